"""The Open Inference Protocol over gRPC: its messages, and the service behind them."""

import ast
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc", reason="gRPC needs pynq_kgrc[grpc]")
pytest.importorskip("av", reason="the service needs pynq_kgrc[serve]")
pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

import grpc
from google.protobuf import descriptor_pb2
from serving import LABELS, Serving, write_program

from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session
from pynq_kgrc.service import messages
from pynq_kgrc.service.grpc_server import MAX_MESSAGE
from pynq_kgrc.service.messages import CLASSES, METHODS, SERVICE

KEY = "0123456789abcdef-grpc"
CODE = grpc.StatusCode


def call(port, verb, /, seconds=20, key=None, **fields):
    """Call a method with a request of these fields."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary(
            f"/{SERVICE}/{verb}",
            request_serializer=CLASSES[f"{verb}Request"].SerializeToString,
            response_deserializer=CLASSES[f"{verb}Response"].FromString,
        )
        metadata = [("authorization", f"Bearer {key}")] if key else None
        return method(CLASSES[f"{verb}Request"](**fields), timeout=seconds, metadata=metadata)


def refused(port, verb, /, **fields):
    """The code and text of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call(port, verb, **fields)
    return caught.value.code(), caught.value.details()


def parameter(**value):
    return CLASSES["InferParameter"](**value)


def tensor(frames, **more):
    return {"name": "frames", "datatype": "UINT8", "shape": frames.shape, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpc")
    write_program(folder / "tiny.kgrc")
    (folder / "repository").mkdir()
    write_program(folder / "repository" / "other.kgrc", seed=1)
    return folder


@pytest.fixture(scope="module")
def service(folder):
    arguments = ["--grpc-port", "0", "--repository", folder / "repository"]
    with Serving(*arguments, state=folder / "state", program=folder / "tiny.kgrc") as serving:
        yield serving
        assert call(serving.started["grpc_port"], "ServerReady").ready
    assert serving.process.returncode == 0


@pytest.fixture
def port(service):
    return service.started["grpc_port"]


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def logits(folder, frames):
    with Session(load(folder / "tiny.kgrc")) as session:
        return np.stack([session.run(clip).logits for clip in frames]).astype("<f4")


def outline(message):
    """Names, numbers and types of a message's fields and messages, whatever else protoc adds."""
    fields = sorted(
        (f.name, f.number, f.type, f.label, f.type_name, f.HasField("oneof_index"))
        for f in message.field
    )
    inner = sorted(outline(one) for one in message.nested_type)
    return message.name, fields, inner, message.options.map_entry


def test_messages_are_those_of_tritons_client():
    """Its file is read, not imported: it needs another protobuf than pynq."""
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("tritonclient is not installed: messages not compared")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "service_pb2.py"
    (file,) = (
        descriptor_pb2.FileDescriptorProto.FromString(node.args[0].value)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "AddSerializedFile"
    )
    theirs = {message.name: message for message in file.message_type}
    ours = messages.describe_messages()
    assert len(ours.message_type) > 20
    for message in ours.message_type:
        assert outline(message) == outline(theirs[message.name])
    (methods,) = ({m.name: m for m in s.method} for s in file.service)
    assert f"{file.package}.{file.service[0].name}" == SERVICE
    for name in METHODS:
        assert methods[name].input_type == f".inference.{name}Request"
        assert methods[name].output_type == f".inference.{name}Response"


def test_server_and_models(port):
    assert call(port, "ServerLive").live
    assert call(port, "ServerReady").ready
    assert "model_repository" in call(port, "ServerMetadata").extensions
    assert call(port, "ModelReady", name="tiny").ready
    found = call(port, "ModelMetadata", name="tiny")
    assert [*found.inputs[0].shape] == [-1, 8, 32, 32, 3]
    assert [(t.name, t.datatype, [*t.shape]) for t in found.outputs] == [
        ("probabilities", "FP32", [-1, len(LABELS)]),
        ("logits", "FP32", [-1, len(LABELS)]),
    ]
    assert refused(port, "ModelReady", name="none")[0] == CODE.NOT_FOUND
    assert refused(port, "ModelMetadata", name="tiny", version="2")[0] == CODE.NOT_FOUND


def test_clips_give_the_logits_of_a_session(port, frames, logits):
    answers = [
        call(port, "ModelInfer", model_name="tiny", id="7", inputs=[tensor(frames)],
             raw_input_contents=[frames.tobytes()]),
        call(port, "ModelInfer", model_name="tiny", id="7", inputs=[
            tensor(frames, contents={"uint_contents": frames.reshape(-1).tolist()})]),
    ]  # fmt: skip
    for answer in answers:
        assert (answer.model_name, answer.id) == ("tiny", "7")
        raw = dict(zip([o.name for o in answer.outputs], answer.raw_output_contents, strict=True))
        assert np.array_equal(np.frombuffer(raw["logits"], "<f4").reshape(3, -1), logits)
        assert [*answer.outputs[0].shape] == [3, len(LABELS)]


def test_the_best_classes(port, frames, logits):
    outputs = [{"name": "logits", "parameters": {"classification": parameter(int64_param=1)}}]
    answer = call(port, "ModelInfer", model_name="tiny", inputs=[tensor(frames[0])],
                  raw_input_contents=[frames[0].tobytes()], outputs=outputs)  # fmt: skip
    best = int(logits[0].argmax())
    text = f"{logits[0, best]:.6f}:{best}:{LABELS[best]}"
    assert answer.outputs[0].datatype == "BYTES"
    assert answer.raw_output_contents[0][4:] == text.encode()


def test_what_is_wrong_is_said(port, frames):
    raw = [frames.tobytes()]
    good = {"model_name": "tiny", "inputs": [tensor(frames)], "raw_input_contents": raw}
    cases = [
        ({**good, "model_name": "none"}, CODE.NOT_FOUND, "no program 'none'"),
        ({**good, "inputs": []}, CODE.INVALID_ARGUMENT, "inputs none; tiny has one"),
        ({**good, "inputs": [tensor(frames[:, :4])]}, CODE.INVALID_ARGUMENT, "accepted are"),
        ({**good, "raw_input_contents": []}, CODE.INVALID_ARGUMENT, "0 bytes arrived"),
        ({**good, "raw_input_contents": raw * 2}, CODE.INVALID_ARGUMENT, "accepted is one"),
        ({**good, "inputs": [tensor(frames, contents={"uint_contents": [1]})]},
         CODE.INVALID_ARGUMENT, "beside contents"),
        ({**good, "raw_input_contents": [],
          "inputs": [tensor(frames, contents={"uint_contents": [256]})]},
         CODE.INVALID_ARGUMENT, "beyond 255"),
        ({**good, "outputs": [{"name": "x"}]}, CODE.INVALID_ARGUMENT, "no output 'x'"),
        ({**good, "parameters": {"timeout": parameter(int64_param=1)}},
         CODE.DEADLINE_EXCEEDED, "asked for"),
        ({**good, "parameters": {"timeout": parameter(string_param="1")}},
         CODE.INVALID_ARGUMENT, "timeout="),
        ({**good, "raw_input_contents": [bytes(MAX_MESSAGE)]}, CODE.RESOURCE_EXHAUSTED, "larger"),
    ]  # fmt: skip
    for fields, code, text in cases:
        found, details = refused(port, "ModelInfer", **fields)
        assert (found, text in details) == (code, True), (found, details)


def test_the_repository(port, service, frames):
    rows = {row.name: row.state for row in call(port, "RepositoryIndex").models}
    assert rows == {"tiny": "READY", "other": "UNAVAILABLE"}
    call(port, "RepositoryModelLoad", model_name="other")
    assert len(call(port, "RepositoryIndex", ready=True).models) == 2
    assert service.infer(frames[:1], "other").status == 200
    call(port, "RepositoryModelUnload", model_name="other")
    assert refused(port, "RepositoryModelUnload", model_name="other")[0] == CODE.NOT_FOUND
    given = {"config": CLASSES["ModelRepositoryParameter"](string_param="{}")}
    found = refused(port, "RepositoryModelLoad", model_name="other", parameters=given)
    assert found[0] == CODE.INVALID_ARGUMENT


def test_keys_metrics_and_the_end(folder, frames, tmp_path):
    (tmp_path / "keys").write_text(KEY)
    arguments = ["--grpc-port", "0", "--api-key-file", tmp_path / "keys"]
    with Serving(*arguments, state=tmp_path / "state", program=folder / "tiny.kgrc") as serving:
        port = serving.started["grpc_port"]
        assert call(port, "ServerLive").live
        for key in (None, KEY[:-1]):
            assert refused(port, "ModelMetadata", name="tiny", key=key)[0] == CODE.UNAUTHENTICATED
        assert call(port, "ModelMetadata", name="tiny", key=KEY).name == "tiny"
        text = serving.get("/metrics", headers={"X-API-Key": KEY}).body.decode()
        assert 'method="GRPC",route="/inference.GRPCInferenceService/ModelMetadata"' in text
        assert KEY not in serving.log
        taken = socket.create_server(("127.0.0.1", 0))
        with taken, pytest.raises(RuntimeError, match="for gRPC: is it in use"):
            Serving("--grpc-port", taken.getsockname()[1], state=tmp_path / "2",
                    program=folder / "tiny.kgrc")  # fmt: skip
    assert serving.process.returncode == 0


def test_tritons_grpc_client(service, port, frames, logits):
    try:
        import tritonclient.grpc as triton
    except Exception as error:  # protobuf's own kind of error, beside pynq's older protobuf
        pytest.skip(f"tritonclient's gRPC cannot be imported here ({error}): run make grpc")
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert (
            client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
        )
        assert client.get_model_metadata("tiny").name == "tiny"
        given = triton.InferInput("frames", list(frames.shape), "UINT8")
        given.set_data_from_numpy(frames)
        found = client.infer("tiny", [given], outputs=[triton.InferRequestedOutput("logits")])
        assert np.array_equal(found.as_numpy("logits"), logits)
        assert [row.name for row in client.get_model_repository_index().models]


def test_kserves_client_over_http_and_grpc(service, port, frames, logits, tmp_path):
    """The client that ships with KServe, unchanged: binary and JSON tensors."""
    if importlib.util.find_spec("kserve") is None:
        pytest.skip("KServe's client needs a later protobuf than pynq's: run make grpc")
    np.save(tmp_path / "frames.npy", frames)
    script = Path(__file__).with_name("kserve_client.py")
    addresses = [f"http://127.0.0.1:{service.port}", f"127.0.0.1:{port}"]
    command = [sys.executable, str(script), *addresses, str(tmp_path / "frames.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) == 4
    for answer in answers:
        assert np.array_equal(np.array(answer, np.float32), logits)
