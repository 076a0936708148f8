"""The library of the kernels in C: found where setup.py built it, or built now, and its calls.

It is a plain shared library that ctypes loads: it depends neither on the version of Python nor on
numpy's. It holds the digest of its sources; one of other sources is not used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from pynq_kgrc.errors import DeviceError
from pynq_kgrc.files import user_cache

KERNELS = Path(__file__).resolve().with_name("kernels")
"""The folder of the sources."""

SOURCES = ("crew.c", "plain.c", "avx2.c", "vnni.c")

FLAGS = ("-std=gnu11", "-O3", "-pthread")

INSTRUCTIONS = ("vnni", "avx2", "plain")
"""Sets of vector instructions, the fastest first: AVX-512 with VNNI, AVX2, and portable C."""

VARIABLE = "PYNQ_KGRC_NATIVE"
"""Environment variable that names one of `INSTRUCTIONS`, in place of the best of this processor."""

BUILD_SECONDS = 300

DIGITS = 16
"""Of a digest."""

ROWS = 9
"""Entries of a table by number of rows, 0 to 8."""


class Instructions(ctypes.Structure):
    """`struct instructions` of native.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pad", "convolve", "spread", "connect", "pool")),
        ("lanes", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("vectors", ctypes.c_int32 * ROWS),
        ("long_vectors", ctypes.c_int32 * ROWS),
        ("set_vectors", ctypes.c_int32),
    )


def sources_digest() -> str:
    """SHA-256 of the sources, as setup.py computes it too."""
    state = hashlib.sha256()
    for path in sorted(KERNELS.glob("*.*")):
        state.update(path.read_bytes())
    return state.hexdigest()[:DIGITS]


def built_library() -> Path | None:
    """The library of these sources, where it was built already; None if it was not."""
    digest = sources_digest()
    paths = (*sorted(KERNELS.parent.glob("_kernels*.so")), _cached(digest))
    return next((path for path in paths if path.is_file() and _digest_of(path) == digest), None)


def find_library() -> Path:
    """The library of these sources, built now if it was not before.

    Raises:
        DeviceError: it is not built, and there is no C compiler or it fails.
    """
    return built_library() or _build()


def has_compiler() -> bool:
    """Whether there is a C compiler."""
    return _compiler() is not None


def _cached(digest: str) -> Path:
    return user_cache() / "native" / f"{platform.machine()}-{digest}.so"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def _digest_of(path: Path) -> str:
    """The digest in a library; "" of a file that is none. The file is read, not loaded."""
    _, mark, rest = path.read_bytes().partition(b"pynq_kgrc kernels ")
    return rest[:DIGITS].decode("ascii", "replace") if mark else ""


def _build(flags: tuple[str, ...] = FLAGS, path: Path | None = None) -> Path:
    digest, compiler = sources_digest(), _compiler()
    library = path or _cached(digest)
    if compiler is None:
        raise DeviceError(
            "the kernels in C are not built, and there is no C compiler (gcc): install one, or use "
            "the backend emulate"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        beside = Path(scratch) / library.name
        command = [compiler, *flags, "-shared", "-fPIC", f'-DKGRC_SOURCES="{digest}"']
        command += [*(str(KERNELS / name) for name in SOURCES), "-o", str(beside)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"{compiler} took more than {BUILD_SECONDS} s") from error
        if done.returncode:
            raise DeviceError(f"{compiler} refuses the kernels in C:\n{done.stderr[:2000]}")
        beside.replace(library)
    return library


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library with its functions declared.

    Raises:
        DeviceError: it cannot be built or loaded.
    """
    path = find_library()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise DeviceError(f"the kernels in C cannot be loaded: {error}") from error
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    library.kgrc_instructions.argtypes = (ctypes.c_char_p,)
    library.kgrc_instructions.restype = ctypes.POINTER(Instructions)
    library.kgrc_crew_new.argtypes = (ctypes.c_int, pointer, long)
    library.kgrc_crew_new.restype = pointer
    library.kgrc_crew_free.argtypes = (pointer,)
    library.kgrc_crew_free.restype = None
    library.kgrc_crew_threads.argtypes = (pointer,)
    library.kgrc_sizes.argtypes = (pointer,)
    library.kgrc_sizes.restype = None
    for name in ("kgrc_convolve", "kgrc_connect", "kgrc_pool"):
        function = getattr(library, name)
        function.argtypes, function.restype = (pointer, pointer, pointer), None
    return library


def choose_instructions(name: str | None = None) -> tuple[str, Instructions]:
    """The instructions of that name or that PYNQ_KGRC_NATIVE names, else this processor's best.

    Raises:
        DeviceError: there are none of that name, or this processor lacks them.
    """
    library = load_library()
    named = name or os.environ.get(VARIABLE)
    if named and named not in INSTRUCTIONS:
        raise DeviceError(f"no vector instructions {named!r}; there are {', '.join(INSTRUCTIONS)}")
    for candidate in (named,) if named else INSTRUCTIONS:
        found = library.kgrc_instructions(candidate.encode())
        if found:
            return candidate, found.contents
    raise DeviceError(f"this processor ({platform.machine()}) has no {named} instructions")
