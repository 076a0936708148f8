"""From video files to clips: which frames, how large, and what is refused.

Every frame of the videos made here carries its own number, as eight stripes that are its bits.
"""

import itertools
import os
import struct
import tempfile
import wave
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from pynq_kgrc import video as video_module
from pynq_kgrc.errors import VideoError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.video import CODECS, Limits, Video, fit, load_clip, load_windows

WIDTH, HEIGHT, FPS = 64, 48, 25
FRAME_MS = 1000 / FPS


def numbered(number):
    stripes = np.unpackbits(np.uint8(number)) * np.uint8(255)
    return np.tile(np.repeat(stripes, WIDTH // 8)[None, :, None], (HEIGHT, 1, 3))


def numbers(clip):
    """The numbers that are drawn into the frames."""
    columns = clip.frames.mean(axis=(1, 3))
    stripes = columns.reshape(len(columns), 8, -1).mean(axis=2)
    return np.packbits(stripes > 128, axis=1)[:, 0].tolist()


def spec(frames=4, step=1, height=24, width=32):
    return ClipSpec(frames=frames, height=height, width=width, short_side=24, step=step)


def write(path, images, codec="MJPG"):
    images = list(images)
    size = images[0].shape[1::-1] if images else (WIDTH, HEIGHT)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), FPS, size)
    assert writer.isOpened()
    for image in images:
        writer.write(image)
    writer.release()
    return path


@pytest.fixture
def make(tmp_path):
    """Write a video file of some numbered frames; returns its path."""

    def made(count, name="video.avi", codec="MJPG"):
        return write(tmp_path / name, (numbered(i) for i in range(count)), codec)

    return made


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, for a video that is given as bytes."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_clip_is_contiguous_bytes_of_the_right_shape(make):
    frames = load_clip(make(10), spec(frames=5, height=20, width=28)).frames
    assert frames.shape == (5, 20, 28, 3)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous


@pytest.mark.parametrize("channel", range(3))
def test_channels_are_red_green_blue(tmp_path, channel):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[..., 2 - channel] = 255  # OpenCV writes blue first
    means = load_clip(write(tmp_path / "v.avi", [image] * 4), spec()).frames.mean(axis=(0, 1, 2))
    assert means[channel] > 240
    assert np.delete(means, channel).max() < 15


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("v.avi", "MJPG"),
        ("v.avi", "XVID"),
        ("v.mp4", "mp4v"),
        ("v.mkv", "FFV1"),
        ("v.webm", "VP80"),
        ("v.ts", "MPG2"),
    ],
)
def test_every_container_gives_its_frames_in_order(make, name, codec):
    clip = load_clip(make(30, name, codec), spec(frames=30))
    assert numbers(clip) == list(range(30))
    assert clip.notes == ()


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("v.mpg", "mpeg2video", "mpeg"),  # MPEG-PS, as camcorders and DVDs have it
        ("v.vob", "mpeg1video", "vob"),
        ("v.m2v", "mpeg2video", "mpeg2video"),
        ("v.wmv", "wmv2", "asf"),
        ("v.flv", "flv", "flv"),
        ("v.ogv", "libtheora", "ogg"),
        ("v.h264", "libx264", "h264"),  # as cameras of single-board computers write it
        ("v.hevc", "libx265", "hevc"),
        ("v.png", "apng", "apng"),
    ],
)
def test_videos_of_cameras_and_old_players(tmp_path, name, codec, container):
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV's FFmpeg cannot write {codec}: not tested")
    path = tmp_path / name
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "rgb24" if codec == "apng" else "yuv420p"
        stream.bit_rate = 2_000_000
        for i in range(30):
            picture = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            picture.pts = i
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    clip = load_clip(path, spec(frames=30))
    assert numbers(clip) == list(range(30))
    assert clip.notes == ()


def test_a_codec_that_is_not_named_is_refused(make):
    """FFmpeg's own list of codecs does not reach the decoder that PyAV opens."""
    path = make(4, "v.mkv", "FFV1")
    with (
        path.open("rb") as file,
        pytest.raises(VideoError, match="codec ffv1, which is not accepted; convert it: ffmpeg"),
    ):
        Video(file, spec(), Limits(), codecs=CODECS)
    with path.open("rb") as file:
        assert Video(file, spec(), Limits()).codec == "ffv1"


def test_a_4k_video_is_taken(tmp_path):
    path = write(tmp_path / "v.avi", [np.full((2160, 3840, 3), 200, np.uint8)] * 2)
    assert load_clip(path, spec(frames=2)).frames.mean() > 190


@pytest.mark.parametrize("first", [b"free", b"skip", b"wide", b"mdat"])
def test_an_old_quicktime_file_begins_with_another_box(make, first):
    content = make(30, "v.mp4", "mp4v").read_bytes()
    clip = load_clip(content.replace(b"ftyp", first, 1), spec(frames=30))
    assert numbers(clip) == list(range(30))


def test_a_transport_stream_may_have_a_time_before_every_packet(make):
    content = make(30, "v.ts", "MPG2").read_bytes()
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    timed = b"".join(bytes(4) + packet for packet in packets)
    assert numbers(load_clip(timed, spec(frames=30))) == list(range(30))


@pytest.mark.parametrize(
    ("count", "frames", "step", "sampling", "wanted"),
    [
        (20, 4, 1, "centre", [8, 9, 10, 11]),
        (21, 4, 1, "centre", [8, 9, 10, 11]),
        (20, 4, 3, "centre", [4, 7, 10, 13]),
        (7, 4, 2, "centre", [0, 2, 4, 6]),
        (4, 4, 1, "centre", [0, 1, 2, 3]),
        (20, 4, 1, "uniform", [2, 7, 12, 17]),
        (20, 4, 3, "uniform", [2, 7, 12, 17]),
        (7, 3, 1, "uniform", [1, 3, 5]),
        (4, 4, 1, "uniform", [0, 1, 2, 3]),
        (200, 2, 1, "uniform", [50, 150]),
    ],
)
def test_sampling_chooses_these_frames(make, count, frames, step, sampling, wanted):
    clip = load_clip(make(count), spec(frames, step), sampling)
    assert numbers(clip) == wanted
    assert clip.start_ms == pytest.approx(wanted[0] * FRAME_MS)
    assert clip.end_ms == pytest.approx((wanted[-1] + 1) * FRAME_MS)
    assert clip.notes == ()


@pytest.mark.parametrize("sampling", ["centre", "uniform"])
@pytest.mark.parametrize(
    ("count", "frames", "step", "wanted"),
    [
        (3, 7, 1, [0, 1, 2, 0, 1, 2, 0]),
        (1, 3, 1, [0, 0, 0]),
        (4, 5, 3, [0, 3, 2, 1, 0]),
        (2, 4, 2, [0, 0, 0, 0]),
    ],
)
def test_a_short_video_starts_over_and_says_so(make, count, frames, step, wanted, sampling):
    clip = load_clip(make(count), spec(frames, step), sampling)
    assert numbers(clip) == wanted
    assert (clip.start_ms, clip.end_ms) == (0, pytest.approx((max(wanted) + 1) * FRAME_MS))
    (note,) = clip.notes
    span = frames if sampling == "uniform" else (frames - 1) * step + 1
    assert note.startswith(
        f"the video has {count} frames, a clip spans {span}: the video is repeated"
    )


def test_steps_past_the_end_start_over_and_say_so_too(make):
    clip = load_clip(make(6), spec(frames=4, step=2))
    assert numbers(clip) == [0, 2, 4, 0]
    assert "the video has 6 frames, a clip spans 7" in clip.notes[0]


@pytest.mark.parametrize(
    "name",
    ["arm_wrestling_k400.mp4", "v_CricketShot_g04_c01_rgb.gif", "v_SoccerJuggling_g23_c01.avi"],
)
def test_real_clips_have_no_notes(example_clips, name):
    clip = load_clip(example_clips / name, ClipSpec(16, 112, 112, 128), "uniform")
    assert clip.frames.shape == (16, 112, 112, 3)
    assert clip.frames.std() > 20
    assert 0 <= clip.start_ms < clip.end_ms
    assert clip.notes == ()


@pytest.mark.parametrize(
    ("name", "codec"), [("v.avi", "MJPG"), ("v.mp4", "mp4v"), ("v.mkv", "FFV1")]
)
def test_bytes_give_the_clip_of_their_file(make, temporary, name, codec):
    path = make(12, name, codec)
    of_file = load_clip(path, spec())
    for source in (path.read_bytes(), str(path)):
        other = load_clip(source, spec())
        np.testing.assert_array_equal(other.frames, of_file.frames)
        assert (other.start_ms, other.end_ms) == (of_file.start_ms, of_file.end_ms)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"nothing to see", b"GIF89a" + bytes(300)])
@pytest.mark.parametrize("load", [load_clip, lambda *args: list(load_windows(*args))])
def test_refused_bytes_leave_no_file(temporary, load, content):
    with pytest.raises(VideoError, match=r"^the video: "):
        load(content, spec())
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "step", "stride", "starts"),
    [
        (12, 1, None, [0, 4, 8]),
        (14, 1, None, [0, 4, 8, 10]),
        (8, 1, 1, [0, 1, 2, 3, 4]),
        (11, 1, 3, [0, 3, 6, 7]),
        (20, 1, 7, [0, 7, 14, 16]),
        (20, 1, 1000, [0, 16]),
        (5, 1, None, [0, 1]),
        (4, 1, 1, [0]),
        (20, 2, None, [0, 7, 13]),
        (20, 3, 5, [0, 5, 10]),
    ],
)
def test_windows_begin_every_stride_and_the_last_ends_with_the_video(
    make, count, step, stride, starts
):
    clips = list(load_windows(make(count), spec(step=step), stride))
    assert [numbers(clip) for clip in clips] == [
        [start + i * step for i in range(4)] for start in starts
    ]
    assert [clip.start_ms for clip in clips] == pytest.approx([s * FRAME_MS for s in starts])
    ends = [(start + 3 * step + 1) * FRAME_MS for start in starts]
    assert [clip.end_ms for clip in clips] == pytest.approx(ends)
    assert ends[-1] == count * FRAME_MS
    assert all(clip.notes == () for clip in clips)


@pytest.mark.parametrize("stride", [None, 1, 9])
def test_a_short_video_has_one_window(make, stride):
    (clip,) = load_windows(make(3), spec(), stride)
    assert numbers(clip) == [0, 1, 2, 0]
    assert "the video is repeated" in clip.notes[0]


@pytest.mark.parametrize("stride", [None, 1, 3, 50])
def test_windows_are_decoded_as_they_are_taken(make, monkeypatch, stride):
    decoded = []
    decode = Video._decoded

    def counted(self):
        for picture in decode(self):
            decoded.append(None)
            yield picture

    monkeypatch.setattr(Video, "_decoded", counted)
    for number, _ in enumerate(load_windows(make(100), spec(), stride)):
        # a picture is handed on when the next one is there: it tells when the first one ends
        assert len(decoded) <= min(100, number * (stride or 4) + 4 + 1)


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_below_one_is_refused(make, stride):
    with pytest.raises(VideoError, match=f"stride={stride} frames; accepted is 1 or more"):
        list(load_windows(make(8), spec(), stride))


@pytest.mark.parametrize("sampling", ["center", "", "CENTRE"])
def test_an_unknown_sampling_is_refused(make, sampling):
    with pytest.raises(
        VideoError, match=f"sampling='{sampling}'; accepted are centre, uniform, windows"
    ):
        load_clip(make(4), spec(), sampling)


def wav(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    return path.read_bytes()


def sound_only_avi():
    def chunk(name, content):
        return name + struct.pack("<I", len(content)) + content

    main = struct.pack("<14I", 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0)
    header = b"auds" + struct.pack("<I4H7I4H", 0, 0, 0, 0, 0, 1, 8000, 0, 800, 800, 0, 1, *[0] * 4)
    pcm = struct.pack("<HHIIHH", 1, 1, 8000, 8000, 1, 8)
    stream = chunk(b"LIST", b"strl" + chunk(b"strh", header) + chunk(b"strf", pcm))
    lists = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + stream)
    return chunk(b"RIFF", b"AVI " + lists + chunk(b"LIST", b"movi" + chunk(b"00wb", bytes(800))))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (
            b"\0",
            r"not a video that can be read \(.*\); accepted are MP4, MOV, MKV, WebM, AVI",
        ),
        (bytes(5000), "not a video"),
        (np.random.default_rng(1).bytes(5000), "not a video"),
        (cv2.imencode(".png", numbered(1))[1].tobytes(), "not a video"),
        (cv2.imencode(".jpg", numbered(1))[1].tobytes(), "not a video"),
        (wav, "sound only, a WAV file; accepted are MP4"),
        (sound_only_avi(), "the file has no video, only audio"),
        (b"GIF89a", "not a video"),
        (b"\x1aE\xdf\xa3", "a Matroska file that cannot be read"),
        (b"RIFF\xff\0\0\0AVI ", "an AVI file without video that can be read; it is cut off"),
    ],
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_what_is_no_video_is_refused(tmp_path, content, why, as_bytes):
    path = tmp_path / "wrong"
    content = content(path) if callable(content) else content
    path.write_bytes(content)
    source, name = (content, "the video") if as_bytes else (path, str(path))
    with pytest.raises(VideoError, match=f"^{name}: {why}"):
        load_clip(source, spec())


FILLED = struct.pack(">I4s4xI", 16, b"ftyp", 0) + struct.pack(">I4s3000000x", 3_000_008, b"free")


@pytest.mark.parametrize(
    ("name", "codec", "change", "why"),
    [
        ("v.mp4", "mp4v", lambda d: d[: d.index(b"moov")], r"without its index \(moov\);"),
        (
            "v.mp4",
            "mp4v",
            lambda d: d.replace(b"trak", b"free"),
            "an MP4 file .*; it is damaged|the file has no video",
        ),
        ("v.mp4", "mp4v", lambda d: d.replace(b"vide", b"soun"), "no video, only audio"),
        ("v.mp4", "mp4v", lambda d: FILLED + d.replace(b"vide", b"soun"), "no video, only audio"),
        ("v.avi", "MJPG", lambda d: d.replace(b"vids", b"auds"), "no video, only audio"),
        ("v.avi", "MJPG", lambda d: d[:200], "an AVI file without video that can be read"),
        ("v.mkv", "FFV1", lambda d: d[:300], "a Matroska file that cannot be read|not one frame"),
    ],
)
def test_videos_that_lost_their_video_are_refused(make, name, codec, change, why):
    content = change(make(12, name, codec).read_bytes())
    with pytest.raises(VideoError, match=f"^the video: .*{why}"):
        load_clip(content, spec())


@pytest.mark.parametrize(
    ("name", "why"),
    [("", "there is no such"), ("gone.mp4", "there is no such"), ("x" * 300, "cannot be read")],
)
def test_a_path_without_a_file_is_refused(tmp_path, name, why):
    with pytest.raises(VideoError, match=f"^{tmp_path / name}: {why}"):
        load_clip(tmp_path / name, spec())


def test_an_avi_of_no_frames_is_refused(make):
    with pytest.raises(
        VideoError, match=r"video.avi: not one frame could be decoded; the video is"
    ):
        load_clip(make(0), spec())


@pytest.mark.parametrize(
    "address",
    ["http://example.org/v.mp4", "rtsp://example.org/v", "file:///tmp/v.mp4", "concat://a|b"],
)
def test_addresses_are_refused(address):
    with pytest.raises(VideoError, match="an address; only local files and bytes are read"):
        load_clip(address, spec())


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("list.ffconcat", "ffconcat version 1.0\nfile video.ts\n"),
        ("list.avi", "ffconcat version 1.0\nfile video.ts\n"),
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nvideo.ts\n#EXT-X-ENDLIST\n"),
    ],
)
def test_playlists_do_not_open_the_videos_that_they_name(make, tmp_path, monkeypatch, name, script):
    make(25, "video.ts", "MPG2")
    path = tmp_path / name
    path.write_text(script)
    assert cv2.VideoCapture(str(path), cv2.CAP_FFMPEG).isOpened()  # FFmpeg would, unrestricted
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for source in (path, script.encode()):
        with pytest.raises(
            VideoError, match=r"not a video that can be read|the video is of a codec"
        ):
            load_clip(source, spec())


SIZE = 50_000


@pytest.mark.parametrize(
    ("within", "beyond", "why"),
    [
        (
            dict(max_pixels=64 * 48),
            dict(max_pixels=64 * 48 - 1),
            "(64 x 48 pixels are larger|more) than the 3071 ",
        ),
        (
            dict(max_bytes=SIZE),
            dict(max_bytes=SIZE - 1),
            f"{SIZE} bytes are more than the {SIZE - 1}",
        ),
    ],
)
def test_limits(make, within, beyond, why):
    path = make(40)
    path.write_bytes(path.read_bytes().ljust(SIZE, b"\0"))
    assert load_clip(path, spec(), limits=Limits(**within)).notes == ()
    with pytest.raises(VideoError, match=f"{path}: .*{why}"):
        load_clip(path, spec(), limits=Limits(**beyond))
    with pytest.raises(VideoError, match=why):
        list(load_windows(path, spec(), limits=Limits(**beyond)))


def test_of_a_long_video_the_beginning_is_looked_at(make):
    path, whole, within = make(40), Limits(), Limits(max_seconds=0.8)  # 25 frames a second
    assert list(load_windows(path, spec(), limits=whole))[-1].end_ms == 1600
    *_, last = load_windows(path, spec(), limits=within)
    assert last.end_ms == 840
    assert last.notes == (
        "the video was looked at up to 0.8 s: only 0.8 s of a video are looked at",
    )
    for sampling, span in (("uniform", (80, 800)), ("centre", (320, 480))):
        clip = load_clip(path, spec(), sampling, within)
        assert clip.notes == last.notes
        assert abs(clip.start_ms - span[0]) < 81 and abs(clip.end_ms - span[1]) < 81, sampling


def test_after_its_time_the_decoder_stops_and_says_so(make, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(video_module.time, "process_time", lambda: next(now))
    clips = list(load_windows(make(40), spec(), limits=Limits(decode_seconds=20)))
    assert clips[-1].end_ms == 21 * 40
    assert clips[-1].notes[-1].endswith("up to 0.8 s: decoding took 20 s by then")


def gif(width, height):
    """Six frames of one pixel each; decoders leave the rest of the screen unchanged."""
    size = struct.pack("<HH", width, height)
    screen = b"GIF89a" + size + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    delay = b"!\xf9\x04\0\x0a\0\0\0"
    image = b",\0\0\0\0" + size + b"\0" + b"\x02\x02\x4c\x01\0"
    return screen + 6 * (delay + image) + b";"


@pytest.mark.parametrize("turn", [1, -1])
def test_frames_that_are_nearly_a_line_are_refused(turn):
    assert load_clip(gif(*(100, 1)[::turn]), spec()).frames.shape == (4, 24, 32, 3)
    for long in (101, 65535):
        width, height = (long, 1)[::turn]
        why = f"{width} x {height} pixels are too elongated; accepted is up to 100 to 1"
        with pytest.raises(VideoError, match=why):
            load_clip(gif(width, height), spec())


@pytest.mark.parametrize("part", [0.6, 0.9])
def test_an_avi_that_is_cut_off_gives_the_frames_before_the_cut(make, part):
    content = make(40).read_bytes()
    clips = list(load_windows(content[: int(len(content) * part)], spec()))
    seen = [number for clip in clips[:-1] for number in numbers(clip)]
    assert 8 <= len(seen) < 40
    assert seen == list(range(len(seen)))
    assert all("the file is cut off or damaged" in " ".join(clip.notes) for clip in clips[-1:])


class Picture:
    """A stand-in for av.VideoFrame, shown at `ms`; its pixels carry its number."""

    side_data = ()
    width, height, duration = WIDTH, HEIGHT, 0
    time_base = Fraction(1, 1000)

    def __init__(self, number, ms):
        self.number, self.pts, self.time = number, ms, None if ms is None else ms / 1000


def show(monkeypatch, *passes):
    """Let the first decoding of a video give pictures at the first times, and so on."""
    left = iter(passes)

    def decoded(self):
        yield from (Picture(number, ms) for number, ms in enumerate(next(left)))

    monkeypatch.setattr(Video, "_decoded", decoded)
    monkeypatch.setattr(video_module, "upright", lambda picture, _: numbered(picture.number))


@pytest.mark.parametrize(
    ("times", "start", "end"),
    [
        ([0, 50, 60, 100], 50, 100),
        ([7, 57, 67, 107], 50, 100),
        ([0, 0, 0, 0], 40, 120),
        ([0, 60, 50, 100], 60, 140),
        ([None, None, None, None], 40, 120),
        ([-1e15, -9e14, 0, 100], 1e14, 1e15 + 100),
    ],
)
def test_a_picture_ends_when_the_next_begins(make, monkeypatch, times, start, end):
    """Times that do not increase, or are not there, are replaced by those of the declared rate."""
    path = make(4)
    show(monkeypatch, times, times)
    limits = Limits(max_seconds=1e13)
    clip = load_clip(path, spec(frames=2), "centre", limits)
    assert numbers(clip) == [1, 2]
    assert (clip.start_ms, clip.end_ms) == (start, end)


@pytest.mark.parametrize("times", [[0] * 27, [0, 1001, 1041]])
def test_neither_count_nor_times_may_exceed_the_limit(make, monkeypatch, times):
    path = make(4)
    show(monkeypatch, times, times)
    clip = load_clip(path, spec(), limits=Limits(max_seconds=1))
    assert clip.notes[0].endswith("s: only 1 s of a video are looked at")


def test_a_video_that_is_shorter_the_second_time_is_refused(make, monkeypatch):
    path = make(4)
    show(monkeypatch, range(20), range(12))
    with pytest.raises(VideoError, match="20 frames were decoded once, but not again"):
        load_clip(path, spec(), "uniform")


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), (0, 0)),
        ((0, 1, -1, 0), (0, 1)),
        ((-1, 0, 0, -1), (1, 1)),
        ((0, -1, 1, 0), (1, 0)),
    ],
)
def test_turned_videos_come_upright(tmp_path, matrix, corner):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[: HEIGHT // 2, : WIDTH // 2] = 255  # white where the camera has its upper left
    content = bytearray(write(tmp_path / "v.mp4", [image] * 4, "mp4v").read_bytes())
    at = content.index(b"tkhd") + 44
    before = struct.unpack(">9i", content[at : at + 36])
    assert before == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    upright = (24, 32) if corner in [(0, 0), (1, 1)] else (32, 24)
    frames = load_clip(bytes(content), spec(height=upright[0], width=upright[1])).frames
    assert frames.shape == (4, *upright, 3)
    middle = tuple(side // 2 for side in upright)
    quarters = frames[0, ..., 0].reshape(2, middle[0], 2, middle[1]).mean(axis=(1, 3))
    wanted = np.zeros((2, 2))
    wanted[corner] = 255
    np.testing.assert_allclose(quarters, wanted, atol=40)


def test_fit_cuts_the_centre_out():
    image = np.random.default_rng(2).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    cut = fit(image, ClipSpec(1, height=16, width=32, short_side=48))
    np.testing.assert_array_equal(cut, image[16:32, 16:48])


@pytest.mark.parametrize("turned", [False, True])
def test_fit_brings_the_short_side_to_size(turned):
    image = np.random.default_rng(2).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    halves = image.reshape(48, 2, 80, 2, 3).mean(axis=(1, 3))[:, 16:64]
    if turned:
        image, halves = image.transpose(1, 0, 2), halves.transpose(1, 0, 2)
    cut = fit(np.ascontiguousarray(image), ClipSpec(1, height=48, width=48, short_side=48))
    np.testing.assert_allclose(cut, halves, atol=1)


SIDES = (1, 2, 3, 17, 111, 112, 113, 127, 128, 240, 333)


@pytest.mark.parametrize("crop", [(112, 112, 112), (112, 112, 128), (7, 20, 7), (33, 32, 31)])
@pytest.mark.parametrize("width", [*SIDES, 1080])
def test_fit_is_never_smaller_than_the_crop(crop, width):
    height, cut_width, short_side = crop
    wanted = ClipSpec(1, height=height, width=cut_width, short_side=short_side)
    for size in itertools.product([*SIDES, 1080], [width]):
        cut = fit(np.full((*size, 3), (1, 2, 3), np.uint8), wanted)
        assert cut.shape == (height, cut_width, 3)
        assert cut.flags.c_contiguous
        assert (cut == (1, 2, 3)).all()


def mutated(content, rng):
    """The bytes with some bits flipped, a piece or the end removed, or a piece set to zero."""
    changed = bytearray(content)
    at = int(rng.integers(len(changed)))
    end = at + int(rng.integers(1, 200))
    match rng.integers(4):
        case 0:
            for spot in rng.integers(0, len(changed), rng.integers(1, 20)):
                changed[spot] ^= 1 << rng.integers(8)
        case 1:
            del changed[at:end]
        case 2:
            del changed[at:]
        case 3:
            changed[at:end] = bytes(len(changed[at:end]))
    return bytes(changed)


@pytest.mark.parametrize(("name", "codec"), [("v.mp4", "mp4v"), ("v.avi", "MJPG")])
def test_damaged_bytes_give_a_clip_or_a_video_error(make, temporary, name, codec):
    content = make(12, name, codec).read_bytes()
    rng = np.random.default_rng(20)
    refused = 0
    for _ in range(150):
        damaged = mutated(content, rng)
        try:
            clip = load_clip(damaged, spec())
        except VideoError:
            refused += 1
        else:
            assert clip.frames.shape == (4, 24, 32, 3)
            assert clip.frames.dtype == np.uint8
            assert 0 <= clip.start_ms < clip.end_ms
        assert list(temporary.iterdir()) == []
    assert 15 < refused < 135


# ---- colours, mirroring, times: what real files do ------------------------------------------


def gradient(number=0):
    """Smooth colours, so that the halved chroma planes lose little."""
    small = np.random.default_rng(3).integers(30, 226, (4, 6, 3)).astype(np.uint8)
    return np.roll(cv2.resize(small, (192, 128), interpolation=cv2.INTER_CUBIC), 4 * number, 1)


def encode(path, images, rate=25, codec="libx264", pixels="yuv420p", tags=(), times=None, **more):
    """A file made by FFmpeg's own encoders; `tags` are colour space and range."""
    import av

    images = list(images)
    height, width = images[0].shape[:2]
    with av.open(str(path), "w", **more) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = {"crf": "5"} if codec == "libx264" else {}
        convert = {}
        if tags:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
            convert = dict(dst_colorspace=tags[0], dst_color_range=tags[1])
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pixels, **convert)
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 1) / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


WHOLE = ClipSpec(4, height=128, width=192, short_side=128)


def knows_bt2020():
    """PyAV 17, the newest for Python 3.10, cannot encode BT.2020, so that it cannot be tested."""
    from av.video.reformatter import Colorspace

    return hasattr(Colorspace, "BT2020")


TAGS = [(1, 1), (1, 2), (5, 1), (5, 2), *([(9, 1)] if knows_bt2020() else []), ()]
"""BT.709, BT.601, BT.2020; limited range 1, full range 2."""


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("tags", TAGS, ids=str)
def test_colours_are_those_that_were_encoded(tmp_path, tags, pixels):
    path = encode(tmp_path / "v.mp4", map(gradient, range(6)), tags=tags, pixels=pixels)
    frames = next(load_windows(path, WHOLE)).frames.astype(int)
    truth = np.stack([gradient(i) for i in range(4)])
    # the wrong matrix is 5 to 10 levels off, the wrong range 8 to 15
    assert np.abs(frames - truth).mean() < 3.5


@pytest.mark.parametrize("tags", [tags for tags in TAGS if tags in ((1, 1), (9, 1))], ids=str)
def test_a_decoder_that_ignores_the_tags_would_be_seen(tmp_path, tags):
    """The bound above is one that is not met by reading everything as BT.601, limited range."""
    import av

    path = encode(tmp_path / "v.mp4", map(gradient, range(6)), tags=tags)
    with av.open(str(path)) as file:
        picture = next(file.decode(video=0))
    wrong = picture.reformat(format="rgb24", src_colorspace=5, src_color_range=1).to_ndarray()
    assert np.abs(wrong.astype(int) - gradient()).mean() > 3.5


@pytest.mark.parametrize("size", [(127, 191), (129, 193), (35, 33)])
def test_odd_sizes(tmp_path, size):
    image = cv2.resize(gradient(), size[::-1])
    path = encode(tmp_path / "v.mkv", [image] * 4, codec="ffv1", pixels="yuv444p")
    clip = next(
        load_windows(path, ClipSpec(4, height=size[0], width=size[1], short_side=min(size)))
    )
    assert np.abs(clip.frames.astype(int) - image).mean() < 2


ONE = 1 << 16
MATRICES = {
    "as it is": (1, 0, 0, 1, lambda image: image),
    "mirrored": (-1, 0, 0, 1, lambda image: image[:, ::-1]),
    "flipped": (1, 0, 0, -1, lambda image: image[::-1]),
    "half a turn": (-1, 0, 0, -1, lambda image: image[::-1, ::-1]),
    "a quarter right": (0, 1, -1, 0, lambda image: np.rot90(image, -1)),
    "a quarter left": (0, -1, 1, 0, lambda image: np.rot90(image)),
    "transposed": (0, 1, 1, 0, lambda image: image.swapaxes(0, 1)),
    "anti-transposed": (0, -1, -1, 0, lambda image: image[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrices(tmp_path, name):
    a, b, c, d, shown = MATRICES[name]
    content = bytearray(encode(tmp_path / "v.mp4", map(gradient, range(4))).read_bytes())
    plain = next(load_windows(bytes(content), WHOLE)).frames[0]
    at = content.index(b"tkhd") + 44
    entries = (a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", *entries)
    wanted = shown(plain)
    fitting = ClipSpec(4, height=wanted.shape[0], width=wanted.shape[1], short_side=128)
    np.testing.assert_array_equal(next(load_windows(bytes(content), fitting)).frames[0], wanted)


def big(number):
    return cv2.resize(numbered(number), (192, 128), interpolation=cv2.INTER_NEAREST)


def test_frames_of_another_size_in_mid_stream(tmp_path):
    first = encode(tmp_path / "1.ts", map(big, range(20)), format="mpegts").read_bytes()
    larger = [cv2.resize(big(i), (256, 160), interpolation=cv2.INTER_NEAREST) for i in range(20)]
    second = encode(tmp_path / "2.ts", larger, format="mpegts").read_bytes()
    clips = list(load_windows(first + second, ClipSpec(8, 128, 192, 128)))
    seen = [number for clip in clips for number in numbers(clip)]
    assert seen == [*range(20), *range(20)]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_a_variable_rate(tmp_path, name):
    times = [*range(20), *range(20, 140, 6)]
    path = encode(tmp_path / name, map(big, range(40)), rate=30, times=times)
    spans = [
        (c.start_ms, c.end_ms, c.notes) for c in load_windows(path, ClipSpec(16, 128, 192, 128))
    ]
    wanted = [(0, 16), (16, 92), (44, 135)]
    for (start, end, notes), (begin, stop) in zip(spans, wanted, strict=True):
        assert (start, end) == pytest.approx((1e3 * begin / 30, 1e3 * stop / 30), abs=1.1)
        assert notes == ()


def test_an_edit_list_hides_frames(tmp_path):
    path = encode(tmp_path / "v.mp4", map(big, range(40)), options={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12
    length, start = struct.unpack(">Ii", content[at : at + 8])
    content[at : at + 8] = struct.pack(">Ii", length * 23 // 40, start + 17 * 512)
    clips = list(load_windows(bytes(content), ClipSpec(4, 128, 192, 128)))
    assert numbers(clips[0])[0] == 17
    assert all(clip.notes == () for clip in clips)


def test_a_late_start_begins_at_zero(tmp_path):
    path = encode(tmp_path / "v.ts", map(big, range(10)), times=range(50, 60), format="mpegts")
    clip = load_clip(path, ClipSpec(10, 128, 192, 128))
    assert clip.start_ms == 0
    assert clip.end_ms == pytest.approx(400, abs=1)
    assert clip.notes == ()


def test_av1(tmp_path):
    path = encode(tmp_path / "v.mp4", map(big, range(8)), codec="libsvtav1")
    assert numbers(load_clip(path, ClipSpec(8, 128, 192, 128))) == list(range(8))


@pytest.mark.parametrize(
    "name", [b"caf\xe9.mp4", b"\xff\xfe.mp4", "é 漢字 %02d a:b\n.mp4".encode()]
)
def test_names_of_any_bytes(tmp_path, name):
    content = encode(tmp_path / "v.mp4", map(big, range(4))).read_bytes()
    odd = os.path.join(os.fsencode(tmp_path), name)
    with open(odd, "wb") as file:
        file.write(content)
    assert numbers(load_clip(os.fsdecode(odd), spec())) == [0, 1, 2, 3]
    with open(odd, "wb") as file:
        file.write(content[:100])
    with pytest.raises(VideoError) as error:
        load_clip(os.fsdecode(odd), spec())
    str(error.value).encode()  # it can be printed


@pytest.mark.parametrize(
    ("rate", "wanted", "shown"),
    [
        (50, 25, range(1, 32, 2)),
        (25, 25, range(16)),
        (Fraction(30000, 1001), 30, range(16)),
        (12, 24, [i // 2 for i in range(16)]),
        (30, None, range(16)),
    ],
)
def test_a_network_gets_frames_at_its_own_rate(tmp_path, rate, wanted, shown):
    path = encode(tmp_path / "v.mp4", map(big, range(60)), rate=rate)
    clip = next(load_windows(path, ClipSpec(16, 128, 192, 128, rate=wanted)))
    assert numbers(clip) == list(shown)
    assert clip.end_ms == pytest.approx(16e3 / (wanted or rate), abs=1)
