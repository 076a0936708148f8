"""The numbers that define an accelerator: bit width, tiles, kernel groups and parallel factors.

The symbols are those of the KGRC paper (table V): tiles T_M, T_N, T_K, T_D, T_H, T_W, groups
G_M x G_N with G_N = T_N, and parallel factors P_M, P_N = T_N, P_K, P_F.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from pynq_kgrc.errors import ConfigError
from pynq_kgrc.files import written_beside
from pynq_kgrc.graph import Size
from pynq_kgrc.groups import GroupSize
from pynq_kgrc.quant import BITS, ceil_div


@dataclass(frozen=True)
class AcceleratorConfig:
    """One design of the accelerator. Hardware, cost model and programs are made from it.

    Raises:
        ConfigError: the numbers do not describe an accelerator that can be built.
    """

    name: str
    bits: int
    """Width of weights and activations: 16, 8 or 4."""
    sparse: bool
    """Whether the design has index logic (KGR, KGC, KGRC); without, it runs dense layers only."""
    tm: int
    """T_M: filters of a tile."""
    tn: int
    """T_N = G_N = P_N: input channels of a tile, of a kernel group and of a vector."""
    pm: int
    """P_M: rows computed per trip, over all T_M / G_M groups of a tile."""
    pk: int
    """P_K: columns (taps) computed per trip."""
    pf: int
    """P_F: output positions computed per trip."""
    gm: int = 8
    """G_M: filters of a kernel group."""
    tk: int = 9
    """T_K: taps of a tile; a group of a layer with K taps has G_K = min(K, T_K)."""
    td: int = 4
    th: int = 14
    tw: int = 14
    """T_D, T_H, T_W: their product is the largest output tile that the buffers hold."""
    filter_tiles: int = 5
    """Filter tiles whose sums are held at the same time: they share one loading of the input."""
    beat: int = 4
    """Positions of T_N channels in one beat of a map port; `port_positions` is the actual number,
    limited by P_F and by 64-bit words."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits={self.bits} is not a width of this accelerator; use 16, 8, 4")
        for symbol in (
            *("tm", "tn", "pm", "pk", "pf", "gm", "tk", "td", "th", "tw", "filter_tiles", "beat"),
        ):
            if getattr(self, symbol) < 1:
                raise ConfigError(f"{symbol}={getattr(self, symbol)} is not 1 or more")
        if self.gm > 256 or self.tk > 256:
            raise ConfigError(
                f"gm={self.gm}, tk={self.tk}: row and column indices are one byte; use 256 at most"
            )
        if self.tm % self.gm:
            accepted = ", ".join(str(self.gm * i) for i in (1, 2, 3))
            raise ConfigError(
                f"tm={self.tm} is not a multiple of gm={self.gm}; use {accepted}, ..."
            )
        if self.pm % self.groups_per_tile or self.gm % max(1, self.rows_per_cycle):
            raise ConfigError(
                f"pm={self.pm} cannot be divided over the {self.groups_per_tile} groups of a tile "
                f"of {self.tm} filters; use {self.groups_per_tile} times a divisor of gm={self.gm}"
            )
        if self.pk > self.tk:
            raise ConfigError(
                f"pk={self.pk} is more than the tk={self.tk} columns of a tile; use 1 to {self.tk}"
            )
        if self.tm % self.tn:
            raise ConfigError(
                f"tm={self.tm} is not a multiple of tn={self.tn}: outputs are stored "
                f"in vectors of {self.tn} channels; use a multiple of {self.tn}"
            )
        if self.groups_per_tile > 16:
            raise ConfigError(
                f"tm={self.tm} makes {self.groups_per_tile} groups of gm={self.gm}; "
                f"use {16 * self.gm} at most"
            )
        if 64 % (self.tn * self.bits) and self.tn * self.bits % 64:
            raise ConfigError(
                f"tn={self.tn} channels of {self.bits} bits do not fill 64-bit words; "
                f"use a power of two"
            )
        if self.beat & (self.beat - 1):
            raise ConfigError(f"beat={self.beat} is not a power of two; use 2, 4, 8")
        if self.port_positions > self.pf:
            raise ConfigError(
                f"pf={self.pf} is less than the {self.port_positions} positions of "
                f"a beat; use {self.port_positions} or more"
            )

    @property
    def groups_per_tile(self) -> int:
        """T_M / G_M: kernel groups along the filters of a tile."""
        return self.tm // self.gm

    @property
    def rows_per_cycle(self) -> int:
        """P_M * G_M / T_M: rows of one group computed per trip."""
        return self.pm // self.groups_per_tile

    @property
    def group_size(self) -> GroupSize:
        return GroupSize(self.gm, self.tn, self.tk)

    @property
    def tile(self) -> Size:
        return self.td, self.th, self.tw

    @property
    def features(self) -> int:
        """T_F = T_D * T_H * T_W: outputs of the largest tile."""
        return self.td * self.th * self.tw

    @property
    def feature_rows(self) -> int:
        """Depth of a filter's sum banks: T_F sums of the largest tile, P_F side by side."""
        return ceil_div(self.features, self.pf)

    @property
    def region_rows(self) -> int:
        """Depth of the banks of the input buffer, which holds P_F positions at each address."""
        return 1024

    @property
    def input_positions(self) -> int:
        """Positions of a channel that the input buffer holds."""
        return self.region_rows * self.pf

    @property
    def port_positions(self) -> int:
        """B: positions of T_N channels in one beat of a map port; 64 bits at least."""
        power_of_two = 1 << (min(self.beat, self.pf).bit_length() - 1)
        return max(power_of_two, 64 // (self.tn * self.bits))

    @property
    def beat_bytes(self) -> int:
        """Bytes of one beat of a map port."""
        return self.port_positions * self.tn * self.bits // 8

    @property
    def chunk_words(self) -> int:
        """64-bit words of a chunk: one group's rows x P_K x T_N codes for one trip."""
        return ceil_div(self.rows_per_cycle * self.pk * self.tn * self.bits, 64)

    @property
    def weight_port_words(self) -> int:
        """64-bit words in one beat of the weight port; 8 (512 bits) at most."""
        return min(8, self.chunk_words & -self.chunk_words)

    @property
    def index_words(self) -> int:
        """64-bit words of a chunk's indices: a byte for each of P_K columns and of the rows."""
        return ceil_div(self.pk + self.rows_per_cycle, 8) if self.sparse else 0

    def check_kept(self, taps: int, kr: int, kc: int) -> None:
        """Check what each kernel group of a layer keeps: `kr` rows, `kc` columns a tap tile.

        Raises:
            ConfigError: more than a group has, none, or fewer than all on a dense design.
        """
        columns = self.group_size.columns(taps)
        for symbol, kept, of in (("kr", kr, self.gm), ("kc", kc, columns)):
            least = 1 if self.sparse else of
            if not least <= kept <= of:
                raise ConfigError(f"{self.name}: {symbol}={kept} is not within {least} to {of}")

    @property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over all fields but the name: equal for equal hardware."""
        numbers = {key: value for key, value in asdict(self).items() if key != "name"}
        return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


PRESETS = {
    config.name: config
    for config in (
        # KGRC paper, table V: the six published designs
        AcceleratorConfig("16-dense", 16, False, tm=56, tn=4, pm=56, pk=1, pf=8),
        AcceleratorConfig("16-sparse", 16, True, tm=32, tn=8, pm=16, pk=3, pf=4),
        AcceleratorConfig("8-dense", 8, False, tm=48, tn=8, pm=48, pk=1, pf=8),
        AcceleratorConfig("8-sparse", 8, True, tm=32, tn=8, pm=16, pk=3, pf=8),
        AcceleratorConfig("4-dense", 4, False, tm=32, tn=8, pm=32, pk=3, pf=8),
        AcceleratorConfig("4-sparse", 4, True, tm=64, tn=8, pm=32, pk=3, pf=8),
        # our own: the best that `explore` finds for C3D and R(2+1)D-18 with KGRC on each board
        AcceleratorConfig("8-zcu102", 8, True, tm=32, tn=8, pm=16, pk=3, pf=9, beat=8),
        AcceleratorConfig(
            *("8-zcu104", 8, True), tm=24, tn=8, pm=12, pk=3, pf=7, th=7, filter_tiles=6, beat=2
        ),
        AcceleratorConfig(
            *("8-kv260", 8, True), tm=16, tn=8, pm=8, pk=3, pf=3, th=7, filter_tiles=3, beat=2
        ),
    )
}


DEFAULT_DESIGN = "8-sparse"
"""The preset where nothing is said and no overlay is installed. The emulation gives the same codes
for all designs of one width."""


def preset(name: str) -> AcceleratorConfig:
    """The design of that name, such as "8-sparse" (KGRC paper, table V).

    Raises:
        ConfigError: there is no design of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no accelerator named {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


_ACCEPTED = {str: "a string", int: "a whole number", bool: "true or false"}


def read_design(name: str) -> AcceleratorConfig:
    """A design by the name of a preset, or from a .json file that `write_design` wrote.

    Every command and script that takes a design reads it with this function.

    Raises:
        ConfigError: no such preset or file, or the file does not describe an accelerator. The
            message names the file, the field, its value and what is accepted.
    """
    if not name.endswith(".json"):
        try:
            return preset(name)
        except ConfigError as error:
            raise ConfigError(f"{error}; or give a .json file that `explore -o` wrote") from None
    try:
        fields = msgspec.json.decode(Path(name).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(
            f"{name}: cannot be read as a design ({error}); use a file that `explore -o` wrote"
        ) from error
    kinds = get_type_hints(AcceleratorConfig)
    for field, value in fields.items():
        if field not in kinds:
            raise ConfigError(f"{name}: {field!r} is no field of a design; use {', '.join(kinds)}")
        if type(value) is not kinds[field]:
            accepted = _ACCEPTED[kinds[field]]
            raise ConfigError(f"{name}: {field}={value!r} is not accepted; use {accepted}")
    try:
        return msgspec.convert(fields, AcceleratorConfig)
    except (ConfigError, msgspec.ValidationError) as error:
        raise ConfigError(f"{name}: {error}") from error


def write_design(config: AcceleratorConfig, path: Path) -> None:
    """Write a design as a JSON file, atomically: the file is complete or as it was before."""
    with written_beside(path) as beside:
        beside.write_text(json.dumps(asdict(config), indent=2) + "\n", "utf-8")
