"""HTTPS and gRPC with a certificate of our own, made by openssl."""

import http.client
import json
import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

from serving import Serving, write_program, write_video
from websockets.sync.client import connect

from pynq_kgrc.cli import main
from pynq_kgrc.errors import ConfigError
from pynq_kgrc.service.settings import check_certificate

MAX_BYTES = 3_000_000


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a certificate and its key, and a program."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine: TLS is not tested")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("own", "other"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem"),
        )
    openssl("ec", "-in", folder / "own.key", "-aes256", "-passout", "pass:secret",
            "-out", folder / "locked.key")  # fmt: skip
    write_program(folder / "tiny.kgrc")
    return folder


@pytest.fixture(scope="module")
def service(folder):
    options = ["--tls-cert", folder / "own.pem", "--tls-key", folder / "own.key"]
    options += ["--max-bytes", MAX_BYTES]
    with Serving(*options, state=folder / "state", program=folder / "tiny.kgrc") as serving:
        yield serving
    assert serving.process.returncode == 0
    assert not [record for record in serving.records if record["level"] == "error"]


@pytest.fixture
def trusting(folder):
    """A client's context that trusts our certificate and no other."""
    return ssl.create_default_context(cafile=folder / "own.pem")


def ask(service, trusting, method, path, body=None, headers=None):
    """Send one request; the status and the body of its answer."""
    client = http.client.HTTPSConnection("127.0.0.1", service.port, timeout=60, context=trusting)
    try:
        client.request(method, path, body, headers or {})
        answer = client.getresponse()
        return answer.status, answer.read()
    finally:
        client.close()


def test_a_video_is_classified_over_https(service, trusting, folder):
    assert service.started["url"] == f"https://127.0.0.1:{service.port}"
    video = write_video(folder / "video.mkv", frames=24, size=(640, 480), codec="mjpeg")
    assert len(video) > 1 << 18, "more than the server reads at once"
    headers = {"Content-Type": "video/mp4", "Origin": f"https://127.0.0.1:{service.port}"}
    status, body = ask(service, trusting, "POST", "/v1/videos:classify", video, headers)
    assert (status, len(json.loads(body)["windows"])) == (200, 3)
    assert ask(service, trusting, "GET", "/")[1].startswith(b"<!doctype html>")


def test_a_refused_body_is_read_to_its_end(service, trusting):
    """The client sends the whole body before it reads the answer."""
    status, body = ask(service, trusting, "POST", "/v1/videos:classify", bytes(MAX_BYTES + 1))
    assert (status, b"accepted are 3000000" in body) == (413, True)


def test_a_live_session_over_tls(service, trusting):
    address = f"wss://127.0.0.1:{service.port}/v1/live"
    with connect(address, ssl=trusting, open_timeout=60) as client:
        assert json.loads(client.recv(timeout=60))["type"] == "ready"


def test_a_client_without_tls_gets_no_answer(service, trusting):
    with socket.create_connection(("127.0.0.1", service.port), 30) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP" not in client.recv(1000)
    assert ask(service, trusting, "GET", "/v2/health/ready")[0] == 200


@pytest.mark.slow
def test_grpc_uses_the_certificate(folder, tmp_path):
    grpc = pytest.importorskip("grpc", reason="gRPC needs pynq_kgrc[grpc]")
    options = ["--tls-cert", folder / "own.pem", "--tls-key", folder / "own.key"]
    options += ["--grpc-port", "0"]
    with Serving(*options, state=tmp_path / "s", program=folder / "tiny.kgrc") as serving:
        trusted = grpc.ssl_channel_credentials((folder / "own.pem").read_bytes())
        address = f"localhost:{serving.started['grpc_port']}"
        with grpc.secure_channel(address, trusted) as channel:
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            assert live(b"", timeout=60) == b"\x08\x01"  # field 1, true


@pytest.mark.parametrize(
    ("certificate", "key", "text"),
    [
        ("gone.pem", "own.key", "--tls-cert .*gone.pem: No such file"),
        ("own.pem", ".", "--tls-key .*: Is a directory"),
        ("own.pem", "other.key", "belong together"),
        ("own.pem", "locked.key", "without a passphrase"),
        ("tiny.kgrc", "own.key", "PEM files"),
        ("own.key", "own.pem", "PEM files"),
    ],
)
def test_files_that_no_server_can_use(folder, certificate, key, text):
    check_certificate(folder / "own.pem", folder / "own.key")
    with pytest.raises(ConfigError, match=text):
        check_certificate(folder / certificate, folder / key)


def test_the_two_options_go_together(tmp_path, capsys):
    state = ["--state", str(tmp_path / "s")]
    assert main(["serve", "--tls-cert", str(Path(tmp_path)), *state]) == 2
    assert "--tls-cert and --tls-key belong together" in capsys.readouterr().err
    assert main(["serve", "--load-all", *state]) == 2
    assert "give --repository DIR" in capsys.readouterr().err
