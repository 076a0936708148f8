"""What the reports of all benchmarks share: command, time, computer, versions; tables; writing."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from pynq_kgrc.files import written_beside

ROOT = Path(__file__).resolve().parents[1]


def circumstances(script: str, packages: Iterable[str]) -> dict[str, Any]:
    """The command, the time, the revision, the computer and the versions."""
    return {
        "command": "python " + shlex.join([os.path.relpath(script, ROOT), *sys.argv[1:]]),
        "when": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "revision": revision(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


def machine() -> dict[str, Any]:
    """The computer: processor, its vector instructions, cores, memory, system."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    vector_instructions = ("avx2", "avx512f", "avx512_vnni", "amx_int8", "neon", "asimd", "asimddp")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "instructions": [flag for flag in vector_instructions if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages,
        "system": platform.platform(),
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def revision() -> str:
    """The commit of this checkout, with `-dirty` if there are changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def where(doc: dict[str, Any]) -> list[str]:
    """Lines of Markdown: the computer, the versions, the revision."""
    host = doc["machine"]
    versions = ", ".join(f"{name} {text}" for name, text in doc["versions"].items())
    instructions = ", ".join(host["instructions"]) or "unknown"
    return [
        "",
        "## Where",
        "",
        f"- {host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 1e9:.0f} GB; "
        f"instructions: {instructions}; {host['system']}",
        f"- {versions}; revision {doc['revision']}",
    ]


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first are aligned right."""
    cells = [head, *rows]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: list[str]) -> str:
        padded = (
            c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, wide, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = [("-" * (w - 1) + ":") if i else "-" * w for i, w in enumerate(wide)]
    return [line(head), line(rule), *map(line, rows)]


def write(folder: Path, name: str, text: str) -> None:
    """Replace a report atomically: readers see the old or the new one, never a part."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / name) as path:
        path.write_text(text, encoding="utf-8")
