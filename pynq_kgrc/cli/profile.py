"""The command profile: where the time of a clip goes, on the host and on the device."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pynq_kgrc.cli.arguments import (
    PROGRAM_HELP,
    Declare,
    add_backend,
    add_sampling,
    check_plot,
    draw_bar,
    file_to_write,
    program_file,
    whole,
)

if TYPE_CHECKING:
    from pynq_kgrc.analysis.profile import LayerProfile, Profile
    from pynq_kgrc.quant import Array


def declare(command: Declare) -> None:
    """Add the command profile."""
    profile = command(
        "profile",
        run_profile,
        "measure where the time of a clip goes, on the host and layer by layer",
        "Runs clips of a video and prints the time of each part of a clip\n\n"
        "  decode   video to frames             host\n"
        "  encode   frames to input codes       host\n"
        "  pack     codes to bytes in memory    host\n"
        "  copy     these bytes to the device   host and memory\n"
        "  device   all layers\n"
        "  read     results to probabilities    host\n\n"
        "then clips a second, one clip after the other, and overlapped: the next clip is decoded,\n"
        "encoded and packed while one runs. Last, for each layer\n\n"
        "  ms        measured; on a board the layer's share of the one start that runs them all\n"
        "  modelled  of the accelerator, by the cost model with memory: never measured\n"
        "  read, written   MB/s from and to memory, on a board\n"
        "  clocks    counted by the kernel, and how many times the modelled clocks that is\n"
        "  waits     share of the clocks in which the array made no trip: it waits for memory, or\n"
        "            a pipeline starts and ends\n\n"
        "Only on a board are these the times of the accelerator. On the emulation and the\n"
        "simulations they are those of this computer, and the first line says so. There, overlap\n"
        "saves little: host and device are the same cores.\n\n"
        "What to do with it: if host parts together take longer than the device, the device\n"
        "waits for the host even overlapped. A layer far above its modelled clocks waits for\n"
        "memory. `simulate` tells for what a layer would wait, without a board.\n\n"
        "  pynq-kgrc profile video.mp4 -p i3d.kgrc --backend board --plot profile.png\n"
        "  pynq-kgrc profile video.mp4 -p i3d.kgrc --clips 2 --json",
    )
    profile.add_argument("video", metavar="VIDEO", help="MP4, MKV, AVI, TS or GIF")
    profile.add_argument("-p", "--program", type=Path, required=True, help=PROGRAM_HELP)
    add_backend(profile)
    profile.add_argument(
        "--clips",
        type=whole(1, 100_000),
        default=8,
        help="how many to run each way; a short video is used again (default: 8)",
    )
    add_sampling(profile)
    profile.add_argument(
        "--power",
        action="store_true",
        help="also read the power of the board's rails, at rest and while clips overlap, and give "
        "the energy of a clip; do not add rails up, some feed others",
    )
    profile.add_argument(
        "--plot",
        type=file_to_write,
        metavar="FILE",
        help="draw the parts and the layers as bars: .png, .svg, .pdf",
    )


def run_profile(options: argparse.Namespace) -> int:
    import msgspec

    from pynq_kgrc.analysis.profile import measure_profile
    from pynq_kgrc.backends.board.power import find_rails
    from pynq_kgrc.errors import DeviceError
    from pynq_kgrc.program import load
    from pynq_kgrc.recognition import sample_clips
    from pynq_kgrc.runtime import Session

    if options.plot:
        check_plot(options.plot)
    rails = find_rails() if options.power else None
    if rails == {}:
        raise DeviceError("--power: no sensors of power rails were found on this computer")
    program = load(program_file(options.program))
    with Session(program, options.backend) as session:

        def clips() -> Iterator[Array]:
            for clip in sample_clips(session, options.video, options.sampling, options.stride):
                yield clip.frames

        profile = measure_profile(session, clips, options.clips, rails)
    if options.plot:
        _plot(profile, options.plot)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(profile), indent=2).decode())
    else:
        print("\n".join(_lines(profile)))
    return 0


def _lines(profile: Profile) -> Iterator[str]:
    yield f"{profile.program} on {profile.design}, backend {profile.backend}, {profile.clips} clips"
    yield f"times: {profile.figures}"
    yield f"'modelled' is an FPGA: {profile.modelled}"
    yield ""
    total = sum(profile.parts_ms.values())
    for part, ms in profile.parts_ms.items():
        yield f"{part:8}{ms:10.2f} ms  {ms / total:4.0%}  {draw_bar(ms / total).rstrip()}".rstrip()
    yield f"{'a clip':8}{total:10.2f} ms"
    yield ""
    gain = profile.clips_per_s_overlapped / profile.clips_per_s
    yield f"{profile.clips_per_s:8.2f} clips/s one after the other"
    yield f"{profile.clips_per_s_overlapped:8.2f} clips/s overlapped, {gain:.2f} times"
    yield ""
    width = max(len("layer"), *(len(layer.name) for layer in profile.layers))
    yield (
        f"{'layer':{width}}  {'ms':>9}  {'modelled':>9}  {'read':>7}  {'written':>7}  "
        f"{'clocks':>11}  {'of model':>8}  {'waits':>5}"
    )
    for layer in profile.layers:
        yield _layer_line(layer, width)
    measured = sum(layer.ms for layer in profile.layers)
    yield f"{'all':{width}}  {measured:9.3f}  {profile.modelled_ms:9.3f}"
    if profile.power:
        yield ""
        wide = max(len(rail.rail) for rail in profile.power)
        yield f"{'rail':{wide}}  {'W idle':>7}  {'W at work':>9}  {'mJ a clip':>9}  beyond idle"
        for rail in profile.power:
            yield (
                f"{rail.rail:{wide}}  {rail.idle_watts:7.3f}  {rail.work_watts:9.3f}  "
                f"{1e3 * rail.clip_joules:9.2f}  {1e3 * rail.added_joules:11.2f}"
            )


def _layer_line(layer: LayerProfile, width: int) -> str:
    def shown(value: float | None, form: str, size: int) -> str:
        return f"{'-' if value is None else format(value, form):>{size}}"

    return (
        f"{layer.name:{width}}  {layer.ms:9.3f}  {layer.modelled_ms:9.3f}  "
        f"{shown(layer.read_mb_per_s, '.0f', 7)}  {shown(layer.written_mb_per_s, '.0f', 7)}  "
        f"{shown(layer.clocks, 'd', 11)}  {shown(layer.slowdown, '.2f', 8)}  "
        f"{shown(layer.waiting, '.0%', 5)}"
    )


def _plot(profile: Profile, path: Path) -> None:
    from pynq_kgrc.analysis.plots import plot_profile
    from pynq_kgrc.files import written_beside

    figure = plot_profile(profile)
    with written_beside(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], dpi=120)
