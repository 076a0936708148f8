"""The service with other projects' clients: Triton's and schemathesis."""

import asyncio
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="the service needs pynq_kgrc[serve]")
pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

from serving import LABELS, Serving, write_program, write_video

from pynq_kgrc.cli import main
from pynq_kgrc.compress.dataset import read_index
from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session, softmax
from pynq_kgrc.service.parts import SHORT_JSON

REASON = "Triton's client is not installed: pip install pynq_kgrc[clients]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def service(folder):
    (folder / "repository").mkdir()
    write_program(folder / "repository" / "other.kgrc", seed=1)
    write_program(folder / "tiny.kgrc")
    arguments = ["--repository", folder / "repository", "--max-bytes", "2000000"]
    with Serving(*arguments, state=folder / "state", program=folder / "tiny.kgrc") as serving:
        yield serving
        assert serving.ready()
    assert not [record for record in serving.records if record["level"] == "error"]


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 8, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected(folder, frames):
    """Logits [2, classes] of the frames."""
    with Session(load(folder / "tiny.kgrc")) as session:
        rows = []
        for clip in frames:
            rows.append(session.run(clip).logits.astype("f4"))
    return np.stack(rows)


# ---- Triton's client ------------------------------------------------------------------------


@pytest.fixture
def triton(service):
    http = pytest.importorskip("tritonclient.http", reason=REASON)
    client = http.InferenceServerClient(f"127.0.0.1:{service.port}")
    yield http, client
    client.close()


def tensor(http, frames, binary=True):
    made = http.InferInput("frames", list(frames.shape), "UINT8")
    made.set_data_from_numpy(frames, binary_data=binary)
    return [made]


def test_triton_health_and_metadata(triton, service):
    _, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert not client.is_model_ready("none")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    found = client.get_model_metadata("tiny")
    assert found["inputs"] == [{"name": "frames", "datatype": "UINT8", "shape": [-1, 8, 32, 32, 3]}]
    assert [output["name"] for output in found["outputs"]] == ["probabilities", "logits"]
    (version,) = found["versions"]
    assert client.get_model_metadata("tiny", version) == found
    assert not client.is_model_ready("tiny", "7")


def test_triton_configuration_and_statistics(triton, service, frames):
    http, client = triton
    found = client.get_model_config("tiny")
    assert (found["name"], found["max_batch_size"]) == ("tiny", 32)
    assert found["input"] == [{"name": "frames", "data_type": "TYPE_UINT8", "dims": [8, 32, 32, 3]}]

    def statistics():
        (row,) = client.get_inference_statistics("tiny")["model_stats"]
        return row

    before = statistics()
    client.infer("tiny", tensor(http, frames), model_version="1")  # whichever is loaded
    with pytest.raises(Exception, match="not done within"):
        client.infer("tiny", tensor(http, frames), timeout=1)
    after = statistics()
    assert after["inference_count"] - before["inference_count"] >= len(frames)
    change = {
        name: after["inference_stats"][name]["count"] - before["inference_stats"][name]["count"]
        for name in ("success", "fail")
    }
    assert change == {"success": 1, "fail": 1}
    assert after["inference_stats"]["compute_infer"]["ns"] > 0
    assert after["last_inference"] > before["last_inference"]
    version = after["version"]
    text = service.get("/metrics").body.decode()
    count = after["inference_stats"]["success"]["count"]
    labels = f'model="tiny",version="{version}"'
    assert f"nv_inference_request_success{{{labels}}} {float(count)}\n" in text
    names = [row["name"] for row in client.get_inference_statistics()["model_stats"]]
    assert "tiny" in names


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_triton_infers(triton, frames, expected, binary_in, binary_out, compression):
    http, client = triton
    outputs = [http.InferRequestedOutput(name, binary_data=binary_out)
               for name in ("logits", "probabilities")]  # fmt: skip
    result = client.infer(
        "tiny",
        tensor(http, frames, binary_in),
        outputs=outputs,
        request_id="7",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    assert result.get_response()["id"] == "7"
    np.testing.assert_array_equal(result.as_numpy("logits"), expected)
    wanted = [softmax(row) for row in expected]
    np.testing.assert_allclose(result.as_numpy("probabilities"), wanted, atol=1e-6)


def test_triton_without_naming_outputs_and_without_a_batch(triton, frames, expected):
    http, client = triton
    result = client.infer("tiny", tensor(http, frames[0]))
    np.testing.assert_array_equal(result.as_numpy("logits"), expected[:1])


@pytest.mark.parametrize("binary", [True, False])
def test_triton_classification(triton, frames, expected, binary):
    http, client = triton
    outputs = [http.InferRequestedOutput("logits", binary_data=binary, class_count=2)]
    result = client.infer("tiny", tensor(http, frames), outputs=outputs)
    found = result.as_numpy("logits")
    assert found.shape == (2, 2)
    for row, logits in zip(found, expected, strict=True):
        for text, index in zip(row, np.argsort(-logits)[:2], strict=True):
            score, at, label = (text.decode() if isinstance(text, bytes) else text).split(":")
            assert (int(at), label) == (index, LABELS[index])
            assert float(score) == pytest.approx(logits[index], abs=1e-5)


def test_triton_asyncio(service, frames, expected):
    aio = pytest.importorskip("tritonclient.http.aio", reason=REASON)
    http = pytest.importorskip("tritonclient.http", reason=REASON)

    async def run():
        async with aio.InferenceServerClient(f"127.0.0.1:{service.port}") as client:
            assert await client.is_server_ready()
            calls = [client.infer("tiny", tensor(http, frames)) for _ in range(4)]
            return [result.as_numpy("logits") for result in await asyncio.gather(*calls)]

    for found in asyncio.run(run()):
        np.testing.assert_array_equal(found, expected)


def test_triton_errors_are_understood(triton, frames):
    http, client = triton
    from tritonclient.utils import InferenceServerException

    wrong = {
        "no program 'none'": ("none", frames),
        r"shape \[2, 8, 32, 32\]": ("tiny", frames[..., 0]),
        r"shape \[33, 8, 32, 32, 3\]": ("tiny", np.zeros((33, 8, 32, 32, 3), np.uint8)),
    }
    for text, (model, data) in wrong.items():
        with pytest.raises(InferenceServerException, match=text):
            client.infer(model, tensor(http, data))
    with pytest.raises(InferenceServerException, match="no output 'nothing'"):
        client.infer("tiny", tensor(http, frames), outputs=[http.InferRequestedOutput("nothing")])
    made = http.InferInput("frames", [8, 32, 32, 3], "FP32")
    made.set_data_from_numpy(np.zeros((8, 32, 32, 3), np.float32))
    with pytest.raises(InferenceServerException, match="type FP32; accepted is UINT8"):
        client.infer("tiny", [made])
    with pytest.raises(InferenceServerException, match="not done within"):
        client.infer("tiny", tensor(http, np.repeat(frames, 16, 0)), timeout=100)


def test_triton_model_repository(triton, frames):
    http, client = triton
    states = lambda: {m["name"]: m["state"] for m in client.get_model_repository_index()}  # noqa: E731
    assert states() == {"tiny": "READY", "other": "UNAVAILABLE"}
    client.load_model("other")
    assert states()["other"] == "READY"
    assert client.infer("other", tensor(http, frames)).as_numpy("logits").shape == (2, 4)
    client.unload_model("other")
    assert states()["other"] == "UNAVAILABLE"


def test_replacing_a_program_under_load_loses_no_request(service, folder, triton, frames):
    http, client = triton
    path = folder / "repository" / "other.kgrc"
    client.load_model("other")
    answers, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            answers.append(service.infer(frames, "other"))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    versions = set()
    for seed in range(2, 7):
        write_program(path, seed=seed)
        client.load_model("other")
        versions.update(client.get_model_metadata("other")["versions"])
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    client.unload_model("other")
    assert len(versions) == 5
    assert {answer.status for answer in answers} == {200}
    seen = {answer.json["model_version"] for answer in answers}
    assert len(seen) >= 3


# ---- bodies that no client sends ------------------------------------------------------------


def test_requests_that_are_wrong_are_refused_with_a_reason(service, frames):
    place = "/v2/models/tiny/infer"
    length = "Inference-Header-Content-Length"
    good = {"name": "frames", "shape": [1, 8, 32, 32, 3], "datatype": "UINT8"}
    size = 8 * 32 * 32 * 3

    def wrapped(**changes):
        return json.dumps({"inputs": [{**good, **changes}]}).encode()

    cases = [
        (b"", {}, 400, "not an inference request"),
        (b"[]", {}, 400, "not an inference request"),
        (b'{"inputs": []}', {}, 400, "inputs none"),
        (wrapped(name="x"), {}, 400, "inputs x; tiny has one, frames"),
        (wrapped(), {}, 400, "accepted are 24576 whole numbers"),
        (wrapped(data=[1, 2]), {}, 400, "data are 2 values, not 24576"),
        (wrapped(data=[[1], [2, 3]]), {}, 400, "data that cannot be read"),
        (wrapped(data=[0.5] * size), {}, 400, "Expected `int`, got `float`"),
        (wrapped(data=[256] * size), {}, 400, "<= 255"),
        (wrapped(data=[-1] * size), {}, 400, ">= 0"),
        (wrapped(data=["x" * 50_000, *[1] * size]), {}, 400, "got `str`"),
        (wrapped(data=[[[[[1, 2, 3]] * 32] * 32] * 7]), {}, 400, "data that cannot be read"),
        (wrapped(data=[[[[[1, 2], [1, 2, 3, 4]] * 16] * 32] * 8]), {}, 400, "of length >= 3"),
        (wrapped(data={"a": 1}), {}, 400, "got `object`"),
        (wrapped(data=[[[[1] * 3] * 32] * 32] * 8), {}, 400, "data that cannot be read"),
        (wrapped(shape=[-1, 8, 32, 32, 3]), {}, 400, "accepted are"),
        (wrapped(shape=[]), {}, 400, "accepted are"),
        (wrapped(parameters={"binary_data_size": 5}), {}, 400, "its shape takes 24576"),
        (wrapped(), {length: "9999"}, 400, "9999 of a body"),
        (wrapped(), {length: "-1"}, 400, "-1 of a body"),
        (wrapped(), {"Content-Encoding": "br"}, 415, "accepted are gzip and deflate"),
        (b"abc", {"Content-Encoding": "gzip"}, 400, "damaged"),
        (gzip.compress(wrapped())[:-9], {"Content-Encoding": "gzip"}, 400, "cut off"),
        (gzip.compress(bytes(100_000_000)), {"Content-Encoding": "gzip"}, 413, "inflates to more"),
    ]
    before = service.peak_memory()
    for body, headers, status, text in cases:
        answer = service.ask("POST", place, body, headers)
        assert answer.status == status, (text, answer)
        assert text in answer.json["error"], answer.json
    assert service.peak_memory() < before + 50_000_000


def test_a_body_that_is_too_large_for_the_model_is_refused_before_it_is_read(service):
    place, most = "/v2/models/tiny/infer", 1_000_000 + 32 * 8 * 32 * 32 * 3
    headers = {"Inference-Header-Content-Length": "100"}
    with service.connect() as line, line.makefile("rb") as answer:
        heads = {"Host": "localhost", "Content-Length": str(most + 1), **headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in heads.items())
        line.sendall(f"POST {place} HTTP/1.1\r\n{text}\r\n".encode())
        assert f"tiny takes up to {most}".encode() in answer.read()
    chunks = (bytes(100_000) for _ in range(most // 100_000 + 1))
    answer = service.ask("POST", place, chunks, headers, encode_chunked=True)
    assert (answer.status, f"more than the {most}" in answer.json["error"]) == (413, True)


def test_an_output_is_asked_for_once(service, frames):
    tensor = {"name": "frames", "shape": list(frames[:1].shape), "datatype": "UINT8"}
    body = {
        "inputs": [{**tensor, "data": frames[:1].tolist()}],
        "outputs": [{"name": "logits"}] * 2,
    }
    answer = service.ask("POST", "/v2/models/tiny/infer", json.dumps(body).encode())
    assert (answer.status, "asked for twice" in answer.json["error"]) == (400, True)


def test_json_tensors_flat_and_nested_short_and_long_are_the_binary_one(service, frames):
    """A long one and a compressed one are read by a decoder child."""
    place, length = "/v2/models/tiny/infer", "Inference-Header-Content-Length"
    batch = np.repeat(frames[:1], 8, 0)
    for clips in (frames[:1], batch, batch[0]):
        tensor = {"name": "frames", "shape": list(clips.shape), "datatype": "UINT8"}
        flat = json.dumps({"inputs": [{**tensor, "data": clips.reshape(-1).tolist()}]}).encode()
        nested = json.dumps({"inputs": [{**tensor, "data": clips.tolist()}]}).encode()
        tensor["parameters"] = {"binary_data_size": clips.nbytes}
        head = json.dumps({"inputs": [tensor]}).encode()
        binary = head + clips.tobytes()
        answers = [
            service.ask("POST", place, flat),
            service.ask("POST", place, nested),
            service.ask("POST", place, gzip.compress(nested), {"Content-Encoding": "gzip"}),
            service.ask("POST", place, binary, {length: str(len(head))}),
            service.ask("POST", place, zlib.compress(binary),
                        {length: str(len(head)), "Content-Encoding": "deflate"}),
        ]  # fmt: skip
        assert {answer.status for answer in answers} == {200}, [a.body[:200] for a in answers]
        assert len({answer.body for answer in answers}) == 1
    assert len(flat) < SHORT_JSON < 8 * len(flat)


def test_a_field_that_is_null_counts_as_absent(service, frames):
    """MLServer's client sends every field (kserve#3365)."""
    tensor = {"name": "frames", "shape": list(frames.shape), "datatype": "UINT8"}
    tensor |= {"data": frames.reshape(-1).tolist(), "parameters": None}
    answers = []
    for more in (
        {},
        {"id": None, "parameters": None, "outputs": None},
        {"parameters": {"binary_data_output": None, "timeout": None}},
        {"outputs": [{"name": n, "parameters": None} for n in ("probabilities", "logits")]},
        {"outputs": [{"name": n, "parameters": {"classification": None, "binary_data": None}}
                     for n in ("probabilities", "logits")]},
    ):  # fmt: skip
        body = json.dumps({"inputs": [tensor], **more}).encode()
        answer = service.ask("POST", "/v2/models/tiny/infer", body)
        assert answer.status == 200, (more, answer.body)
        answers.append(answer.json)
    assert "id" not in answers[0]
    assert all(answer == answers[0] for answer in answers)


def test_parameters_of_the_protocol_have_types_and_bounds(service, frames):
    tensor = {"name": "frames", "shape": list(frames.shape), "datatype": "UINT8"}
    data = frames.reshape(-1).tolist()
    good = {"inputs": [{**tensor, "data": data}]}

    def asked(name, value):
        return {**good, "outputs": [{"name": "logits", "parameters": {name: value}}]}

    cases = [
        *((asked("classification", v), "classification=") for v in (-1, True, 1.0, "2", 1001)),
        *((asked("binary_data", v), "binary_data=") for v in ("false", 0, 1, "")),
        *(({**good, "parameters": {"timeout": v}}, "timeout=") for v in (-1, True, "5", 10**30)),
        ({**good, "parameters": {"binary_data_output": "false"}}, "binary_data_output="),
        ({"inputs": [{**tensor, "data": [True, *data[1:]]}]}, "whole numbers"),
        ({"inputs": [{**tensor, "data": [float("nan"), *data[1:]]}]}, "not an inference request"),
        ({"inputs": [{**tensor, "data": data, "parameters": {"binary_data_size": True}}]}, "True"),
    ]
    for body, text in cases:
        answer = service.ask("POST", "/v2/models/tiny/infer", json.dumps(body).encode())
        assert answer.status == 400, (text, answer.body)
        assert text in answer.json["error"], answer.json
    deep = b'{"inputs": [{"name": "frames", "shape": [1], "datatype": "UINT8", "data": '
    for body in (b"[" * 100_000, deep + b"[" * 100_000, deep + b"[" * 900 + b"]" * 900 + b"}]}"):
        assert service.ask("POST", "/v2/models/tiny/infer", body).status == 400
    head = {"Inference-Header-Content-Length": "1" * 5000}
    assert service.ask("POST", "/v2/models/tiny/infer", b"{}", head).status == 400
    body = json.dumps(good).encode()
    head = {"Inference-Header-Content-Length": str(len(body))}
    answer = service.ask("POST", "/v2/models/tiny/infer", body + b"rest", head)
    assert (answer.status, "4 bytes after the JSON" in answer.json["error"]) == (400, True)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("gzip", True),
        ("GZIP", True),
        ("x-gzip", True),
        ("*", True),
        ("br, gzip;q=0.5", True),
        ("gzip ; Q = 1.000 , identity;q=0.5", True),
        ("identity;q=0, *;q=0.1", True),
        ("", False),
        ("identity", False),
        ("notgzip", False),
        ("gzipped, xgzip", False),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("identity, gzip;q=0", False),
        ("*;q=0", False),
        ("gzip;q=0, *", False),
        ("identity, gzip;q=0.5", False),
        ("gzip;q=nan", False),
        ("gzip;q=", False),
        ("gzip;q=-1", False),
    ],
)
def test_gzip_is_sent_to_those_who_accept_it(service, frames, header, wanted):
    """RFC 9110, 12.5.3; q=0 refuses a coding."""
    batch = np.repeat(frames[:1], 32, 0)
    tensor = {"name": "frames", "shape": list(batch.shape), "datatype": "UINT8"}
    tensor["parameters"] = {"binary_data_size": batch.nbytes}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Accept-Encoding": header}
    answer = service.ask("POST", "/v2/models/tiny/infer", head + batch.tobytes(), headers)
    assert answer.status == 200
    assert (answer.headers.get("content-encoding") == "gzip") == wanted
    assert answer.headers["vary"] == "Accept-Encoding"
    body = gzip.decompress(answer.body) if wanted else answer.body
    assert json.loads(body)["model_name"] == "tiny"


REAL_DATA = """
import json, random
import schemathesis

VIDEO = open("a.mp4", "rb").read()
FRAMES = {"name": "frames", "datatype": "UINT8", "shape": [1, 8, 32, 32, 3], "data": [7] * 24576}
drawn = random.Random(1)

@schemathesis.hook
def before_call(context, case, kwargs):
    "Half of the requests that follow the schema get names, videos and clips that exist."
    if case.meta is None or not case.meta.generation.mode.is_positive or drawn.random() < 0.5:
        return
    if "name" in case.path_parameters:
        case.path_parameters["name"] = "other" if "repository" in case.path else "tiny"
    if "version" in case.path_parameters:
        case.path_parameters["version"] = "1"
    if case.path == "/v1/videos:classify":
        case.body, case.query = VIDEO, {"top_k": "2"}
        case.media_type = "application/octet-stream"
        case.headers["Prefer"] = "respond-async"
    if case.path.endswith("/infer") and isinstance(case.body, dict):
        case.body = {"inputs": [FRAMES]}
"""  # no schema says which bytes are a video


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["examples,coverage,fuzzing", "stateful"])
def test_schemathesis_finds_no_fault(tmp_path, phases):
    """Generated requests, single ones and sequences: every answer conforms to openapi.json."""
    pytest.importorskip("schemathesis", reason="pip install pynq_kgrc[clients]")
    write_video(tmp_path / "a.mp4")
    (tmp_path / "real_data.py").write_text(REAL_DATA)
    (tmp_path / "repository").mkdir()
    write_program(tmp_path / "repository" / "other.kgrc", seed=1)
    program = tmp_path / "tiny.kgrc"
    write_program(program)
    arguments = ["--repository", tmp_path / "repository", "--max-bytes", "2000000"]
    with Serving(*arguments, state=tmp_path / "state", program=program) as serving:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run",
                f"http://127.0.0.1:{serving.port}/openapi.json",
                "--max-examples", "40", "--seed", "1", "--no-color", "--phases", phases,
                # a body that is no video is refused; a job that was cancelled can be looked at
                "--exclude-checks", "positive_data_acceptance,use_after_free",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=500,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "real_data"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        text = serving.get("/metrics").body.decode()
        routes = [("POST", "/v1/videos:classify", 202)]
        if phases == "stateful":  # the links of openapi.json lead from a video to its job
            routes += [("GET", f"/v1/jobs/{{key}}{end}", 200) for end in ("", "/events")]
            routes += [("DELETE", "/v1/jobs/{key}", 200)]
            routes += [("POST", "/v2/models/{name}/infer", 200)]
        for method, route, status in routes:
            assert f'method="{method}",route="{route}",status="{status}"' in text, text
        assert serving.get("/v2/health/live").status == 200
    assert not [record for record in serving.records if record["level"] == "error"]


# ---- real programs and real videos -----------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


def readme_request(port):
    """The curl command of the README, sent to this port."""
    text = (ROOT / "README.md").read_text("utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("curl --data-binary")]
    return shlex.split(line.replace(":8000", f":{port}"))


@pytest.mark.slow
@pytest.mark.network
def test_the_readme_s_request_names_the_action_with_i3d(folder, example_clips):
    """Pretrained weights, compiled on the calibration clips as the README says."""
    program = folder / "i3d.kgrc"
    clips = [str(path) for path in sorted((example_clips / "calibration").glob("*.avi"))]
    compile_ = ["compile", "i3d", "--weights", "i3d-kinetics400", "-o", str(program)]
    if main([*compile_, "--clips", *clips]):
        pytest.skip("NETWORK: the pretrained weights could not be fetched; I3D was not served")
    assert shutil.which("curl"), "curl is not on this machine"
    with Serving("--wait", "300", state=folder / "i3d", program=program) as serving:
        done = subprocess.run(
            readme_request(serving.port), cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        document = json.loads(done.stdout)
        assert document["labels"][0]["label"] == "arm wrestling", document
        assert document["labels"][0]["confidence"] > 0.9
        assert document["segments"] == [
            {**document["segments"][0], "start_ms": 0.0, "end_ms": pytest.approx(10_000, abs=50)}
        ]
        assert len(document["labels"]) == 3
        assert len(document["windows"]) == 5


@pytest.mark.slow
@pytest.mark.data
def test_the_shipped_program_recognizes_unseen_subjects(folder, shared_data, monkeypatch):
    """The service without --program, on real depth videos of the test subjects."""
    monkeypatch.setenv(
        "XDG_CACHE_HOME", str(folder / "cache")
    )  # without I3D, which would come first
    videos = read_index(shared_data / "utd_mhad_depth").only("test")
    right, chosen = 0, videos.samples[::12]
    with Serving(state=folder / "shipped") as serving:
        assert serving.started["programs"] == ["utd_mhad27"]
        for sample in chosen:
            data = (videos.folder / sample.file).read_bytes()
            document = serving.classify(data, "?top_k=1").json
            right += document["labels"][0]["label"] == videos.classes[sample.label]
    assert len(chosen) == 27
    assert right / len(chosen) > 0.7


@pytest.mark.slow
def test_the_simulated_board_answers_as_the_emulation(folder):
    """Also with two programs in turn: an exclusive device holds one at a time."""
    shipped = ROOT / "pynq_kgrc" / "programs" / "utd_mhad27.kgrc"
    shutil.copy(shipped, folder / "twin.kgrc")
    data = write_video(folder / "moving.mp4", size=(128, 128))
    found = {}
    for backend in ("emulate", "board"):
        arguments = ["--backend", backend, "--program", folder / "twin.kgrc"]
        with Serving(*arguments, state=folder / backend, program=shipped) as serving:
            answers = [serving.classify(data, f"?program={name}&sampling=windows").json
                       for name in ("utd_mhad27", "twin", "utd_mhad27")]  # fmt: skip
        assert [answer["backend"] for answer in answers] == [backend] * 3
        assert len(answers[0]["windows"]) == 3
        found[backend] = [answer["windows"] for answer in answers]
    assert found["emulate"] == found["board"]
