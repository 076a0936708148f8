"""A state dict is loaded whole, or refused with a reason and the network left as it was."""

import argparse
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from pynq_kgrc.errors import ModelError
from pynq_kgrc.models.c3d import c3d
from pynq_kgrc.models.checkpoint import load_state
from pynq_kgrc.models.i3d import i3d
from pynq_kgrc.models.r2plus1d import r2plus1d_18
from pynq_kgrc.models.thin import thin_r2plus1d


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Linear(4, 2))


def write(state, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def load_in_vain(path) -> str:
    """The message of the ModelError; the module must be unchanged afterwards."""
    module = small()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_state(module, path)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_loads_every_format(tmp_path, suffix):
    source, target = small(), small()
    path = write(source.state_dict(), tmp_path / f"small{suffix}")
    load_state(target, str(path))
    for name, values in source.state_dict().items():
        assert torch.equal(values, target.state_dict()[name])


def test_a_batch_counter_may_be_missing(tmp_path):
    state = {k: v for k, v in small().state_dict().items() if "num_batches" not in k}
    load_state(small(), write(state, tmp_path / "small.safetensors"))


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    state = small().state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        del state[name]
    state["head.weight"] = torch.zeros(1)
    state["2.weight"] = torch.zeros(3, 4)
    message = load_in_vain(write(state, tmp_path / "odd.pt"))
    assert "odd.pt does not fit Sequential: tensors" in message
    assert "4 missing (0.weight, 0.bias, 1.weight, ...)" in message
    assert "1 extra (head.weight)" in message
    assert "1 of another shape (2.weight [3, 4] instead of [2, 4])" in message


def test_one_misshapen_tensor_at_the_end_leaves_the_first_alone(tmp_path):
    state = {k: v + 1 for k, v in small().state_dict().items()}
    state["2.bias"] = torch.zeros(5)
    assert "2.bias [5] instead of [2]" in load_in_vain(write(state, tmp_path / "late.safetensors"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all, but some bytes of text"])
def test_a_file_of_other_content(tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    message = load_in_vain(path)
    assert f"bad{suffix} is " in message
    assert ("is empty" if not content else "begins with the bytes 6e 6f") in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_cut_short(tmp_path, suffix):
    path = write(small().state_dict(), tmp_path / f"cut{suffix}")
    path.write_bytes(path.read_bytes()[:-100])
    what = {".pt": "zip archive cut short", ".safetensors": "no whole safetensors file"}[suffix]
    assert f"cut{suffix} is {'a ' if suffix == '.pt' else ''}{what}" in load_in_vain(path)


def test_no_file(tmp_path):
    assert "none.pt cannot be read: No such file" in load_in_vain(tmp_path / "none.pt")


def test_a_list(tmp_path):
    message = load_in_vain(write([torch.zeros(1)], tmp_path / "list.pt"))
    assert message.endswith("list.pt holds a list, not a state dict")


class Command:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_with_a_command_does_not_run(tmp_path):
    path, trap = tmp_path / "trap.pt", tmp_path / "sprung"
    torch.save({"0.weight": Command(str(trap))}, path)
    assert "object of posix.mkdir; only tensors" in load_in_vain(path)
    path.write_bytes(pickle.dumps(Command(str(trap))))
    assert "is not a whole file of torch.save" in load_in_vain(path)
    assert not trap.exists()


def filled() -> nn.Sequential:
    """A network whose statistics are not those of a new one."""
    network = small()
    with torch.no_grad():
        network[1].running_mean.normal_()
        network[1].running_var.uniform_(0.5, 2)
    return network


def assert_loads(path, source, **options) -> str:
    """The file's weights make a new network equal to `source`; the summary."""
    target = small()
    told = load_state(target, path, **options)
    for name, values in source.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(values, target.state_dict()[name]), name
    return told


@pytest.mark.parametrize(
    "name",
    [
        "a.pth",
        "a.pt",
        "a.pyth",
        "a.ckpt",
        "a.bin",
        "a.pth.tar",
        "a.pkl",
        "a.safetensors",
        "weights",
    ],
)
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_the_content_decides_the_format_not_the_suffix(tmp_path, name, form):
    source, path = filled(), tmp_path / name
    if form == "safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        zipped = form == "zip"
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=zipped)
    assert_loads(path, source)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile imports torch.jit
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (nn.DataParallel, "module."),
        (torch.compile, "_orig_mod."),
        (lambda m: nn.DataParallel(torch.compile(m)), "module._orig_mod."),
        (torch.optim.swa_utils.AveragedModel, "module."),
        (lambda m: nn.ModuleDict({"backbone": m}), "backbone."),
        (lambda m: nn.ModuleDict({"model": m}), "model."),
        (lambda m: nn.ModuleDict({"encoder": m}), "encoder."),
        (lambda m: nn.ModuleDict({"anything": m}), "anything."),
    ],
)
def test_the_prefix_of_a_wrapper_is_removed_and_named(tmp_path, wrap, prefix):
    source = filled()
    path = write(wrap(source).state_dict(), tmp_path / "wrapped.pt")
    assert f"prefix {prefix!r} removed" in assert_loads(path, source)


def test_wrapped_weights_give_the_logits_of_the_source(tmp_path):
    source, target = thin_r2plus1d(5).eval(), thin_r2plus1d(5).eval()
    state = {"state_dict": nn.DataParallel(source).state_dict(), "epoch": 3}
    told = load_state(target, write(state, tmp_path / "thin.ckpt"))
    assert "entry 'state_dict', prefix 'module.' removed, classifier 'fc' of 5 classes kept" in told
    clip = torch.randn(1, 3, 16, 64, 64)
    assert torch.equal(source(clip), target(clip))


@pytest.mark.parametrize(
    "entry",
    [
        "state_dict",
        "model",
        "model_state",
        "model_state_dict",
        "network",
        "ema_state_dict",
        "model_ema",
        "averaged_model",
        "state_dict_ema",
    ],
)
def test_a_training_checkpoint_with_one_set_of_weights(tmp_path, entry):
    source = filled()
    optimizer = torch.optim.Adam(source.parameters())
    loss = source[0](torch.ones(1, 3, 1, 1, 1)).sum()
    loss.backward()
    optimizer.step()
    content = {
        "epoch": 3,
        entry: source.state_dict(),
        "optimizer": optimizer.state_dict(),
        "params": {"lr": 0.1},
        "best": torch.tensor(1.0),
        "args": argparse.Namespace(lr=0.1),
    }
    assert f"from entry {entry!r}" in assert_loads(write(content, tmp_path / "run.pth"), source)


def test_an_entry_within_an_entry_and_one_without_end(tmp_path):
    source = filled()
    path = write({"model": {"state_dict": source.state_dict()}}, tmp_path / "nested.pt")
    assert "from entry 'model.state_dict'" in assert_loads(path, source)
    endless: dict = {}
    endless["model"] = endless
    assert "none of its entries (model)" in load_in_vain(write(endless, tmp_path / "endless.pt"))


def test_two_sets_of_weights_are_refused_unless_one_is_chosen(tmp_path):
    source, other = filled(), filled()
    average = torch.optim.swa_utils.AveragedModel(source)
    content = {"model": other.state_dict(), "model_ema": average.state_dict()}
    path = write(content, tmp_path / "both.pt")
    assert "more than one set of weights: entries 'model' and 'model_ema'" in load_in_vain(path)
    assert_loads(path, source, entry="model_ema")
    assert_loads(path, other, entry="model")
    with pytest.raises(ModelError, match="no entry 'ema' of weights; it has model, model_ema"):
        load_state(small(), path, entry="ema")


def test_two_prefixes_that_fit_are_refused(tmp_path):
    pair = nn.ModuleDict({"student": filled(), "teacher": filled()})
    message = load_in_vain(write(pair.state_dict(), tmp_path / "pair.pt"))
    assert "the prefixes 'student.' and 'teacher.' both fit" in message


def test_tensors_beside_the_prefix_are_refused_by_name(tmp_path):
    state = {"criterion.weight": torch.ones(2)}
    state |= nn.DataParallel(small()).state_dict()
    message = load_in_vain(write(state, tmp_path / "more.pt"))
    assert "1 extra (criterion.weight); with prefix 'module.' removed" in message


def test_a_rule_that_is_not_one_to_one_is_refused(tmp_path):
    target = small()
    target.OTHER_NAMES = {"another": ((r"^old\.", "0."),)}
    state = target.state_dict()
    state["old.weight"] = state["0.weight"] + 1
    with pytest.raises(ModelError, match=r"1 extra \(old.weight\)"):
        load_state(target, write(state, tmp_path / "twice.pt"))


def test_two_rules_that_fit_differently_are_refused(tmp_path):
    target = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    target.OTHER_NAMES = {"swapped": ((r"^a\.", "c."), (r"^b\.", "a."), (r"^c\.", "b."))}
    path = write(target.state_dict(), tmp_path / "swapped.pt")
    with pytest.raises(ModelError, match=r"in more than one way \(.*swapped.*ambiguous"):
        load_state(target, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_precisions_become_float32(tmp_path, dtype, suffix):
    source = filled()
    state = {k: v.to(dtype) for k, v in source.state_dict().items()}  # the counter too
    path = write(state, tmp_path / f"half{suffix}")
    rounded = filled()
    rounded.load_state_dict({k: v.float() for k, v in state.items()})
    assert f"{str(dtype)[6:]} converted" in assert_loads(path, rounded)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_refused_by_name(tmp_path, dtype):
    state = small().state_dict()
    state["2.weight"] = torch.ones(2, 4).to(dtype)
    message = load_in_vain(write(state, tmp_path / "kind.pt"))
    assert f"2.weight is of {dtype}; accepted are torch.float16" in message


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("2.bias", torch.tensor([1.0, float("nan")]), "1 of 2 values that are NaN or infinite"),
        ("2.bias", torch.tensor([1.0, float("-inf")]), "1 of 2 values that are NaN or infinite"),
        ("2.bias", torch.tensor([1, 1e300]).double() * 1e300, "values that are NaN or infinite"),
        ("2.bias", torch.tensor([1.0, 1e60], dtype=torch.float64), "infinite as torch.float32"),
        ("1.running_var", torch.tensor([1.0, -2, 1, 1]), "negative variance -2"),
        ("2.bias", torch.ones(2).to_sparse(), "a sparse tensor"),
        ("2.bias", torch.ones(2, device="meta"), "meta"),
    ],
)
def test_values_that_no_weight_has_are_refused_by_name(tmp_path, name, value, reason):
    state = {**small().state_dict(), name: value}
    message = load_in_vain(write(state, tmp_path / "values.pt"))
    assert f"values.pt: {name} " in message and reason in message


def test_another_number_of_classes(tmp_path):
    source = filled()
    source[2] = nn.Linear(4, 51)
    path = write(source.state_dict(), tmp_path / "classes.pt")
    message = load_in_vain(path)
    assert "2.weight [51, 4] instead of [2, 4]" in message
    assert "for 51 classes, the network for 2" in message
    target = small()
    head = target[2].weight.clone()
    told = load_state(target, path, classifier=False)
    assert told.endswith("classifier '2' of 51 classes left out")
    assert torch.equal(target[2].weight, head)
    assert torch.equal(target[0].weight, source[0].weight)


def test_a_classifier_of_another_number_of_classes_only_is_left_out(tmp_path):
    source, target = filled(), small()
    path = write(source.state_dict(), tmp_path / "equal.pt")
    assert load_state(target, path, classifier=None).endswith("classifier '2' of 2 classes kept")
    assert torch.equal(target[2].weight, source[2].weight)
    source[2] = nn.Linear(4, 51)
    path = write(source.state_dict(), tmp_path / "more.pt")
    told = load_state(target, path, classifier=None)
    assert told.endswith("classifier '2' of 51 classes left out")
    state = source.state_dict() | {"0.bias": torch.zeros(5)}
    with pytest.raises(ModelError, match=r"0.bias \[5\] instead of \[4\]"):
        load_state(target, write(state, tmp_path / "other.pt"), classifier=None)


def test_masks_of_torch_prune_are_multiplied(tmp_path):
    source = filled()
    prune.random_unstructured(source[0], "weight", 0.5)
    state = source.state_dict()
    assert "0.weight_orig" in state and "0.weight" not in state
    target = small()
    told = load_state(target, write(state, tmp_path / "masked.pt"))
    assert "1 pruned by their masks" in told
    assert torch.equal(target[0].weight, source[0].weight)
    assert int((target[0].weight == 0).sum()) == 6
    state["0.weight_mask"] = state["0.weight_mask"] * 2
    message = load_in_vain(write(state, tmp_path / "masked.pt"))
    assert "0.weight_mask is no mask of 0.weight_orig: accepted are zeros and ones" in message
    del state["0.weight_mask"]
    message = load_in_vain(write(state, tmp_path / "masked.pt"))
    assert "1 missing (0.weight), 1 extra (0.weight_orig)" in message


@pytest.mark.parametrize("legacy", [False, True])
def test_arrays_and_numbers_of_numpy(tmp_path, legacy):
    source = filled()
    content = {
        "state_dict": {k: v.numpy().astype(v.numpy().dtype.newbyteorder(">"))
                       for k, v in source.state_dict().items()},
        "best": np.float64(0.5),
        "epoch": np.int64(3),
    }  # fmt: skip
    path = tmp_path / "arrays.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_loads(path, source)


def test_arrays_of_objects_are_refused(tmp_path):
    path = write({"0.weight": np.array([None, "x"], object)}, tmp_path / "objects.pt")
    assert "is not a whole file of torch.save with tensors" in load_in_vain(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_gets_a_plain_message(tmp_path, legacy):
    path = tmp_path / "module.pt"
    torch.save(small(), path, _use_new_zipfile_serialization=not legacy)
    message = load_in_vain(path)
    assert "object of torch.nn.modules.container.Sequential; only tensors" in message
    assert "\x1b" not in message and "weights_only" not in message and "\n" not in message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
def test_files_of_other_kinds(tmp_path):
    def told(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return load_in_vain(tmp_path / name)

    assert "git-lfs pointer" in told("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid")
    assert "is a web page" in told("page.pth", b"<!DOCTYPE html><html>")
    assert "packed archive; unpack" in told("packed.tar", b"\x1f\x8b\x08" + bytes(600))
    assert "HDF5" in told("keras.pt", b"\x89HDF\r\n\x1a\n" + bytes(600))
    assert "not a whole file of torch.save" in told("plain.pkl", pickle.dumps({"a": 1}, 2))
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("word/document.xml", "text")
    assert "zip archive of another kind (it holds word/document.xml)" in load_in_vain(
        tmp_path / "other.pt"
    )
    torch.jit.save(torch.jit.script(small()), tmp_path / "script.pt")
    assert "is a TorchScript archive" in load_in_vain(tmp_path / "script.pt")
    assert "is a folder" in load_in_vain(tmp_path)


def test_a_changed_byte_is_noticed(tmp_path):
    """torch.load alone takes the file, and gives other weights."""
    path = tmp_path / "flip.pt"
    torch.save({"0.weight": torch.full((64, 64), 3.0)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    assert "the checksum of its part flip/data/0 is wrong" in load_in_vain(path)


def test_names_cannot_steer_the_terminal(tmp_path):
    message = load_in_vain(write({"\x1b[31mred": torch.ones(1)}, tmp_path / "red.pt"))
    assert "\x1b" not in message and "red" in message


def stamped(build, classes):
    """A network in which every float tensor has values that tell it from the others."""
    network = build(classes)
    for number, tensor in enumerate(network.state_dict().values()):
        if tensor.is_floating_point():
            tensor.fill_(float(number % 2000))
            tensor.view(-1)[0] = 0.5
    return network


def assert_translated(tmp_path, build, names, library):
    """A float16 file with `names` (ours to theirs) fills a new network with the same values."""
    source, target = stamped(build, 7), build(7)
    state = {names(k): v.half() for k, v in source.state_dict().items() if v.ndim}
    told = load_state(target, write(state, tmp_path / "foreign.pth"))
    assert f"names of {library}" in told
    for name, values in source.state_dict().items():
        if values.ndim:
            assert torch.equal(values, target.state_dict()[name]), name


def test_c3d_of_mmaction2(tmp_path):
    """Names as in mmaction2's models/backbones/c3d.py and its I3DHead."""

    def names(ours: str) -> str:
        layer, leaf = ours.split(".")
        if layer == "fc8":
            return f"cls_head.fc_cls.{leaf}"
        if layer.startswith("fc"):
            return f"backbone.{ours}"
        return f"backbone.{layer}{'a' if layer in ('conv1', 'conv2') else ''}.conv.{leaf}"

    assert_translated(tmp_path, c3d, names, "mmaction2")


def test_r2plus1d_of_torchvision_in_mmaction2(tmp_path):
    """mmaction2 holds torchvision's network as `backbone`; its head is `cls_head.fc_cls`."""

    def names(ours: str) -> str:
        return ours.replace("fc.", "cls_head.fc_cls.") if "fc." in ours else f"backbone.{ours}"

    assert_translated(tmp_path, r2plus1d_18, names, "mmaction2")


I3D_BRANCHES = {
    "Branch_0.Conv3d_0a_1x1": ("b0", "branch_0"),
    "Branch_1.Conv3d_0a_1x1": ("b1a", "branch_1.0"),
    "Branch_1.Conv3d_0b_3x3": ("b1b", "branch_1.1"),
    "Branch_2.Conv3d_0a_1x1": ("b2a", "branch_2.0"),
    "Branch_2.Conv3d_0b_3x3": ("b2b", "branch_2.1"),
    "Branch_3.Conv3d_0b_1x1": ("b3b", "branch_3.1"),
}
"""Names in piergiaj's pytorch_i3d.py and in hassony2's src/i3dpt.py, by ours."""


@pytest.mark.parametrize("which", [0, 1])
def test_i3d_of_other_repositories(tmp_path, which):
    def names(ours: str) -> str:
        if ours.startswith("Logits."):
            return ours.replace("Logits", ("logits.conv3d", "conv3d_0c_1x1.conv3d")[which])
        for branch, theirs in I3D_BRANCHES.items():
            ours = ours.replace(branch, theirs[which])
        if which:
            ours = ours.replace("Conv3d_", "conv3d_").replace("Mixed", "mixed")
        return ours.replace(".conv.", ".conv3d.").replace(".norm.", (".bn.", ".batch3d.")[which])

    library = ("pytorch-i3d translated", "kinetics_i3d_pytorch (its batch norm's epsilon")[which]
    assert_translated(tmp_path, i3d, names, library)
