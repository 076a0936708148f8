"""Files that are either whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to; it becomes `path` if the block ends well.

    Whatever goes wrong, a file that was at `path` before is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        beside.chmod(0o644)
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave a renamed file of zeros
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
