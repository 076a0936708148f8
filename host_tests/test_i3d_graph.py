"""I3D without torch: the graph is the trace, stored ranges give compile's program, names are found.

The real weights are in the slow tests; `thin_state` takes the same code path with few filters.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

from pynq_kgrc.accelerator.config import preset
from pynq_kgrc.cli import main
from pynq_kgrc.compiler import released
from pynq_kgrc.compiler.lower import lower
from pynq_kgrc.compiler.released import find_program, read_ranges, released_program
from pynq_kgrc.compiler.retarget import retarget
from pynq_kgrc.compress.calibrate import choose_quant
from pynq_kgrc.errors import CompileError, ModelError
from pynq_kgrc.files import shipped_programs
from pynq_kgrc.models import i3d as torch_i3d
from pynq_kgrc.models.i3d import WIDTHS, clip
from pynq_kgrc.models.i3d_graph import i3d_graph
from pynq_kgrc.models.pretrained import RELEASES, Release
from pynq_kgrc.models.trace import trace
from pynq_kgrc.program import load
from pynq_kgrc.runtime import Session
from pynq_kgrc.samples import true_label, write_ranges
from pynq_kgrc.version import VERSION
from pynq_kgrc.video import load_clip

SHORT = clip(frames=16)

NAME = "i3d-kinetics400"


def same_graph(ours, traced):
    assert (ours.output, ours.clip, ours.labels) == (traced.output, traced.clip, traced.labels)
    assert [layer.name for layer in ours.layers] == [layer.name for layer in traced.layers]
    for layer, other in zip(ours.layers, traced.layers, strict=True):
        for field in ("op", "inputs", "channels", "size", "shape", "activation"):
            assert getattr(layer, field) == getattr(other, field), (layer.name, field)
        for field in ("weight", "bias"):
            array, wanted = getattr(layer, field), getattr(other, field)
            assert (array is None) == (wanted is None)
            if array is not None:
                assert array.dtype == wanted.dtype
                np.testing.assert_array_equal(array, wanted, f"{layer.name} {field}")


@pytest.mark.parametrize("frames", [24, pytest.param(16, marks=pytest.mark.slow)])
def test_the_graph_is_the_trace_bit_for_bit(monkeypatch, frames):
    """The torch module with narrow blocks; statistics and scales of its batch norms are random.

    With 16 frames nothing is left to average over time.
    """
    narrow = {name: tuple(8 + i for i in range(6)) for name in WIDTHS}
    monkeypatch.setattr(torch_i3d, "WIDTHS", narrow)
    torch.manual_seed(1)
    network = torch_i3d.I3D(classes=7)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for tensor in (module.weight.data, module.running_var, module.bias.data):
                tensor.uniform_(0.5, 2)
            module.running_mean.normal_()
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    labels = tuple("abcdefg")
    spec = clip(frames)
    same_graph(i3d_graph(state, spec, labels), trace(network, spec, labels, "i3d"))


def thin_state(filters=4, classes=3):
    """A state dict of I3D with `filters` filters in every convolution."""
    rng = np.random.default_rng(0)
    state = {}

    def unit(path, channels, kernel):
        shape = (filters, channels, kernel, kernel, kernel)
        spread = np.sqrt(2 / np.prod(shape[1:]))
        state[f"{path}.conv.weight"] = rng.normal(0, spread, shape).astype(np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            low = 0.5 if part in ("weight", "running_var") else -0.2
            value = rng.uniform(low, low + 0.5, filters).astype(np.float32)
            state[f"{path}.norm.{part}"] = value

    unit("Conv3d_1a_7x7", 3, 7)
    unit("Conv3d_2b_1x1", filters, 1)
    unit("Conv3d_2c_3x3", filters, 3)
    channels = filters
    for block in WIDTHS:
        unit(f"{block}.Branch_0.Conv3d_0a_1x1", channels, 1)
        for branch in (1, 2):
            unit(f"{block}.Branch_{branch}.Conv3d_0a_1x1", channels, 1)
            unit(f"{block}.Branch_{branch}.Conv3d_0b_3x3", filters, 3)
        unit(f"{block}.Branch_3.Conv3d_0b_1x1", channels, 1)
        channels = 4 * filters
    state["Logits.weight"] = rng.normal(size=(classes, channels, 1, 1, 1)).astype(np.float32)
    state["Logits.bias"] = rng.normal(size=classes).astype(np.float32)
    return state


def thin_graph(state, labels=()):
    return i3d_graph(state, SHORT, labels)


@pytest.fixture(scope="module")
def video(example_clips):
    return sorted((example_clips / "calibration").glob("*.avi"))[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory, video):
    """A folder with weights, labels and stored ranges of a thin I3D, and its graph."""
    folder = tmp_path_factory.mktemp("thin")
    (folder / "labels.txt").write_text("left\nright\nnone\n")
    state = thin_state()
    safetensors.numpy.save_file(state, folder / "thin.safetensors", {"source_sha256": "1" * 64})
    graph = thin_graph(state, ("left", "right", "none"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RELEASES, "thin", entry(folder))
        write_ranges("thin", graph, [video], (8,))
    return folder, graph


def entry(folder):
    """A release "thin" whose weights are in the cache already."""
    return Release(
        *("thin", "1", "thin-1.tar.gz", "0" * 64, "thin.ckpt", "1" * 64),
        convert=dict,
        labels=folder / "labels.txt",
        megabytes=1,
        graph=thin_graph,
        ranges=folder / "thin.ranges.json",
    )


@pytest.fixture
def stored(made, tmp_path, monkeypatch):
    """The graph of the release "thin", which is in the table and in a cache of its own."""
    cache = tmp_path / "cache" / "pynq_kgrc"
    cache.mkdir(parents=True)
    for path in made[0].iterdir():
        place = cache if path.suffix == ".safetensors" else tmp_path
        (place / path.name).write_bytes(path.read_bytes())
    monkeypatch.setitem(RELEASES, "thin", entry(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made[1]


def test_stored_ranges_give_the_program_that_compile_makes(stored, video, tmp_path):
    clip_of_video = load_clip(video, SHORT).frames
    quantized = choose_quant(stored, [SHORT.normalise(clip_of_video)], 8)
    config = preset("8-sparse")
    path = released_program("thin", config)
    assert path.name == f"thin-{config.digest}-{VERSION}.kgrc"
    lower(quantized, config).save(tmp_path / "with_clips.kgrc")
    assert path.read_bytes() == (tmp_path / "with_clips.kgrc").read_bytes()


BOARD = """
import pathlib, subprocess, sys
for name in ("torch", "pynq", "matplotlib", "fastapi"):
    sys.modules[name] = None
subprocess.run = None  # nothing can be fetched
from pynq_kgrc.cli import main
from pynq_kgrc.models.i3d_graph import clip, i3d_graph
from pynq_kgrc.models.pretrained import RELEASES, Release
here = pathlib.Path(sys.argv[1])
RELEASES["thin"] = Release(
    "thin", "1", "thin-1.tar.gz", "0" * 64, "thin.ckpt", "1" * 64, dict, here / "labels.txt", 1,
    lambda state, labels: i3d_graph(state, clip(frames=16), labels), here / "thin.ranges.json",
)
sys.exit(main(["pull", "thin", "--design", "8-zcu102", "--json"]))
"""


def test_pull_makes_a_program_without_torch_and_offline(stored, tmp_path):
    """In another process, which knows the release of the fixture and can import no torch."""
    done = subprocess.run(
        [sys.executable, "-c", BOARD, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "weights of thin",
        "quantizing with stored ranges",
        "compiling for 8-zcu102",
    ]
    program = load(json.loads(done.stdout)["path"])
    assert program.config.name == "8-zcu102"
    assert program.labels == ("left", "right", "none")


def test_a_made_program_is_used_again_and_a_damaged_one_made_again(stored):
    told = []
    path = released_program("thin", preset("8-sparse"), told.append)
    whole = path.read_bytes()
    assert len(told) == released.STAGES
    assert released_program("thin", preset("8-sparse"), told.append) == path
    assert len(told) == released.STAGES
    path.write_bytes(whole[:-10])
    assert released_program("thin", preset("8-sparse")).read_bytes() == whole
    retarget(load(path), preset("8-zcu102")).save(path)  # a file that was copied to this name
    assert released_program("thin", preset("8-sparse")).read_bytes() == whole
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_made(stored, tmp_path, monkeypatch, capsys):
    with pytest.raises(ModelError, match=r"ranges for 8 bits, and 4-sparse works on 4"):
        released_program("thin", preset("4-sparse"))
    with pytest.raises(ModelError, match="no published network 'thick'; there are i3d-kinetics400"):
        released_program("thick", preset("8-sparse"))
    file = tmp_path / "thin.ranges.json"
    text = file.read_text()
    file.write_text(text.replace("1" * 64, "2" * 64))
    with pytest.raises(ModelError, match="were chosen for weights of sha256 2222"):
        released_program("thin", preset("8-sparse"))
    file.write_text(text.replace('"AvgPool3d"', '"Median"'))
    with pytest.raises(
        CompileError, match="ranges are of another network; only one of both has AvgPool3d"
    ):
        released_program("thin", preset("8-sparse"))
    file.write_text(text[:-40])
    with pytest.raises(ModelError, match="no ranges of thin"):
        released_program("thin", preset("8-sparse"))
    assert main(["pull", "thick", "--design", "8-sparse"]) != 0
    assert "no program 'thick'; there are utd_mhad27, i3d-kinetics400" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_4c.Branch_2.Conv3d_0a_1x1.norm.bias"), "needs Mixed_4c.*nothing"),
        (lambda s: s.update({"Logits.bias": np.zeros(4, np.float32)}), r"Logits.bias of shape \(3"),
        (lambda s: s.update({"Conv3d_2b_1x1.conv.weight": s["Logits.weight"]}), "with 4 channels"),
    ],
)
def test_a_state_dict_that_does_not_fit(change, message):
    state = thin_state()
    change(state)
    with pytest.raises(ModelError, match=message):
        i3d_graph(state, SHORT)


def test_a_clip_or_labels_that_do_not_fit():
    with pytest.raises(ModelError, match="not 12 x 224 x 224"):
        i3d_graph(thin_state(), clip(frames=12))
    with pytest.raises(ModelError, match="3 classes here, but 2 labels"):
        i3d_graph(thin_state(), SHORT, ("a", "b"))


def test_the_ranges_that_ship_are_whole():
    """For every published network: of its weights, for each width, chosen on the shipped clips."""
    for name in RELEASES:
        stored = read_ranges(name)
        assert [ranges.bits for ranges in stored.ranges] == list(released.WIDTHS)
        assert len(stored.clips) == 2
        for ranges in stored.ranges:
            assert all(low <= high for low, high in ranges.observed.values())
            assert set(ranges.chosen) <= set(ranges.observed)


def test_a_program_by_its_name(tmp_path, monkeypatch, capsys, example_clips):
    """`--program utd_mhad27` is the file that ships; for another design it is packed again."""
    (shipped,) = shipped_programs()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_program("utd_mhad27", preset("8-sparse")) == shipped
    other = find_program("utd_mhad27", preset("8-zcu102"))
    assert other.parent == tmp_path / "pynq_kgrc" / "programs"
    assert load(other).config == preset("8-zcu102")
    assert find_program("utd_mhad27.kgrc", preset("8-sparse")).name == "utd_mhad27.kgrc"
    video = example_clips / "depth" / "a01_s2_t1.mp4"
    assert main(["classify", str(video), "-p", "utd_mhad27", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["program"] == load(shipped).name
    assert document["videos"][0]["labels"][0]["label"] == "right arm swipe to the left"


# ---- slow: the published weights --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.network
def test_i3d_is_the_program_of_compile(i3d, example_clips):
    """The fixture i3d traces the torch module and calibrates on the same two clips.

    Where it was calibrated with the same numpy and BLAS as the stored ranges, the programs are
    equal. Elsewhere the last bits of ranges may differ, and with them single codes.
    """
    graph, compiled = i3d
    program = load(released_program(NAME, compiled.config))
    frames = [load_clip(path, program.clip).frames for path in sorted(example_clips.glob("*.mp4"))]
    with Session(program) as ours, Session(compiled) as theirs:
        for clip_frames in frames:
            left, right = ours.run(clip_frames).logits, theirs.run(clip_frames).logits
            assert np.corrcoef(left, right)[0, 1] > 0.9999
            assert program.labels[int(left.argmax())] == "arm wrestling"
    for task, other in zip(program.tasks, compiled.tasks, strict=True):
        if hasattr(task, "weights"):  # they do not depend on ranges
            np.testing.assert_array_equal(task.weights.values, other.weights.values)
        assert task.out.scale == pytest.approx(other.out.scale, rel=1e-4)
        assert task.out.zero_point == other.out.zero_point


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("design", ["8-zcu102", "16-sparse"])
def test_the_first_label_is_right(design, example_clips, i3d):
    """Of each clip that ships, as `classify` samples it; the fixture fetches the weights."""
    program = load(released_program(NAME, preset(design)))
    video = example_clips / "arm_wrestling_k400.mp4"
    with Session(program) as session:
        found = session.classify(load_clip(video, program.clip).frames)
    assert found.labels[0].label == true_label(video)
