"""An archive of videos through Ray Data: a row for every file, in one Parquet table.

Ray starts the workers, hands each a file at a time, starts another where one dies and gives it the
file again. What comes back is written down at once (`archive.Journal`) by this process alone, so
that nothing is lost or doubled whoever is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import queue
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow
import pyarrow.parquet
import ray
import ray.data

from pynq_kgrc.backends.base import BACKENDS
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.backends.emulation.crew import available_cores
from pynq_kgrc.cluster.archive import (
    File,
    Journal,
    ArchiveSettings,
    FileResult,
    check_settings,
    digest_of,
    failed,
    find_files,
    classify_file,
)
from pynq_kgrc.cluster.local import ray_started
from pynq_kgrc.errors import ConfigError, DeviceError, KgrcError
from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session
from pynq_kgrc.storage import written_beside

ATTEMPTS = 3
"""A file whose worker died so often is given up."""
START_SECONDS = 300.0
"""Ray and the workers may take so long until the first row."""
RAY_SECONDS = 60.0
"""An answer between two processes of Ray may take so long."""
ROWS_AT_ONCE = 1000
KEY = b"pynq_kgrc.settings"
"""Of the table's metadata: what its rows answer."""

_STRINGS = pyarrow.list_(pyarrow.string())
_REALS = pyarrow.list_(pyarrow.float64())
_WINDOW = pyarrow.struct(
    {
        "start_ms": pyarrow.float64(),
        "end_ms": pyarrow.float64(),
        "labels": _STRINGS,
        "scores": _REALS,
    }
)
SCHEMA = pyarrow.schema(
    {
        "path": pyarrow.string(),
        "labels": _STRINGS,
        "scores": _REALS,
        "windows": pyarrow.list_(_WINDOW),
        "notes": _STRINGS,
        "error": pyarrow.string(),
        "size": pyarrow.int64(),
        "modified_ns": pyarrow.int64(),
    }
)
"""Of the table; its fields are those of `archive.FileResult`."""

Watch = Callable[[Iterable[FileResult], int], Iterable[FileResult]]
"""Passes rows on, of which there will be so many: a progress bar."""


@dataclass(frozen=True)
class Batch:
    """One archive, and how it is gone through."""

    folder: Path
    program: Path
    out: Path
    backend: str = "emulate"
    top: int = 5
    stride: int | None = None
    sampling: str = "centre"
    workers: int = 1
    file_seconds: float = 600.0
    """A file may take a worker so long."""
    address: str = "local"
    """Of a Ray cluster that sees the same files; "local" starts one here and ends it."""
    anew: bool = False
    """Whether to throw away what an earlier run found."""


@dataclass(frozen=True)
class BatchSummary:
    """What became of an archive."""

    rows: int
    errors: int
    """Rows that say why there are no labels."""
    kept: int
    """Rows that an earlier run had found."""


def classify_archive(batch: Batch, watch: Watch = lambda rows, _: rows) -> BatchSummary:
    """Look at every file that has no row yet, and write the table.

    Raises:
        ConfigError: `out` holds something else, or another run is writing it.
        DataError: no folder, or no file in it.
        DeviceError: a worker cannot run the program; what was found is kept.
    """
    _check(batch)
    settings = ArchiveSettings(
        digest_of(batch.program), batch.backend, batch.top, batch.stride, batch.sampling
    )
    partial = batch.out.with_name(batch.out.name + ".partial")
    files = find_files(batch.folder, (batch.out, partial))
    done = [] if batch.anew else read_table(batch.out, settings)
    if batch.anew:
        partial.unlink(missing_ok=True)
    with Journal(partial, settings) as journal:
        for row in done:
            journal.add(row)
        kept = {row.path for row in journal.rows(files)}
        todo = [file for file in files if file.path not in kept]
        if todo:
            with contextlib.closing(find_rows(todo, batch, settings)) as found:
                for row in watch(found, len(todo)):
                    journal.add(row)
        errors = write_table(batch.out, settings, journal.rows(files), len(files))
        journal.delete()
    return BatchSummary(len(files), errors, len(kept))


def _check(batch: Batch) -> None:
    """Refuse what cannot work, before anything starts."""
    load(batch.program)
    if batch.backend not in BACKENDS:
        raise ConfigError(f"--backend {batch.backend}; there are {', '.join(BACKENDS)}")
    if batch.backend == "board" and batch.workers > 1 and batch.address == "local":
        raise ConfigError(f"--workers {batch.workers}: a board takes one")


def find_rows(files: list[File], batch: Batch, settings: ArchiveSettings) -> Generator[FileResult, None, None]:
    """A row for every file, in the order in which they are found.

    Raises:
        DeviceError: a worker cannot run the program, or Ray failed.
    """
    missing = {file.path for file in files}
    with ray_started(batch.workers, batch.address):
        for document, trouble in _stream(_dataset(files, batch, settings), batch.file_seconds):
            if trouble:
                raise DeviceError(trouble)
            row = msgspec.json.decode(document, type=FileResult)
            if row.path in missing:
                missing.remove(row.path)
                yield row
    if missing:
        raise DeviceError(f"Ray gave no row for {len(missing)} files, such as {min(missing)}")


def _dataset(files: list[File], batch: Batch, settings: ArchiveSettings) -> Any:
    """The files as a lazy data set of rows; a block a file, so that each is handed out alone."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = ray.data.from_items(
        [{"file": msgspec.json.encode(file)} for file in files], override_num_blocks=len(files)
    )
    tries = ray.remote(AttemptCounter).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    cores = available_cores()
    return items.map_batches(
        FileClassifier,
        fn_constructor_args=(
            str(batch.program.absolute()),
            settings,
            tries,
            max(1, cores // batch.workers),
            batch.file_seconds,
        ),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=batch.workers, max_tasks_in_flight_per_actor=1),
    )


class AttemptCounter:
    """How often workers began with each file, in a process of its own.

    Ray hands the file of a worker that dies to another one, for ever.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def begin(self, path: str) -> int:
        """How many began with this file before."""
        before = self.counts.get(path, 0)
        self.counts[path] = before + 1
        return before

    def end(self, path: str) -> None:
        """It came to an end."""
        self.counts.pop(path, None)


class FileClassifier:
    """A worker's part: it has the program, and is handed a file at a time."""

    def __init__(
        self, program: str, settings: ArchiveSettings, tries: Any, threads: int, seconds: float
    ) -> None:
        self.program, self.settings, self.tries = Path(program), settings, tries
        self.threads, self.seconds = threads, seconds
        self.session: Session | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of one file as a row, or what keeps this worker from looking."""
        row, trouble = b"", ""
        try:
            file = msgspec.json.decode(batch["file"][0], type=File)
            row = msgspec.json.encode(self._look(file))
        except KgrcError as error:
            trouble = str(error)
        except Exception:
            trouble = f"a worker failed: {traceback.format_exc()}"
        return {"row": [row], "trouble": [trouble]}

    def _look(self, file: File) -> FileResult:
        before = ray.get(self.tries.begin.remote(file.path), timeout=RAY_SECONDS)
        if before == ATTEMPTS:
            why = f"{before} workers ended while they looked at it, each by a crash or after "
            return failed(file, f"given up: {why}{self.seconds:g} s")
        # a thread that Python does not run: it also ends a decoder that never comes back
        faulthandler.dump_traceback_later(self.seconds, exit=True)
        try:
            row = classify_file(self._opened(), file, self.settings)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.tries.end.remote(file.path)
        return row

    def _opened(self) -> Session:
        if self.session is None:
            if digest_of(self.program) != self.settings.program:
                raise ConfigError(f"{self.program}: is another program now; start again")
            program = load(self.program)
            if self.settings.backend == "emulate":
                emulation = Emulation(program.config, self.threads)
                self.session = Session(program, emulation)
            else:
                self.session = Session(program, self.settings.backend)
        return self.session


def _stream(dataset: Any, seconds: float) -> Iterator[tuple[bytes, str]]:
    """Rows and troubles as they come; Ray waits for ever, so that a thread waits for it.

    Raises:
        DeviceError: nothing came for too long, or Ray failed.
    """
    arrived: queue.Queue[tuple[bytes, str] | BaseException | None] = queue.Queue()

    def pull() -> None:
        try:
            for block in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                for row, trouble in zip(block["row"], block["trouble"], strict=True):
                    arrived.put((bytes(row), str(trouble)))
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=pull, name="ray-data", daemon=True).start()
    limit = START_SECONDS
    while True:
        try:
            item = arrived.get(timeout=limit + ATTEMPTS * seconds)
        except queue.Empty:
            raise DeviceError(f"Ray gave no row within {limit + ATTEMPTS * seconds:g} s") from None
        if item is None:
            return
        if isinstance(item, BaseException):
            raise DeviceError(f"Ray failed: {type(item).__name__}: {item}") from item
        yield item


def write_table(out: Path, settings: ArchiveSettings, rows: Iterable[FileResult], count: int) -> int:
    """Write the table beside its place and rename it; how many rows have an error.

    Raises:
        DeviceError: there are not as many rows as there have to be.
    """
    written = errors = 0
    schema = SCHEMA.with_metadata({KEY: msgspec.json.encode(settings)})
    with written_beside(out) as beside:
        with pyarrow.parquet.ParquetWriter(beside, schema) as writer:
            for group in _groups(rows):
                documents = [msgspec.to_builtins(row) for row in group]
                writer.write_table(pyarrow.Table.from_pylist(documents, schema))
                written += len(group)
                errors += sum(row.error is not None for row in group)
        if written != count:
            raise DeviceError(f"{out}: {written} rows of {count} files; start again")
    return errors


def _groups(rows: Iterable[FileResult]) -> Iterator[list[FileResult]]:
    group: list[FileResult] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def read_table(out: Path, settings: ArchiveSettings) -> list[FileResult]:
    """The rows of a table; none if there is no table.

    Raises:
        ConfigError: the file is no such table, or answers another settings.
    """
    if not out.exists():
        return []
    try:
        table = pyarrow.parquet.read_table(out)
        asked = (table.schema.metadata or {}).get(KEY)
        if asked is None:
            raise ConfigError(f"{out}: is no table of this command; give another --out, or --anew")
        check_settings(out, asked, settings)
        return [msgspec.convert(row, FileResult) for row in table.to_pylist()]
    except (OSError, pyarrow.ArrowException, msgspec.ValidationError) as error:
        raise ConfigError(
            f"{out}: is no table of results ({error}); give another --out, or --anew"
        ) from error
