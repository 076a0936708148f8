"""One process per device: a file lock (flock), which ends even if its process is killed."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from pathlib import Path

from pynq_kgrc.errors import DeviceError


def lock_path(device: str) -> Path:
    """The lock file of a device. The file is never deleted; only the lock on it is released."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", device)
    return Path(tempfile.gettempdir()) / f"pynq_kgrc-{name}.lock"


class DeviceLock:
    """The lock on a device, held until `release` or the end of the process.

    Raises:
        DeviceError: the device is locked already; names the process that holds it.
    """

    def __init__(self, device: str) -> None:
        path = lock_path(device)
        self._file: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._file, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            self._file = None
            ours = " (this one: close its other session first)" * (holder == str(os.getpid()))
            raise DeviceError(
                f"{device} is in use by process {holder}{ours}; one process at a time can drive "
                f"it. Close its session or notebook, or end it ({path})"
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
