"""What a person can set of the service, and the limits that hold for everybody."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from pynq_kgrc.errors import ConfigError

MIN_KEY = 16
"""Characters of a key, at least."""


@dataclass(frozen=True)
class Settings:
    """Times are in seconds, sizes in bytes."""

    programs: tuple[Path, ...] = ()
    """Loaded at the start; each is named after its file."""
    repository: Path | None = None
    """A folder of programs that may be loaded while the service runs."""
    backend: str = "emulate"
    workers: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[bytes, ...] = ()
    """SHA-256 of each key; none: no key is asked for."""
    state: Path = Path("state")
    """Folder of the finished jobs and of copies of the programs."""

    queue: int = 16
    """Videos and inferences that are waiting or running; more are refused with 429."""
    uploads: int = 64
    """Bodies being received at a time."""
    live: int = 4
    """Live sessions at a time."""
    max_bytes: int = 200_000_000
    """Of a body."""
    max_json_bytes: int = 32_000_000
    """Of the JSON of a body."""
    max_header_bytes: int = 32_768
    max_pixels: int = 1920 * 1088
    """Of a frame."""
    max_seconds: float = 600.0
    """Of a video."""
    max_window: int = 1024
    """Frames of a video that one window may span."""

    header_seconds: float = 10.0
    """For the head of a request."""
    body_seconds: float = 30.0
    """For a body, plus a second for every `body_rate` bytes that arrived."""
    body_rate: int = 50_000
    send_seconds: float = 30.0
    """A client that reads nothing of its answer for so long is gone."""
    wait_seconds: float = 25.0
    """A request waits so long for its result; then it becomes a job."""
    clip_seconds: float = 120.0
    """The device may take so long for a clip; then it counts as hung."""
    job_seconds: float = 3600.0
    decode_seconds: float = 120.0
    """Processor time to decode a video."""
    decode_bytes: int = 1_000_000_000
    """Memory that decoding may add."""
    drain_seconds: float = 1.0
    """After SIGTERM: not ready, but still answering."""
    grace_seconds: float = 30.0
    """After that: accepted work is finished."""
    keep_seconds: float = 3600.0
    """Results of jobs are kept so long."""
    free_bytes: int = field(default=100_000_000)
    """Left free on the disk; an upload that would take them is refused with 507."""


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The SHA-256 of each key of a file, one key a line; `#` begins a comment.

    Raises:
        ConfigError: no such file, no key in it, or one that is too short.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no file of keys, one a line ({error})") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path}: holds no key; write one a line, {MIN_KEY} characters or more")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY:
            raise ConfigError(
                f"{path}: key {number} has {len(key)} characters; use {MIN_KEY} or more"
            )
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_settings(settings: Settings, insecure: bool) -> None:
    """Refuse what would be dangerous or cannot work.

    Raises:
        ConfigError: says which setting, and what would be accepted.
    """
    if not is_loopback(settings.host) and not settings.keys and not insecure:
        raise ConfigError(
            f"--host {settings.host} can be reached from outside: give --api-key-file, or "
            f"--insecure if everybody there may use the device"
        )
    if settings.backend == "board" and settings.workers > 1:
        raise ConfigError(f"--workers {settings.workers}: a board takes one")
    if not 0 <= settings.port < 65536:
        raise ConfigError(f"--port {settings.port}; accepted are 0 to 65535")
    if settings.repository is not None and not settings.repository.is_dir():
        raise ConfigError(f"--repository {settings.repository}: there is no such folder")


def state_folder(port: int) -> Path:
    """Where a service keeps its jobs if nobody says: one folder a port."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "pynq_kgrc" / f"serve-{port}"


def shipped_programs() -> tuple[Path, ...]:
    """The programs that come with this package."""
    return tuple(sorted((Path(__file__).parent.with_name("programs")).glob("*.kgrc")))


def shipped_program() -> Path:
    """The one program that comes with this package.

    Raises:
        ConfigError: there is none, or more than one.
    """
    programs = shipped_programs()
    if len(programs) != 1:
        names = ", ".join(str(path) for path in programs) or "none"
        raise ConfigError(f"say which program: --program FILE (shipped are: {names})")
    return programs[0]
