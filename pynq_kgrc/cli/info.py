"""The command info, and how a program is described."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pynq_kgrc.cli.arguments import Declare

if TYPE_CHECKING:
    from pynq_kgrc.program import Program


def declare(command: Declare) -> None:
    """Add this file's command."""
    info = command("info", run_info, "show what a program holds")
    info.add_argument("program", type=Path)


def run_info(options: argparse.Namespace) -> int:
    from pynq_kgrc.program import load

    print_description(describe(load(options.program)), options.json)
    return 0


def describe(program: Program) -> dict[str, Any]:
    """What a program holds, as plain data: sizes in bytes, operations in MACs."""
    from pynq_kgrc.analysis.description import describe

    return describe(program)


def print_description(document: dict[str, Any], as_json: bool) -> None:
    """Print it, for a person or for a script."""
    if as_json:
        print(json.dumps(document, indent=2))
        return
    print(f"{summary(document)}\n")
    wide = max(len(row["name"]) for row in document["tasks"])
    snr = document.get("fidelity", {}).get("snr_db", {})
    for row in document["tasks"]:
        print(_task_line(row, wide, snr))
    if "fidelity" in document:
        report = document["fidelity"]
        print(f"\nfirst label as in float on {report['agreeing']} of {report['clips']} clips")


def summary(document: dict[str, Any]) -> str:
    """A description in four lines."""
    clip = document["clip"]
    return (
        f"{document['name']} for {document['accelerator']} ({document['bits']} bits, "
        f"digest {document['accelerator_digest']})\n"
        f"clip {clip['frames']} x {clip['height']} x {clip['width']}, "
        f"{document['classes'] or 'unnamed'} classes\n"
        f"weights {document['weight_bytes'] / 1e6:.1f} MB, activations at their peak "
        f"{document['activation_peak_bytes'] / 1e6:.1f} MB\n"
        f"operations {document['macs_dense'] / 1e9:.2f} GMAC dense, "
        f"{document['macs_kept'] / 1e9:.2f} kept: "
        f"{document['macs_dense'] / max(1, document['macs_kept']):.2f}x fewer"
    )


def _task_line(row: dict[str, Any], wide: int, snr: dict[str, float]) -> str:
    shape = " x ".join(map(str, row["in"])) + " -> " + " x ".join(map(str, row["out"]))
    kernel = "x".join(map(str, row["kernel"]))
    line = f"{row['name']:{wide}}  {row['mode']:12} {kernel:7} {shape}"
    if "macs_kept" in row:
        line += f"  {row['macs_kept'] / 1e6:.0f} of {row['macs_dense'] / 1e6:.0f} MMAC"
        line += f"  {row['weight_bytes'] / 1e3:.0f} kB"
        line += "".join(f"  +{rider}" for rider in row["rides"])
    if row["name"] in snr:
        line += f"  {snr[row['name']]:.1f} dB"
    return line
