"""What hostile clients cost the service: memory above idle, and how late others are answered.

Starts `pynq-kgrc serve` for each attack, with the program that ships, and attacks it over loopback
with limits of time. Meanwhile a process of its own asks /v2/health/live every 20 ms. The clients
share the cores with the service. Writes attacks.md and attacks.json to benchmarks/results.

The disk is attacked on a small file system of its own, which only root can mount; else it is left
out and the report says so.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reports import ROOT, circumstances, markdown_table, where, write

from pynq_kgrc.service.settings import Settings, shipped_program

RESULTS = ROOT / "benchmarks" / "results"
INFER = f"/v2/models/{shipped_program().stem}/infer"
CLASSIFY = "/v1/videos:classify"
VIDEO = (ROOT / "examples" / "clips" / "arm_wrestling_k400.mp4").read_bytes()
HEAD = b'{"inputs":[{"name":"frames","shape":[32,16,64,64,3],"datatype":"UINT8","data":['
MB = 1_000_000
KEY = "attacks-of-benchmarks"
LEAST_SECONDS = 5.0
"""A shorter attack is repeated, so that a percentile of the health checks means something."""


class Target:
    """A service that is attacked, and what it answered."""

    def __init__(self, state: Path) -> None:
        command = [sys.executable, "-m", "pynq_kgrc.cli", "serve", "--json", "--port", "0"]
        command += ["--state", str(state), "--program", str(shipped_program())]
        # reachable at an address that is not this machine's loopback, too: clients of this machine
        # may take all places
        keys = state.with_suffix(".keys")
        keys.write_text(f"{KEY}\n", encoding="ascii")
        command += ["--host", "0.0.0.0", "--api-key-file", str(keys)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        assert self.process.stdout is not None
        self.port: int = json.loads(self.process.stdout.readline())["port"]
        self.state = state
        self.answers: Counter[str] = Counter()

    def send(self, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        """Send a request, read its answer, and count the status."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before it was read
                client.request("POST", path, body, {"X-API-Key": KEY, **(headers or {})})
            answer = client.getresponse()
            answer.read()
            self.answers[str(answer.status)] += 1
        except OSError as error:
            self.answers[type(error).__name__] += 1
        finally:
            client.close()

    def memory(self) -> int:
        """Memory of all its processes in bytes; pages that they share are counted once."""
        total = 0
        for process in family(self.process.pid):
            with suppress(OSError):
                text = Path(f"/proc/{process}/smaps_rollup").read_text("ascii")
                total += 1024 * int(text.split("\nPss:")[1].split()[0])
        return total

    def peak(self) -> int:
        """Largest memory of the process that answers since `forget`, in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return 1024 * int(text.split("VmHWM:")[1].split()[0])

    def forget(self) -> None:
        """Let `peak` begin anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="ascii")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def family(root: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            text = (folder / "stat").read_text("utf-8", "replace")
            parents[int(folder.name)] = int(text.rsplit(")", 1)[1].split()[1])
    found = [root]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def own_address() -> str:
    """An address of this machine that is not loopback, where it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # chooses a route; nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def at_once(count: int, work: Callable[[], None]) -> None:
    """Run the same work in threads."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def as_json(target: Target, *bodies: bytes) -> None:
    """Send inference requests in JSON, one after the other."""
    for body in bodies:
        target.send(INFER, body, {"Content-Type": "application/json"})


def string_among_numbers(target: Target, seconds: float) -> None:
    """A string of 20,000 characters among the numbers of a tensor."""
    start = HEAD.replace(b"[32,", b"[1,")
    as_json(target, start + b"1," * 196_607 + b'"' + b"b" * 20_000 + b'"]}]}')


def json_numbers(target: Target, seconds: float) -> None:
    """15 million numbers, in 30 MB."""
    as_json(target, HEAD + b"1," * 14_999_990 + b"1]}]}")


def json_nesting(target: Target, seconds: float) -> None:
    """Deep lists and objects, 8 million empty lists, 2 million objects, many strings."""
    as_json(
        target,
        HEAD + b"[" * 14_000_000 + b"]" * 14_000_000 + b"]}]}",
        b'{"inputs":' * 3_000_000,
        HEAD + b"[]," * 8_000_000 + b"[]]}]}",
        HEAD + b'{"a":1},' * 2_000_000 + b"1]}]}",
        HEAD + b'"aaaa",' * 3_000_000 + b'"' + b"b" * MB + b'"]}]}',
    )


def gzip_bombs(target: Target, seconds: float) -> None:
    """Four clients with 193 kB of gzip that inflate to 199 MB, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = b"".join([packer.compress(bytes(MB)) for _ in range(199)] + [packer.flush()])
    end = time.monotonic() + seconds

    def client() -> None:
        while time.monotonic() < end:
            target.send(INFER, body, {"Content-Encoding": "gzip"})

    at_once(4, client)


def large_bodies(target: Target, seconds: float) -> None:
    """Six inference bodies of 190 MB at once."""
    at_once(6, lambda: target.send(INFER, iter([bytes(MB)] * 190), {"Content-Length": "190000000"}))


def slow_uploads(target: Target, seconds: float) -> None:
    """100 uploads of a byte a second from one address; a client of another sends videos."""
    head = f"POST {CLASSIFY} HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n"
    head += "Content-Length: 100000\r\n\r\n"
    crowd = [socket.create_connection((own_address(), target.port), 30) for _ in range(100)]
    for client in crowd:
        client.sendall(head.encode())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for client in crowd:
            with suppress(OSError):  # it was refused or closed
                client.sendall(b"x")
        target.send(f"{CLASSIFY}?top_k=1", VIDEO, {"Content-Type": "video/mp4"})
        time.sleep(1)
    for client in crowd:
        client.close()


def form_options(target: Target, seconds: float) -> None:
    """Options out of bounds, as fields of a form."""
    for option in ("top_k=-1", "top_k=0", "top_k=1e3", "stride=-1", "stride=0", "window=99999999"):
        name, value = option.split("=")
        fields = f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n--x\r\n'
        fields += 'Content-Disposition: form-data; name="video"; filename="v"\r\n\r\n'
        body = fields.encode() + VIDEO + b"\r\n--x--\r\n"
        target.send(CLASSIFY, body, {"Content-Type": "multipart/form-data; boundary=x"})


def full_disk(target: Target, seconds: float) -> None:
    """Three chunked uploads of 120 MB on a disk of 300 MB."""
    # http.client sends the parts of an iterator without a length as chunks
    at_once(3, lambda: target.send(CLASSIFY, iter([bytes(100_000)] * 1200)))


ATTACKS = (
    *(string_among_numbers, json_numbers, json_nesting, gzip_bombs, large_bodies, slow_uploads),
    *(form_options, full_disk),
)


def ask_health(port: int, stop: Any, out: Any) -> None:
    """Ask for health until told to stop; send the seconds of each answer."""
    waits = []
    while not stop.is_set():
        began = time.perf_counter()
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        with suppress(OSError):
            client.request("GET", "/v2/health/live")
            client.getresponse().read()
        waits.append(time.perf_counter() - began)
        client.close()
        time.sleep(0.02)
    out.send(waits)


@contextmanager
def health_asked(port: int) -> Any:
    """A list that has, after the block, the milliseconds of each answer, sorted."""
    stop = multiprocessing.Event()
    inbox, out = multiprocessing.Pipe(duplex=False)
    asking = multiprocessing.Process(target=ask_health, args=(port, stop, out))
    asking.start()
    waits: list[float] = []
    try:
        yield waits
    finally:
        stop.set()
        waits += sorted(1e3 * seconds for seconds in inbox.recv())
        asking.join()


def percentile(waits: list[float]) -> int:
    """The 99th percentile, rounded."""
    return round(waits[int(0.99 * len(waits))])


def measure(attack: Callable[[Target, float], None], state: Path, seconds: float) -> dict[str, Any]:
    """Start a service, ask for its health, attack it and ask again, end it; the row."""
    target = Target(state)
    try:
        time.sleep(2)  # its start is over
        target.forget()
        idle, idle_all, most, free = target.peak(), target.memory(), 0, []
        with health_asked(target.port) as control:
            time.sleep(LEAST_SECONDS)
        began = time.monotonic()

        def repeat() -> None:
            attack(target, seconds)
            while time.monotonic() - began < LEAST_SECONDS:
                attack(target, seconds)

        attacking = threading.Thread(target=repeat)
        with health_asked(target.port) as waits:
            attacking.start()
            while attacking.is_alive():
                most = max(most, target.memory())
                free.append(shutil.disk_usage(state).free)
                attacking.join(0.1)
            took = time.monotonic() - began
            time.sleep(0.5)
        return {
            "attack": attack.__name__.replace("_", " "),
            "what": (attack.__doc__ or "").rstrip("."),
            "seconds": round(took, 1),
            "answers": dict(sorted(target.answers.items())),
            "answering_mb": round((target.peak() - idle) / 1e6),
            "all_mb": max(0, round((most - idle_all) / 1e6)),
            "control_p99_ms": percentile(control),
            "health_p99_ms": percentile(waits),
            "health_max_ms": round(waits[-1]),
            "asked": len(waits),
            "least_free_mb": round(min(free, default=0) / 1e6),
            "load": round(os.getloadavg()[0], 1),
        }
    finally:
        target.stop()


@contextmanager
def small_disk(folder: Path) -> Any:
    """A file system of 300 MB, mounted for as long as the context lasts.

    Raises:
        OSError: it cannot be mounted.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise OSError("no right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def report(doc: dict[str, Any]) -> str:
    """The document as Markdown."""
    rows = [
        [
            row["what"],
            ", ".join(f"{count} x {status}" for status, count in row["answers"].items()),
            f"{row['answering_mb']} MB",
            f"{row['all_mb']} MB",
            f"{row['control_p99_ms']} ms",
            f"{row['health_p99_ms']} ms",
            f"{row['health_max_ms']} ms",
            f"{row['load']}",
        ]
        for row in doc["rows"]
    ]
    head = ["attack", "answers", "answering process", "all processes"]
    head += ["health before, 99 %", "health, 99 %", "largest", "load"]
    lines = [
        "# The service under attack",
        "",
        f"Measured by `{doc['command']}`, {doc['when']}. Memory is the largest above idle, of the",
        "process that answers and of all processes of the service together. The health before was",
        f"asked for {LEAST_SECONDS:g} s without an attack. The load is the system's average of a",
        "minute at the attack's end: what else ran, and the attacking client, are in these times.",
        "",
        *markdown_table(head, rows),
        "",
    ]
    for row in doc["rows"]:
        if row["attack"] == "full disk":
            keep = Settings.free_bytes // MB
            lines.append(
                f"In the attack on the disk, the least free was {row['least_free_mb']} MB; "
                f"{keep} MB are to stay free."
            )
    lines += [f"Left out: {text}." for text in doc["left_out"]]
    return "\n".join([*lines, *where(doc), ""])


def main() -> None:
    """Attack, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of the attacks that repeat")
    parser.add_argument("--only", default="", help="attacks whose name has this text")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    options = parser.parse_args()
    chosen = [each for each in ATTACKS if options.only.replace(" ", "_") in each.__name__]
    doc = circumstances(__file__, ["numpy", "uvicorn", "fastapi", "av"])
    doc |= {"seconds": options.seconds, "rows": [], "left_out": []}
    with tempfile.TemporaryDirectory() as folder:
        for attack in chosen:
            state = Path(folder) / attack.__name__
            try:
                if attack is full_disk:
                    with small_disk(state):
                        row = measure(attack, state, options.seconds)
                else:
                    state.mkdir()
                    row = measure(attack, state, options.seconds)
            except OSError as error:
                doc["left_out"].append(f"{attack.__name__.replace('_', ' ')} ({error})")
                continue
            doc["rows"].append(row)
            print(json.dumps(row), flush=True)
    write(options.out, "attacks.json", json.dumps(doc, indent=1) + "\n")
    write(options.out, "attacks.md", report(doc))
    print(report(doc))


if __name__ == "__main__":
    main()
