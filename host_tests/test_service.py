"""The service as clients use it: videos, jobs, live frames, programs, keys and shutdown."""

import asyncio
import base64
import contextlib
import gzip
import http.client
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest

pytest.importorskip("av", reason="the service needs pynq_kgrc[serve]")
pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

import av
import msgspec
from serving import LABELS, Serving, write_jpeg, write_program, write_video

from pynq_kgrc.cli import _parser, main
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session
from pynq_kgrc.service.keys import read_keys
from pynq_kgrc.service.schemas import Classification
from pynq_kgrc.service.settings import Settings, check_settings, is_loopback
from pynq_kgrc.service.waiting import within
from pynq_kgrc.video import Frame, cut_windows, frame_offsets, load_clip, load_windows

KEY = "correct-horse-battery"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def program(folder):
    write_program(folder / "tiny.kgrc")
    return folder / "tiny.kgrc"


MAX_PIXELS = 1088 * 2400


@pytest.fixture(scope="module")
def repository(folder):
    """A folder of programs that may be loaded."""
    (folder / "repository").mkdir()
    write_program(folder / "repository" / "other.kgrc", seed=1)
    (folder / "repository" / "broken.kgrc").write_bytes(b"nothing")
    return folder / "repository"


@pytest.fixture(scope="module")
def video(folder):
    return write_video(folder / "video.mp4")


@pytest.fixture(scope="module")
def service(folder, program, repository):
    arguments = ["--repository", repository, "--queue", "4", "--max-bytes", "3000000"]
    arguments += ["--max-pixels", MAX_PIXELS]
    with Serving(*arguments, state=folder / "state", program=program) as serving:
        yield serving
        assert serving.ready()  # no test broke it
    assert serving.process.returncode == 0
    assert not [record for record in serving.records if record["level"] == "error"]


# ---- videos ---------------------------------------------------------------------------------


def test_a_video_is_classified_as_the_session_does(service, program, folder, video):
    answer = service.classify(video, "?top_k=3")
    assert answer.status == 200, answer.body
    document = answer.json
    chosen = load(program)
    with Session(chosen) as session:
        clips = list(load_windows(folder / "video.mp4", chosen.clip))
        expected = [session.classify(clip.frames, 4).labels for clip in clips]
    assert len(document["windows"]) == len(expected) == 5
    for window, clip, labels in zip(document["windows"], clips, expected, strict=True):
        assert window["start_ms"] == pytest.approx(clip.start_ms, abs=0.1)
        assert window["end_ms"] == pytest.approx(clip.end_ms, abs=0.1)
        assert len(window["labels"]) == 3
        # FFmpeg of another version rounds colours otherwise
        assert window["labels"][0]["label"] == labels[0].label
        assert window["labels"][0]["confidence"] == pytest.approx(labels[0].confidence, abs=0.05)
    mean = dict.fromkeys(LABELS, 0.0)
    for labels in expected:
        for label in labels:
            mean[label.label] += label.confidence / len(expected)
    assert document["labels"][0]["confidence"] == pytest.approx(max(mean.values()), abs=0.05)
    assert document["segments"][0]["start_ms"] == 0
    assert document["segments"][-1]["end_ms"] == pytest.approx(1600, abs=0.1)
    assert document["backend"] == "emulate"
    assert document["program"]["name"] == "tiny"
    assert document["video"] | {"notes": []} == {
        "duration_ms": 1600.0,
        "frames": 40,
        "width": 64,
        "height": 48,
        "codec": "mpeg4",
        "container": "mov,mp4,m4a,3gp,3g2,mj2",
        "notes": [],
    }
    assert document["timings_ms"]["run"] > 0
    assert document["board"]["kind"] == "modelled"
    assert document["board"]["latency_ms"] > 0
    assert [layer["task"] for layer in document["layers"]] == [t.name for t in chosen.tasks]
    layers = sum(layer["modelled_ms"] for layer in document["layers"])
    assert layers == pytest.approx(document["board"]["latency_ms"], rel=0.01)


def test_the_description_is_made_of_the_structs_that_are_answered(service, video):
    document = service.get("/openapi.json").json
    schemas = document["components"]["schemas"]
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert {"Classification", "JobDocument", "Label", "ErrorDocument"} <= references
    assert references <= schemas.keys()
    paths = document["paths"]["/v1/videos:classify"]["post"]["responses"]
    assert paths["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/Classification"
    }
    answer = service.classify(video)
    assert list(schemas["Classification"]["properties"]) == list(answer.json)
    assert list(schemas["TimedTask"]["properties"])[:2] == ["name", "in"]
    decoded = msgspec.json.decode(answer.body, type=Classification)
    assert msgspec.json.encode(decoded) == answer.body


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [("a.avi", "mpeg4", None), ("a.mkv", "libx264", None), ("a.mov", "mjpeg", None),
     ("a.ts", "mpeg2video", "mpegts"), ("a.webm", "libvpx", None)],
)  # fmt: skip
def test_containers_and_codecs(service, tmp_path, name, codec, container):
    options = {"format": container} if container else {}
    data = write_video(tmp_path / name, frames=20, codec=codec, **options)
    document = service.classify(data, kind="application/octet-stream").json
    assert document["video"]["frames"] == 20, document
    assert len(document["windows"]) == 3


def test_window_and_stride(service, video):
    starts = [w["start_ms"] for w in service.classify(video, "?stride=4").json["windows"]]
    assert starts == [160.0 * i for i in range(9)]
    document = service.classify(video, "?window=40").json
    assert [(w["start_ms"], w["end_ms"]) for w in document["windows"]] == [(0.0, 1600.0)]
    for query in ("?window=7", "?window=1000000", "?stride=0", "?top_k=0", "?top_k=x"):
        refused = service.classify(video, query)
        assert refused.status == 422, query
        assert query[1:].split("=")[0] in refused.json["error"]


WRONG_OPTIONS = [
    *(("top_k", text) for text in ("0", "-2", "1001", "9" * 5000, "-0", "+5", "1_0", "5.0", " 5")),
    *(("top_k", text) for text in ("", "\u0665", "\uff15", "nan", "inf", "1e2", "true", "null")),
    *(("stride", text) for text in ("0", "-1", "1000001", "")),
    *(("window", text) for text in ("0", "-1", "7", "1025")),
    *(("sampling", text) for text in ("", "Uniform", "some")),
    ("program", ""),
    ("program", "x" * 201),
    ("topk", "3"),
]


@pytest.mark.parametrize(("name", "text"), WRONG_OPTIONS, ids=lambda text: text[:12] or "empty")
def test_an_option_out_of_bounds_is_refused_in_the_query_and_in_a_form(service, name, text):
    """The bounds are declared once; the answer names the option and says what is accepted."""
    query = service.classify(b"x" * 100, "?" + urlencode({name: text}))
    part = b'--xyz\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = part % (name.encode(), text.encode()) + part % (b"video", b"x" * 100) + b"--xyz--\r\n"
    form = service.classify(body, kind="multipart/form-data; boundary=xyz")
    if len(text) > 1000:
        assert form.status == 400
    else:
        assert (form.status, form.json) == (422, query.json)
    assert query.status == 422
    said = query.json["error"]
    if name == "topk":
        assert said == "no option 'topk'; there are top_k, window, stride, program, sampling"
    else:
        assert name in said and text[:30] in said and "accepted" in said


def test_options_that_contradict_each_other_are_refused(service, video):
    for query in ("?top_k=1&top_k=2", "?sampling=uniform&stride=4", "?sampling=uniform&window=9"):
        refused = service.classify(video, query)
        assert refused.status == 422, query
        assert query[1:].split("=")[0] in refused.json["error"]
    refused = service.classify(gzip.compress(video), headers={"Content-Encoding": "gzip"})
    assert refused.status == 415
    assert "accepted is identity" in refused.json["error"]


def test_uniform_sampling_is_that_of_the_video_module(service, folder, video):
    clip = load(folder / "tiny.kgrc").clip
    wanted = load_clip(folder / "video.mp4", clip, sampling="uniform")
    document = service.classify(video, "?sampling=uniform").json
    (window,) = document["windows"]
    assert window["start_ms"] == pytest.approx(wanted.start_ms, abs=0.1) != 0
    assert window["end_ms"] == pytest.approx(wanted.end_ms, abs=0.1)
    with Session(load(folder / "tiny.kgrc")) as session:
        label = session.classify(wanted.frames).labels[0]
    assert window["labels"][0]["confidence"] == pytest.approx(label.confidence, abs=0.05)
    assert service.classify(video, "?sampling=some").status == 422
    short = write_video(folder / "short.mp4", frames=5)
    document = service.classify(short, "?sampling=uniform").json
    assert [len(document[key]) for key in ("windows", "segments")] == [1, 1]
    assert "is repeated" in document["video"]["notes"][0]


def test_a_short_video_is_repeated(service, tmp_path):
    data = write_video(tmp_path / "short.mp4", frames=3)
    document = service.classify(data).json
    assert len(document["windows"]) == 1
    assert "is repeated" in document["video"]["notes"][0]


def test_a_rotated_video_is_upright(service, tmp_path):
    """A video with a display matrix gives the result of its rotated pixels."""
    plain = tmp_path / "plain.mp4"
    write_video(plain, frames=8, size=(64, 48), codec="mjpeg")
    turned = tmp_path / "turned.mp4"
    data = bytearray(plain.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track: a quarter turn
    matrix = [0, 0x10000, 0, -0x10000, 0, 0, 48 << 16, 0, 0x40000000]
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    turned.write_bytes(data)
    clip = load(service.errors.parent / "tiny.kgrc").clip
    (upright,) = load_windows(turned, clip)
    (lying,) = load_windows(plain, clip)
    assert not np.array_equal(upright.frames, lying.frames)
    with Session(load(service.errors.parent / "tiny.kgrc")) as session:
        wanted = session.classify(upright.frames).labels[0].confidence
        other = session.classify(lying.frames).labels[0].confidence
    assert abs(wanted - other) > 0.05
    found = service.classify(bytes(data)).json["labels"][0]["confidence"]
    assert found == pytest.approx(wanted, abs=0.04)


def test_multipart(service, video):
    def form(*parts):
        body = b""
        for head, data in parts:
            body += (
                b"--xyz\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + data + b"\r\n"
            )
        return body + b"--xyz--\r\n"

    kind = "multipart/form-data; boundary=xyz"
    body = form((b'name="top_k"', b"2"), (b'name="file"; filename="../../a.mp4"', video))
    answer = service.classify(body, kind=kind)
    assert answer.status == 200, answer.body
    assert len(answer.json["labels"]) == 2
    mistakes = {
        "without a part named": form((b'name="top_k"', b"2")),
        "more than one video": form((b'name="file"', video), (b'name="video"', video)),
        "more than 1000 bytes": form((b'name="note"', b"x" * 2000), (b'name="file"', video)),
        "more than 16 parts": form(*[(b'name="a"', b"1")] * 17, (b'name="file"', video)),
        "cut off": body[:-20],
        "not a form": b"hello",
        "empty video": form((b'name="file"', b"")),
    }
    for text, wrong in mistakes.items():
        refused = service.classify(wrong, kind=kind)
        assert (refused.status, text in refused.json["error"]) == (400, True), refused.body
    twice = [(b'name="top_k"', b"2")] * 2
    for fields, text in ((twice, "top_k is given twice"), ([(b'name="note"', b"x")], "'note'")):
        refused = service.classify(form(*fields, (b'name="file"', video)), kind=kind)
        assert (refused.status, text in refused.json["error"]) == (422, True), refused.body
    assert service.classify(body, kind="multipart/form-data").status == 400


def test_what_is_no_video_is_refused_with_a_reason(service, video, tmp_path, folder):
    secret = folder / "video.mp4"
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    cases = {
        "no video, only audio": sound.read_bytes(),
        "not a video": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        "not a video that": f"#EXTM3U\n#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n".encode(),
        "empty video": b"",
        "not a video that can": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "accepted are MP4": np.random.default_rng(0).bytes(50_000),
        "without its index": video[:2000],
        "be read": b"<html>no</html>",
    }
    for text, data in cases.items():
        refused = service.classify(data)
        assert refused.status in (400, 422), (text, refused)
        assert text in refused.json["error"], refused.body
        assert str(folder) not in refused.json["error"]
    refused = service.classify(video, kind="text/html")
    assert refused.status == 415
    assert "video/mp4" in refused.json["error"]


def test_a_cut_video_says_so(service, tmp_path):
    data = write_video(tmp_path / "cut.avi", frames=60, codec="mjpeg")
    document = service.classify(data[: len(data) // 2]).json
    assert 10 < document["video"]["frames"] < 45
    assert "cut off or damaged" in document["video"]["notes"][-1]


def write_plain(path, codec, layout, size=(64, 48)):
    """Write a video of nine pictures of one colour each; its bytes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = layout
        for i in range(9):
            picture = np.full((size[1], size[0], 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def test_pixels_and_bytes_have_limits(service, tmp_path):
    huge = write_video(tmp_path / "huge.mp4", frames=2, size=(4096, 2160), codec="mpeg4")
    refused = service.classify(huge)
    assert refused.status == 413
    assert f"more than the {MAX_PIXELS} pixels accepted" in refused.json["error"]
    huge = write_video(tmp_path / "huge.mkv", frames=2, size=(4096, 2160), codec="libx264")
    refused = service.classify(huge)
    assert refused.status == 413
    assert f"4096 x 2160 pixels are larger than the {MAX_PIXELS} accepted" in refused.json["error"]
    refused = service.classify(bytes(3_000_001))
    assert refused.status == 413
    assert refused.json["error"] == "a body of 3000001 bytes; accepted are 3000000"
    portrait = write_plain(tmp_path / "phone.mp4", "libx264", "yuv420p", (1080, 2400))
    answer = service.classify(portrait)
    assert answer.status == 200, answer.body
    assert answer.json["video"]["height"] == 2400


def test_of_a_long_video_the_beginning_is_answered(service, tmp_path):
    long = write_video(tmp_path / "long.avi", frames=20, codec="mpeg4", rate=1)
    at = long.index(b"strh") + 8 + 20  # one frame takes 100 s
    slow = long[:at] + struct.pack("<II", 100, 1) + long[at + 8 :]
    answer = service.classify(slow).json
    assert answer["video"]["notes"][0].endswith("s: only 600 s of a video are looked at")
    assert answer["video"]["frames"] == 7
    assert answer["windows"][-1]["end_ms"] == 700_000


@pytest.mark.parametrize("codec", ["ffv1", "huffyuv", "png", "qtrle"])
def test_a_codec_that_is_not_named_is_refused(service, tmp_path, codec):
    layout = "rgb24" if codec in ("png", "qtrle") else "yuv422p"
    container = {"ffv1": "v.mkv", "huffyuv": "v.avi"}.get(codec, "v.mov")
    refused = service.classify(write_plain(tmp_path / container, codec, layout))
    assert refused.status == 422
    assert f"codec {codec}, which is not accepted; convert it: ffmpeg" in refused.json["error"]


def test_the_clips_of_one_video_run_on_all_workers(folder, tmp_path):
    """With two workers, two clips run at a time; the answer is that of one worker."""
    write_program(tmp_path / "slow.kgrc", size=(8, 48, 48), filters=32)
    film = write_video(tmp_path / "film.mp4", frames=96)
    frames = np.random.default_rng(0).integers(0, 256, (6, 8, 48, 48, 3), dtype=np.uint8)
    answers, busiest = [], []
    for workers in (1, 2):
        state = tmp_path / f"state-{workers}"
        with Serving("--workers", workers, state=state, program=tmp_path / "slow.kgrc") as serving:
            idle, over = [workers], threading.Event()

            def watch(serving=serving, idle=idle, over=over):
                while not over.wait(0.01):
                    text = serving.get("/metrics").body.decode()
                    idle.append(float(text.split("kgrc_workers_idle ")[-1].split()[0]))

            watching = threading.Thread(target=watch)
            watching.start()
            document = serving.classify(film, "?stride=4").json
            batch = serving.infer(frames, "slow").body
            over.set()
            watching.join()
            answers.append((document["windows"], document["segments"], batch))
            busiest.append(workers - min(idle))
    assert busiest == [1, 2]
    assert answers[0] == answers[1]
    assert len(answers[0][0]) == 23


# ---- windows and segments -------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("stride", [1, 3, 8, 20])
def test_windows_are_those_of_the_video_module(count, stride):
    """The rule of video.load_windows: every stride, and one that ends with the video."""
    frames = [Frame(40.0 * i, 40.0 * (i + 1), np.full(1, i)) for i in range(count)]
    offsets = frame_offsets(4, 2, None)
    assert offsets == [0, 2, 4, 6]
    last = max(0, count - 7)
    starts = [*range(0, last, stride), last]
    wanted = [
        [(start + o) % count if count < 7 else start + o for o in offsets] for start in starts
    ]
    found = [[int(p[0]) for p in w.pixels] for w in cut_windows(iter(frames), offsets, stride)]
    assert found == wanted


def test_offsets_of_a_window():
    assert frame_offsets(4, 1, 10) == [0, 3, 6, 9]
    assert frame_offsets(1, 1, 9) == [4]
    assert frame_offsets(3, 5, None) == [0, 5, 10]


# ---- jobs -----------------------------------------------------------------------------------


def test_a_job_runs_by_itself(service, video):
    answer = service.classify(video, headers={"Prefer": "respond-async"})
    assert answer.status == 202
    place = answer.headers["location"]
    assert place == f"/v1/jobs/{answer.json['id']}"
    service.until(lambda: service.get(place).json["state"] == "done")
    document = service.get(place).json
    direct = service.classify(video).json
    assert document["result"]["windows"] == direct["windows"]
    assert document["progress"]["windows"] == 5
    text = service.get(f"{place}/events").body.decode()
    assert text.startswith("event: done\ndata: {")
    assert service.ask("DELETE", place).status == 200
    assert service.get(place).status == 404
    assert "no job" in service.get("/v1/jobs/nothing").json["error"]


def test_progress_comes_as_events_and_a_job_can_be_cancelled(service, folder):
    long = write_video(folder / "long.mp4", frames=1500)
    place = service.classify(long, "?stride=1", headers={"Prefer": "wait=0"}).headers["location"]
    with service.connect() as line:
        line.sendall(f"GET {place}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        text = b""
        while text.count(b"event: progress") < 4:
            text += line.recv(1 << 16)
    shares = [json.loads(x[6:])["progress"]["windows"] for x in text.decode().splitlines()
              if x.startswith("data: ") and x.endswith("}")]  # fmt: skip
    assert shares == sorted(shares)
    assert service.ask("DELETE", place).json["state"] == "cancelled"
    service.until(lambda: service.get(place).json["state"] == "cancelled")
    service.until(lambda: metric(service, "kgrc_at_work") == 0, 5)


@pytest.mark.slow
def test_jobs_of_a_killed_service_are_lost_and_say_so(folder, program, video):
    long = write_video(folder / "long2.mp4", frames=1500)
    state = folder / "killed"
    with Serving(state=state, program=program) as first:
        done = first.classify(video, headers={"Prefer": "respond-async"}).headers["location"]
        first.until(lambda: first.get(done).json["state"] == "done")
        query = "?stride=1"
        lost = first.classify(long, query, headers={"Prefer": "respond-async"}).headers["location"]
        first.process.kill()
        first.process.wait()
    with Serving(state=state, program=program) as second:
        assert second.get(done).json["state"] == "done"
        assert second.get(lost).json["state"] == "lost"
        assert "send it again" in second.get(lost).json["error"]


def metric(service, name):
    text = service.get("/metrics").body.decode()
    (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[1])


# ---- live -----------------------------------------------------------------------------------


def test_live_frames(service):
    connect = pytest.importorskip("websockets.sync.client").connect
    with connect(f"ws://127.0.0.1:{service.port}/v1/live?top_k=2") as client:
        hello = json.loads(client.recv(10))
        assert (hello["type"], hello["frames"]) == ("ready", 8)
        seen = []
        for i in range(12):
            client.send(write_jpeg(20 * i))
            seen.append(json.loads(client.recv(10)))
        assert [m["type"] for m in seen] == ["filling"] * 7 + ["prediction"] * 5
        assert seen[0]["have"] == 1
        assert len(seen[-1]["labels"]) == 2
        large = write_jpeg(90, (1920, 1080))
        for _ in range(300):  # far faster than they can be decoded
            client.send(large)
        last = seen[-1]
        while last["received"] < 312:
            last = json.loads(client.recv(10))
        assert last["dropped"] > 0
        client.send(b"no picture")
        while last["type"] != "error":
            last = json.loads(client.recv(10))
        assert "not a JPEG" in last["error"]
    with connect(f"ws://127.0.0.1:{service.port}/v1/live?program=none") as client:
        assert json.loads(client.recv(10))["status"] == 404
    for query in ("top_k=0", "top_k=-2", "top_k=1001", "top_k=x", "stride=4", "top_k=1&top_k=2"):
        with connect(f"ws://127.0.0.1:{service.port}/v1/live?{query}") as client:
            refused = json.loads(client.recv(10))
            assert refused["status"] == 422, query
            assert query.split("=")[0] in refused["error"]
    with (
        pytest.raises(Exception, match="403"),
        connect(f"ws://127.0.0.1:{service.port}/v1/live", origin="http://elsewhere.example"),
    ):
        pass


def test_a_proxy_on_this_machine_says_who_the_client_is(service):
    """Else all clients behind it would count as this machine, which may take all places."""
    connect = pytest.importorskip("websockets.sync.client").connect
    place = f"ws://127.0.0.1:{service.port}/v1/live"

    def session(client):
        made = entered.enter_context(
            connect(place, additional_headers={"X-Forwarded-For": f"10.9.9.9, {client}"})
        )
        return json.loads(made.recv(10))

    with contextlib.ExitStack() as entered:
        assert [session("10.1.1.1")["type"] for _ in range(3)] == ["ready"] * 3
        refused = session("10.1.1.1")
        assert (refused["status"], "of your address" in refused["error"]) == (429, True)
        assert session("10.1.1.2")["type"] == "ready"
    service.until(lambda: '"client": "10.1.1.2"' in service.log)


# ---- programs -------------------------------------------------------------------------------


def test_programs_are_listed_loaded_and_replaced(service, repository, video):
    assert [p["name"] for p in service.get("/v1/programs").json["programs"]] == ["tiny"]
    (listed,) = service.get("/v1/programs").json["programs"]
    assert listed["labels"] == list(LABELS)
    assert listed["tasks"][0]["modelled_ms"] > 0

    index = {row["name"]: row for row in service.ask("POST", "/v2/repository/index").json}
    assert {name: row["state"] for name, row in index.items()} == {
        "tiny": "READY", "other": "UNAVAILABLE", "broken": "UNAVAILABLE"
    }  # fmt: skip
    assert service.classify(video, "?program=other").status == 404
    refused = service.ask("POST", "/v2/repository/models/broken/load")
    assert (refused.status, "not a whole program" in refused.json["error"]) == (400, True)
    assert service.ask("POST", "/v2/repository/models/..%2Ftiny/load").status == 404

    loaded = service.ask("POST", "/v2/repository/models/other/load").json
    before = service.classify(video, "?program=other").json
    assert before["program"] == loaded
    (repository / "other.kgrc").write_bytes(b"corrupt")
    assert service.ask("POST", "/v2/repository/models/other/load").status == 400
    assert service.classify(video, "?program=other").json["windows"] == before["windows"]
    write_program(repository / "other.kgrc", seed=2)
    again = service.ask("POST", "/v2/repository/models/other/load").json
    assert again["version"] != loaded["version"]
    after = service.classify(video, "?program=other").json
    assert after["program"] == again
    assert after["windows"] != before["windows"]
    assert service.ask("POST", "/v2/repository/models/other/unload").status == 200
    assert service.classify(video, "?program=other").status == 404
    assert service.ask("POST", "/v2/repository/models/other/unload").status == 404
    copies = service.errors.with_suffix("") / "programs"
    service.until(lambda: len(list(copies.iterdir())) == 1, 5)


# ---- authentication -------------------------------------------------------------------------


def test_keys(folder, program, video, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"# ours\nalice classify alice's own key 1\n{KEY}\n")
    arguments = ["--api-key-file", keys, "--host", "127.0.0.1"]
    with Serving(*arguments, state=tmp_path / "state", program=program) as serving:
        for headers in ({}, {"Authorization": "Bearer wrong-wrong-wrong-wrong"},
                        {"X-API-Key": KEY[:-1]}, {"Authorization": KEY}):  # fmt: skip
            refused = serving.classify(video, headers=headers)
            assert refused.status == 401, headers
            assert refused.headers["www-authenticate"] == "Bearer"
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}):
            assert serving.classify(video, headers=headers).status == 200
        assert serving.get("/v2/health/ready").status == 200
        assert serving.get("/v2/models/tiny/ready").status == 200
        unknown = serving.get("/v2/models/zzz/ready")
        assert (unknown.status, "tiny" in unknown.json["error"]) == (404, False)
        assert serving.get("/").status == 200
        for path in ("/metrics", "/v1/programs", "/v2/models/tiny", "/nowhere"):
            assert serving.get(path).status == 401

        assert serving.classify(video, headers={"X-API-Key": "alice's own key 1"}).status == 200
        serving.until(lambda: '"key": "alice"' in serving.log)
        assert "alice's own key 1" not in serving.log
        alice = {"X-API-Key": "alice's own key 1"}
        order = "/v2/repository/models/tiny/unload"
        refused = serving.ask("POST", order, headers=alice)
        assert (refused.status, refused.json["error"]) == (
            403, "the key alice may classify, not manage"
        )  # fmt: skip
        later = {"Prefer": "respond-async"}
        ours = serving.classify(video, headers={**alice, **later}).headers["location"]
        theirs = serving.classify(video, headers={"X-API-Key": KEY, **later}).headers["location"]
        assert serving.get(ours, headers=alice).status == 200
        assert serving.get(theirs, headers=alice).status == 404
        assert serving.get(f"{theirs}/events", headers=alice).status == 404
        assert serving.ask("DELETE", theirs, headers=alice).status == 404
        listed = serving.get("/v1/jobs", headers=alice).json["jobs"]
        assert [f"/v1/jobs/{job['id']}" for job in listed] == [ours]
        assert len(serving.get("/v1/jobs", headers={"X-API-Key": KEY}).json["jobs"]) == 2
        assert serving.get(ours, headers={"X-API-Key": KEY}).status == 200

        # without a key the body is not read
        with serving.connect() as line:
            line.sendall(
                b"POST /v1/videos:classify HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 100000000\r\n\r\n"
            )
            assert send_until_closed(line, 100_000_000) < 20_000_000

        connect = pytest.importorskip("websockets.sync.client").connect
        place = f"ws://127.0.0.1:{serving.port}/v1/live"
        coded = base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")
        with connect(place, subprotocols=[f"kgrc.key.{coded}"]) as client:
            assert json.loads(client.recv(10))["type"] == "ready"
        with pytest.raises(Exception, match="403"), connect(place):
            pass
    assert KEY not in serving.log
    assert "wrong-wrong" not in serving.log


def send_until_closed(line, most):
    """How many bytes a service reads before it closes the connection."""
    sent = 0
    try:
        while sent < most:
            sent += line.send(bytes(1 << 16))
    except OSError:
        pass
    return sent


def test_other_origins_and_other_hosts_are_refused(service, video):
    origin = {"Origin": "http://elsewhere.example"}
    assert service.classify(video, headers=origin).status == 403
    ours = {"Origin": f"http://127.0.0.1:{service.port}"}
    assert service.classify(video, headers=ours).status == 200
    assert service.get("/v1/programs", headers={"Host": "elsewhere.example"}).status == 421
    for header, word in (("Host", "["), ("Origin", "http://[")):
        refused = service.ask("POST", "/v1/videos:classify", video, {header: word})
        assert (refused.status, header in refused.json["error"]) == (400, True)
        assert "x-request-id" in refused.headers


def test_head_is_get_without_a_body(service):
    for path in ("/", "/v2/health/live", "/v2/models/tiny"):
        there, body = service.get(path), service.ask("HEAD", path)
        assert (body.status, body.body) == (200, b"")
        assert body.headers["content-length"] == there.headers["content-length"]
    assert service.ask("HEAD", "/nowhere").status == 404
    assert service.ask("HEAD", "/v1/videos:classify").status == 405


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"NONSENSE\r\n\r\n", "not a request of HTTP/1.1"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTE : chunked\r\n\r\n", "not a request of HTTP/1.1"),
        (b"POST /v1/videos:classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
         b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
         "Content-Length beside Transfer-Encoding"),
    ],
)  # fmt: skip
def test_requests_that_are_no_http_get_json_and_are_closed(service, raw, text):
    with service.connect() as line, line.makefile("rb") as answer:
        line.sendall(raw)
        head, _, body = answer.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"content-type: application/json" in head
    assert text in json.loads(body)["error"]


def test_the_query_of_a_websocket_is_not_logged(service):
    connect = pytest.importorskip("websockets.sync.client").connect
    with connect(f"ws://127.0.0.1:{service.port}/v1/live?program=secret-name") as client:
        assert json.loads(client.recv(10))["status"] == 404
    service.until(lambda: '"/v1/live"' in service.log)
    assert "secret-name" not in service.log


def test_orders_to_the_repository(service, repository):
    index = service.ask("POST", "/v2/repository/index", b'{"ready": true}').json
    assert [row["name"] for row in index] == ["tiny"]
    assert len(service.ask("POST", "/v2/repository/index", b"{}").json) > 1
    for body in (b'{"ready": 1}', b"[", b"[]"):
        assert service.ask("POST", "/v2/repository/index", body).status == 400
    place = "/v2/repository/models/other/load"
    refused = service.ask("POST", place, b'{"parameters": {"config": "{}"}}')
    assert (refused.status, "parameters config" in refused.json["error"]) == (400, True)
    os.mkfifo(repository / "pipe.kgrc")
    refused = service.ask("POST", "/v2/repository/models/pipe/load")
    (repository / "pipe.kgrc").unlink()
    assert (refused.status, "pipe.kgrc: is no file" in refused.json["error"]) == (400, True)


def test_settings_that_are_refused(tmp_path, capsys):
    program = str(tmp_path / "x.kgrc")
    short = tmp_path / "short"
    short.write_text("abc\n")
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    twice = tmp_path / "twice"
    twice.write_text("bob classify 0123456789abcdef\nbob manage fedcba9876543210\n")
    mistakes = {
        "--host 0.0.0.0 can be reached from other machines": ["--host", "0.0.0.0"],
        "key 1 has 3 characters; use 16": ["--api-key-file", str(short)],
        "has no key": ["--api-key-file", str(empty)],
        "two keys are named bob": ["--api-key-file", str(twice)],
        "cannot be read as a file of keys": ["--api-key-file", str(tmp_path / "gone")],
        "--workers 2: the backend board takes one": ["--backend", "board", "--workers", "2"],
        "there is no such folder": ["--repository", str(tmp_path / "gone")],
    }
    for text, arguments in mistakes.items():
        state = ["--state", str(tmp_path / "state")]
        assert main(["serve", "-p", program, *state, *arguments]) == 2, text
        assert text in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--port 70000; accepted are 0 to 65535"):
        check_settings(Settings(port=70000), insecure=False)
    settings = Settings(host="0.0.0.0")
    check_settings(settings, insecure=True)
    assert [is_loopback(h) for h in ("localhost", "127.9.9.9", "::1", "0.0.0.0", "a.b")] == [
        True, True, True, False, False
    ]  # fmt: skip
    short.write_text("0123456789abcdef\n")
    assert len(read_keys(short)) == 1


@pytest.mark.slow
def test_what_cannot_start_says_why(folder, program, service, tmp_path):
    def error(*arguments, state=tmp_path / "s"):
        with pytest.raises(RuntimeError) as found:
            Serving(*arguments, state=state, log=tmp_path / "log")
        return str(found.value)

    broken = tmp_path / "broken.kgrc"
    broken.write_bytes(b"nothing")
    assert "not a whole program file" in error("-p", broken)
    assert "no backend named 'gpu'" in error(
        "-p", program, "--backend", "gpu", state=tmp_path / "g"
    )
    taken = error("-p", program, "--port", service.port, state=tmp_path / "t")
    assert "Address already in use" in taken
    used = error("-p", program, state=folder / "state")
    assert "another service uses it" in used


# ---- operation ------------------------------------------------------------------------------


def test_every_answer_has_a_request_id_and_is_logged(service):
    answer = service.get("/v1/programs", headers={"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    strange = service.get("/v1/programs?key=secret-in-query", headers={"X-Request-Id": "a b"})
    assert strange.headers["x-request-id"] != "a b"
    (record,) = [r for r in service.records if r.get("request_id") == "abc-1"]
    assert (record["method"], record["path"], record["status"]) == ("GET", "/v1/programs", 200)
    assert "secret-in-query" not in service.log


def test_errors_have_one_form(service):
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/jobs/x", 405),
        ("PUT", "/v1/videos:classify", 405),
        ("GET", "/page/../secret", 404),
        ("GET", "/page/secret.js", 404),
        ("GET", "/v2/models/none", 404),
        ("POST", "/v2/repository/models/none/load", 404),
    ):
        answer = service.ask(method, path)
        assert answer.status == status, path
        assert isinstance(answer.json["error"], str)
    assert service.ask("PUT", "/v1/jobs/x").headers["allow"] == "DELETE, GET"


def test_metrics(service, video):
    before = metric(service, "kgrc_clip_seconds_count")
    service.classify(video)
    assert metric(service, "kgrc_clip_seconds_count") == before + 5
    assert metric(service, "kgrc_ready") == 1
    assert 'route="/v1/videos:classify"' in service.get("/metrics").body.decode()
    for i in range(3):  # unknown paths and methods make no time series
        service.ask(f"M{i}", f"/random{i}")
    assert "random" not in service.get("/metrics").body.decode()


def test_small_answers_are_sent_at_once(service):
    """On a kept connection no answer waits 40 ms for an acknowledgement (Nagle)."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    times = []
    for _ in range(15):
        began = time.monotonic()
        connection.request("GET", "/v2/health/live")
        connection.getresponse().read()
        times.append(time.monotonic() - began)
    connection.close()
    assert sorted(times)[7] < 0.035


def test_one_process_answers_and_is_small(service, video):
    service.classify(video)
    assert service.memory() < 120e6


def test_the_answering_process_imports_no_network():
    code = (
        "import sys\n"
        "for name in ('torch', 'cv2', 'pynq', 'av'): sys.modules[name] = None\n"
        "import pynq_kgrc.service.app\n"
        "assert 'pynq_kgrc.runtime' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_sigterm_finishes_what_was_accepted(folder, program):
    import threading

    slow = folder / "slow.kgrc"
    write_program(slow, size=(8, 48, 48), filters=32)
    frames = np.zeros((4, 8, 48, 48, 3), np.uint8)
    with Serving(state=folder / "drained", program=slow) as serving:
        replies = []
        ask = lambda: replies.append(serving.infer(frames, "slow"))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        serving.until(lambda: metric(serving, "kgrc_at_work") >= 4)
        began = time.monotonic()
        serving.process.terminate()
        serving.until(lambda: serving.get("/v2/health/ready").status == 503, 5)
        assert serving.get("/v2/health/live").headers["connection"] == "close"
        for thread in threads:
            thread.join()
        assert serving.process.wait(30) == 0
        assert [reply.status for reply in replies] == [200] * 6
        assert time.monotonic() - began < 20


def test_the_deployed_commands_are_valid():
    """The commands of the unit and of the container file are accepted by the parser."""
    deploy = Path(__file__).resolve().parent.parent / "deploy"
    unit = (deploy / "pynq-kgrc.service").read_text()
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    container = (deploy / "Containerfile").read_text().replace("\\\n", "")
    command = json.loads(container[container.rindex("CMD [") + 4 :].strip())
    for words in (shlex.split(line.removeprefix("ExecStart=")), command):
        assert words[0].endswith("pynq-kgrc")
        options = _parser().parse_args(words[1:])
        assert options.run is not None
        assert (options.host, options.insecure) == ("0.0.0.0", False)
        assert options.api_key_file is not None


def test_waiting_with_a_time_limit_loses_no_cancellation():
    """The task is cancelled in the moment in which the awaited future is done."""

    async def run():
        ready = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(within(ready, 5))
        await asyncio.sleep(0.01)
        ready.set_result(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await within(asyncio.sleep(0, "done"), 5) == "done"
        with pytest.raises(asyncio.TimeoutError):
            await within(asyncio.sleep(5), 0.01)
        with pytest.raises(ZeroDivisionError):
            await within(fail(), 5)

    async def fail():
        return 1 / 0

    asyncio.run(run())


def test_every_message_of_the_wire_is_checked():
    import io

    from pynq_kgrc.errors import DeviceError
    from pynq_kgrc.service import wire

    file = io.BytesIO()
    wire.send(file, wire.Command("run", "k"), b"abc")
    whole = file.getvalue()
    order, payload = wire.receive(io.BytesIO(whole), wire.Command)
    assert (order.verb, order.key, payload) == ("run", "k", b"abc")
    assert wire.receive(io.BytesIO(whole[:-1]), wire.Command) is None
    assert wire.receive(io.BytesIO(b""), wire.Command) is None
    huge = wire.LENGTHS.pack(10, 1 << 40)
    with pytest.raises(DeviceError, match="at most"):
        wire.receive(io.BytesIO(huge), wire.Command)
    wrong = wire.LENGTHS.pack(2, 0) + msgspec.json.encode([])
    with pytest.raises(DeviceError, match="not a message"):
        wire.receive(io.BytesIO(wrong), wire.Command)
