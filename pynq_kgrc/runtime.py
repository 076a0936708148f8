"""A session runs one program on one backend: frames in, scores or labels out.

The host encodes the frames, and turns the output codes into logits and probabilities. Every layer
runs on the backend. Of many clips the host prepares the next one while the backend runs the present
one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from pynq_kgrc.backends.base import Backend, Counters, PackedMap, open_backend
from pynq_kgrc.backends.chosen import resolve_backend
from pynq_kgrc.errors import DeviceError, ProgramError
from pynq_kgrc.program import Program
from pynq_kgrc.quant import Array
from pynq_kgrc.results import Label, best_labels, is_unsure

Item = TypeVar("Item")


@dataclass(frozen=True)
class Seconds:
    """Where the time of one clip went, in seconds on this host.

    Of many clips, `encode` and `pack` pass while the device runs the clip before.
    """

    encode: float
    """Pixels to input codes."""
    pack: float
    """Input codes to the bytes of the device's memory; 0 or nearly so where it takes codes."""
    copy: float
    """These bytes, or codes, to the device."""
    device: float
    """All tasks, from start to end."""
    read: float
    """Output codes from the device, to logits and probabilities."""

    @property
    def total(self) -> float:
        """The sum of the parts: from frames to probabilities, where they do not overlap."""
        return self.encode + self.pack + self.copy + self.device + self.read


@dataclass(frozen=True, eq=False)
class Scores:
    """What the network computed for one clip, and at what cost."""

    logits: Array
    """[classes] float64."""
    probabilities: Array
    """[classes] float64: the soft-max of the logits, divided by the temperature of the program."""
    layers: tuple[Counters, ...]
    """The counters of each task, in order."""
    seconds: Seconds


@dataclass(frozen=True)
class Prediction:
    """The best labels of one clip, the most probable first, and at what cost."""

    labels: tuple[Label, ...]
    layers: tuple[Counters, ...]
    """The counters of each task, in order."""
    backend: str
    """Name of the backend that ran it."""
    timing: Seconds
    unsure: bool = False
    """Whether the best label's confidence is below the threshold of the program."""

    @property
    def seconds(self) -> float:
        """The sum of the parts of `timing`, in seconds on this host."""
        return self.timing.total


@dataclass
class PreparedClip:
    """A clip that is ready to be copied to the device."""

    packed: Array | PackedMap
    encode: float
    """Seconds."""
    pack: float


class Session:
    """A program loaded on a backend; a context manager.

    Threads may share a session, and sessions a backend: each clip is written, run and read under
    the backend's lock, and the others wait. In the child of a fork a session works on with a device
    of its own (emulation, C-simulation) or raises DeviceError (board); the parent is undisturbed.
    A session cannot be pickled: open one in each process.

    Args:
        program: the program to load.
        backend: the name of a backend ("emulate", or "auto" for the best that there is), which the
            session opens and closes; or an open backend, which `close` leaves open.

    Raises:
        ProgramError: the program is for another accelerator than the backend.
        DeviceError: there is no backend of that name, or its device does not answer.
    """

    def __init__(self, program: Program, backend: str | Backend = "emulate") -> None:
        self.program = program
        self._owned, self._closed = isinstance(backend, str), False
        self.backend: Backend = (
            open_backend(resolve_backend(backend), program.config)
            if isinstance(backend, str)
            else backend
        )
        self.backend_name = self.backend.name
        try:
            self.backend.load(program)
        except BaseException:
            self.close()
            raise

    def run(self, frames: Array) -> Scores:
        """Run one clip through the network.

        Args:
            frames: uint8 RGB [D, H, W, 3] of the size of `program.clip`.

        Raises:
            ProgramError: frames of another shape or type.
            DeviceError: the device did not finish.
        """
        return self._run(self._prepare(frames))

    def run_many(
        self, clips: Iterable[Item], frames: Callable[[Any], Array] = lambda clip: clip
    ) -> Iterator[tuple[Item, Scores]]:
        """Run clips one after the other; each with its scores, in order.

        While the backend runs a clip, a thread takes the next one from `clips`, encodes and packs
        it; never more than that one. The bits are those of `run`. The emulation computes on the
        same cores, so that little time is saved there.

        An error of `clips` or of a clip is raised in its turn, after the scores of all clips before
        it. When the iterator ends, fails or is closed, no thread is left: it waits until the next
        clip is prepared. Any number of threads may each iterate over an iterator of their own.

        Args:
            clips: frames as for `run`, or anything of which `frames` gives them. They are taken in
                another thread than the caller's.
            frames: the frames of one of the clips.

        Raises:
            ProgramError: frames of another shape or type.
            DeviceError: the device did not finish, or this is a fork of the process that began.
        """
        process = os.getpid()

        ahead = ReadAhead((clip, self._prepare(frames(clip))) for clip in clips)
        try:
            ahead.begin()
            while (found := ahead.take()) is not None:
                clip, prepared = found
                yield clip, self._run(prepared, ahead.begin)
                if os.getpid() != process:
                    raise DeviceError(
                        f"process {os.getpid()} is a fork of process {process}, which began to run "
                        f"these clips; begin again in this process"
                    )
        finally:
            ahead.end()

    def classify_many(self, clips: Iterable[Array], top: int = 5) -> Iterator[Prediction]:
        """`classify` for clips one after the other, as `run_many` runs them; in order."""
        for _, scores in self.run_many(clips):
            yield self._predict(scores, top)

    def classify(self, frames: Array, top: int = 5) -> Prediction:
        """The `top` most probable labels of one clip; all labels if there are fewer.

        Args and errors are those of `run`.
        """
        return self._predict(self.run(frames), top)

    def _predict(self, scores: Scores, top: int) -> Prediction:
        labels = best_labels(scores.probabilities, self.program.labels, top)
        unsure = is_unsure(scores.probabilities, self.program.clip.threshold)
        return Prediction(labels, scores.layers, self.backend_name, scores.seconds, unsure)

    def trace(self, frames: Array) -> Iterator[tuple[str, Array, Counters]]:
        """Run task by task: the name, output codes [C, D, H, W] and counters of each.

        The device is free for others between two tasks. If they used it, the tasks so far are run
        again.

        Args and errors are those of `run`.
        """
        prepared, clip = self._prepare(frames), object()
        for i, task in enumerate(self.program.tasks):
            with self._device():
                if self.backend.clip is not clip:
                    self._write(prepared.packed, clip)
                    self.backend.run(0, i)
                (counters,) = self.backend.run(i, i + 1)
                found = self.backend.read(task.target, task.shape.out_channels, task.out_size)
            yield task.name, found, counters

    def _prepare(self, frames: Array) -> PreparedClip:
        """The host's work before the device is needed."""
        start = time.perf_counter()
        codes = self.program.encode_clip(frames)
        encoded = time.perf_counter()
        packed = self.backend.pack(self.program, self.program.source, codes)
        return PreparedClip(packed, encoded - start, time.perf_counter() - encoded)

    def _run(self, clip: PreparedClip, started: Callable[[], None] = lambda: None) -> Scores:
        """Run a clip; `started` is called when it is copied, just before the device starts."""
        with self._device():
            start = time.perf_counter()
            self._write(clip.packed, object())
            copied = time.perf_counter()
            del clip.packed  # its memory is free for the next clip
            started()
            layers = tuple(self.backend.run())
            done = time.perf_counter()
            last = self.program.tasks[-1]
            found = self.backend.read(last.target, last.shape.out_channels, last.out_size)
        logits = self.program.output.dequantize(found).reshape(-1)
        probabilities = softmax(logits / self.program.clip.temperature)
        end = time.perf_counter()
        seconds = Seconds(clip.encode, clip.pack, copied - start, done - copied, end - done)
        return Scores(logits, probabilities, layers, seconds)

    @contextmanager
    def _device(self) -> Iterator[None]:
        """The backend for this session alone, with its program loaded."""
        with self.backend.lock:
            try:
                loaded = self.backend.program is self.program
            except ProgramError:
                if self._closed:
                    raise
                loaded = False  # the load of another session was stopped
            if not loaded:
                self.backend.load(self.program)
            yield

    def _write(self, codes: Array | PackedMap, clip: object) -> None:
        self.backend.write(self.program.source, codes)
        self.backend.clip = clip

    def __reduce__(self) -> str:
        raise ProgramError(
            "a session cannot be pickled, its device belongs to this process; open a session in "
            "each process"
        )

    def close(self) -> None:
        """Close the backend, if the session opened it."""
        self._closed = self._owned
        if self._owned:
            self.backend.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ReadAhead(Generic[Item]):
    """An iterator whose next item a thread takes, while the caller works on the present one.

    `begin` starts to take an item, `take` waits for it. The thread takes one item and ends.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._thread: threading.Thread | None = None
        self._found: Item | None = None
        self._error: BaseException | None = None
        self._ended = False
        # not Thread.join: in Python 3.11 a join that Ctrl-C interrupts takes a thread that runs for
        # ended
        self._taken = threading.Event()
        self._process = os.getpid()

    def begin(self) -> None:
        """Start to take the next item."""
        self._taken.clear()
        self._thread = threading.Thread(target=self._next, name="next clip")
        try:
            self._thread.start()
        except BaseException:
            if self._thread.ident is None:  # it never ran: `end` has nothing to wait for
                self._thread = None
            raise

    def take(self) -> Item | None:
        """The item that `begin` started to take; None after the last one.

        Raises:
            BaseException: what the iterator raised.
        """
        assert self._thread is not None
        self._taken.wait()
        found, self._found, error = self._found, None, self._error
        if error is not None:
            raise error
        return found

    def end(self) -> None:
        """Wait until nothing is taken any more. In the child of a fork there is no thread."""
        self._ended = True
        if self._process == os.getpid() and self._thread is not None:
            self._taken.wait()
            self._thread.join()

    def _next(self) -> None:
        try:
            if not self._ended:
                self._found = next(self._items, None)
        except BaseException as error:
            self._error = error
        finally:
            self._taken.set()


@dataclass(frozen=True)
class Difference:
    """The first element in which two backends differ."""

    task: str
    index: tuple[int, int, int, int]
    """Channel, depth, height, width."""
    left: int
    right: int
    count: int
    """Number of elements of that task that differ."""


def compare(left: Session, right: Session, frames: Array) -> Difference | None:
    """Run a clip on two sessions of one program: the first task and element that differ, or None.

    Raises:
        ProgramError: the sessions run different programs.
    """
    if left.program is not right.program:
        raise ProgramError("compare takes two sessions of the same program")
    for (name, ours, _), (_, theirs, _) in zip(
        left.trace(frames), right.trace(frames), strict=True
    ):
        differing = np.argwhere(ours != theirs)
        if differing.size:
            c, d, h, w = (int(i) for i in differing[0])
            at = (c, d, h, w)
            return Difference(name, at, int(ours[at]), int(theirs[at]), len(differing))
    return None


def softmax(logits: Array) -> Array:
    """Probabilities [classes] of logits [classes]."""
    powers = np.exp(logits - logits.max())
    probabilities: Array = powers / powers.sum()
    return probabilities
