"""Keys of clients: their file, what each may do, and which one a request has."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pynq_kgrc.errors import ConfigError

MIN_KEY = 16
"""Smallest length of a key, in characters."""
ROLES = ("classify", "manage")
"""What a key may do: send videos and clips; or also load and unload programs, and see all jobs."""
KEY_PROTOCOL = "kgrc.key."
"""A browser cannot set headers of a WebSocket; it sends the key as a subprotocol."""


@dataclass(frozen=True)
class Key:
    """A key, without its text."""

    name: str
    """How the log calls it."""
    digest: bytes
    """SHA-256 of the key."""
    role: str = "manage"
    """One of `ROLES`."""

    @property
    def manages(self) -> bool:
        """Whether it may load and unload programs, and see the jobs of other keys."""
        return self.role == "manage"


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file, one per line; `#` begins a comment line.

    A line is `KEY`, or `NAME ROLE KEY` with a role of `ROLES`. A key without a name may do all, and
    is named after its place in the file.

    Raises:
        ConfigError: the file cannot be read, has no key, a name twice, or a key that is too short.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a file of keys, one per line ({error})"
        ) from error
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not lines:
        raise ConfigError(
            f"{path}: has no key; write one per line, of {MIN_KEY} characters or more"
        )
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        words = line.split(None, 2)
        named = len(words) == 3 and words[1] in ROLES
        name, role, text = words if named else (f"key {number}", "manage", line)
        if not text.isprintable():
            raise ConfigError(
                f"{path}: key {number} has control characters, which no header of HTTP can carry"
            )
        if len(text) < MIN_KEY:
            raise ConfigError(
                f"{path}: key {number} has {len(text)} characters; use {MIN_KEY} or more"
            )
        if name in keys:
            raise ConfigError(f"{path}: two keys are named {name}; give each a name of its own")
        keys[name] = Key(name, hashlib.sha256(text.encode()).digest(), role)
    return tuple(keys.values())


def find_key(keys: tuple[Key, ...], head: Mapping[str, str]) -> Key | None:
    """The key that a request with these headers has; compared with all, in constant time."""
    scheme, _, text = head.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        text = head.get("x-api-key", "")
    for protocol in head.get("sec-websocket-protocol", "").split(","):
        if protocol.strip().startswith(KEY_PROTOCOL):
            coded = protocol.strip().removeprefix(KEY_PROTOCOL)
            try:
                text = base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4)).decode()
            except (binascii.Error, ValueError):
                text = ""
    digest = hashlib.sha256(text.strip().encode("utf-8", "replace")).digest()
    found = None
    for key in keys:
        if hmac.compare_digest(digest, key.digest):
            found = key
    return found
