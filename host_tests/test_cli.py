"""The command line: every command, its JSON, and its messages for wrong input."""

import argparse
import importlib
import inspect
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from networks import Net, compiled, small_config

from pynq_kgrc.accelerator.config import preset, write_design
from pynq_kgrc.accelerator.latency import task_time
from pynq_kgrc.analysis.timing import one_tap_share
from pynq_kgrc.cli import _parser, main
from pynq_kgrc.graph import SAMPLINGS
from pynq_kgrc.recognition import recognize, sample_clips
from pynq_kgrc.results import Recognition
from pynq_kgrc.video import load_clip

NETWORK = '''
"""A small network of someone's own."""
import torch
from torch import nn

from pynq_kgrc.graph import ClipSpec

CLIP = ClipSpec(frames=8, height=16, width=16, short_side=16)


class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv3d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv3d(8, 16, 3, padding=1)
        self.pool = nn.MaxPool3d(2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3, 4)))


def small(classes=3):
    return Small(classes)


def silu():
    return nn.Sequential(nn.Conv3d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 6 * 14 * 14, 2))
'''


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder on the import path with the module `own_network`."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_network.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    yield "own_network:small"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def clips(example_clips):
    return [str(path) for path in sorted((example_clips / "calibration").glob("*.avi"))]


@pytest.fixture(scope="module")
def program(network, clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    labels = folder / "labels.txt"
    labels.write_text("run\njump\nwave\n")
    path = folder / "small.kgrc"
    arguments = ["compile", network, "--clips", *clips, "--labels", str(labels), "-o", str(path)]
    assert main(arguments) == 0
    return str(path)


def run_json(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_classify_prints_bars_and_labels(program, clips, capsys):
    assert main(["classify", *clips, "-p", program, "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("emulate") == 2
    lines = out.splitlines()
    bars = [line for line in lines if "%" in line and " to " not in line]
    assert len(bars) == 4 and all(line.split()[-1] in ("run", "jump", "wave") for line in bars)
    segments = [line for line in lines if "%" in line and " to " in line]
    assert len(segments) >= 2, "no timeline of a video of several clips"
    assert "unsure" not in out
    assert "█" in out


def test_classify_json_and_windows(program, clips, capsys):
    document = run_json(capsys, "classify", clips[0], "-p", program)
    (video,) = document["videos"]
    assert video.keys() - {"video", "seconds"} == set(Recognition.__struct_fields__)
    assert video["video"] == clips[0] and video["backend"] == "emulate" and not video["unsure"]
    assert {label["label"] for label in video["labels"]} == {"run", "jump", "wave"}
    assert sum(label["confidence"] for label in video["labels"]) == pytest.approx(1)
    adjoining = video["windows"]
    document = run_json(capsys, "classify", clips[0], "-p", program, "--stride", "4")
    windows = document["videos"][0]["windows"]
    starts = [window["start_ms"] for window in windows]
    assert len(windows) > 1.8 * len(adjoining) > 3
    assert starts == sorted(starts)
    assert document["videos"][0]["segments"][0]["start_ms"] == 0
    arguments = ["classify", clips[0], "-p", program, "--sampling"]
    (spread,) = run_json(capsys, *arguments, "uniform")["videos"][0]["windows"]
    (centre,) = run_json(capsys, *arguments, "centre")["videos"][0]["windows"]
    assert spread["end_ms"] - spread["start_ms"] > centre["end_ms"] - centre["start_ms"]
    assert spread["start_ms"] < centre["start_ms"]


def test_info(program, capsys):
    document = run_json(capsys, "info", program)
    assert document["accelerator"] == "8-sparse"
    assert document["classes"] == 3
    assert [task["name"] for task in document["tasks"]] == ["conv1", "conv2", "mean", "fc"]
    assert document["tasks"][0]["rides"] == ["pool"]
    assert document["macs_dense"] == sum(t.get("macs_dense", 0) for t in document["tasks"])
    assert main(["info", program]) == 0
    out = capsys.readouterr().out
    assert "clip 8 x 16 x 16, 3 classes" in out
    assert "average pool" in out


@pytest.mark.parametrize(("kernel", "pk", "hinted"), [(1, 3, True), (3, 3, False), (1, 1, False)])
def test_info_names_explore_where_columns_idle(kernel, pk, hinted, tmp_path, capsys):
    net = Net(size=(4, 14, 14))
    first = net.conv("clip", 8, 3)
    for _ in range(6):
        first = net.conv(first, 8, kernel, pad=kernel // 2)
    program, _ = compiled(net, small_config(pk=pk))
    path = str(tmp_path / "net.kgrc")
    program.save(path)
    taps = [(t, task_time(program.config, program.work(t)).cycles) for t in program.tasks]
    ones = sum(cycles for task, cycles in taps if task.shape.kernel == (1, 1, 1))
    assert one_tap_share(program) == ones / sum(cycles for _, cycles in taps)
    assert main(["info", path]) == 0
    shown = capsys.readouterr().out
    assert ("P_K = 3 columns of small-8: `pynq-kgrc explore -p" in shown) == hinted
    assert ("explore" in shown) == hinted
    assert "explore" not in json.dumps(run_json(capsys, "info", path))


@pytest.mark.parametrize("config", ["16-sparse", "4-dense"])
def test_compile_with_a_report(network, clips, config, tmp_path, capsys):
    path = tmp_path / "x.kgrc"
    arguments = ["compile", network, "--clips", *clips, "--design", config, "-o", str(path)]
    document = run_json(capsys, *arguments, "--report")
    assert document["fidelity"]["clips"] == 2
    assert min(document["fidelity"]["snr_db"].values()) > (60 if config == "16-sparse" else 0)
    assert path.is_file()


def test_compile_chooses_an_entry_and_leaves_a_classifier_out(network, clips, tmp_path, capsys):
    build = sys.modules.get("own_network") or importlib.import_module("own_network")
    states = {name: build.small(5).state_dict() for name in ("model", "model_ema")}
    torch.save(states, tmp_path / "run.ckpt")
    out = tmp_path / "x.kgrc"
    arguments = ["compile", network, "--clips", *clips, "-o", str(out)]
    arguments += ["--weights", str(tmp_path / "run.ckpt")]
    assert main(arguments) == 2
    assert "'model' and 'model_ema', which may differ; choose one with --entry" in (
        capsys.readouterr().err
    )
    arguments += ["--entry", "model_ema"]
    assert main(arguments) == 2
    refused = capsys.readouterr().err
    assert "The file is for 5 classes, the network for 3" in refused and "--partial" in refused
    assert main([*arguments, "--classes", "3"]) == 2 and not out.exists()
    capsys.readouterr()
    assert main([*arguments, "--partial"]) == 0
    told = capsys.readouterr().err
    assert "4 tensors from entry 'model_ema', classifier 'fc' of 5 classes left out" in told


def test_compile_without_folding(network, clips, tmp_path, capsys):
    arguments = ["compile", network, "--clips", *clips, "-o", str(tmp_path / "x.kgrc")]
    folded = run_json(capsys, *arguments)
    assert folded["tasks"][0]["in"][0] == 3 * math.prod(folded["folded"]) > 3
    plain = run_json(capsys, *arguments, "--no-fold")
    assert plain["tasks"][0]["in"] == [3, 8, 16, 16] and "folded" not in plain


def test_compile_takes_the_design_that_explore_writes(network, clips, tmp_path, capsys):
    design = replace(preset("8-sparse"), name="found", gm=4)
    write_design(design, tmp_path / "best.json")
    arguments = ["compile", network, "--clips", *clips, "-o", str(tmp_path / "x.kgrc")]
    for spelling in ("--design", "--config"):
        document = run_json(capsys, *arguments, spelling, str(tmp_path / "best.json"))
        assert (document["accelerator"], document["accelerator_digest"]) == ("found", design.digest)


def options_of(command):
    """The options of a command by name, with their help."""
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    return {name: action for action in actions for name in action.option_strings}


def test_an_accelerator_is_chosen_by_one_option():
    """`--design` in every command; an earlier spelling is accepted, but not in the help.

    What looks at a board takes the design of its overlay, if none is given.
    """
    design = options_of("compile")["--design"]
    assert design.default == "8-sparse"
    assert options_of("compile")["--config"].dest == "design"
    assert options_of("compile")["--config"].help == argparse.SUPPRESS
    for command, default in (("compile", design.default), ("doctor", None), ("selftest", None)):
        assert "--accelerator" not in options_of(command)
        assert options_of(command)["--design"].default == default


def test_commands_that_take_one_clip_sample_alike():
    for command in ("classify", "batch"):
        sampling = options_of(command)["--sampling"]
        assert sampling.default is None
        assert tuple(sampling.choices) == SAMPLINGS
        assert "default: as the program says" in sampling.help
    for road in (load_clip, recognize, sample_clips):
        assert inspect.signature(road).parameters["sampling"].default is None


def test_compare(program, clips, capsys):
    assert main(["compare", clips[0], "-p", program]) == 0
    assert "agree on all 4 tasks" in capsys.readouterr().out
    assert run_json(capsys, "compare", clips[0], "-p", program) is None


def mistakes(tmp_path, network, program, clip):
    broken = tmp_path / "broken.kgrc"
    broken.write_bytes(b"nothing")
    out = str(tmp_path / "out.kgrc")
    build = ["compile", "--clips", clip, "-o", out]
    return {
        "broken.kgrc: not a whole program file": ["classify", clip, "-p", str(broken)],
        "nowhere.mp4: there is no such file": ["classify", "nowhere.mp4", "-p", program],
        "no backend named 'gpu'; there are": ["classify", clip, "-p", program, "--backend", "gpu"],
        "'vgg' is no network": [*build, "vgg"],
        "No module named 'nope'": [*build, "nope:net"],
        "no accelerator named '9-bit'": [*build, network, "--design", "9-bit"],
        "no recipe 'kgr' for": [*build, network, "--recipe", "kgr"],
        "method='best'; accepted are": [*build, network, "--method", "best"],
        "gone.pt": [*build, network, "--weights", "gone.pt"],
        "gone.txt: no list of labels": [*build, network, "--labels", "gone.txt"],
        "silu": [*build, "own_network:silu"],
        "no pretrained weights 'vgg'": ["pull", "vgg"],
        "there is no such program file": ["info", "gone.kgrc"],
    }


def test_every_mistake_is_one_line_and_leaves_nothing(network, program, clips, tmp_path, capsys):
    for text, arguments in mistakes(tmp_path, network, program, clips[0]).items():
        assert main(arguments) == 2, text
        out, err = capsys.readouterr()
        assert text in err
        assert err.startswith("pynq-kgrc: ")
        assert "Traceback" not in err
        assert out == ""
        assert not (tmp_path / "out.kgrc").exists()


def test_help_teaches(capsys):
    for arguments in (["--help"], ["classify", "--help"], ["compile", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    for text in ("pynq-kgrc pull i3d-kinetics400", "Exit status", "--stride", "MODULE:FUNCTION"):
        assert text in out


def test_wrong_options_exit_with_2(program, capsys):
    for arguments in ([], ["classify", "x.mp4"], ["classify", "x", "-p", program, "--top", "0"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "'0' is not accepted; use a whole number from 1 to 1000" in capsys.readouterr().err


def test_compile_writes_how_a_video_is_sampled(network, clips, tmp_path, capsys):
    """CLIP says it, and --sampling and --rate say otherwise."""
    out = str(tmp_path / "x.kgrc")
    arguments = ["compile", network, "--clips", *clips, "-o", out]
    assert run_json(capsys, *arguments)["clip"]["sampling"] == "windows"
    clip = run_json(capsys, *arguments, "--sampling", "uniform", "--rate", "12.5")["clip"]
    assert (clip["sampling"], clip["rate"]) == ("uniform", 12.5)
    (video,) = run_json(capsys, "classify", clips[0], "-p", out)["videos"]
    assert len(video["windows"]) == 1
