"""The settings of the service; some have an option of `serve`, the others are fixed limits."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pynq_kgrc.errors import ConfigError
from pynq_kgrc.files import shipped_programs
from pynq_kgrc.graph import MAX_PIXELS, MAX_SECONDS
from pynq_kgrc.service.keys import Key


@dataclass(frozen=True)
class Settings:
    """Times are in seconds, sizes in bytes."""

    programs: Mapping[str, Path] = field(default_factory=dict)
    """Name -> file of each program that is loaded at the start; the first one is the default."""
    repository: Path | None = None
    """A folder of further programs, which clients may load while the service runs."""
    load_all: bool = False
    """Load the programs of `repository` at the start, too, those that a worker accepts."""
    backend: str = "emulate"
    workers: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    tls: tuple[Path, Path] | None = None
    """PEM files of a certificate (with its chain) and of its key; None: HTTP without TLS."""
    keys: tuple[Key, ...] = ()
    """Empty: no key is needed."""
    state: Path = Path("state")
    """Folder of the jobs' database, of copies of the programs, and of uploads."""

    queue: int = 16
    """Videos and inferences that may wait or run at a time; further ones get 429."""
    uploads: int = 64
    """Request bodies that may be received at a time; further ones get 429."""
    live: int = 4
    """Live sessions that may run at a time."""
    max_bytes: int = 200_000_000
    """Largest request body."""
    infer_bytes: int = 100_000_000
    """Memory for the bodies of all inference requests at a time; others wait to be read."""
    max_header_bytes: int = 32_768
    max_pixels: int = MAX_PIXELS
    """Largest frame, in pixels."""
    max_seconds: float = MAX_SECONDS
    """Of a longer video only the beginning is looked at."""
    max_window: int = 1024
    """Most frames of a video that one window may span."""

    header_seconds: float = 10.0
    """Time limit for the header of a request (slow-loris)."""
    body_seconds: float = 30.0
    """Time limit for a body, plus a second for every `body_rate` bytes that arrived."""
    body_rate: int = 50_000
    """Bytes per second."""
    send_seconds: float = 30.0
    """A connection is closed after this time in which the client does not read its answer."""
    wait_seconds: float = 25.0
    """A request waits at most this time for its result; then it is answered with a job."""
    clip_seconds: float = 120.0
    """Time limit of a clip on the device; then the worker counts as hung and is replaced."""
    job_seconds: float = 3600.0
    """Time limit of a job, or of an inference without a timeout of its own."""
    decode_seconds: float = 120.0
    """Processor time to decode a video; after it, what was decoded is the answer."""
    decode_bytes: int = 1_000_000_000
    """Address space that a decoder child may add."""
    drain_seconds: float = 1.0
    """Time after SIGTERM in which the service is not ready, but still accepts requests."""
    grace_seconds: float = 30.0
    """Time after that to finish accepted requests and jobs."""
    keep_seconds: float = 3600.0
    """How long results of jobs are kept."""
    free_bytes: int = 100_000_000
    """Bytes that stay free on the disk of `state`: an upload that would take them is refused with
    507. An announced size is reserved until it has arrived."""


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_settings(settings: Settings, insecure: bool) -> None:
    """Refuse settings that are insecure or cannot work.

    Raises:
        ConfigError: names the setting, and what would be accepted.
    """
    if not is_loopback(settings.host) and not settings.keys and not insecure:
        raise ConfigError(
            f"--host {settings.host} can be reached from other machines: give --api-key-file, or "
            f"--insecure to serve everyone without a key"
        )
    if not 0 <= settings.port < 65536:
        raise ConfigError(f"--port {settings.port}; accepted are 0 to 65535")
    if settings.repository is not None and not settings.repository.is_dir():
        raise ConfigError(f"--repository {settings.repository}: there is no such folder")
    if settings.load_all and settings.repository is None:
        raise ConfigError("--load-all loads what is in a folder: give --repository DIR")
    if settings.tls is not None:
        check_certificate(*settings.tls)


def check_certificate(certificate: Path, key: Path) -> None:
    """Refuse files that no TLS server can use.

    Raises:
        ConfigError: a file cannot be read, is not PEM, needs a passphrase, or the two do not
            belong together.
    """
    for option, path in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{option} {path}: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # without a function here, OpenSSL asks for a passphrase on the terminal
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--tls-cert {certificate} and --tls-key {key} are no certificate and its key: give "
            f"two PEM files that belong together, the key without a passphrase ({error})"
        ) from error


def state_folder(port: int) -> Path:
    """The default of --state: one folder for each port, below $XDG_STATE_HOME."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "pynq_kgrc" / f"serve-{port}"


def shipped_program() -> Path:
    """The program that comes with this package.

    Raises:
        ConfigError: no program comes with it, or several.
    """
    programs = shipped_programs()
    if len(programs) != 1:
        names = ", ".join(str(path) for path in programs) or "none"
        raise ConfigError(f"give a program: --program FILE (this package comes with: {names})")
    return programs[0]
