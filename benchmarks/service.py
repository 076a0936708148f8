"""How the service behaves under load, on this computer, over loopback.

Starts `pynq-kgrc serve` with a program and asks four questions, each bounded in time:

1. overhead: how much longer does a clip take through HTTP than in a Session alone?
2. crowd: 1,000 clients at once: are all answered with 200, 429 or 503, and how fast is health?
3. overload: how many clips per second at the peak, and with at least ten times as many clients?
4. memory: how much does the process take that answers clients?

The clients share the cores with the service, which makes it slower than with remote clients.
Writes service.md and service.json to benchmarks/results.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from reports import ROOT, circumstances, markdown_table, where, write

from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session
from pynq_kgrc.service.settings import shipped_program

RESULTS = ROOT / "benchmarks" / "results"

FEW = (4, 16)
"""Numbers of clients that the service answers without refusals: the peak is at one of these."""
MANY = 160

LIMIT_SECONDS = 60.0
"""A client that waits longer counts as timed out."""


@dataclass
class Tally:
    """Counts of the answers that clients got, and the seconds of successful ones."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    without_retry_after: int = 0

    def count(self, status: str, seconds: float, head: bytes = b"") -> None:
        self.statuses[status] += 1
        if status == "200":
            self.seconds.append(seconds)
        elif status in ("429", "503") and b"retry-after:" not in head.lower():
            self.without_retry_after += 1


async def ask(port: int, request: bytes, tally: Tally) -> tuple[str, float]:
    """Send one request on a new connection.

    Returns:
        The status or the name of an error, and the seconds of Retry-After (1 without the header).
    """
    began = time.perf_counter()
    head, status = b"", "timeout"
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                status = head.split(b" ", 2)[1].decode()
                await reader.read(-1)
            finally:
                writer.close()
    except TimeoutError:
        pass
    except (OSError, asyncio.IncompleteReadError) as error:
        status = type(error).__name__
    tally.count(status, time.perf_counter() - began, head)
    _, _, after = head.lower().partition(b"retry-after:")
    return status, float(after.split(b"\r\n")[0]) if after else 1.0


def infer_request(name: str, frames: Any) -> bytes:
    """The HTTP request for a clip by the Open Inference Protocol."""
    tensor = {
        "name": "frames",
        "shape": list(frames.shape),
        "datatype": "UINT8",
        "parameters": {"binary_data_size": frames.nbytes},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    return (
        (
            f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Inference-Header-Content-Length: {len(head)}\r\n"
            f"Content-Length: {len(head) + frames.nbytes}\r\n\r\n"
        ).encode()
        + head
        + frames.tobytes()
    )


def watch_health(port: int, kept: bool, stop: Event, answer: Connection) -> None:
    """Ask for health 50 times a second until `stop`, on one connection or each time on a new one.

    Runs in a process of its own, so that no other client delays it.
    """
    seconds: list[float] = []
    line: http.client.HTTPConnection | None = None
    while not stop.is_set():
        began = time.perf_counter()
        if line is None:
            line = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_SECONDS)
        line.request("GET", "/v2/health/live")
        line.getresponse().read()
        seconds.append(time.perf_counter() - began)
        if not kept:
            line.close()
            line = None
        time.sleep(0.02)
    answer.send(seconds)


async def measure_crowd(port: int, request: bytes, clients: int) -> dict[str, Any]:
    """`clients` requests at once, while two processes ask for health all the time."""
    crowd, stop = Tally(), multiprocessing.Event()
    watches = []
    for kept in (True, False):
        ours, theirs = multiprocessing.Pipe()
        watch = multiprocessing.Process(target=watch_health, args=(port, kept, stop, theirs))
        watch.start()
        watches.append((watch, ours))
    await asyncio.sleep(1)
    began = time.perf_counter()
    await asyncio.gather(*(ask(port, request, crowd) for _ in range(clients)))
    took = time.perf_counter() - began
    stop.set()
    health = []
    for watch, ours in watches:
        health.append(ours.recv())
        watch.join()
    document: dict[str, Any] = {
        "clients": clients,
        "statuses": dict(crowd.statuses),
        "without_retry_after": crowd.without_retry_after,
        "seconds": took,
    }
    for name, seconds in zip(("kept_connection", "new_connections"), health, strict=True):
        document[f"health_{name}"] = {
            "requests": len(seconds),
            "median_ms": 1e3 * statistics.median(seconds),
            "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
            "worst_ms": 1e3 * max(seconds),
        }
    return document


async def measure_goodput(port: int, request: bytes, clients: int, seconds: float) -> float:
    """Clips answered per second.

    A client sends its next request at once, or after a refusal when Retry-After says.
    """
    tally = Tally()
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            status, pause = await ask(port, request, tally)
            if status != "200":
                await asyncio.sleep(min(pause, max(0.0, end - time.perf_counter())))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return tally.statuses["200"] / (time.perf_counter() - began)


async def measure_overhead(
    port: int, request: bytes, session: Session, frames: Any, rounds: int
) -> dict[str, float]:
    """A clip in a session alone and through the service, in turns; medians in ms."""
    bare, served, tally = [], [], Tally()
    for _ in range(rounds):
        began = time.perf_counter()
        session.classify(frames)
        bare.append(time.perf_counter() - began)
        began = time.perf_counter()
        await ask(port, request, tally)
        served.append(time.perf_counter() - began)
    extra = [1e3 * (s - b) for s, b in zip(served, bare, strict=True)]
    return {
        "bare_ms": 1e3 * statistics.median(bare),
        "served_ms": 1e3 * statistics.median(served),
        "overhead_ms": statistics.median(extra),
    }


def cpu_ms(pid: int) -> float:
    """Processor time of a process since it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return 1000 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1000


def measure(program_path: Path, clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure all four."""
    program = load(program_path)
    clip = program.clip
    shape = (clip.frames, clip.height, clip.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    request = infer_request(program_path.stem, frames)
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "pynq_kgrc.cli", "serve", "--json", "--port", "0"]
        command += ["--program", str(program_path), "--state", state]
        with open(os.devnull, "wb") as nowhere:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=nowhere)
        assert process.stdout is not None
        try:
            started = json.loads(process.stdout.readline())
            port = started["port"]
            document: dict[str, Any] = {
                "program": program.name,
                "clip": list(shape),
                "load_average": os.getloadavg()[0],
                "memory_idle_mb": resident_mb(process.pid),
            }
            with Session(program) as session:
                session.classify(frames)
                used = cpu_ms(process.pid)
                document["overhead"] = asyncio.run(
                    measure_overhead(port, request, session, frames, rounds)
                )
                # of the process that answers; hardly affected by other load
                document["overhead"]["cpu_ms"] = (cpu_ms(process.pid) - used) / rounds
            document["crowd"] = asyncio.run(measure_crowd(port, request, clients))
            rates: dict[int, list[float]] = {n: [] for n in (*FEW, MANY)}
            for _ in range(5):  # in turns: other load affects all of them
                for n, found in rates.items():
                    found.append(asyncio.run(measure_goodput(port, request, n, seconds)))
            peak = max(statistics.median(rates[n]) for n in FEW)
            overload = statistics.median(rates[MANY])
            document["goodput"] = {
                "per_s": rates,
                "peak_per_s": peak,
                "overload_per_s": overload,
                "ratio": overload / peak,
            }
            document["memory_after_mb"] = resident_mb(process.pid)
        finally:
            process.terminate()
            process.wait(60)
            process.stdout.close()
    return document


def lines_of(doc: dict[str, Any]) -> list[str]:
    """The report in Markdown: each question, its target and the result."""
    crowd, goodput, overhead = doc["crowd"], doc["goodput"], doc["overhead"]
    statuses = ", ".join(f"{n} x {status}" for status, n in sorted(crowd["statuses"].items()))
    rows = [
        ["clips through HTTP, above a bare Session", "15 ms", f"{overhead['overhead_ms']:.1f} ms"],
        ["of it, processor time of the process that answers", "", f"{overhead['cpu_ms']:.1f} ms"],
        [f"{crowd['clients']:,} clients at once", "200, 429 or 503", statuses],
        ["429 and 503 without Retry-After", "0", str(crowd["without_retry_after"])],
    ]
    for name in ("kept_connection", "new_connections"):
        health = crowd[f"health_{name}"]
        words = f"health meanwhile, 99th percentile, {name.replace('_', ' ')}"
        rows.append([words, "100 ms", f"{health['p99_ms']:.0f} ms of {health['requests']}"])
    few = " or ".join(map(str, FEW))
    rows += [
        [f"clips a second at the peak ({few} clients)", "", f"{goodput['peak_per_s']:.1f}"],
        [f"with {MANY} clients, of the peak", "90 %", f"{100 * goodput['ratio']:.0f} %"],
        ["memory before the first clip", "120 MB", f"{doc['memory_idle_mb']:.0f} MB"],
        ["memory after all this", "", f"{doc['memory_after_mb']:.0f} MB"],
    ]
    return [
        "# The service under load",
        "",
        f"Every figure is measured, on {doc['when']}, by `{doc['command']}`, over loopback,",
        "clients and service on the same cores. Memory: of the process that answers clients.",
        "",
        f"Program {doc['program']}, clips of {' x '.join(map(str, doc['clip'][:3]))}.",
        "",
        *markdown_table(["question", "target", "found"], rows),
        "",
        f"Load average of the last minute before: {doc['load_average']:.1f}.",
        *where(doc),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        *("-p", "--program"),
        type=Path,
        default=shipped_program(),
        help="default: the one that is shipped",
    )
    parser.add_argument("--clients", type=int, default=1000, help="of the crowd (default: 1000)")
    parser.add_argument("--seconds", type=float, default=10, help="of each load (default: 10)")
    parser.add_argument("--rounds", type=int, default=20, help="clips compared (default: 20)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    options = parser.parse_args()
    found = circumstances(__file__, ("pynq_kgrc", "numpy", "fastapi", "uvicorn"))
    found |= measure(options.program, options.clients, options.seconds, options.rounds)
    text = "\n".join(lines_of(found)) + "\n"
    print(text)
    write(options.out, "service.json", json.dumps(found, indent=1) + "\n")
    write(options.out, "service.md", text)


if __name__ == "__main__":
    main()
