"""The backend "board": a program on the accelerator of a PYNQ board.

With PYNQ_KGRC_SIMULATE=1 the board is a simulated one (`simulated.py`); all else is the same.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pynq

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.cost import task_cost
from pynq_kgrc.accelerator.header import (
    ADDRESSES,
    DONE,
    IDLE,
    MAP_PORTS,
    REGISTERS,
    START,
    STATUS,
    TABLE_PORTS,
    register_of,
)
from pynq_kgrc.backends.base import (
    Counters,
    Loaded,
    check_codes,
    check_design,
    check_size,
    reported_counters,
)
from pynq_kgrc.backends.board.kernel import (
    Held,
    KgrcIp,
    KgrcOverlay,
    cma_free,
    device_errors,
    find_device,
    last_cause,
    log,
    quiet,
    waiting_loop,
)
from pynq_kgrc.backends.board.overlays import FoundOverlay, find_overlay
from pynq_kgrc.backends.image import build_image, decode_map, encode_map, map_bytes, slot_beat
from pynq_kgrc.errors import DeviceError, ProgramError
from pynq_kgrc.graph import Size
from pynq_kgrc.program import Program, Slot
from pynq_kgrc.quant import Array, ceil_div

MARGIN = 20.0
"""How often a run may take what is modelled: the model knows no memory that stalls."""

FLOOR_SECONDS = 1.0
"""What a run may take beside that, for a host that is busy."""

MIB = 1 << 20

CHECKED = ("macs", "input_beats", "shortcut_beats", "output_beats", "weight_beats", "table_words")
"""What the kernel counts and the cost model knows exactly."""


class Board(Loaded):
    """The accelerator `config` on a board with PYNQ; a context manager.

    One start runs all tasks that are asked for. A run that fails leaves the device programmed
    again, and the next `write` or `load` restores the program; until then results are refused.

    Args:
        config: the design; the overlay has to be of this one.
        overlay: where it lies; else KGRC_OVERLAY, else the folder `overlays`.
        device: a pynq.Device; else the simulated one or pynq's own choice.
        download: program the device; without, attach to what is loaded.
        margin: limit of a run, in times what is modelled.
        floor_seconds: added to the limit.
        cacheable: ask pynq for cached buffers; flushed and invalidated either way.

    Raises:
        DeviceError: no device, no overlay, or not the one that it should be; says what to do.
    """

    name = "board"
    exclusive = True

    def __init__(
        self,
        config: AcceleratorConfig,
        overlay: Path | None = None,
        *,
        device: Any = None,
        download: bool = True,
        margin: float = MARGIN,
        floor_seconds: float = FLOOR_SECONDS,
        cacheable: bool = False,
    ) -> None:
        self.config = config
        self._device = find_device() if device is None else device
        self._margin, self._floor, self._cacheable = margin, floor_seconds, cacheable
        supply = getattr(self._device, "supply_overlay", None)
        if supply is not None and overlay is None:
            overlay = supply(config)
        self._found: FoundOverlay = find_overlay(config, overlay)
        self._broken: str | None = None
        self._lost: str | None = None
        self._stale = False
        self._interrupts = False
        self._addresses: dict[str, int] = {}
        self._held = Held(self._device)
        self._release = weakref.finalize(self, Held.release, self._held)
        try:
            self._open(download)
        except BaseException:
            self._release()
            raise

    # ---- the device -------------------------------------------------------------------------

    def _open(self, download: bool) -> None:
        found = self._found
        try:
            with quiet():
                self._held.overlay = KgrcOverlay(
                    str(found.bit), download=download, device=self._device
                )
        except DeviceError:
            raise
        except Exception as error:
            raise DeviceError(f"{found.bit} cannot be loaded: {last_cause(error)}") from error
        self._connect("program it again: open it with download=True")

    @property
    def _overlay(self) -> KgrcOverlay:
        overlay = self._held.overlay
        if overlay is None:
            raise DeviceError("the board is closed; open it again")
        return overlay

    def _connect(self, busy_cure: str) -> None:
        """Bind the kernel and make sure that it is what the manifest says."""
        manifest = self._found.manifest
        self._ip = self._bind()
        control = self._ip.get("CTRL")
        if not control & IDLE:
            raise DeviceError(
                f"the kernel is not idle (CTRL={control:#x}): an earlier run was left behind; "
                f"{busy_cure}"
            )
        clock = float(getattr(pynq.Clocks, f"fclk{manifest.pl_clock}_mhz"))
        if abs(clock - manifest.clock_mhz) > 0.01 * manifest.clock_mhz:
            raise DeviceError(
                f"the clock reads back as {clock:.6g} MHz, the overlay is built for "
                f"{manifest.clock_mhz:.6g}; set the frequency of pl_clk{manifest.pl_clock} in the "
                f"block design so, and copy the new kgrc.hwh"
            )
        self._clock_hz = clock * 1e6
        if self._interrupts:
            self._ip.enable_interrupt()
        # nothing to do: the kernel only says which design it is
        self._held.running = True
        self._ip.start(0, 0)
        if not self._wait(self._floor, 0.0):
            registers = self._dump()
            raise DeviceError(f"the kernel does not answer within {self._floor} s; {registers}")
        self._held.running = False
        self._check_digest()

    def describe(self) -> str:
        """What the device said of itself, in a line."""
        waits = "interrupt" if self._interrupts else "no interrupt, polled"
        return (
            f"{self.config.name} (digest {self._ip.digest()}) at {self._clock_hz / 1e6:.6g} MHz, "
            f"{waits}"
        )

    def _bind(self) -> KgrcIp:
        """The kernel's driver, its interrupt bound to our loop where the overlay has one."""

        async def bind() -> KgrcIp:
            return self._overlay.bind()

        with quiet():
            loop = waiting_loop()
            kernel = self._overlay.bind() if loop is None else loop.run_until_complete(bind())
        self._interrupts = loop is not None and getattr(kernel, "interrupt", None) is not None
        return kernel

    def _check_digest(self) -> None:
        digest = self._ip.digest()
        if digest != self.config.digest:
            changed = self._changed()
            if changed:
                raise DeviceError(f"the device was re-programmed or reset while it ran: {changed}")
            raise DeviceError(
                f"the device is of the design {digest}, not {self.config.name} "
                f"({self.config.digest}); use the overlay of this design, or compile for the "
                f"device's"
            )

    # ---- the program ------------------------------------------------------------------------

    def load(self, program: Program) -> None:
        """Allocate the buffers, write weights and tables. A second call replaces the first.

        Raises:
            ProgramError: a program for another design or of another format; the loaded one stays.
            DeviceError: not enough contiguous memory, or no device; none is loaded then.
        """
        check_design(program, self.config)
        version = self._found.manifest.program_version
        if program.version != version:
            raise ProgramError(
                f"{program.name} is of format version {program.version}, the overlay reads "
                f"{version}; compile it again, or use a newer overlay"
            )
        image = build_image(program)
        costs = [task_cost(self.config, program.work(task)) for task in program.tasks]
        self._restore_device()
        self._program = None
        needs = {
            "maps": ceil_div(program.arena_bytes, 64) * 64 + 64,
            "weights": image.weights.nbytes,
            "tables": image.tables.nbytes,
            "status": len(program.tasks) * len(STATUS) * 8,
        }
        self._allocate(needs)
        self._modelled = np.array([cost.cycles for cost in costs], np.float64)
        self._counted = np.array([[getattr(c, n) for n in CHECKED] for c in costs], np.uint64)
        self._program = program
        self._fill(image.weights, image.tables)

    def _allocate(self, needs: dict[str, int]) -> None:
        """Buffers of at least those bytes; what is large enough stays."""
        held, total = self._held, sum(needs.values())
        free = cma_free(self._device)
        parts = ", ".join(f"{name} {size / MIB:.1f}" for name, size in needs.items())
        left = "unknown" if free is None else f"{free / MIB:.1f}"
        log.info("contiguous memory: %.1f MiB needed (%s), %s MiB free", total / MIB, parts, left)
        held.free(needs)
        try:
            for name, size in needs.items():
                if name not in held.buffers:
                    held.buffers[name] = pynq.allocate(
                        (size // 8,), np.uint64, target=self._device, cacheable=self._cacheable
                    )
        except Exception as error:
            held.free()
            raise DeviceError(
                f"not enough contiguous memory (CMA): {total / MIB:.1f} MiB are needed ({parts}), "
                f"{left} MiB were free: {last_cause(error)}. Close other sessions and overlays, "
                f"boot with a larger pool (kernel argument cma=512M), or compile for a design "
                f"of fewer bits or a smaller clip"
            ) from error

    def _fill(self, weights: Array, tables: Array) -> None:
        """Write everything that the program needs on a device that is connected."""
        buffers = self._held.buffers
        for buffer in buffers.values():
            buffer[:] = 0
        buffers["weights"][: weights.size] = weights
        buffers["tables"][: tables.size] = tables
        for buffer in buffers.values():
            buffer.flush()
        self._stale = False
        place = dict.fromkeys(MAP_PORTS, "maps") | dict.fromkeys(TABLE_PORTS, "tables")
        self._addresses = {}
        for port in ADDRESSES:
            address = int(buffers[place.get(port, port)].device_address)
            self._addresses[f"{register_of(port)}_1"] = address & 0xFFFFFFFF
            self._addresses[f"{register_of(port)}_2"] = address >> 32
        self._ip.place(self._addresses)

    def _restore_device(self) -> None:
        """After a failure: the device as it was after opening.

        Raises:
            DeviceError: it still does not answer; says why it was stopped.
        """
        overlay = self._overlay
        if self._broken is None:
            return
        try:
            with quiet():
                self._held.running = False
                overlay.download()
            self._connect("turn the board off and on")
        except Exception as error:
            raise DeviceError(
                f"the device does not come back after: {self._broken}. {last_cause(error)}"
            ) from error
        self._broken = None

    # ---- maps -------------------------------------------------------------------------------

    def write(self, slot: Slot, codes: Array) -> None:
        """Codes [C, D, H, W] into a slot.

        Raises:
            ProgramError: nothing is loaded, or codes of another type or shape.
            DeviceError: an earlier failure cannot be repaired.
        """
        program = self.program
        check_codes(program, slot, codes)
        start = slot_beat(program, slot, "write") * self.config.beat_bytes
        raw = encode_map(self.config, codes, program.buffers[slot.buffer].bits)
        if self._broken is not None:
            self._restore_device()
            image = build_image(program)
            self._fill(image.weights, image.tables)
        with device_errors("write"):
            maps = self._fresh_maps()
            maps[start : start + raw.size] = raw
            self._held.buffers["maps"].flush()
        self._lost = None

    def read(self, slot: Slot, channels: int, size: Size) -> Array:
        """The codes [C, D, H, W] of a slot.

        Raises:
            ProgramError: nothing is loaded, or maps of another size.
            DeviceError: the last run failed.
        """
        program = self.program
        check_size(program, slot, size)
        self._refuse_lost()
        bits = program.buffers[slot.buffer].bits
        start = slot_beat(program, slot, "read") * self.config.beat_bytes
        with device_errors("read"):
            raw = self._fresh_maps()[start : start + map_bytes(self.config, channels, size, bits)]
        return decode_map(self.config, raw, channels, size, bits)

    def _fresh_maps(self) -> Array:
        """The host's copy of the maps, up to date.

        Since pynq 3.1 a flush writes the whole buffer: stale parts would undo what the device did.
        """
        maps = self._held.buffers["maps"]
        if self._stale:
            maps.invalidate()
            self._stale = False
        plain: Array = np.asarray(maps).view(np.uint8)
        return plain

    def _refuse_lost(self) -> None:
        if self._lost is not None:
            raise DeviceError(f"there is no result; write the clip again after: {self._lost}")

    # ---- running ----------------------------------------------------------------------------

    def run(self, first: int = 0, last: int | None = None) -> list[Counters]:
        """Run the tasks [first, last) in one start.

        Seconds are those of the whole start, shared out by the cycles that each task reports.

        Raises:
            ProgramError: nothing is loaded, or the range is not within the program.
            DeviceError: it did not finish in time, or not as it should; names the task. The maps
                are lost then, and the device is programmed again.
        """
        first, last = self.task_range(first, last)
        if first == last:
            return []
        self._refuse_lost()
        try:
            with device_errors("run"):
                return self._run(first, last)
        except BaseException as error:
            self._give_up(error)
            raise

    def _run(self, first: int, last: int) -> list[Counters]:
        buffers, tasks = self._held.buffers, self.program.tasks
        self._check_ready()
        # as plain numpy: what is computed from pynq's arrays believes to be a buffer itself
        status = np.asarray(buffers["status"])
        status = status[: len(tasks) * len(STATUS)].reshape(-1, len(STATUS))
        status[first:last] = 0
        buffers["status"].flush()
        modelled = float(self._modelled[first:last].sum()) / self._clock_hz
        limit = self._margin * modelled + self._floor
        began = time.perf_counter()
        self._held.running = self._stale = True
        self._ip.start(first, last - first)
        finished = self._wait(limit, modelled)
        seconds = time.perf_counter() - began
        if not finished:
            raise DeviceError(self._explain(first, last, limit, modelled))
        self._held.running = False
        buffers["status"].invalidate()
        self._check_digest()
        self._check_status(status, first, last)
        cycles = status[first:last, STATUS.index("array")]
        shares = cycles / max(1, int(cycles.sum())) * seconds
        names = [task.name for task in tasks[first:last]]
        return reported_counters(self.config, names, status[first:last], shares)

    def _check_ready(self) -> None:
        """Refuse to start on a device that is no longer ours."""
        if not self._overlay.is_loaded():
            raise DeviceError(
                "the device was re-programmed: this process loaded another overlay; use one at "
                "a time"
            )
        control = self._ip.get("CTRL")
        changed = self._changed()
        if changed:
            raise DeviceError(
                f"the device was re-programmed or reset since the program was loaded: {changed}"
            )
        if not control & IDLE:
            raise DeviceError(f"the kernel is busy (CTRL={control:#x}) with a run that is not ours")

    def _changed(self) -> str:
        """Registers of addresses that do not hold what was written, in words."""
        found = [
            f"{name} reads {value:#x}, not {wanted:#x}"
            for name, wanted in self._addresses.items()
            if (value := self._ip.get(name)) != wanted
        ]
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        return ", ".join(found[:2]) + more

    def _check_status(self, status: Array, first: int, last: int) -> None:
        """Every task has to be done, and to have done what the cost model says."""
        for number in np.flatnonzero(status[first:last, 0] != 1) + first:
            raise DeviceError(
                f"the kernel ended but {self._task(int(number))} reports "
                f"{int(status[number, 0]):#x} where 1 is done; the device was reset, or fails"
            )
        places = [STATUS.index(name) for name in CHECKED]
        differing = np.argwhere(status[first:last, places] != self._counted[first:last])
        for row, column in differing:
            number = first + int(row)
            raise DeviceError(
                f"{self._task(number)} counted {int(status[number, places[column]])} "
                f"{CHECKED[column]} where {int(self._counted[number, column])} are due"
            )

    def _task(self, number: int) -> str:
        return f"task {self.program.tasks[number].name} ({number + 1} of {len(self._modelled)})"

    def _give_up(self, error: BaseException) -> None:
        """After a failed run: stop the device now; restore the program when it is next needed."""
        self._broken = self._lost = str(error) or type(error).__name__
        self._interrupts = False
        try:
            self._held.stop()
        except Exception as worse:
            log.warning("the device cannot be programmed again: %s", last_cause(worse))

    def _explain(self, first: int, last: int, limit: float, modelled: float) -> str:
        """Why a run did not finish, as far as can be seen from here."""
        changed, registers = self._changed(), self._dump()
        late = f"no end after {limit:.3g} s, {1e3 * modelled:.3g} ms modelled"
        if changed:
            # a reset clears them all; the length of time is of no interest then
            if all(self._ip.get(name) == 0 for name in self._addresses):
                what = "the device was reset, re-programmed or without power while it ran"
            else:
                what = f"bus decode error: the kernel reads outside its buffers, as {changed}"
            return f"{what} ({late}); {registers}"
        buffers = self._held.buffers
        buffers["status"].invalidate()
        done = np.asarray(buffers["status"])[:: len(STATUS)]
        open_tasks = [number for number in range(first, last) if done[number] != 1]
        name = self._task(open_tasks[0]) if open_tasks else "nothing"
        tables = build_image(self.program).tables
        buffers["tables"].invalidate()
        if not np.array_equal(np.asarray(buffers["tables"])[: tables.size], tables):
            what = "bus decode error, or worse: its tables in memory are not those written"
            return f"{name} did not finish; {what} ({late}); {registers}"
        return f"{name} did not finish ({late}); {registers}"

    def _dump(self) -> str:
        """All registers, for the text of an error."""
        return "registers " + " ".join(f"{name}={self._ip.get(name):#x}" for name in REGISTERS)

    def _wait(self, limit: float, modelled: float) -> bool:
        """Wait for the end of a run; false after `limit` seconds."""
        began = time.monotonic()
        pause, patience = 20e-6, max(5e-3, 2 * modelled)
        missed = False
        while True:
            # the time is taken first: whoever slept too long still gets one look
            passed = time.monotonic() - began
            control = self._ip.get("CTRL")
            if control & DONE or (control & IDLE and not control & START):
                # it may be on its way: the run can end between a wait and this look
                loop = waiting_loop() if missed else None
                if loop is not None and not self._wait_interrupt(loop, 5e-3):
                    log.warning("an interrupt was lost; polling from here on")
                    self._interrupts = False
                return True
            if passed > limit:
                return False
            if self._interrupts and (loop := waiting_loop()) is not None:
                missed = not self._wait_interrupt(loop, min(patience, limit - passed + 1e-3))
                patience *= 2
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, 1e-3)

    def _wait_interrupt(self, loop: asyncio.AbstractEventLoop, seconds: float) -> bool:
        """Whether the interrupt came within that time; then it is taken back."""

        async def wait() -> bool:
            try:
                await asyncio.wait_for(self._ip.interrupt.wait(), seconds)
            except asyncio.TimeoutError:
                return False
            return True

        came = loop.run_until_complete(wait())
        if came:
            self._ip.settle_interrupt()
        return came

    def close(self) -> None:
        """Give the device back: stop it if it runs, free its memory, release its lock."""
        self._program = None
        self._release()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
