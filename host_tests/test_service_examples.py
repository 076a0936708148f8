"""The examples of docs/service.md: Triton's clients are run, the document for KServe is read."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("fastapi", reason="the service needs pynq_kgrc[serve]")

from serving import Serving

from pynq_kgrc.files import shipped_programs

PAGE = (ROOT / "docs" / "service.md").read_text("utf-8")
(PROGRAM,) = shipped_programs()


def example(language, text):
    """The one example of the page in that language that has this text."""
    (found,) = [b for b in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if text in b]
    return found


def run(code, **ports):
    """What an example prints."""
    for port, own in ports.items():
        old = f"localhost:{port.removeprefix('p')}"
        assert old in code
        code = code.replace(old, f"localhost:{own}")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_over_http(tmp_path):
    pytest.importorskip("tritonclient.http", reason="no tritonclient[http]")
    with Serving(state=tmp_path / "state", program=PROGRAM) as serving:
        printed = run(example("python", "tritonclient.http"), p8000=serving.port)
    best = re.findall(r"[0-9.]+:([0-9]+):([a-z ]+)", printed)
    assert len(best) == 3


def test_triton_over_grpc(tmp_path):
    code = example("python", "tritonclient.grpc")
    compile(code, "service.md", "exec")
    pytest.importorskip("grpc", reason="gRPC needs pynq_kgrc[grpc]")
    probe = [sys.executable, "-c", "import tritonclient.grpc"]
    if subprocess.run(probe, capture_output=True, timeout=60).returncode:
        pytest.skip("no tritonclient[grpc] that runs here: make grpc has an environment for it")
    with Serving("--grpc-port", "0", state=tmp_path / "state", program=PROGRAM) as serving:
        assert 0 <= int(run(code, p8001=serving.started["grpc_port"])) < 27


def test_kserve_has_the_paths_of_the_container():
    yaml = pytest.importorskip("yaml", reason="no PyYAML: the document is not read")
    document = yaml.safe_load(example("yaml", "InferenceService"))
    assert document["apiVersion"] == "serving.kserve.io/v1beta1"
    predictor = document["spec"]["predictor"]
    (container,) = predictor["containers"]
    text = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
    (port,) = container["ports"]
    assert f"EXPOSE {port['containerPort']}\n" in text
    assert f"--uid {predictor['securityContext']['runAsUser']} " in text
    words = json.loads(text[text.rindex("CMD [") + 4 :].replace("\\\n", " "))
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {words[words.index(o) + 1] for o in ("--repository", "--api-key-file")}
    named = {mount["name"] for mount in container["volumeMounts"]}
    assert named == {volume["name"] for volume in predictor["volumes"]}
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["containerPort"]
