"""Faults: each is caused on purpose, and the service must handle it."""

import ast
import asyncio
import contextlib
import http.client
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="the service needs pynq_kgrc[serve]")
pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

import av
import msgspec
from serving import Serving, write_program, write_video

from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.service.refusal import Refusal
from pynq_kgrc.service.uploads import Room, Upload
from pynq_kgrc.service.videos import Decoder
from pynq_kgrc.service.wire import DecodeRequest

VIDEO = {"Content-Type": "video/mp4"}
WITHHELD = [
    *("open a file", "reach the network", "start a process", "signal the service", "act as root")
]
WORKER, DECODER = "pynq_kgrc.service.worker", "pynq_kgrc.service.decode"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("faults")
    write_program(made / "tiny.kgrc")
    write_program(made / "slow.kgrc", size=(8, 48, 48), filters=32)
    write_video(made / "video.mp4")
    write_video(made / "long.mp4", frames=1500)
    return made


@pytest.fixture(scope="module")
def video(folder):
    return (folder / "video.mp4").read_bytes()


@pytest.fixture(scope="module")
def service(folder):
    """A queue of three, and a device that counts as hung after 2 s."""
    arguments = ["--queue", "3", "--clip-limit", "2", "-p", folder / "slow.kgrc"]
    with Serving(*arguments, state=folder / "state", program=folder / "tiny.kgrc") as serving:
        yield serving
        assert serving.ready()
    assert serving.process.returncode == 0


@pytest.fixture
def frames():
    return np.zeros((1, 8, 32, 32, 3), np.uint8)


def slow_frames(count):
    return np.zeros((count, 8, 48, 48, 3), np.uint8)


def metric(service, name):
    text = service.get("/metrics").body.decode()
    (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[1])


def together(*calls):
    """Run calls in threads at the same time; their results."""
    results = [None] * len(calls)

    def run(i):
        results[i] = calls[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(580)
    return results


# ---- the device -----------------------------------------------------------------------------


def test_a_killed_worker_costs_no_request(service, frames):
    """kill -9 while clips run: the clip is tried once more on the next worker."""
    wanted = service.infer(slow_frames(8), "slow")
    assert wanted.status == 200

    def kill():
        time.sleep(0.15)
        (pid,) = service.children(WORKER)
        os.kill(pid, signal.SIGKILL)

    answer, _ = together(lambda: service.infer(slow_frames(8), "slow"), kill)
    assert (answer.status, answer.body) == (200, wanted.body)
    assert service.infer(frames).status == 200


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_gives_503(service):
    stop = threading.Event()

    def kill():
        while not stop.is_set():
            for pid in service.children(WORKER):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    killer = threading.Thread(target=kill)
    killer.start()
    answer = service.infer(slow_frames(8), "slow")
    assert service.get("/v2/health/live").status == 200
    stop.set()
    killer.join()
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) > 0
    service.until(service.ready, 20)
    assert service.infer(slow_frames(1), "slow").status == 200


def test_a_hung_device_is_replaced(service, frames):
    (pid,) = service.children(WORKER)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    answer = service.infer(frames)
    took = time.monotonic() - began
    assert (answer.status, "hung" in answer.json["error"]) == (503, True)
    assert 1.9 < took < 4
    assert answer.headers["retry-after"] == "5"
    service.until(service.ready, 5)  # recovered within 5 s of the limit
    assert service.infer(frames).status == 200
    assert pid not in service.children(WORKER)
    assert metric(service, "kgrc_worker_restarts_total") >= 1


def test_a_killed_decoder_is_replaced(service, video):
    (pid,) = service.children(DECODER)
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert service.classify(video).status == 200


def test_work_stops_when_the_client_leaves(service, folder):
    long = (folder / "long.mp4").read_bytes()
    before = metric(service, "kgrc_clip_seconds_count")
    with service.connect() as line:
        line.sendall(
            b"POST /v1/videos:classify?stride=1&program=slow HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: video/mp4\r\nContent-Length: %d\r\n\r\n" % len(long) + long
        )
        service.until(lambda: metric(service, "kgrc_clip_seconds_count") > before + 1)
    service.until(lambda: metric(service, "kgrc_at_work") == 0, 3)
    time.sleep(0.2)
    counted = metric(service, "kgrc_clip_seconds_count")
    time.sleep(0.5)
    assert metric(service, "kgrc_clip_seconds_count") == counted
    service.until(lambda: children_of(service.children(DECODER)[0]) == [], 5)


def children_of(pid):
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True)
    return found.stdout.split()


# ---- the queue ------------------------------------------------------------------------------


def test_beyond_the_queue_requests_are_refused_at_once(service):
    def late():
        service.until(lambda: metric(service, "kgrc_at_work") == 3)
        began = time.monotonic()
        reply = service.infer(slow_frames(1), "slow")
        return reply, time.monotonic() - began

    *accepted, (refused, took) = together(
        *[lambda: service.infer(slow_frames(8), "slow")] * 3, late
    )
    assert [reply.status for reply in accepted] == [200] * 3
    assert refused.status == 429
    assert "3 videos or inferences are the most" in refused.json["error"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert took < 0.5


def test_a_client_that_leaves_during_its_upload_is_no_failure_of_ours(service, frames):
    for path in (b"/v1/videos:classify", b"/v2/models/tiny/infer"):
        with service.connect() as line:
            line.sendall(
                b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: video/mp4\r\nContent-Length: 1000000\r\n\r\n" + bytes(1000)
            )
            time.sleep(0.2)
        left = re.compile(rf'"method": ?"POST", ?"path": ?"{path.decode()}", ?"status": ?499')
        service.until(lambda left=left: left.search(service.log))
    assert "Traceback" not in service.log
    assert 'status="500"' not in service.get("/metrics").body.decode()


def test_a_full_queue_reads_no_body(service):
    def late():
        service.until(lambda: metric(service, "kgrc_at_work") == 3)
        with service.connect() as line:
            line.sendall(
                b"POST /v1/videos:classify HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: video/mp4\r\nContent-Length: 100000000\r\n\r\n"
            )
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 100_000_000:
                    sent += line.send(bytes(1 << 16))
        return sent

    *_, sent = together(*[lambda: service.infer(slow_frames(12), "slow")] * 3, late)
    assert sent < 20_000_000


# ---- slow and silent clients ----------------------------------------------------------------


def closed_after(line, seconds):
    """What arrives until the service closes the connection, and after how many seconds."""
    began, text = time.monotonic(), b""
    line.settimeout(seconds)
    while data := line.recv(4096):
        text += data
    return text, time.monotonic() - began


@pytest.mark.slow
def test_half_open_and_slow_clients_are_closed(service, frames):
    """100 idle connections, one with an incomplete header (slow-loris), one with a slow body."""
    silent = [service.connect() for _ in range(100)]
    head, body = service.connect(), service.connect()
    head.sendall(b"GET / HTTP/1.1\r\nHost: loc")
    body.sendall(
        b"POST /v1/videos:classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: video/mp4\r\n"
        b"Content-Length: 1000000\r\n\r\nabc"
    )

    def trickle():
        with contextlib.suppress(OSError):
            for _ in range(40):
                time.sleep(1)
                body.sendall(b"x")

    threading.Thread(target=trickle, daemon=True).start()
    times = []
    for _ in range(20):  # the others are served
        began = time.monotonic()
        assert service.infer(frames).status == 200
        times.append(time.monotonic() - began)
    assert max(times) < 1
    text, took = closed_after(head, 20)
    assert text.startswith(b"HTTP/1.1 408")
    assert took < 11
    for line in silent:
        assert closed_after(line, 5)[0] == b""
        line.close()
    text, took = closed_after(body, 40)
    assert text.startswith(b"HTTP/1.1 408")
    assert b"the body did not arrive" in text
    assert took < 25  # of 30 s, ten of which passed before
    head.close()
    body.close()


def test_a_head_that_is_too_long_is_refused(service):
    refused = service.get("/", headers={"X": "a" * 40_000})
    assert (refused.status, "a header of more than" in refused.json["error"]) == (431, True)
    with contextlib.suppress(ConnectionError):
        assert service.get("/", headers={"X": "a" * 3_000_000}).status in (400, 431)
    assert service.get("/v2/health/live").status == 200


@pytest.mark.slow
def test_chunked_bodies_are_counted(folder, video):
    with Serving(
        "--max-bytes", "100000", state=folder / "small", program=folder / "tiny.kgrc"
    ) as small:
        connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=20)
        chunks = (bytes(100_000) for _ in range(500))
        status = None
        with contextlib.suppress(ConnectionError):
            connection.request(
                "POST", "/v1/videos:classify", chunks, {"Content-Type": "video/mp4"},
                encode_chunked=True,
            )  # fmt: skip
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            status = connection.getresponse().status
        connection.close()
        assert status in (413, None)
        requests = lambda: [r for r in small.records if r["message"] == "request"]  # noqa: E731
        small.until(lambda: requests() and requests()[-1]["status"] == 413)
        assert requests()[-1]["received"] < 12_000_000
        assert small.classify(video[:2000]).status == 422
        connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=20)
        for _ in range(2):  # a client that sends all before it reads gets the answer
            connection.request("POST", "/v1/videos:classify", bytes(3_000_000))
            answer = connection.getresponse()
            assert (answer.status, answer.headers["connection"]) == (413, "close")
            assert "accepted are 100000" in answer.read().decode()
        connection.close()


# ---- the end --------------------------------------------------------------------------------


def test_no_accepted_request_is_lost_at_the_end(folder):
    """SIGTERM while 12 clients send clip after clip on kept connections."""
    frames = np.zeros((1, 8, 32, 32, 3), np.uint8)
    lost, statuses = [], []
    stopping = threading.Event()

    def client(port):
        head = b'{"inputs":[{"name":"frames","shape":[1,8,32,32,3],"datatype":"UINT8",'
        head += b'"parameters":{"binary_data_size":%d}}]}' % frames.nbytes
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        headers = {"Inference-Header-Content-Length": str(len(head))}
        while True:
            try:
                if connection.sock is None:
                    connection.connect()
            except OSError:
                return  # the socket is closed: nothing was accepted
            try:
                connection.request(
                    "POST", "/v2/models/tiny/infer", head + frames.tobytes(), headers
                )
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                lost.append(repr(error))
                return
            statuses.append(answer.status)

    arguments = ["--queue", "20"]
    with Serving(*arguments, state=folder / "end", program=folder / "tiny.kgrc") as serving:
        threads = [threading.Thread(target=client, args=(serving.port,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        serving.process.terminate()
        stopping.set()
        for thread in threads:
            thread.join(60)
        assert serving.process.wait(30) == 0
    assert set(statuses) == {200}
    assert len(statuses) > 50
    # a client that connected to the backlog in the moment of closing was never accepted
    assert len(lost) <= 1, lost


@pytest.mark.slow
def test_a_second_signal_stops_at_once(folder):
    with Serving(state=folder / "hurry", program=folder / "slow.kgrc") as serving:
        thread = threading.Thread(target=_quiet, args=(serving,))
        thread.start()
        serving.until(lambda: metric(serving, "kgrc_at_work") == 1)
        serving.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        serving.process.send_signal(signal.SIGINT)
        assert serving.process.wait(40) == 0
        thread.join(10)
        assert serving.children(WORKER) == serving.children(DECODER) == []


def _quiet(serving):
    with contextlib.suppress(OSError, http.client.HTTPException):
        serving.infer(slow_frames(32), "slow")


@pytest.mark.slow
def test_nothing_is_left_when_the_service_is_killed(folder, video):
    """kill -9 of the service: its child processes end, and no upload stays on the disk."""
    serving = Serving(state=folder / "gone", program=folder / "slow.kgrc")
    with contextlib.suppress(Exception):
        long = (folder / "long.mp4").read_bytes()
        serving.classify(long, "?stride=1", headers={"Prefer": "respond-async"})
    pids = serving.children(WORKER) + serving.children(DECODER)
    assert len(pids) == 2
    serving.process.kill()
    serving.process.wait()
    serving.process.stdout.close()
    end = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") and not zombie(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
    left = [path.name for path in (folder / "gone").iterdir()]
    assert not [name for name in left if "jobs" not in name and name not in ("lock", "programs")]


def zombie(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


# ---- the disk -------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(megabytes):
    """A folder that is a disk of that size."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders must not hold a disk
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)],
        capture_output=True,
    )
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("no small disk can be mounted here: its limits are not tested on a full one")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


@pytest.mark.slow
def test_a_full_disk_gives_507_and_leaves_nothing(folder, tmp_path):
    with small_disk(100) as state:
        with Serving(state=state, program=folder / "tiny.kgrc", log=tmp_path / "log") as serving:
            free = os.statvfs(state)
            before = free.f_bfree
            refused = serving.classify(bytes(8_000_000))
            assert refused.status == 507
            assert "no room for an upload of 8000000 bytes" in refused.json["error"]
            (state / "ballast").write_bytes(bytes(10_000_000))
            # without Content-Length the size is not known before
            connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=20)
            connection.request(
                "POST", "/v1/videos:classify", (bytes(100_000) for _ in range(60)),
                {"Content-Type": "video/mp4"}, encode_chunked=True,
            )  # fmt: skip
            answer = connection.getresponse()
            assert (answer.status, b"no room" in answer.read()) == (507, True)
            connection.close()
            (state / "ballast").unlink()
            assert os.statvfs(state).f_bfree >= before - 8
            assert serving.classify((folder / "video.mp4").read_bytes()).status == 200
        (state / "ballast").write_bytes(bytes(104_000_000))
        upload = Upload(Room(state, -10_000_000), 0)  # another process takes the room
        with pytest.raises(Refusal, match="the disk is full after") as full:
            upload.write(bytes(2_000_000))
        assert full.value.status == 507
        upload.close()


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A disk of 1,000 bytes, of which 100 are to stay free, and the uploads on it."""
    uploads = []

    def usage(_):
        used = sum(upload.size for upload in uploads if not upload.file.closed)
        return shutil._ntuple_diskusage(1000, used, 1000 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return Room(tmp_path, 100), uploads


def test_an_announced_upload_has_its_room(room):
    disk, uploads = room
    uploads += [Upload(disk, 600), Upload(disk, 0)]
    with pytest.raises(Refusal, match=r"301 bytes: 400 .*100 stay free") as full:
        Upload(disk, 301)
    assert full.value.status == 507
    uploads[1].write(bytes(300))
    with pytest.raises(Refusal, match="no room"):  # a size that was not announced
        uploads[1].write(b"1")
    for _ in range(6):
        uploads[0].write(bytes(100))
    with pytest.raises(Refusal, match="no room"):  # more than was announced
        uploads[0].write(b"1")
    uploads[1].close()
    uploads[0].write(bytes(300))
    uploads[0].close()
    assert disk.promised == 0


def test_what_was_announced_and_did_not_come_is_free_again(room):
    disk, uploads = room
    uploads += [Upload(disk, 800), Upload(disk, 0)]
    with pytest.raises(Refusal, match="no room"):
        uploads[1].write(bytes(101))
    uploads[0].close()
    uploads[1].write(bytes(900))
    uploads[1].close()


@pytest.mark.slow
def test_uploads_at_a_time_leave_the_disk_its_free_bytes(folder, tmp_path):
    with (
        small_disk(200) as state,
        Serving(state=state, program=folder / "tiny.kgrc", log=tmp_path / "log") as serving,
    ):
        least, over = [1 << 60], threading.Event()

        def watch():
            while not over.wait(0.005):
                least.append(os.statvfs(state).f_bfree * os.statvfs(state).f_bsize)

        def send(chunked):
            def upload():
                body = (bytes(100_000) for _ in range(700)) if chunked else bytes(70_000_000)
                try:
                    return serving.ask("POST", "/v1/videos:classify", body, VIDEO).status
                except (BrokenPipeError, ConnectionResetError):
                    return 507  # answered and closed while the body was still on its way

            return upload

        watching = threading.Thread(target=watch)
        watching.start()
        found = together(send(True), send(False), send(True), send(False))
        over.set()
        watching.join()
        assert set(found) <= {422, 507}
        assert 507 in found
        assert min(least) > 99_000_000


# ---- bad videos, many of them ---------------------------------------------------------------


def huge_picture(path):
    """A small file whose frames have 134 million pixels."""
    write_video(path, frames=2, size=(64, 48), codec="mjpeg")
    data = bytearray(path.read_bytes())
    at = 0
    while (at := data.find(b"\xff\xc0\x00\x11\x08", at + 1)) > 0:
        data[at + 5 : at + 9] = struct.pack(">HH", 8192, 16384)
    for box, offset in ((b"tkhd", 76 + 4),):
        place = data.find(box) + offset
        data[place : place + 8] = struct.pack(">II", 16384 << 16, 8192 << 16)
    place = data.find(b"stsd") + 4 + 8 + 8 + 24
    data[place : place + 4] = struct.pack(">HH", 16384, 8192)
    return bytes(data)


def test_a_huge_picture_is_refused_without_its_memory(service, tmp_path):
    data = huge_picture(tmp_path / "huge.mov")
    assert len(data) < 500_000
    refused = service.classify(data)
    assert refused.status == 413, refused.body
    assert "pixels" in refused.json["error"]


@pytest.mark.slow
def test_a_bomb_runs_out_of_time_and_others_do_not_wait(folder, video):
    """A decompression bomb: 12,000 equal frames of full HD in a small file."""
    path = folder / "bomb.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=60, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        frame = av.VideoFrame(1920, 1080, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for i in range(3000):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    bomb = path.read_bytes()
    assert len(bomb) < 2_000_000
    with Serving(state=folder / "bombed", program=folder / "tiny.kgrc") as serving:
        query = "?stride=100000"
        place = serving.classify(bomb, query, headers={"Prefer": "respond-async"}).headers[
            "location"
        ]
        began = time.monotonic()
        assert serving.classify(video).status == 200
        assert time.monotonic() - began < 20
        (pid,) = children_of(serving.children(DECODER)[0])
        status = Path(f"/proc/{pid}/status").read_text()
        assert int(status.split("VmHWM:")[1].split()[0]) < 400_000  # kB
        assert serving.ask("DELETE", place).status == 200
        serving.until(lambda: children_of(serving.children(DECODER)[0]) == [], 10)


def test_a_decoder_beyond_its_limits_ends_with_the_reason(folder):
    """Limits of memory and time of a decoder child, without the service."""
    job = DecodeRequest("clips", ClipSpec(8, 32, 32, 32))

    async def decode(decoder, **limits):
        upload = Upload(Room(folder, 0), 0)
        upload.write((folder / "long.mp4").read_bytes())
        replies = []
        try:
            chosen = msgspec.structs.replace(job, **limits)
            async with decoder.clips(upload, chosen, 8 * 32 * 32 * 3) as pieces:
                async for reply, _ in pieces:
                    replies.append(reply)
        finally:
            upload.close()
        return replies

    decoder = Decoder()
    decoder.start()
    try:
        assert len(asyncio.run(decode(decoder))) == 1500 // 8 + 2
        *_, end = asyncio.run(decode(decoder, decode_seconds=0.02, stride=9999))
        assert end.notes[0].endswith("decoding took 0.02 s by then")
        assert end.decoded < 1500
        with pytest.raises(Refusal, match="memory") as refused:
            asyncio.run(decode(decoder, decode_bytes=100_000))
        assert refused.value.status in (413, 422)
        *_, end = asyncio.run(decode(decoder, max_seconds=5.0))
        assert end.notes[0].endswith("only 5 s of a video are looked at")
        assert asyncio.run(decoder.confined()) == WITHHELD
    finally:
        decoder.stop()


@pytest.mark.parametrize(
    ("apply", "machine", "withheld"),
    [
        ("_filter_calls(libc)", "x86_64", [*WITHHELD[:4]]),
        ("_restrict_files(libc)", "", ["open a file"]),
        ("_change_user()", "", ["signal the service", "act as root"]),
        ("None", "", []),
    ],
)
def test_each_confinement_alone(apply, machine, withheld):
    """In a process of its own; what this kernel or user lacks is skipped."""
    if os.geteuid() or (machine and platform.machine() != machine):
        pytest.skip("needs root on x86-64: single confinements not tested")
    code = (
        "import ctypes\nfrom pynq_kgrc.service.confine import *\n"
        "from pynq_kgrc.service.confine import _change_user, _filter_calls, _restrict_files\n"
        "libc = ctypes.CDLL(None, use_errno=True)\nlibc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)\n"
        f"{apply}\nprint(what_holds())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    found = ast.literal_eval(done.stdout)
    assert set(found) >= set(withheld), done.stderr
    if not withheld:
        assert found == []


def mutate(rng, video):
    """A damaged video, or random bytes."""
    kind = rng.integers(5)
    data = bytearray(video)
    if kind == 0:
        return rng.bytes(int(rng.integers(1, 5000)))
    if kind == 1:
        return bytes(data[: int(rng.integers(1, len(data)))])
    if kind == 2:
        for at in rng.integers(0, len(data), 20):
            data[at] = int(rng.integers(256))
    elif kind == 3:  # the head of the container is where sizes and counts are
        for at in rng.integers(0, 600, 8):
            data[at % len(data)] = int(rng.integers(256))
    else:
        at, size = int(rng.integers(len(data))), int(rng.integers(1, 2000))
        data[at : at + size] = b""
    return bytes(data)


def send_random(service, videos, count, seed):
    """Send `count` mutated uploads on one connection; status -> sizes and answers."""
    rng = np.random.default_rng(seed)
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    seen = {}
    for _ in range(count):
        data = mutate(rng, videos[int(rng.integers(len(videos)))])
        connection.request(
            "POST", "/v1/videos:classify?stride=100000", data, {"Content-Type": "video/mp4"}
        )
        answer = connection.getresponse()
        text = answer.read()
        seen.setdefault(answer.status, []).append((len(data), text[:300]))
    connection.close()
    return seen


@pytest.mark.parametrize("count", [30, pytest.param(4000, marks=pytest.mark.slow)])
def test_random_uploads_are_answered_with_a_reason(folder, tmp_path, count):
    """Always 200 (it still is a video) or 4xx, and memory does not grow."""
    kinds = {"a.mp4": "mpeg4", "a.avi": "mjpeg", "a.mkv": "libx264", "a.webm": "libvpx"}
    videos = [write_video(tmp_path / n, frames=12, codec=c) for n, c in kinds.items()]
    with Serving(state=folder / f"random{count}", program=folder / "tiny.kgrc") as serving:
        send_random(serving, videos, 20, seed=1)
        before = serving.memory()
        halves = together(
            *[lambda s=s: send_random(serving, videos, count // 2, seed=s) for s in (2, 3)]
        )
        for seen in halves:
            assert set(seen) <= {200, 400, 413, 422}, {k: v[:3] for k, v in seen.items()}
            assert len(seen[422]) > count / 20
            assert all(b'{"error":"' in text for _, text in seen[422])
        assert serving.memory() < before + 20e6
        assert serving.ready()


def test_aborted_connections_leave_nothing_behind(service):
    """300 connections that are opened and reset at once leave no descriptor open."""
    for _ in range(300):
        line = socket.create_connection(("127.0.0.1", service.port), 5)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line.close()
    assert service.get("/v2/health/live").status == 200
    folder = f"/proc/{service.process.pid}/fd"
    service.until(lambda: len(os.listdir(folder)) < 60, 5)


def test_the_command_line_says_what_is_missing(tmp_path):
    """Without the libraries of the service, one line names the extra to install."""
    code = (
        "import sys\n"
        "sys.modules['fastapi'] = None\n"
        "from pynq_kgrc.cli import main\n"
        f"sys.exit(main(['serve', '-p', {str(tmp_path / 'x.kgrc')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install '.[serve]'" in done.stderr
