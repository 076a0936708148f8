"""The programs that are served, by name, and those that may be loaded.

A loaded program is copied into the state folder under its SHA-256. So a change of the original
file does not change what is served, and a restarted worker loads the same program again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pynq_kgrc.errors import KgrcError, ProgramError
from pynq_kgrc.program import cached_program
from pynq_kgrc.service.pool import Pool
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.wire import ProgramDocument

log = logging.getLogger("pynq_kgrc.service")

SHIPPED = Path(__file__).resolve().parents[1] / "programs"
MAX_ABOUT = 2000
"""Most bytes that are read of the text beside a program."""


@dataclass(frozen=True)
class ServedProgram:
    """A program that is loaded in all workers."""

    name: str
    version: str
    """The first 12 hex digits of the SHA-256 of its file."""
    key: str
    """Its name in the commands to the workers."""
    path: Path
    """The copy in the state folder."""
    description: ProgramDocument
    about: str
    """What it knows, in a sentence or two; empty if nothing is known of that."""

    @property
    def labels(self) -> list[str]:
        """A name for each class."""
        return self.description.labels or [str(i) for i in range(self.description.classes)]

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Shape of a clip of uint8 frames: [D, H, W, 3]."""
        clip = self.description.clip
        return clip.frames, clip.height, clip.width, clip.channels


class Catalogue:
    """Programs by name; one of the folder is named after its file, without the suffix.

    Args:
        pool: the workers that load the programs.
        state: the service's folder, for copies of the files.
        programs: name -> file of those that may be loaded.
        folder: a folder of further files that may be loaded.
    """

    def __init__(self, pool: Pool, state: Path, programs: Mapping[str, Path], folder: Path | None):
        self.pool, self.folder = pool, folder
        self.copies = state / "programs"
        self.given = dict(programs)
        self.served: dict[str, ServedProgram] = {}
        self.reasons: dict[str, str] = {}
        """Name -> why that program is not loaded."""
        self._lock = asyncio.Lock()
        self._users: Counter[str] = Counter()
        """Key -> number of leases (reference count)."""
        self._retired: dict[str, ServedProgram] = {}
        """Programs that are no longer served, but are still leased."""
        self._drops: set[asyncio.Task[None]] = set()

    def sources(self) -> dict[str, Path]:
        """Name -> file of every program that may be loaded."""
        found = {path.stem: path for path in sorted((self.folder or Path()).glob("*.kgrc"))}
        return {**(found if self.folder is not None else {}), **self.given}

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """Every program that is loaded or may be loaded, and why it is not loaded.

        Args:
            ready: the loaded ones only.
        """
        rows = []
        for name in {**self.sources(), **self.served}:
            program = self.served.get(name)
            if program is None and ready:
                continue
            version = "" if program is None else program.version
            state = "UNAVAILABLE" if program is None else "READY"
            reason = self.reasons.get(name, "")
            rows.append({"name": name, "version": version, "state": state, "reason": reason})
        return rows

    def find(self, name: str | None, version: str | None = None) -> ServedProgram:
        """The loaded program of that name; without a name, the first one.

        The version "1", which many clients ask for, is whichever is loaded.

        Raises:
            Refusal: 404, it is not loaded; the message names the loaded ones.
        """
        if name is None and self.served:
            name = next(iter(self.served))
        program = self.served.get(name or "")
        if program is None or version not in (None, program.version, "1"):
            asked = (name or "") + (f" version {version}" if version else "")
            there = ", ".join(self.served) or "none is loaded"
            raise Refusal(404, f"no program {asked[:100]!r}; loaded are: {there}")
        return program

    @contextlib.contextmanager
    def lease(self, name: str | None, version: str | None = None) -> Iterator[ServedProgram]:
        """The program of that name; it stays loaded for as long as the context lasts.

        Raises:
            Refusal: 404, it is not loaded.
        """
        program = self.find(name, version)
        self._users[program.key] += 1
        try:
            yield program
        finally:
            self._users[program.key] -= 1
            if not self._users[program.key]:
                del self._users[program.key]
                if program.key in self._retired:
                    self._start_drop(program)

    async def load(self, name: str) -> ServedProgram:
        """Load a program, or reload its file; the old version is served until the new one is ready.

        Raises:
            Refusal: 404, there is no such file; 503, no worker.
            ProgramError: the file is not a program for this backend.
        """
        source = self.sources().get(name)
        if source is None:
            there = ", ".join(self.sources()) or "none"
            raise Refusal(404, f"no program file {name[:100]!r}; there are: {there}")
        async with self._lock:
            old = self.served.get(name)
            path = None
            try:
                digest, path = await asyncio.to_thread(self._copy, source)
                if old is not None and old.version == digest[:12]:
                    return old
                key = f"{name}@{digest[:12]}"
                description = await self.pool.load(key, path)
            except KgrcError as error:
                self.reasons[name] = str(error)
                self._delete(path)
                raise
            about = await asyncio.to_thread(_read_about, name, source)
            self.served[name] = ServedProgram(name, digest[:12], key, path, description, about)
            self.reasons.pop(name, None)
            if old is not None:
                self._retire(old)
            return self.served[name]

    async def unload(self, name: str) -> None:
        """Stop serving a program; requests that lease it still finish.

        Raises:
            Refusal: 404, it is not loaded.
        """
        async with self._lock:
            program = self.find(name)
            del self.served[name]
            self.reasons[name] = "unloaded"
            self._retire(program)

    def _retire(self, program: ServedProgram) -> None:
        """Drop a program as soon as no request leases it."""
        if self._users[program.key]:
            self._retired[program.key] = program
        else:
            self._start_drop(program)

    def _start_drop(self, program: ServedProgram) -> None:
        self._retired.pop(program.key, None)
        task = asyncio.get_running_loop().create_task(self._drop(program))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    async def _drop(self, program: ServedProgram) -> None:
        async with self._lock:
            if program.key in {other.key for other in self.served.values()}:
                return  # it was loaded again in the meantime
            with contextlib.suppress(KgrcError):
                await self.pool.drop(program.key)
            self._delete(program.path)

    def _delete(self, path: Path | None) -> None:
        """Delete a copy of a file, unless a served or retired program needs it."""
        needed = {program.path for program in [*self.served.values(), *self._retired.values()]}
        if path is not None and path not in needed:
            path.unlink(missing_ok=True)

    def _copy(self, source: Path) -> tuple[str, Path]:
        """Copy a file into the state folder; its SHA-256 and the path of the copy.

        Raises:
            ProgramError: it cannot be read.
        """
        if not source.is_file():  # a FIFO would be read for ever
            raise ProgramError(f"{source.name}: is no file")
        self.copies.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        handle, beside = tempfile.mkstemp(dir=self.copies, prefix=".")
        try:
            with os.fdopen(handle, "wb") as copy, source.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    copy.write(block)
            path = self.copies / f"{digest.hexdigest()}.kgrc"
            os.replace(beside, path)
        except OSError as error:
            Path(beside).unlink(missing_ok=True)
            raise ProgramError(f"{source.name}: cannot be copied ({error.strerror})") from error
        return digest.hexdigest(), path


def _read_about(name: str, source: Path) -> str:
    """The text beside a program, `NAME.txt` beside `NAME.kgrc`; empty if there is none.

    That of a published network, whose program is in the user's cache, ships with the package.
    """
    beside = source.with_suffix(".txt")
    if source.parent == cached_program(name).parent:
        beside = SHIPPED / f"{name}.txt"
    try:
        if not beside.is_file():
            return ""
        with beside.open("rb") as file:
            return " ".join(file.read(MAX_ABOUT).decode("utf-8", "ignore").split())
    except OSError as error:
        log.warning("the text beside a program cannot be read", extra={"reason": str(error)})
        return ""
