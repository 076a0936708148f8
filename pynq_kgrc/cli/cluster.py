"""Commands of scale-out: batch and cluster."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pynq_kgrc.cli.arguments import (
    DAY,
    PROGRAM_HELP,
    Declare,
    add_sampling,
    add_top,
    file_to_write,
    positive,
    printable,
    program_file,
    progress,
    readable,
    whole,
)
from pynq_kgrc.errors import ConfigError, to_install

BATCH = """\
Every file below FOLDER gets a row in a Parquet table, sorted by path. The columns are labels (each
a label and its confidence, which is a probability), windows, notes and error. A file that is not a
video, or is damaged, has an error and no labels; the exit status is then 2. Hidden files are left
out. The results are those of `classify`, bit for bit, with any number of workers.

The command can be stopped or killed at any moment. Started again with the same options, it
classifies only the files that have no result yet or have changed. Until all files have a result,
the results are in RESULTS.parquet.partial. A run with another program or other options is refused
as long as old results are there.

Ray starts the workers on this machine, or on the cluster of --address, whose machines must see the
same files. Its telemetry and dashboard are off.
"""

CLUSTER = """\
A load balancer. Each board runs `pynq-kgrc serve`; emulators run on this machine, or on the cluster
of --address. The page, jobs, live sessions and the Open Inference Protocol over HTTP are as on one
board, /metrics counts what each device did, and a client sends the same request:

  curl --data-binary @video.mp4 -H 'Content-Type: video/mp4' \\
      'http://127.0.0.1:9000/v1/videos:classify?top_k=3'

A device gets one video or inference at a time. A device that answers 503 or 429, or does not
answer, leaves the rotation until its /v2/health/ready succeeds; its video is sent to one other
device. /v1/devices lists the devices, and why one is out of the rotation. The client's key is
passed on to the boards.
On your own Ray cluster, `serve run pynq_kgrc.cluster.serving:build boards=URL,URL` does the same.
"""


def declare(command: Declare) -> None:
    """Add this file's commands."""
    batch = command("batch", run_batch, "recognize actions in a whole archive of videos", BATCH)
    batch.add_argument("folder", type=Path, metavar="FOLDER")
    batch.add_argument(
        "-o",
        "--out",
        type=file_to_write,
        required=True,
        metavar="RESULTS.parquet",
        help="the table to write",
    )
    batch.add_argument(
        "-p",
        "--program",
        type=Path,
        help=f"{PROGRAM_HELP} (default: the one that comes with this package)",
    )
    batch.add_argument(
        "--backend", default="emulate", help="emulate, native, csim or board (default: emulate)"
    )
    batch.add_argument(
        "--workers",
        type=whole(1, 1024),
        help="number of processes (default: one per core; one for a board)",
    )
    add_top(batch, "labels per row and window")
    add_sampling(batch)
    batch.add_argument(
        "--file-limit",
        type=whole(1, DAY),
        default=600,
        metavar="SECONDS",
        help="time limit of a file, after which its worker is replaced (default: 600)",
    )
    _add_address(batch)
    batch.add_argument(
        "--anew", action="store_true", help="discard the results at RESULTS.parquet and start over"
    )

    cluster = command("cluster", run_cluster, "put many boards behind one endpoint", CLUSTER)
    cluster.add_argument(
        "--board",
        action="append",
        default=[],
        metavar="URL",
        help="address of a pynq-kgrc serve; may be given more than once",
    )
    cluster.add_argument(
        "--emulators",
        type=whole(0, 1024),
        default=0,
        metavar="N",
        help="number of emulations to start (default: 0)",
    )
    cluster.add_argument(
        "-p",
        "--program",
        type=Path,
        help=f"program of the emulators: {PROGRAM_HELP} (default: the one that comes with this "
        "package)",
    )
    cluster.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    cluster.add_argument(
        "--port", type=whole(1, 65535), default=9000, help="port to listen on (default: 9000)"
    )
    cluster.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys, one per line, as for serve"
    )
    cluster.add_argument(
        "--insecure",
        action="store_true",
        help="allow other machines to use the endpoint without a key",
    )
    cluster.add_argument(
        "--max-bytes", type=positive, default=50_000_000, help="largest video (default: 50000000)"
    )
    cluster.add_argument(
        "--queue",
        type=whole(1, 10_000),
        default=16,
        help="videos that may wait or run; further ones get 429 (default: 16)",
    )
    cluster.add_argument(
        "--wait",
        type=whole(1, DAY),
        default=60,
        metavar="SECONDS",
        help="time a video waits for an idle device (default: 60)",
    )
    cluster.add_argument(
        "--limit",
        type=whole(1, DAY),
        default=600,
        metavar="SECONDS",
        help="time limit of a video, after which its device leaves the rotation (default: 600)",
    )
    _add_address(cluster)


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address",
        default="local",
        metavar="HOST:PORT",
        help="address of a running Ray cluster; set RAY_AUTH_MODE=token if it needs a token",
    )


def run_batch(options: argparse.Namespace) -> int:
    try:
        from pynq_kgrc.cluster.batch import Batch, classify_archive
    except ImportError as error:
        raise needs_ray(error) from error
    from pynq_kgrc.backends.base import backend_class
    from pynq_kgrc.backends.cores import available_cores
    from pynq_kgrc.service.settings import shipped_program

    exclusive = backend_class(options.backend).exclusive
    workers = options.workers or (1 if exclusive else available_cores())
    batch = Batch(
        folder=options.folder,
        program=program_file(options.program) if options.program else shipped_program(),
        out=options.out,
        backend=options.backend,
        top=options.top,
        stride=options.stride,
        sampling=options.sampling,
        workers=workers,
        file_seconds=options.file_limit,
        address=options.address,
        anew=options.anew,
    )
    try:
        found = classify_archive(
            batch, lambda rows, total: progress(rows, options.folder.name or "videos", total)
        )
    except KeyboardInterrupt:
        print("pynq-kgrc: stopped; the results so far are kept for the next run", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps({"out": readable(options.out), **vars(found)}))
    else:
        kept = f", {found.kept} of them from an earlier run" if found.kept else ""
        errors = f"; {found.errors} could not be read (column error)" if found.errors else ""
        print(f"{printable(options.out)}: {found.rows} rows{kept}{errors}")
    if found.errors:
        text = f"{found.errors} of {found.rows} files could not be read; see the column error"
        print(f"pynq-kgrc: {text}", file=sys.stderr)
    return 2 if found.errors else 0


def run_cluster(options: argparse.Namespace) -> int:
    try:
        from pynq_kgrc.cluster.serving import Layout
        from pynq_kgrc.cluster.serving import run_cluster as serve_cluster
    except ImportError as error:
        raise needs_ray(error) from error
    from pynq_kgrc.cli.serve import named_program
    from pynq_kgrc.service.keys import read_keys
    from pynq_kgrc.service.settings import Settings, check_settings

    keys = read_keys(options.api_key_file) if options.api_key_file else ()
    check_settings(Settings(host=options.host, port=options.port, keys=keys), options.insecure)
    name, program = named_program(options.program) if options.program else ("", "")
    layout = Layout(
        boards=",".join(options.board),
        emulators=options.emulators,
        program=str(program),
        name=name,
        keys=str(options.api_key_file.absolute()) if options.api_key_file else "",
        insecure=options.insecure,
        max_bytes=options.max_bytes,
        queue=options.queue,
        wait_seconds=options.wait,
        answer_seconds=options.limit,
    )

    out = sys.stdout

    def announce(url: str) -> None:
        print(json.dumps({"url": url}) if options.json else url, file=out, flush=True)

    serve_cluster(layout, options.host, options.port, options.address, announce)
    return 0


def needs_ray(error: ImportError) -> ConfigError:
    """The error if Ray is not installed."""
    return ConfigError(
        f"this command needs Ray, which is not installed by default because it is large ({error}): "
        f"{to_install('cluster,serve')}"
    )
