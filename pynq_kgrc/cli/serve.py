"""The command serve."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pynq_kgrc.cli.arguments import (
    DAY,
    PROGRAM_HELP,
    Declare,
    positive,
    printable,
    program_file,
    whole,
)
from pynq_kgrc.errors import ConfigError, to_install
from pynq_kgrc.graph import MAX_PIXELS, MAX_SECONDS

MORE = """\
Send a video from another terminal:

  curl --data-binary @video.mp4 -H 'Content-Type: video/mp4' \\
      'http://127.0.0.1:8000/v1/videos:classify?top_k=3'

or open http://127.0.0.1:8000 in a browser and drop a video there, or use the webcam. KServe and
Triton clients (Open Inference Protocol v2 over HTTP) use the same programs below /v2; /docs lists
all routes. Only this machine can reach the service unless --host is given; then a key is needed.
On SIGTERM the service finishes accepted work for at most --grace seconds. See docs/service.md.
"""


def declare(command: Declare) -> None:
    """Add this file's command."""
    serve = command("serve", run_serve, "recognize actions in videos, over HTTP", MORE)
    serve.add_argument(
        "-p",
        "--program",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"{PROGRAM_HELP}, to load at the start; may be given more than once, the first is "
        "the default one; i3d-kinetics400 is fetched if it is not in the cache (default: "
        "i3d-kinetics400 where it is in the cache, and the program that ships)",
    )
    serve.add_argument(
        "--repository", type=Path, metavar="DIR", help="a folder of programs that clients may load"
    )
    serve.add_argument(
        "--load-all",
        action="store_true",
        help="load all programs of --repository at the start; without --program they take the "
        "place of those that ship",
    )
    serve.add_argument(
        "--backend",
        default="auto",
        help="emulate, native, csim, board, or auto: the first of board, native and emulate that "
        "there is (default: auto)",
    )
    serve.add_argument(
        "--workers", type=whole(1, 1024), default=1, help="processes that run clips (default: 1)"
    )
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    serve.add_argument(
        "--port", type=whole(0, 65535), default=8000, help="port to listen on; 0: any free one"
    )
    serve.add_argument(
        "--tls-cert",
        type=Path,
        metavar="FILE",
        help="serve HTTPS (and gRPC) with this certificate and its chain, a PEM file",
    )
    serve.add_argument(
        "--tls-key",
        type=Path,
        metavar="FILE",
        help="the certificate's private key, a PEM file without a passphrase",
    )
    serve.add_argument(
        "--grpc-port",
        type=whole(0, 65535),
        metavar="PORT",
        help="serve the Open Inference Protocol over gRPC as well, on this port; "
        "0: any free one (Triton's is 8001; default: no gRPC)",
    )
    serve.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys, one per line: KEY, or NAME ROLE KEY with the role classify or manage (may load "
        "and unload programs); clients send Authorization: Bearer KEY",
    )
    serve.add_argument(
        "--insecure",
        action="store_true",
        help="allow other machines to use the service without a key",
    )
    serve.add_argument(
        "--max-bytes", type=positive, default=200_000_000, help="largest video (default: 200000000)"
    )
    serve.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        help=f"largest frame of a video, in pixels (default: {MAX_PIXELS}, which takes in 4K)",
    )
    serve.add_argument(
        "--max-seconds",
        type=whole(1, DAY),
        default=round(MAX_SECONDS),
        metavar="SECONDS",
        help="of a longer video only that much is looked at, and the answer says so "
        f"(default: {MAX_SECONDS:g})",
    )
    serve.add_argument(
        "--decode-seconds",
        type=whole(1, DAY),
        default=120,
        metavar="SECONDS",
        help="processor time to decode a video; after it, what was decoded is the answer "
        "(default: 120)",
    )
    serve.add_argument(
        "--uploads",
        type=whole(1, 10_000),
        default=64,
        help="uploads that are received at a time; further ones get 429 (default: 64)",
    )
    serve.add_argument(
        "--live",
        type=whole(1, 10_000),
        default=4,
        help="live sessions at a time; further ones get 429 (default: 4)",
    )
    serve.add_argument(
        "--queue",
        type=whole(1, 10_000),
        default=16,
        help="videos that may wait or run; further ones get 429 (default: 16)",
    )
    serve.add_argument(
        "--wait",
        type=whole(1, DAY),
        default=25,
        metavar="SECONDS",
        help="time a request waits for its result before it gets a job's address (default: 25)",
    )
    serve.add_argument(
        "--clip-limit",
        type=whole(1, DAY),
        default=120,
        metavar="SECONDS",
        help="time limit of a clip, after which the device counts as hung (default: 120)",
    )
    serve.add_argument(
        "--grace",
        type=whole(1, DAY),
        default=30,
        metavar="SECONDS",
        help="time to finish accepted work after SIGTERM (default: 30)",
    )
    serve.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="folder for results of jobs and uploads (default: below $XDG_STATE_HOME)",
    )


def choose_programs(options: argparse.Namespace) -> tuple[dict[str, Path], list[str]]:
    """Name -> file of the programs to load at the start, and what to say about them.

    Raises:
        KgrcError: a program of `--program` cannot be made, or two have one name.
    """
    from pynq_kgrc.files import shipped_programs

    shipped = {path.stem: path for path in shipped_programs()}
    if options.program:
        return _named_programs(options.program, shipped)
    if options.load_all and any((options.repository or Path()).glob("*.kgrc")):
        return {}, []
    from pynq_kgrc.backends.chosen import installed_design
    from pynq_kgrc.compiler.released import cached_release
    from pynq_kgrc.models.pretrained import RELEASES

    if options.load_all or options.backend == "csim":  # the C-simulation takes minutes for I3D
        return shipped, []
    found = {name: cached_release(name, installed_design()) for name in RELEASES}
    cached = {name: path for name, path in found.items() if path is not None}
    notes = [
        f"{name} is in the cache, so it is served, too, and is the default program"
        if name in cached
        else f"for {_classes(name)} everyday actions: pynq-kgrc serve -p {name} "
        f"(fetches {RELEASES[name].megabytes} MB once)"
        for name in RELEASES
    ]
    return {**cached, **shipped}, notes


def _named_programs(
    given: list[Path], shipped: dict[str, Path]
) -> tuple[dict[str, Path], list[str]]:
    """Those of `--program`; the shipped ones if the only one given cannot be fetched."""
    from pynq_kgrc.errors import ModelError
    from pynq_kgrc.models.pretrained import RELEASES

    programs: dict[str, Path] = {}
    for each in given:
        try:
            name, path = named_program(each)
        except ModelError as error:
            if str(each) not in RELEASES or len(given) > 1 or not shipped:
                raise
            instead = ", ".join(shipped)
            return shipped, [f"{each} cannot be served, {instead} is served instead: {error}"]
        if name in programs:
            raise ConfigError(f"--program {each}: another program is named {name}; rename the file")
        programs[name] = path
    return programs, []


def named_program(given: Path) -> tuple[str, Path]:
    """The name and the file of `--program`: a file has its own, a program of the package keeps its.

    Raises:
        KgrcError: as `program_file`.
    """
    path = program_file(given)
    return (path.stem if path == given else str(given)), path


def _classes(name: str) -> int:
    """The number of classes of a published network."""
    from pynq_kgrc.models.pretrained import RELEASES, read_labels

    return len(read_labels(RELEASES[name].labels))


def run_serve(options: argparse.Namespace) -> int:
    import asyncio

    try:
        from pynq_kgrc.service.app import run_service
    except ImportError as error:
        raise ConfigError(f"the service needs more ({error}): {to_install('serve')}") from error
    from pynq_kgrc.backends.base import backend_class
    from pynq_kgrc.backends.chosen import resolve_backend
    from pynq_kgrc.service.keys import read_keys
    from pynq_kgrc.service.settings import Settings, check_settings, state_folder

    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError("--tls-cert and --tls-key belong together: give both")
    programs, notes = choose_programs(options)
    if not programs and options.repository is None:
        raise ConfigError(
            "no program comes with this release: give --program FILE (made by compile)"
        )
    backend = resolve_backend(options.backend)
    settings = Settings(
        programs=programs,
        repository=options.repository,
        load_all=options.load_all,
        backend=backend,
        workers=options.workers,
        host=options.host,
        port=options.port,
        tls=(options.tls_cert, options.tls_key) if options.tls_cert else None,
        keys=read_keys(options.api_key_file) if options.api_key_file else (),
        max_bytes=options.max_bytes,
        max_pixels=options.max_pixels,
        max_seconds=options.max_seconds,
        decode_seconds=options.decode_seconds,
        uploads=options.uploads,
        live=options.live,
        queue=options.queue,
        wait_seconds=options.wait,
        clip_seconds=options.clip_limit,
        grace_seconds=options.grace,
        state=options.state or state_folder(options.port),
    )
    check_settings(settings, options.insecure)
    if options.workers > 1 and backend_class(backend).exclusive:
        raise ConfigError(f"--workers {options.workers}: the backend {backend} takes one")

    def announce(started: dict[str, Any]) -> None:
        if options.json:
            print(json.dumps({**started, "notes": notes}), flush=True)
        else:
            programs = ", ".join(started["programs"]) or "no program yet"
            print(f"{started['url']}  ({programs} on {started['backend']})")
            for note in notes:
                print(printable(note))
            if started["grpc_port"] is not None:
                print(f"gRPC on port {started['grpc_port']}")
            limits = ", ".join(started["decoders_cannot"]) or "nothing of what this kernel lacks"
            print(f"what decodes a video cannot: {limits}", flush=True)

    make_grpc = None
    if options.grpc_port is not None:
        try:
            from pynq_kgrc.service.grpc_server import GrpcServer
        except ImportError as error:
            raise ConfigError(
                f"--grpc-port needs more ({error}): {to_install('serve,grpc')}"
            ) from error
        make_grpc = lambda service: GrpcServer(service, options.host, options.grpc_port)  # noqa: E731

    asyncio.run(run_service(settings, announce, make_grpc))
    return 0
