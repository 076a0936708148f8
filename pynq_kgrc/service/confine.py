"""Confines a process that reads a stranger's bytes: no files, no network, no processes, no rights.

Each of these holds where the kernel has it: another user (where the service runs as root),
no_new_privs, Landlock (files, TCP, signals; Linux 5.13 and later), and a seccomp filter (files,
sockets, processes, signals; x86-64 and aarch64). `what_holds` tries each out; `serve` prints it.
Numbers and structures are those of Linux' public headers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import pwd
import signal
import socket
from collections.abc import Callable

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
LOAD_WORD, JUMP_IF_EQUAL, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
X32 = 0x40000000
"""Bit of the system calls of the x32 interface, which x86-64 kernels may have as well."""

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> AUDIT_ARCH of its system calls."""

FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    "open": (2, None),
    "creat": (85, None),
    "openat": (257, 56),
    "openat2": (437, 437),
    "open_by_handle_at": (304, 265),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "truncate": (76, 45),
    "mount": (165, 40),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "fork": (57, None),
    "vfork": (58, None),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "memfd_create": (319, 279),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
"""System calls that fail with EPERM: their numbers on x86-64 and aarch64."""


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint32),
    )


class _Filter(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_ushort),
        ("instructions", ctypes.POINTER(_Instruction)),
    )


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


def confine() -> None:
    """Give up, for this process and for good, what the kernel lets it give up.

    What it has open stays open. What this kernel or machine lacks is left out: see `what_holds`.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _change_user()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _restrict_files(libc)
    _filter_calls(libc)


def _change_user() -> None:
    if os.geteuid():
        return
    try:
        entry = pwd.getpwnam("nobody")
        user, group = entry.pw_uid, entry.pw_gid
    except KeyError:
        user = group = 65534
    with contextlib.suppress(OSError):  # in a user namespace without other users
        os.setgroups([])
        os.setresgid(group, group, group)
        os.setresuid(user, user, user)


def _restrict_files(libc: ctypes.CDLL) -> None:
    """A Landlock ruleset without a rule: nothing of what it handles is allowed."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return
    # 13 rights to files in version 1, then refer, truncate, and ioctl of devices; TCP; signals
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    ruleset = _Ruleset(files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    handle = libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    if handle >= 0:
        libc.syscall(LANDLOCK_RESTRICT_SELF, handle, 0)
        os.close(handle)


def _filter_calls(libc: ctypes.CDLL) -> None:
    """A seccomp filter that refuses `FORBIDDEN`, and all calls of another architecture."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        return
    column = list(ARCHITECTURES).index(machine)
    numbers = [pair[column] for pair in FORBIDDEN.values() if pair[column] is not None]
    steps = [
        (LOAD_WORD, 0, 0, 4),  # the architecture
        (JUMP_IF_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, REFUSE),
        (LOAD_WORD, 0, 0, 0),  # the number of the call
        (JUMP_IF_SET, len(numbers) + 1, 0, X32),
    ]
    for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
        steps.append((JUMP_IF_EQUAL, left, 0, number or 0))
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    instructions = (_Instruction * len(steps))(*(_Instruction(*step) for step in steps))
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(_Filter(len(steps), instructions)))


def what_holds() -> list[str]:
    """What this process, which is confined, finds that it cannot do: each is tried."""
    attempts: dict[str, Callable[[], object]] = {
        "open a file": lambda: os.close(os.open("/", os.O_RDONLY)),
        "reach the network": lambda: socket.socket().close(),
        "start a process": _fork,
        "signal the service": lambda: os.kill(os.getppid(), 0),
        "act as root": lambda: os.setuid(0),
    }
    return [text for text, attempt in attempts.items() if _is_refused(attempt)]


def _fork() -> None:
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def _is_refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return True
    return False
