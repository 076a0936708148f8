"""The service for a minute of live frames, and for two thousand requests of all kinds."""

import gc
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="the service needs pynq_kgrc[serve]")
pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

from serving import Serving, write_jpeg, write_program, write_video

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("long")


@pytest.fixture
def service(folder):
    write_program(folder / "tiny.kgrc")
    with Serving(state=folder / "state", program=folder / "tiny.kgrc") as serving:
        yield serving
    assert not [record for record in serving.records if record["level"] == "error"]


def test_a_live_session_lasts_longer_than_a_minute(service):
    connect = pytest.importorskip("websockets.sync.client").connect
    with connect(f"ws://127.0.0.1:{service.port}/v1/live") as client:
        assert json.loads(client.recv(30))["type"] == "ready"
        end, sent, kinds = time.monotonic() + 62, 0, Counter()
        while time.monotonic() < end:
            client.send(write_jpeg(sent % 250))
            sent += 1
            last = json.loads(client.recv(30))
            kinds[last["type"]] += 1
            time.sleep(0.05)
    assert kinds == {"filling": 7, "prediction": sent - 7}
    assert (last["type"], last["received"]) == ("prediction", sent)
    service.until(lambda: '"/v1/live"' in service.log)


class Mix:
    """Requests of all kinds; each method sends one and says which answer it was."""

    def __init__(self, service, video):
        self.service, self.video = service, video
        self.frames = np.random.default_rng(0).integers(0, 256, (1, 8, 32, 32, 3), dtype=np.uint8)

    def a_video(self):
        return self.service.classify(self.video).status

    def options(self):
        return self.service.classify(self.video, "?stride=4&top_k=2").status

    def wrong_option(self):
        return self.service.classify(self.video, "?stride=-1").status

    def no_video(self):
        return self.service.classify(b"no video").status

    def cut_video(self):
        return self.service.classify(self.video[: len(self.video) // 2]).status

    def job(self):
        answer = self.service.classify(self.video, headers={"Prefer": "respond-async"})
        if answer.status != 202:
            return answer.status
        place = answer.headers["location"]
        self.service.get(f"{place}/events")  # until it is final
        self.service.ask("DELETE", place)
        return self.service.get(place).status

    def binary(self):
        return self.service.infer(self.frames).status

    def text(self):
        tensor = {"name": "frames", "shape": list(self.frames.shape), "datatype": "UINT8"}
        body = json.dumps({"inputs": [{**tensor, "data": self.frames.tolist()}]}).encode()
        return self.service.ask("POST", "/v2/models/tiny/infer", body).status

    def wrong_text(self):
        return self.service.ask("POST", "/v2/models/tiny/infer", b'{"inputs": [[[').status

    def left(self):
        with self.service.connect() as line:
            head = (
                "POST /v1/videos:classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n"
            )
            line.sendall(f"{head}\r\n".encode() + self.video[:5000])
        return 499

    def live(self):
        from websockets.sync.client import connect

        with connect(f"ws://127.0.0.1:{self.service.port}/v1/live") as client:
            message = json.loads(client.recv(60))
            if message["type"] == "error":
                return message["status"]
            client.send(write_jpeg(50))
            return 101 if json.loads(client.recv(60))["type"] == "filling" else 500

    def pages(self):
        places = ("/", "/page/page.js", "/metrics", "/v1/programs", "/v2/models/tiny/stats")
        return self.service.get(random.choice(places)).status

    def none(self):
        return self.service.get("/v1/jobs/none").status


# 429: four live sessions at a time
ANSWERS = {
    "a_video": {200}, "options": {200}, "wrong_option": {422}, "no_video": {422},
    "cut_video": {200, 422}, "job": {404}, "binary": {200}, "text": {200}, "wrong_text": {400},
    "left": {499}, "live": {101, 429}, "pages": {200}, "none": {404},
}  # fmt: skip


def held_by(pids):
    """Bytes of memory, open descriptors and threads of processes."""
    memory, files, threads = 0, 0, 0
    for pid in pids:
        text = Path(f"/proc/{pid}/status").read_text()
        memory += 1024 * int(text.split("VmRSS:")[1].split()[0])
        threads += int(text.split("Threads:")[1].split()[0])
        files += len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return memory, files, threads


def test_two_thousand_mixed_requests_leave_nothing_behind(service, folder):
    pytest.importorskip("websockets")
    mix = Mix(service, write_video(folder / "mixed.mp4", frames=40))
    (worker,) = service.children("service.worker")
    wrong = Counter()

    def send(count, seed):
        order = random.Random(seed)
        for _ in range(count):
            name = order.choice(list(ANSWERS))
            status = getattr(mix, name)()
            if status not in ANSWERS[name]:
                wrong[name, status] += 1

    def round_of(count, seed):
        threads = [threading.Thread(target=send, args=(count // 8, seed + n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        service.until(lambda: len(service.children("")) == children, 60)
        time.sleep(6)  # connections that linger
        return held_by([service.process.pid, worker]), held_by(service.children(""))

    children = len(service.children(""))
    before, before_children = round_of(400, 1)
    after, after_children = round_of(2000, 100)
    assert not wrong
    assert after[0] - before[0] < 8e6, (before, after)
    assert after[1:] == before[1:]
    assert after_children[1:] == before_children[1:]
    assert [worker] == service.children("service.worker")
