"""One process per device: a file lock (flock), which ends even if its process is killed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pwd
import re
import tempfile
from pathlib import Path

from pynq_kgrc.errors import DeviceError

FOLDERS = ("/run/lock", "/tmp")
"""Where lock files lie: the first of them that can be written to. They do not depend on TMPDIR, so
that all processes of a machine take the same file. A process that may not write to the first of
them takes another file; therefore each looks for a lock in all of them."""

TRIES = 100
"""How often a lock file may be replaced by its next owner's while it is opened and locked."""

log = logging.getLogger(__name__)


def lock_path(device: str) -> Path:
    """The lock file of a device. It exists while the lock is held, or its holder was killed."""
    usable = (folder for folder in FOLDERS if os.access(folder, os.W_OK | os.X_OK))
    return Path(next(usable, None) or tempfile.gettempdir()) / _file_name(device)


def _file_name(device: str) -> str:
    return f"pynq_kgrc-{re.sub(r'[^A-Za-z0-9_.-]', '_', device)}.lock"


class DeviceLock:
    """The lock on a device, held until `release` or the end of the process.

    Raises:
        DeviceError: the device is locked already, and by which process; or the lock file cannot
            be used, and why. Both name the file.
    """

    def __init__(self, device: str) -> None:
        self._path = path = lock_path(device)
        self._file: int | None = None
        for _ in range(TRIES):
            self._file = _open_lock(device, path)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                text = _in_use(device, path, self._file)
                self._close()
                raise DeviceError(text) from error
            except OSError as error:
                self._close()
                raise DeviceError(
                    f"{device} cannot be locked: {path}: {error.strerror}; that folder must be on "
                    f"a local file system"
                ) from error
            if _is_at(self._file, path):
                break
            self._close()  # its holder released it, and deleted it, after it was opened here
        else:
            raise DeviceError(f"{device} cannot be locked: {path} is replaced all the time")
        with contextlib.suppress(OSError):  # on a full disk: the lock holds without the process id
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        # each process locks its own file before it looks for others: of two that open the device
        # at once, one at least sees the other
        try:
            for folder in FOLDERS:
                if folder != str(path.parent):
                    self._check_elsewhere(device, folder)
        except BaseException:
            self.release()
            raise

    def _check_elsewhere(self, device: str, folder: str) -> None:
        """Raise if a process that may write to another folder than this one has its lock there."""
        if FOLDERS.index(folder) == 0 and os.path.isdir(folder):
            log.warning("the lock of %s is %s: %s cannot be written to", device, self._path, folder)
        path = Path(folder) / _file_name(device)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # most often there is none
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DeviceError(_in_use(device, path, file)) from error
        except OSError as error:
            raise DeviceError(f"{device} cannot be locked: {path}: {error.strerror}") from error
        finally:
            os.close(file)

    def release(self) -> None:
        """Release the lock and delete its file; a second call does nothing."""
        if self._file is None:
            return
        try:
            with contextlib.suppress(OSError):  # another user's file in a folder like /tmp
                self._path.unlink()
            # a forked child has the file open too: closing it here would not release the lock
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)
        finally:
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


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


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _in_use(device: str, path: Path, file: int) -> str:
    """Who drives the device, by its open lock file."""
    holder = _holder(file)
    ours = " (this one: close its other session first)" * (holder == str(os.getpid()))
    return (
        f"{device} is in use by process {holder}{ours}; one process at a time can drive it. Close "
        f"its session or notebook, or end it ({path})"
    )


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
