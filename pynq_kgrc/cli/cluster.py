"""Commands of scale-out: batch and cluster."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pynq_kgrc.cli.arguments import Declare, add_sampling, positive, progress
from pynq_kgrc.errors import ConfigError

BATCH = """\
Every file below FOLDER gets a row, sorted by path: labels and scores (probabilities), windows,
notes; or, if it is no video or is damaged, what is wrong with it, in the column error. Hidden
files are left out. The rows are those of `classify`, to the last bit, however many workers there
are.

Stop it whenever you like, or pull the plug: started again with the same options it looks only at
what is missing, or has changed since. Until all is done the rows lie in RESULTS.parquet.partial.
Other options, or another program, are refused for as long as old results are there.

Ray starts the workers on this machine, or on the cluster of --address, whose machines have to see
the same files. Its telemetry and dashboard are off.
"""

CLUSTER = """\
Boards are instances of `pynq-kgrc serve`, each on its board; emulators run here, or on the cluster
of --address. Clients ask as they would ask one of them:

  curl --data-binary @video.mp4 -H 'Content-Type: video/mp4' \\
      'http://127.0.0.1:9000/v1/videos:classify?top_k=3'

A device gets one video at a time. One that answers 503 or 429, or not at all, leaves the rotation
until its /v2/health/ready is good again; the video that met it is sent to another one, once.
/v1/devices says who is in the rotation, and why not. The client's key is passed on to the boards.
On a Ray cluster of your own, `serve run pynq_kgrc.cluster.serving:build boards=URL,URL` does the
same.
"""


def declare(command: Declare) -> None:
    """Add this file's commands."""
    batch = command("batch", run_batch, "name the actions in a whole archive of videos", BATCH)
    batch.add_argument("folder", type=Path, metavar="FOLDER")
    batch.add_argument(
        "-o", "--out", type=Path, required=True, metavar="RESULTS.parquet", help="the table"
    )
    batch.add_argument(
        "-p",
        "--program",
        type=Path,
        help="a compiled .kgrc (default: the one that ships with this package)",
    )
    batch.add_argument("--backend", default="emulate", help="what runs it (default: emulate)")
    batch.add_argument(
        "--workers", type=positive, help="processes (default: one a core; one for a board)"
    )
    batch.add_argument("--top", type=positive, default=5, help="labels of a row (default: 5)")
    add_sampling(batch)
    batch.add_argument(
        "--file-limit",
        type=positive,
        default=600,
        metavar="SECONDS",
        help="a worker that takes longer for a file is replaced (default: 600)",
    )
    _add_address(batch)
    batch.add_argument(
        "--anew", action="store_true", help="throw away what is at RESULTS.parquet, and start over"
    )

    cluster = command("cluster", run_cluster, "put many boards behind one endpoint", CLUSTER)
    cluster.add_argument(
        "--board",
        action="append",
        default=[],
        metavar="URL",
        help="of a pynq-kgrc serve; may be given more than once",
    )
    cluster.add_argument(
        "--emulators", type=int, default=0, metavar="N", help="emulations to start (default: 0)"
    )
    cluster.add_argument(
        "-p",
        "--program",
        type=Path,
        help="of the emulators (default: the one that ships with this package)",
    )
    cluster.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    cluster.add_argument("--port", type=positive, default=9000, help="port (default: 9000)")
    cluster.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="keys, one a line, as serve takes them"
    )
    cluster.add_argument(
        "--insecure", action="store_true", help="no key, though others can reach the endpoint"
    )
    cluster.add_argument(
        "--max-bytes", type=positive, default=50_000_000, help="of a video (default: 50000000)"
    )
    cluster.add_argument(
        "--queue",
        type=positive,
        default=16,
        help="videos waiting or running; more are refused with 429 (default: 16)",
    )
    cluster.add_argument(
        "--wait",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="a video waits so long for a device (default: 60)",
    )
    cluster.add_argument(
        "--limit",
        type=positive,
        default=600,
        metavar="SECONDS",
        help="a device that takes longer for a video rests (default: 600)",
    )
    _add_address(cluster)


def _add_address(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address",
        default="local",
        metavar="HOST:PORT",
        help="of a Ray cluster that runs already; RAY_AUTH_MODE=token where it asks for its token",
    )


def run_batch(options: argparse.Namespace) -> int:
    try:
        from pynq_kgrc.cluster.batch import Batch, classify_archive
    except ImportError as error:
        raise needs_ray(error) from error
    from pynq_kgrc.backends.emulation.crew import available_cores
    from pynq_kgrc.service.settings import shipped_program

    workers = options.workers or (1 if options.backend == "board" else available_cores())
    batch = Batch(
        folder=options.folder,
        program=options.program or shipped_program(),
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
        print("pynq-kgrc: stopped; what was found is kept for the next run", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps({"out": str(options.out), **vars(found)}))
    else:
        kept = f", {found.kept} of them from an earlier run" if found.kept else ""
        errors = f"; {found.errors} could not be read (column error)" if found.errors else ""
        print(f"{options.out}: {found.rows} rows{kept}{errors}")
    return 0


def run_cluster(options: argparse.Namespace) -> int:
    try:
        from pynq_kgrc.cluster.serving import Layout
        from pynq_kgrc.cluster.serving import run_cluster as serve_cluster
    except ImportError as error:
        raise needs_ray(error) from error
    from pynq_kgrc.service.settings import Settings, check_settings, read_keys

    keys = read_keys(options.api_key_file) if options.api_key_file else ()
    check_settings(Settings(host=options.host, port=options.port, keys=keys), options.insecure)
    layout = Layout(
        boards=",".join(options.board),
        emulators=options.emulators,
        program=str(options.program or ""),
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
    """What to say where Ray is not installed."""
    return ConfigError(
        f"this needs Ray, which is large and not installed by default ({error}): "
        f"pip install pynq_kgrc[cluster,serve]"
    )
