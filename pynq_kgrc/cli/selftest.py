"""The command selftest: checks a board step by step, and prints a table for a report."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pynq_kgrc.backends.board import SIMULATE, simulation_requested
from pynq_kgrc.cli.arguments import (
    DAY,
    PROGRAM_HELP,
    Declare,
    positive,
    program_file,
    progress,
    say,
    whole,
)
from pynq_kgrc.cli.doctor import add_board, board_design
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.version import VERSION

NO_BOARD = 3
"""Exit status where there is no board at all."""


def declare(command: Declare) -> None:
    """Add this file's command."""
    selftest = command(
        "selftest",
        run_selftest,
        "test a board: memory, every mode bit for bit, counters, speed, interrupts, power",
        "Nine steps: 1 machine, 2 programming, 3 memory through each port, 4 known answers of\n"
        "every mode, 5 counters against the model, 6 speed, 7 interrupts, 8 repeats, 9 power.\n"
        "It programs the device and stops whatever runs on it. Step 6 compares counted clock\n"
        "cycles with modelled ones.\n"
        "Exit status 0 if all steps that apply passed, 1 if one failed, 2 for wrong arguments,\n"
        f"{NO_BOARD} if there is no board. {SIMULATE}=1 tests the simulated board.",
    )
    add_board(selftest, "the accelerator that the overlay is of")
    selftest.add_argument(
        "-p",
        "--program",
        type=Path,
        help=f"{PROGRAM_HELP}; it is run as well, its design is tested",
    )
    selftest.add_argument(
        "--repeats", type=positive, default=100, help="runs of step 8 (default: 100)"
    )
    selftest.add_argument(
        "--limit",
        type=whole(1, DAY),
        default=300,
        metavar="SECONDS",
        help="a step that takes longer has failed (default: 300)",
    )


def run_selftest(options: argparse.Namespace) -> int:
    from pynq_kgrc.backends.board.machine import CHECKS, Asked, is_board, run_checks
    from pynq_kgrc.program import load

    program = None if options.program is None else load(program_file(options.program))
    if program is None:
        config = board_design(options.design, options.overlay)
    else:
        config = program.config
        if options.design is not None:
            asked = board_design(options.design, options.overlay)
            if asked.digest != config.digest:
                raise ConfigError(
                    f"--design {options.design}: {options.program} is compiled for {config.name}; "
                    f"leave --design out"
                )
    if not is_board():
        return _complain(
            options,
            "there is no board to test here: no PYNQ image and no FPGA manager. `pynq-kgrc doctor` "
            f"says what is missing; {SIMULATE}=1 tests the simulated board",
            NO_BOARD,
        )
    (pynq,) = run_checks("board", {"pynq": CHECKS["pynq"]}, Asked(config, options.overlay))
    try:
        from pynq_kgrc.analysis.selftest import FAILED, OK, SelfTest, StepResult, as_data
    except ImportError as error:
        return _complain(options, f"pynq: {pynq.found} ({error}); {pynq.cure}", 1)

    test = SelfTest(
        config,
        options.overlay,
        program,
        repeats=options.repeats,
        limit=options.limit,
        progress=progress,
    )
    results: list[StepResult] = []
    wide = max(map(len, test.steps))
    for result in test.run():
        results.append(result)
        if not options.json:
            say(f"{result.number}  {result.name:{wide}}  {result.state:7}  {result.found}")
            for part in result.parts:
                say(f"   {'':{wide}}  {part.state:7}  {part.name}: {part.found}")
    versions = {
        "board": "simulated" if simulation_requested() else "real",
        "design": config.name,
        "digest": config.digest,
        "tool": test.tool or "unknown",
        "pynq_kgrc": VERSION,
        "pynq": pynq.found.split(";")[0],
        "python": f"{platform.python_version()} on {platform.machine()}",
        "image": next(p.found.split(" -> ")[0] for p in results[0].parts if p.name == "image"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    failed = [result for result in results if result.state == FAILED]
    if options.json:
        steps: list[dict[str, Any]] = [as_data(result) for result in results]
        print(json.dumps({"works": not failed, **versions, "steps": steps}, indent=2))
    else:
        print()
        for name, text in versions.items():
            print(f"{name:9}  {text}")
        print(f"\n{_verdict(results, OK, FAILED)}")
    return 1 if failed else 0


def _complain(options: argparse.Namespace, text: str, status: int) -> int:
    """Say why no step was run; with --json as a document too."""
    if options.json:
        print(json.dumps({"works": False, "error": text, "steps": []}, indent=2))
    print(f"pynq-kgrc: {text}", file=sys.stderr)
    return status


def _verdict(results: list[Any], ok: str, failed: str) -> str:
    kind = "The simulated board" if simulation_requested() else "The board"
    bad = [f"{r.number} {r.name}" for r in results if r.state == failed]
    left = [f"{r.number} {r.name}" for r in results if r.state not in (ok, failed)]
    text = f"{kind} fails: {', '.join(bad)}" if bad else f"{kind} passes all steps that apply"
    return f"{text}; skipped: {', '.join(left) or 'none'}."
