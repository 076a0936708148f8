"""The backend "board": a program on the accelerator of a PYNQ board.

With PYNQ_KGRC_SIMULATE=1 the board is the simulated one (`simulated.py`); nothing else differs.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pynq

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import (
    ADDRESSES,
    DONE,
    IDLE,
    IMAGE_VERSION,
    MAP_PORTS,
    REGISTERS,
    START,
    STATUS,
    TABLE_PORTS,
    WEIGHT_PORTS,
    register_of,
)
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.backends.base import (
    Counters,
    Loaded,
    PackedMap,
    check_design,
    check_size,
    locked,
    reported_counters,
)
from pynq_kgrc.backends.board.device import (
    DeviceResources,
    check_board,
    device_errors,
    error_text,
    find_device,
    interrupt_loop,
    run_in,
    warnings_ignored,
)
from pynq_kgrc.backends.board.kernel import KgrcIp, KgrcOverlay, check_bitstream
from pynq_kgrc.backends.board.overlays import FoundOverlay, find_overlay
from pynq_kgrc.backends.image import (
    Image,
    build_image,
    decode_map,
    map_bytes,
    pack_map,
    packed_map,
    slot_beat,
)
from pynq_kgrc.errors import DeviceError, ProgramError
from pynq_kgrc.graph import Size
from pynq_kgrc.program import Program, Slot
from pynq_kgrc.quant import Array, ceil_div

MARGIN = 20.0
"""Timeout = 20 x the time that is modelled with memory + FLOOR_SECONDS."""

FLOOR_SECONDS = 1.0
"""Added to every timeout, for a busy host."""

SLOW = 1.5
"""A run of more than SLOW times the modelled clock cycles is logged."""

CHECKED = (
    *("macs", "input_beats", "shortcut_beats", "output_beats", "weight_beats", "table_words"),
    *("input_requests", "shortcut_requests", "output_requests", "weight_requests"),
)
"""The counts in a task's status that must equal the cost model's exactly."""

log = logging.getLogger(__name__)


class BoardBackend(Loaded):
    """The accelerator `config` on a PYNQ board; a context manager.

    `run` starts the kernel once for all its tasks. After a failed run the device is programmed
    again at once and the maps are lost: `read` and `run` raise until `write` or `load` has
    restored them.

    Args:
        config: the design; the overlay must be of the same digest.
        overlay: the overlay's place (see `find_overlay`); default KGRC_OVERLAY, else `overlays`.
        device: a pynq.Device; default the simulated one if requested, else pynq's active device.
        download: program the device, unless an earlier backend of this process left it programmed
            with the same overlay, idle and unharmed; if false, attach to the bitstream that is
            already loaded, whoever loaded it.
        margin: the timeout of a run is `margin` x its modelled time + `floor_seconds`.
        floor_seconds: see `margin`; also the timeout of the check at the beginning.
        cacheable: request cached buffers from pynq. The driver flushes and invalidates always.

    Raises:
        DeviceError: no device, no overlay, or either is not what it should be; says what to do.
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
        super().__init__()
        self.config = config
        self._margin, self._floor, self._cacheable = margin, floor_seconds, cacheable
        with device_errors("open"):
            self._device = find_device() if device is None else device
            supply = getattr(self._device, "supply_overlay", None)
            if supply is not None and overlay is None:
                overlay = supply(config)
            self._found_overlay: FoundOverlay = find_overlay(config, overlay)
            check_board(self._device, self._found_overlay.manifest.board)
        self._maps_stale = False
        """Whether the device may have written maps that the host has not invalidated yet."""
        self._interrupts = False
        self._addresses: dict[str, int] = {}
        """The values of the address registers of the loaded program, by register."""
        self._resources = DeviceResources(self._device)
        self._release = weakref.finalize(self, DeviceResources.release, self._resources)
        try:
            with device_errors("open"):
                self._resources.acquire()
                self._load_overlay(download)
        except BaseException:
            self._release()
            raise

    # ---- the device -------------------------------------------------------------------------

    def _load_overlay(self, download: bool) -> None:
        resources, found = self._resources, self._found_overlay
        resources.found, bit = found, str(found.bit)
        if download and (left := resources.left_overlay(found)) is not None:
            resources.overlay = left
            try:
                self._connect(busy_cure="it is programmed again")
            except Exception as error:
                log.info("the overlay that is loaded is not used: %s", error_text(error))
                resources.running = False  # programming it stops it
            else:
                resources.failure = None
                return
        cure = "program it: open it with download=True"
        if not download:
            check_bitstream(self._device, bit, f"the device cannot be used as it is ({cure}): ")
        try:
            with warnings_ignored():
                resources.overlay = KgrcOverlay(bit, download=download, device=self._device)
        except DeviceError:
            raise
        except Exception as error:
            raise DeviceError(f"{bit} cannot be loaded: {error_text(error)}") from error
        self._connect(busy_cure=cure)
        resources.failure = None

    @property
    def _overlay(self) -> KgrcOverlay:
        overlay = self._resources.overlay
        if overlay is None:
            raise DeviceError("the board is closed; open it again")
        return overlay

    def _connect(self, busy_cure: str) -> None:
        """Bind the kernel's driver; check that kernel, clock and design are the manifest's."""
        manifest = self._found_overlay.manifest
        self._ip = self._bind_kernel()
        control = self._ip.get("CTRL")
        if not control & IDLE:
            raise DeviceError(
                f"the kernel is not idle (CTRL={control:#x}): an earlier run was left behind; "
                f"{busy_cure}"
            )
        self._check_clock("memory ports", manifest.port_pl_clock, manifest.port_clock_mhz)
        self._clock_hz = 1e6 * self._check_clock("kernel", manifest.pl_clock, manifest.clock_mhz)
        if self._interrupts:
            self._ip.enable_interrupt()
        # A start with no tasks makes the kernel report the digest of its design.
        self._resources.running = True
        self._ip.start(0, 0)
        if not self._wait_until_done(self._floor, 0.0):
            registers = self._register_dump()
            raise DeviceError(f"the kernel does not answer within {self._floor} s; {registers}")
        self._resources.running = False
        self._check_digest()

    def _check_clock(self, of: str, number: int, built_mhz: float) -> float:
        """The frequency in MHz that a PL clock reads back as; raises if it is another."""
        clock = float(getattr(pynq.Clocks, f"fclk{number}_mhz"))
        if abs(clock - built_mhz) > 0.01 * built_mhz:
            raise DeviceError(
                f"the clock of the {of} reads back as {clock:.6g} MHz, but the overlay is built "
                f"for {built_mhz:.6g} MHz; set that frequency of pl_clk{number} in the block "
                f"design, and copy the new kgrc.hwh"
            )
        return clock

    @property
    def clock_mhz(self) -> float:
        """The clock of the kernel, as the board reads it back."""
        return self._clock_hz / 1e6

    def describe(self) -> str:
        """The design, digest and clock that the device reported, and how runs are awaited."""
        waits = "interrupt" if self._interrupts else "no interrupt, polled"
        return (
            f"{self.config.name} (digest {self.config.digest}) at {self._clock_hz / 1e6:.6g} MHz, "
            f"{waits}"
        )

    def _bind_kernel(self) -> KgrcIp:
        """The kernel's driver; its interrupt, if it has one, is bound to `interrupt_loop`."""

        async def bind() -> KgrcIp:
            return self._overlay.bind()

        with warnings_ignored():
            loop = interrupt_loop()
            kernel = self._overlay.bind() if loop is None else run_in(loop, bind())
        self._interrupts = loop is not None and getattr(kernel, "interrupt", None) is not None
        return kernel

    def _check_digest(self) -> None:
        digest = self._ip.digest()
        if digest != self.config.digest:
            changed = self._changed_addresses()
            if changed:
                raise DeviceError(f"the device was re-programmed or reset while it ran: {changed}")
            raise DeviceError(
                f"the device is of the design {digest}, not {self.config.name} "
                f"({self.config.digest}); use the overlay of this design, or compile for the "
                f"device's"
            )

    # ---- the program ------------------------------------------------------------------------

    @locked
    def load(self, program: Program) -> None:
        """Allocate the buffers, write weights and tables. A second call replaces the program.

        Raises:
            ProgramError: the program is for another design, or the overlay reads another version of
                the memory image; the program loaded before stays.
            DeviceError: too little contiguous memory, or the device fails; no program is loaded
                then.
        """
        before, self._program = self._program, None  # until the last byte of the new one is written
        try:
            image = self._checked_image(program)
        except ProgramError:
            self._program = before
            raise
        times = [task_time(self.config, program.work(task)) for task in program.tasks]
        resources = self._resources
        with device_errors("load"):
            if resources.failure is not None:
                self._restore_device()
            resources.failure = "a load that did not end"
            self._overlay.check_device()
            # no start may find the addresses of buffers that are freed now
            self._put_addresses(dict.fromkeys(ADDRESSES, 0))
            sizes = {
                "maps": ceil_div(program.arena_bytes, 64) * 64 + 64,
                "weights": image.weights.nbytes,
                "tables": image.tables.nbytes,
                "status": len(program.tasks) * len(STATUS) * 8,
            }
            resources.allocate(sizes, self._cacheable)
            self._modelled_cycles = np.array([time.cycles for time in times], np.float64)
            self._modelled_counts = np.array(
                [[getattr(time.cost, name) for name in CHECKED] for time in times], np.uint64
            )
            self._write_image(image.weights, image.tables)
        resources.failure = None
        self._program = program

    def _checked_image(self, program: Program) -> Image:
        check_design(program, self.config)
        version = self._found_overlay.manifest.program_version
        if version != IMAGE_VERSION:
            raise ProgramError(
                f"{program.name} becomes a memory image of version {IMAGE_VERSION}, the overlay "
                f"reads version {version}; use an overlay that was built for this release"
            )
        return build_image(program)

    def _write_image(self, weights: Array, tables: Array) -> None:
        """Write weights, tables and the address registers; clear maps and status."""
        buffers = self._resources.buffers
        for buffer in buffers.values():
            buffer[:] = 0
        buffers["weights"][: weights.size] = weights
        buffers["tables"][: tables.size] = tables
        for buffer in buffers.values():
            buffer.flush()
        self._maps_stale = False
        buffer_of = dict.fromkeys(MAP_PORTS, "maps") | dict.fromkeys(WEIGHT_PORTS, "weights")
        buffer_of |= dict.fromkeys(TABLE_PORTS, "tables")
        self._put_addresses(
            {p: int(buffers[buffer_of.get(p, p)].device_address) for p in ADDRESSES}
        )

    def _put_addresses(self, address_of: dict[str, int]) -> None:
        """Write the address registers; from port to address."""
        self._addresses = {}
        for port, address in address_of.items():
            self._addresses[f"{register_of(port)}_1"] = address & 0xFFFFFFFF
            self._addresses[f"{register_of(port)}_2"] = address >> 32
        for name, value in self._addresses.items():
            self._ip.put(name, value)

    def _restore_device(self) -> None:
        """After a failure, bring the device to the state that it had after opening.

        Raises:
            DeviceError: it still does not answer; the message contains the first failure.
        """
        overlay, self._addresses = self._overlay, {}
        try:
            with warnings_ignored():
                overlay.download()
            self._resources.running = False
            self._connect(busy_cure="turn the board off and on")
        except Exception as error:
            raise DeviceError(
                f"the device does not come back after: {self._resources.failure}. "
                f"{error_text(error)}"
            ) from error

    # ---- maps -------------------------------------------------------------------------------

    def pack(self, program: Program, slot: Slot, codes: Array) -> PackedMap:
        """The codes [C, D, H, W] of a map as the bytes that `write` copies; the device is not used.

        Raises:
            ProgramError: the program is for another design, or the codes have another shape.
        """
        return pack_map(self.config, program, slot, codes)

    @locked
    def write(self, slot: Slot, codes: Array | PackedMap) -> None:
        """Write the codes [C, D, H, W] of a map, packed or not, into a slot; they are copied.

        After a failed run this first restores the device and the program.

        Raises:
            ProgramError: no program is loaded, the codes have another type or shape, or they are
                packed for another program or slot.
            DeviceError: the device cannot be restored, or fails.
        """
        program = self.program
        packed = packed_map(program, slot, codes)
        self._maps_lost = "a write that did not end"
        with device_errors("write"):
            if self._resources.failure is not None:
                self._restore_device()
                image = build_image(program)
                self._write_image(image.weights, image.tables)
                self._resources.failure = None
            maps = self._host_maps()
            maps[packed.start : packed.start + packed.raw.size] = packed.raw
            self._resources.buffers["maps"].flush()
        self._maps_lost = None

    @locked
    def read(self, slot: Slot, channels: int, size: Size) -> Array:
        """A copy of the codes [C, D, H, W] in a slot.

        Raises:
            ProgramError: no program is loaded, or the slot holds maps of another size.
            DeviceError: the last run failed, or the device fails.
        """
        program = self.program
        check_size(program, slot, size)
        self.check_maps()
        bits = program.buffers[slot.buffer].bits
        start = slot_beat(program, slot, "read") * self.config.beat_bytes
        with device_errors("read"):
            raw = self._host_maps()[start : start + map_bytes(self.config, channels, size, bits)]
        return decode_map(self.config, raw, channels, size, bits)

    def _host_maps(self) -> Array:
        """The host's view of the maps as bytes, invalidated after a run.

        Since pynq 3.1 a flush writes back the whole buffer, so stale parts of the host's view
        would overwrite what the device has written.
        """
        maps = self._resources.buffers["maps"]
        if self._maps_stale:
            maps.invalidate()
            self._maps_stale = False
        plain: Array = np.asarray(maps).view(np.uint8)
        return plain

    # ---- running ----------------------------------------------------------------------------

    @locked
    def run(self, first: int = 0, last: int | None = None) -> list[Counters]:
        """Run the tasks [first, last) in one start of the kernel.

        The time of the whole start is measured; each task's `seconds` are its share of it by
        the clock cycles that the kernel counted, or by its trips where it counted none. A run of
        more than SLOW times the modelled clock cycles is logged as a warning.

        Raises:
            ProgramError: no program is loaded, or the range is not within it (`task_range`).
            DeviceError: a timeout, a wrong status or counts that differ from the cost model;
                names the task. The maps are lost and the device is programmed again.
        """
        first, last = self.task_range(first, last)
        if first == last:
            return []
        self.check_maps()
        self._resources.failure = self._maps_lost = "a run that did not end"
        try:
            with device_errors("run"):
                counters = self._run_tasks(first, last)
        except BaseException as error:
            self._stop_after_failure(error)
            raise
        self._resources.failure = self._maps_lost = None
        return counters

    def _run_tasks(self, first: int, last: int) -> list[Counters]:
        buffers, tasks = self._resources.buffers, self.program.tasks
        self._check_ready()
        # A plain numpy view: results computed from a PynqBuffer would claim to be PynqBuffers.
        status = np.asarray(buffers["status"])
        status = status[: len(tasks) * len(STATUS)].reshape(-1, len(STATUS))
        status[first:last] = 0
        buffers["status"].flush()
        modelled = float(self._modelled_cycles[first:last].sum()) / self._clock_hz
        limit = self._margin * modelled + self._floor
        began = time.perf_counter()
        self._resources.running = self._maps_stale = True
        self._ip.start(first, last - first)
        finished = self._wait_until_done(limit, modelled)
        seconds = time.perf_counter() - began
        if not finished:
            raise DeviceError(self._timeout_message(first, last, limit, modelled))
        self._resources.running = False
        buffers["status"].invalidate()
        self._check_digest()
        self._check_status(status, first, last)
        clocks = status[first:last, STATUS.index("clocks")]
        counted = clocks if clocks.all() else status[first:last, STATUS.index("array")]
        shares = counted / max(1, int(counted.sum())) * seconds
        names = [task.name for task in tasks[first:last]]
        self._warn_if_slow(clocks, first, last)
        return reported_counters(self.config, names, status[first:last], shares)

    def _check_ready(self) -> None:
        """Raise if the device no longer holds our overlay and program, or is busy."""
        self._overlay.check_device()
        control = self._ip.get("CTRL")
        changed = self._changed_addresses()
        if changed:
            raise DeviceError(
                f"the device was re-programmed or reset since the program was loaded: {changed}"
            )
        if not control & IDLE:
            raise DeviceError(
                f"the kernel is busy (CTRL={control:#x}) with a run that this process did not start"
            )

    def _changed_addresses(self) -> str:
        """The address registers that no longer hold what was written, as text; "" if none."""
        found = [
            f"{name} reads {value:#x}, not {wanted:#x}"
            for name, wanted in self._addresses.items()
            if (value := self._ip.get(name)) != wanted
        ]
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        return ", ".join(found[:2]) + more

    def _check_status(self, status: Array, first: int, last: int) -> None:
        """Raise unless every task reports done, and the counts of the cost model."""
        for number in np.flatnonzero(status[first:last, 0] != 1) + first:
            raise DeviceError(
                f"the kernel ended but {self._task_text(int(number))} reports "
                f"{int(status[number, 0]):#x} instead of 1 (done); the device was reset, or fails"
            )
        places = [STATUS.index(name) for name in CHECKED]
        differing = np.argwhere(status[first:last, places] != self._modelled_counts[first:last])
        for row, column in differing:
            number = first + int(row)
            raise DeviceError(
                f"{self._task_text(number)} counted {int(status[number, places[column]])} "
                f"{CHECKED[column]}; the cost model says "
                f"{int(self._modelled_counts[number, column])}"
            )

    def _warn_if_slow(self, clocks: Array, first: int, last: int) -> None:
        modelled = self._modelled_cycles[first:last]
        if clocks.sum() > SLOW * modelled.sum():
            worst = int(np.argmax(clocks / modelled))
            log.warning(
                "the kernel took %d clock cycles, %.3g times the modelled %d; worst is %s, %.3g "
                "times. Its loops reach another II, or memory is slower, than the model assumes",
                clocks.sum(),
                clocks.sum() / modelled.sum(),
                modelled.sum(),
                self._task_text(first + worst),
                clocks[worst] / modelled[worst],
            )

    def _task_text(self, number: int) -> str:
        tasks = self.program.tasks
        return f"task {tasks[number].name} ({number + 1} of {len(tasks)})"

    def _stop_after_failure(self, error: BaseException) -> None:
        """Stop the device now; `write` or `load` restores the program when it is next needed."""
        self._resources.failure = self._maps_lost = str(error) or type(error).__name__
        self._interrupts = False
        try:
            self._resources.stop()
        except Exception as worse:
            log.warning("the device cannot be programmed again: %s", error_text(worse))

    def _timeout_message(self, first: int, last: int, limit: float, modelled: float) -> str:
        """Why a run did not finish, as far as registers and memory show it."""
        changed, registers = self._changed_addresses(), self._register_dump()
        late = f"no end after {limit:.3g} s, {1e3 * modelled:.3g} ms modelled"
        if changed:
            # A reset clears all address registers; a lost write changes only some.
            if all(self._ip.get(name) == 0 for name in self._addresses):
                what = "the device was reset, re-programmed or without power while it ran"
            else:
                what = (
                    f"bus decode error: the kernel accesses memory outside its buffers; {changed}"
                )
            return f"{what} ({late}); {registers}"
        buffers = self._resources.buffers
        buffers["status"].invalidate()
        done = np.asarray(buffers["status"])[:: len(STATUS)]
        open_tasks = [number for number in range(first, last) if done[number] != 1]
        what = self._task_text(open_tasks[0]) if open_tasks else "the kernel, its tasks done,"
        what += " did not finish"
        tables = build_image(self.program).tables
        buffers["tables"].invalidate()
        if not np.array_equal(np.asarray(buffers["tables"])[: tables.size], tables):
            what += "; probably a bus decode error: the tables in memory are not those written"
        return f"{what} ({late}); {registers}"

    def _register_dump(self) -> str:
        """All registers, for an error message."""
        return "registers " + " ".join(f"{name}={self._ip.get(name):#x}" for name in REGISTERS)

    def _wait_until_done(self, limit: float, modelled: float) -> bool:
        """Wait until the kernel is done; False after `limit` seconds.

        Waits for the interrupt if there is one, else polls with exponential backoff.
        """
        began = time.monotonic()
        pause, patience = 20e-6, max(5e-3, 2 * modelled)
        timed_out = False
        while True:
            # The time is taken before CTRL is read: after a long sleep CTRL is still read once.
            passed = time.monotonic() - began
            control = self._ip.get("CTRL")
            if control & DONE or (control & IDLE and not control & START):
                # Done although the last wait timed out: the interrupt was lost, unless the run
                # ended between that wait and this read and the interrupt is about to arrive.
                loop = interrupt_loop() if timed_out else None
                if loop is not None and not self._wait_interrupt(loop, 5e-3):
                    log.warning("an interrupt was lost; polling from here on")
                    self._interrupts = False
                return True
            if passed > limit:
                return False
            if self._interrupts and (loop := interrupt_loop()) is not None:
                timed_out = not self._wait_interrupt(loop, min(patience, limit - passed + 1e-3))
                patience *= 2
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, 1e-3)

    def _wait_interrupt(self, loop: asyncio.AbstractEventLoop, seconds: float) -> bool:
        """Whether the interrupt arrives within `seconds`; if so it is acknowledged."""

        async def wait() -> bool:
            task = asyncio.current_task()
            assert task is not None
            timer = loop.call_later(seconds, task.cancel)
            try:
                await self._ip.interrupt.wait()
            except asyncio.CancelledError:
                return False
            finally:
                timer.cancel()
            return True

        arrived = run_in(loop, wait())
        if arrived:
            self._ip.clear_interrupt()
        return arrived

    def after_fork(self) -> None:
        super().after_fork()
        if hasattr(self, "_resources"):  # else it is being opened by another thread
            self._resources.keep_in_child()

    def close(self) -> None:
        """Stop the kernel if it runs, free its memory, release the lock. Closing twice is fine."""
        with self.lock:
            self._program = None
            self._release()

    def __enter__(self) -> BoardBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
