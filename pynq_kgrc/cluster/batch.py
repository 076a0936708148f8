"""Classify an archive of videos with Ray Data: a row for every file, in one Parquet table.

Ray starts the workers, gives each one file at a time, and restarts a worker that dies. This
process alone writes each result to disk as soon as it arrives (`archive.Journal`), so that no
result is lost or written twice, whichever process is killed.
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

from pynq_kgrc.backends.base import BACKENDS, backend_class
from pynq_kgrc.backends.cores import available_cores
from pynq_kgrc.backends.emulation.backend import Emulation
from pynq_kgrc.cluster.archive import (
    ArchiveSettings,
    File,
    FileResult,
    Journal,
    check_same_settings,
    classify_file,
    digest_of,
    failed,
    find_files,
)
from pynq_kgrc.cluster.local import ray_started
from pynq_kgrc.errors import ConfigError, DeviceError, KgrcError
from pynq_kgrc.files import written_beside
from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session

ATTEMPTS = 3
"""A file is given up after the workers of this many attempts ended."""
START_SECONDS = 300.0
"""Time limit for Ray and its workers to give the first row."""
RAY_SECONDS = 60.0
"""Time limit for a call from one process of Ray to another."""
ROWS_AT_ONCE = 1000
"""Rows of a row group of the table."""
KEY = b"pynq_kgrc.question"
"""Key of the table's metadata that holds its `ArchiveSettings`."""

_LABELS = pyarrow.list_(
    pyarrow.struct({"label": pyarrow.string(), "confidence": pyarrow.float64()})
)
_WINDOW = pyarrow.struct(
    {"start_ms": pyarrow.float64(), "end_ms": pyarrow.float64(), "labels": _LABELS}
)
_SEGMENT = pyarrow.struct(
    {
        "label": pyarrow.string(),
        "confidence": pyarrow.float64(),
        "start_ms": pyarrow.float64(),
        "end_ms": pyarrow.float64(),
    }
)
SCHEMA = pyarrow.schema(
    {
        "path": pyarrow.string(),
        "labels": _LABELS,
        "unsure": pyarrow.bool_(),
        "segments": pyarrow.list_(_SEGMENT),
        "windows": pyarrow.list_(_WINDOW),
        "notes": pyarrow.list_(pyarrow.string()),
        "error": pyarrow.string(),
        "size": pyarrow.int64(),
        "modified_ns": pyarrow.int64(),
    }
)
"""Columns of the table: the fields of `archive.FileResult`."""

Watch = Callable[[Iterable[FileResult], int], Iterable[FileResult]]
"""Passes results on and is told their number: a progress bar."""


@dataclass(frozen=True)
class Batch:
    """An archive, and how to classify it."""

    folder: Path
    program: Path
    out: Path
    backend: str = "emulate"
    top: int = 5
    stride: int | None = None
    sampling: str | None = None
    workers: int = 1
    file_seconds: float = 600.0
    """Time limit of a worker for one file."""
    address: str = "local"
    """Address of a Ray cluster whose machines see the same files; "local" starts Ray here and
    stops it afterwards."""
    anew: bool = False
    """Whether to discard the results of an earlier run."""


@dataclass(frozen=True)
class BatchSummary:
    """How many rows the table has."""

    rows: int
    errors: int
    """Rows with an error instead of labels."""
    kept: int
    """Rows taken over from an earlier run."""


def classify_archive(batch: Batch, watch: Watch = lambda results, _: results) -> BatchSummary:
    """Classify every file that has no up-to-date result, and write the table.

    Raises:
        ConfigError: `out` is something else, or another run is writing it.
        DataError: the folder does not exist or contains no file.
        DeviceError: a worker cannot run the program; the results so far are kept.
    """
    _check(batch)
    settings = ArchiveSettings(
        digest_of(batch.program), batch.backend, batch.top, batch.stride, batch.sampling
    )
    partial = batch.out.with_name(batch.out.name + ".partial")
    files = find_files(batch.folder, (batch.out, partial))
    earlier = [] if batch.anew else read_table(batch.out, settings)
    if batch.anew:
        partial.unlink(missing_ok=True)
    with Journal(partial, settings) as journal:
        for result in earlier:
            journal.add(result)
        kept = {result.path for result in journal.results(files)}
        missing = [file for file in files if file.path not in kept]
        if missing:
            with contextlib.closing(classify_files(missing, batch, settings)) as results:
                for result in watch(results, len(missing)):
                    journal.add(result)
        errors = write_table(batch.out, settings, journal.results(files), len(files))
        journal.delete()
    return BatchSummary(len(files), errors, len(kept))


def _check(batch: Batch) -> None:
    """Refuse settings that cannot work, before anything starts."""
    load(batch.program)
    if batch.backend not in BACKENDS:
        raise ConfigError(f"--backend {batch.backend}; there are {', '.join(BACKENDS)}")
    if batch.workers > 1 and batch.address == "local" and backend_class(batch.backend).exclusive:
        raise ConfigError(f"--workers {batch.workers}: the backend {batch.backend} takes one")


def classify_files(
    files: list[File], batch: Batch, settings: ArchiveSettings
) -> Generator[FileResult, None, None]:
    """A result for every file, in the order in which the workers finish.

    Raises:
        DeviceError: a worker cannot run the program, or Ray failed.
    """
    missing = {file.path for file in files}
    with ray_started(batch.workers, batch.address):
        for document, failure in _stream(_dataset(files, batch, settings), batch.file_seconds):
            if failure:
                raise DeviceError(failure)
            result = msgspec.json.decode(document, type=FileResult)
            if result.path in missing:
                missing.remove(result.path)
                yield result
    if missing:
        raise DeviceError(f"Ray gave no row for {len(missing)} files, such as {min(missing)}")


def _dataset(files: list[File], batch: Batch, settings: ArchiveSettings) -> Any:
    """A lazy data set of results; one block per file, so that Ray hands files out one by one."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    items = ray.data.from_items(
        [{"file": msgspec.json.encode(file)} for file in files], override_num_blocks=len(files)
    )
    attempts = (
        ray.remote(AttemptCounter)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote()
    )
    cores = available_cores()
    return items.map_batches(
        FileClassifier,
        fn_constructor_args=(
            str(batch.program.absolute()),
            settings,
            attempts,
            max(1, cores // batch.workers),
            batch.file_seconds,
        ),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=batch.workers, max_tasks_in_flight_per_actor=1),
    )


class AttemptCounter:
    """Counts the attempts at each file, in a process of its own.

    If a worker dies, Ray gives its file to another worker, without a limit; this is the limit.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def begin(self, path: str) -> int:
        """Count one attempt; the number of attempts before it that did not end."""
        before = self.counts.get(path, 0)
        self.counts[path] = before + 1
        return before

    def end(self, path: str) -> None:
        """The file has a result: forget its attempts."""
        self.counts.pop(path, None)


class FileClassifier:
    """What runs in a worker of Ray: holds the program and classifies one file per call."""

    def __init__(
        self, program: str, settings: ArchiveSettings, attempts: Any, threads: int, seconds: float
    ) -> None:
        self.program, self.settings, self.attempts = Path(program), settings, attempts
        self.threads, self.seconds = threads, seconds
        self.session: Session | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The result of a batch of one file, or why this worker cannot classify files."""
        row, failure = b"", ""
        try:
            file = msgspec.json.decode(batch["file"][0], type=File)
            row = msgspec.json.encode(self._classify(file))
        except KgrcError as error:
            failure = str(error)
        except Exception:
            failure = f"a worker failed: {traceback.format_exc()}"
        return {"row": [row], "failure": [failure]}

    def _classify(self, file: File) -> FileResult:
        before = ray.get(self.attempts.begin.remote(file.path), timeout=RAY_SECONDS)
        if before == ATTEMPTS:
            why = f"{before} workers ended while they classified it, each by a crash or after "
            return failed(file, f"given up: {why}{self.seconds:g} s")
        # a watchdog thread in C: it also ends a decoder that holds the GIL and never returns
        faulthandler.dump_traceback_later(self.seconds, exit=True)
        try:
            result = classify_file(self._opened(), file, self.settings)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.attempts.end.remote(file.path)
        return result

    def _opened(self) -> Session:
        if self.session is None:
            if digest_of(self.program) != self.settings.program:
                raise ConfigError(f"{self.program}: the file has changed; start again")
            program = load(self.program)
            if self.settings.backend == Emulation.name:
                emulation = Emulation(program.config, self.threads)
                self.session = Session(program, emulation)
            else:
                self.session = Session(program, self.settings.backend)
        return self.session


def _stream(dataset: Any, seconds: float) -> Iterator[tuple[bytes, str]]:
    """Results and failures as they arrive.

    Ray's iterator has no time limit, so that a thread reads it and this generator waits for the
    thread.

    Raises:
        DeviceError: nothing arrived within the time limit, or Ray failed.
    """
    arrived: queue.Queue[tuple[bytes, str] | BaseException | None] = queue.Queue()

    def pull() -> None:
        try:
            for block in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                for row, failure in zip(block["row"], block["failure"], strict=True):
                    arrived.put((bytes(row), str(failure)))
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


def write_table(
    out: Path, settings: ArchiveSettings, results: Iterable[FileResult], count: int
) -> int:
    """Write the table beside `out`, then rename it to `out`; the number of rows with an error.

    Raises:
        DeviceError: there are not `count` results.
    """
    written = errors = 0
    schema = SCHEMA.with_metadata({KEY: msgspec.json.encode(settings)})
    with written_beside(out) as beside:
        with pyarrow.parquet.ParquetWriter(beside, schema) as writer:
            for group in _groups(results):
                documents = [msgspec.to_builtins(result) for result in group]
                writer.write_table(pyarrow.Table.from_pylist(documents, schema))
                written += len(group)
                errors += sum(result.error is not None for result in group)
        if written != count:
            raise DeviceError(f"{out}: {written} rows of {count} files; start again")
    return errors


def _groups(results: Iterable[FileResult]) -> Iterator[list[FileResult]]:
    group: list[FileResult] = []
    for result in results:
        group.append(result)
        if len(group) == ROWS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def read_table(out: Path, settings: ArchiveSettings) -> list[FileResult]:
    """The results of a table; none if there is no table.

    Raises:
        ConfigError: the file is not such a table, or has results of other settings.
    """
    if not out.exists():
        return []
    try:
        table = pyarrow.parquet.read_table(out)
        stored = (table.schema.metadata or {}).get(KEY)
        if stored is None:
            raise ConfigError(
                f"{out}: is not a table of this command; give another --out, or --anew"
            )
        check_same_settings(out, stored, settings)
        return [msgspec.convert(row, FileResult) for row in table.to_pylist()]
    except (OSError, pyarrow.ArrowException, msgspec.ValidationError) as error:
        raise ConfigError(
            f"{out}: is not a table of results ({error}); give another --out, or --anew"
        ) from error
