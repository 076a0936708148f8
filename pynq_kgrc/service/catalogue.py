"""The programs that are served, by name, and those that could be.

A program that is loaded is copied into the state folder under its SHA-256, so that what is served
does not change when the file it came from does, and a worker that is restarted finds it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pynq_kgrc.errors import KgrcError, ProgramError
from pynq_kgrc.service.pool import Pool
from pynq_kgrc.service.refusal import Refusal

MAX_PROGRAM = 4_000_000_000


@dataclass(frozen=True)
class ServedProgram:
    """A program that is loaded."""

    name: str
    version: str
    """The first 12 hex digits of the SHA-256 of its file."""
    key: str
    """What the workers call it."""
    path: Path
    """Our copy of it."""
    description: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """A name for each class."""
        named = self.description["labels"]
        return named or [str(i) for i in range(self.description["classes"])]

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """Of the frames: [D, H, W, 3]."""
        clip = self.description["clip"]
        return clip["frames"], clip["height"], clip["width"], 3


class Catalogue:
    """Programs by name; a name is that of the file without its suffix."""

    def __init__(self, pool: Pool, state: Path, programs: Iterable[Path], folder: Path | None):
        self.pool, self.folder = pool, folder
        self.copies = state / "programs"
        self.given = {path.stem: path for path in programs}
        self.served: dict[str, ServedProgram] = {}
        self.reasons: dict[str, str] = {}
        """Why a program that was asked for is not loaded."""
        self._lock = asyncio.Lock()
        self._users: Counter[str] = Counter()
        self._retired: dict[str, ServedProgram] = {}
        self._drops: set[asyncio.Task[None]] = set()

    def sources(self) -> dict[str, Path]:
        """Every program that may be loaded."""
        found = {path.stem: path for path in sorted((self.folder or Path()).glob("*.kgrc"))}
        return {**(found if self.folder is not None else {}), **self.given}

    def find(self, name: str | None, version: str | None = None) -> ServedProgram:
        """The program of that name; if none is named, the first.

        Raises:
            Refusal: 404, there is none; it names those there are.
        """
        if name is None and self.served:
            name = next(iter(self.served))
        program = self.served.get(name or "")
        if program is None or version not in (None, program.version):
            asked = (name or "") + (f" version {version}" if version else "")
            there = ", ".join(self.served) or "none is loaded"
            raise Refusal(404, f"no program {asked[:100]!r}; loaded are: {there}")
        return program

    @contextlib.contextmanager
    def lease(self, name: str | None, version: str | None = None) -> Iterator[ServedProgram]:
        """The program of that name, which stays loaded until it is given back.

        Raises:
            Refusal: 404, there is none.
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
                    self._forget(program)

    async def load(self, name: str) -> ServedProgram:
        """Load a program, or its file anew; until that is done the old one serves.

        Raises:
            Refusal: 404, there is no such file; 400, it is no program for this backend; 503.
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
            self.served[name] = ServedProgram(name, digest[:12], key, path, description)
            self.reasons.pop(name, None)
            if old is not None:
                self._retire(old)
            return self.served[name]

    async def unload(self, name: str) -> None:
        """Stop serving a program.

        Raises:
            Refusal: 404, it is not loaded.
        """
        async with self._lock:
            program = self.find(name)
            del self.served[name]
            self.reasons[name] = "unloaded"
            self._retire(program)

    def _retire(self, program: ServedProgram) -> None:
        """Drop a program as soon as nobody uses it."""
        if self._users[program.key]:
            self._retired[program.key] = program
        else:
            self._forget(program)

    def _forget(self, program: ServedProgram) -> None:
        self._retired.pop(program.key, None)
        task = asyncio.get_running_loop().create_task(self._drop(program))
        self._drops.add(task)
        task.add_done_callback(self._drops.discard)

    async def _drop(self, program: ServedProgram) -> None:
        async with self._lock:
            if program.key in {other.key for other in self.served.values()}:
                return  # loaded again meanwhile
            with contextlib.suppress(KgrcError):
                await self.pool.drop(program.key)
            self._delete(program.path)

    def _delete(self, path: Path | None) -> None:
        """Delete a copy that no program needs, the retired ones included."""
        needed = {program.path for program in [*self.served.values(), *self._retired.values()]}
        if path is not None and path not in needed:
            path.unlink(missing_ok=True)

    def _copy(self, source: Path) -> tuple[str, Path]:
        """The SHA-256 of a file, and where its copy is.

        Raises:
            ProgramError: it cannot be read.
        """
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
