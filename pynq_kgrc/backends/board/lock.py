"""One process per device: a file lock (flock), which ends even if its process is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
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
        DeviceError: the device is locked already, and by which process; or the lock file cannot
            be used, and why. Both name the file.
    """

    def __init__(self, device: str) -> None:
        path = lock_path(device)
        self._file: int | None = _open_lock(device, path)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(self._file)
            self.release()
            ours = " (this one: close its other session first)" * (holder == str(os.getpid()))
            raise DeviceError(
                f"{device} is in use by process {holder}{ours}; one process at a time can drive "
                f"it. Close its session or notebook, or end it ({path})"
            ) from error
        except OSError as error:
            self.release()
            raise DeviceError(
                f"{device} cannot be locked: {path}: {error.strerror}; set TMPDIR to a folder on a "
                f"local disk"
            ) from error
        with contextlib.suppress(OSError):  # on a full disk: the lock holds without the process id
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _open_lock(device: str, path: Path) -> int:
    """Open the lock file. All users may write to a file that is created here."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            # without O_CREAT: Linux refuses it for another user's file in /tmp, even to root
            # (fs.protected_regular)
            return os.open(path, flags)
        except FileNotFoundError:
            file = os.open(path, flags | os.O_CREAT, 0o666)
            with contextlib.suppress(OSError):  # another user created it in the meantime
                os.fchmod(file, 0o666)
            return file
    except OSError as error:
        owner = _owner(path)
        raise DeviceError(
            f"{device} cannot be locked: {path}{owner}: {error.strerror}; if no process uses the "
            f"device, delete that file, or run as its owner"
        ) from error


def _owner(path: Path) -> str:
    try:
        uid = path.lstat().st_uid
    except OSError:
        return ""
    try:
        return f" of user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f" of user {uid}"


def _holder(file: int) -> str:
    """The process id in a lock file; "unknown" if there is none."""
    text = os.pread(file, 32, 0).strip()
    return text.decode() if text.isdigit() else "unknown"
