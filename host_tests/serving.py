"""Starts a service in a process of its own, and sends raw requests to it."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import msgspec
import numpy as np
from networks import Net, compiled

LABELS = ("run", "jump", "wave", "clap")


def write_program(path, size=(8, 32, 32), seed=0, filters=8, labels=LABELS):
    """Write a small program that runs in milliseconds; more `filters` make it slow."""
    net = Net(size, seed=seed)
    x = net.conv("clip", filters)
    if filters > 8:
        x = net.conv(x, filters)
    x = net.dense(net.pool(x, 2), len(labels))
    program, _ = compiled(net)
    program = msgspec.structs.replace(program, labels=labels)
    program.save(path)
    return program


def write_video(path, frames=40, size=(64, 48), codec="mpeg4", rate=25, **options):
    """Write a video whose frames all differ; its bytes."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(frames):
            picture = rng.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
            picture[:, : 1 + i * size[0] // frames] += np.uint8(120)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return Path(path).read_bytes()


def write_jpeg(shade, size=(64, 48)):
    """The bytes of an image, as a webcam's page sends them."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height = size
    codec.pix_fmt, codec.time_base = "yuvj420p", Fraction(1, 25)
    picture = np.full((size[1], size[0], 3), shade, np.uint8)
    picture[: size[1] // 2, : size[0] // 3] = 255 - shade
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj420p")
    return b"".join(bytes(p) for p in [*codec.encode(frame), *codec.encode(None)])


@dataclass
class Reply:
    """The answer of a service."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Serving:
    """`pynq-kgrc serve` on a free port; a context manager."""

    def __init__(self, *arguments, state, program=None, log=None):
        command = [sys.executable, "-m", "pynq_kgrc.cli", "serve", "--json", "--port", "0"]
        if "--backend" not in arguments:  # "auto" would be the simulated board of conftest.py
            command += ["--backend", "emulate"]
        command += ["--state", str(state), *map(str, arguments)]
        if program is not None:
            command += ["--program", str(program)]
        self.errors = log or Path(state).with_suffix(".log")
        with self.errors.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env={**os.environ, **THREADS}
            )
        timer = threading.Timer(120, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            self.process.wait(30)
            self.process.stdout.close()
            raise RuntimeError(self.log)
        self.started = json.loads(line)
        self.port = self.started["port"]

    @property
    def log(self):
        return self.errors.read_text()

    @property
    def records(self):
        """The whole lines of the log, decoded."""
        return [json.loads(line) for line in self.log.split("\n")[:-1]]

    def children(self, module):
        """Ids of this service's child processes that run a module."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                text = (folder / "cmdline").read_bytes()
                if parent == self.process.pid and module.encode() in text:
                    found.append(int(folder.name))
        return found

    def memory(self):
        """Resident memory of the answering process, in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(text.split("VmRSS:")[1].split()[0])

    def peak_memory(self):
        """Largest resident memory of the answering process so far, in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(text.split("VmHWM:")[1].split()[0])

    def ask(self, method, path, body=None, headers=None, timeout=60, **more):
        """Send one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {}, **more)
            answer = connection.getresponse()
            heads = {k.lower(): v for k, v in answer.getheaders()}
            return Reply(answer.status, heads, answer.read())
        finally:
            connection.close()

    def get(self, path, **more):
        return self.ask("GET", path, **more)

    def classify(self, video, query="", kind="video/mp4", headers=None, **more):
        heads = {"Content-Type": kind, **(headers or {})}
        return self.ask("POST", f"/v1/videos:classify{query}", video, heads, **more)

    def infer(self, frames, name="tiny", **more):
        """Send clips by the Open Inference Protocol as binary tensors."""
        count = frames.nbytes
        tensor = {"name": "frames", "shape": list(frames.shape), "datatype": "UINT8"}
        tensor["parameters"] = {"binary_data_size": count}
        head = json.dumps({"inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        return self.ask(
            "POST", f"/v2/models/{name}/infer", head + frames.tobytes(), headers, **more
        )

    def connect(self, timeout=60):
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def until(self, check, seconds=20):
        """Wait until `check` is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if check():
                return
            time.sleep(0.02)
        raise AssertionError(f"not within {seconds} s: {check}")

    def ready(self):
        return self.get("/v2/health/ready").status == 200

    def stop(self, seconds=60):
        """Send SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()
        self.process.stdout.close()


THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
