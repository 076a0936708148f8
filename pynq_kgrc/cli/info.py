"""The command info, and how a description of a program is printed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pynq_kgrc.cli.arguments import PROGRAM_HELP, Declare, program_file

if TYPE_CHECKING:
    from pynq_kgrc.analysis.documents import ProgramDescription, TaskDescription
    from pynq_kgrc.program import Program

ONE_TAP = 0.5
"""From this share of the time in convolutions of one tap, `info` names explore."""


def declare(command: Declare) -> None:
    """Add this file's command."""
    info = command("info", run_info, "show the layers, sizes and operations of a program")
    info.add_argument("program", type=Path, metavar="PROGRAM", help=PROGRAM_HELP)


def run_info(options: argparse.Namespace) -> int:
    from pynq_kgrc.analysis.description import describe
    from pynq_kgrc.program import load

    program = load(program_file(options.program))
    print_description(describe(program), options.json)
    if not options.json and (hint := _hint(program)):
        print(f"\n{hint}")
    return 0


def _hint(program: Program) -> str:
    """Advice where most of the time is in layers that leave columns of the array idle; else ""."""
    from pynq_kgrc.analysis.timing import one_tap_share

    config = program.config
    share = one_tap_share(program)
    if config.pk == 1 or share < ONE_TAP:
        return ""
    return (
        f"{share:.0%} of the modelled time is in convolutions of one tap, which use one of the "
        f"P_K = {config.pk} columns of {config.name}: `pynq-kgrc explore -p PROGRAM` searches "
        f"designs with other P_K"
    )


def print_description(document: ProgramDescription, as_json: bool) -> None:
    """Print a description as JSON, or as text with a line for each task."""
    if as_json:
        print(json.dumps(msgspec.to_builtins(document), indent=2))
        return
    print(f"{summary(document)}\n")
    width = max(len(task.name) for task in document.tasks)
    fidelity = document.fidelity
    snr_db = {} if fidelity is msgspec.UNSET else fidelity.snr_db
    for task in document.tasks:
        print(_task_line(task, width, snr_db.get(task.name)))
    if fidelity is not msgspec.UNSET:
        print(f"\nfirst label as in float on {fidelity.agreeing} of {fidelity.clips} clips")


def summary(document: ProgramDescription) -> str:
    """A description in five lines, without its tasks."""
    clip = document.clip
    unit, symbol = (1e9, "GMAC") if document.macs_dense >= 1e9 else (1e6, "MMAC")
    taps = "" if document.folded is msgspec.UNSET else "x".join(map(str, document.folded))
    folded = f"; {taps} taps of {document.tasks[0].name} are written as channels" if taps else ""
    softmax = "; the runtime applies its soft-max" if document.softmax is True else ""
    array = 0 if document.macs_array is msgspec.UNSET else document.macs_array
    return (
        f"{document.name} for {document.accelerator} ({document.bits} bits, "
        f"digest {document.accelerator_digest})\n"
        f"clip {clip.frames} x {clip.height} x {clip.width}, "
        f"{document.classes or 'unnamed'} classes{folded}{softmax}\n"
        f"weights {document.weight_bytes / 1e6:.1f} MB, activations at their peak "
        f"{document.activation_peak_bytes / 1e6:.1f} MB\n"
        f"on the array {array / unit:.2f} {symbol}, zeros in kernel groups included\n"
        f"operations {document.macs_dense / unit:.2f} {symbol} dense, "
        f"{document.macs_kept / unit:.2f} kept: "
        f"{document.macs_dense / max(1, document.macs_kept):.2f}x fewer"
    )


def _task_line(task: TaskDescription, width: int, snr_db: float | None) -> str:
    shape = " x ".join(map(str, task.in_)) + " -> " + " x ".join(map(str, task.out))
    kernel = "x".join(map(str, task.kernel))
    line = f"{task.name:{width}}  {task.mode:12} {kernel:7} {shape}"
    if (
        task.macs_kept is not msgspec.UNSET
        and task.macs_dense is not msgspec.UNSET
        and task.weight_bytes is not msgspec.UNSET
        and task.rides is not msgspec.UNSET
    ):
        line += f"  {task.macs_kept / 1e6:.0f} of {task.macs_dense / 1e6:.0f} MMAC"
        line += f"  {task.weight_bytes / 1e3:.0f} kB"
        line += "".join(f"  +{part}" for part in task.rides)
    if snr_db is not None:
        line += f"  {snr_db:.1f} dB"
    return line
