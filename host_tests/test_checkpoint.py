"""A state dict is loaded whole, or refused with a reason and the network left as it was."""

import os
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from pynq_kgrc.errors import ModelError
from pynq_kgrc.models.checkpoint import load_state


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
    assert f"bad{suffix} cannot be read as {suffix}: " in load_in_vain(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_cut_short(tmp_path, suffix):
    path = write(small().state_dict(), tmp_path / f"cut{suffix}")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"cannot be read as {suffix}: " in load_in_vain(path)


def test_no_file(tmp_path):
    assert "none.pt cannot be read as .pt: " in load_in_vain(tmp_path / "none.pt")


def test_another_ending(tmp_path):
    message = load_in_vain(tmp_path / "weights.onnx")
    assert "a checkpoint ends in .safetensors, .pt, .pth, not '.onnx'" in message


def test_a_whole_training_state(tmp_path):
    saved = {"epoch": 3, "model": small().state_dict()}
    message = load_in_vain(write(saved, tmp_path / "training.pth"))
    assert "2 of its entries are something else (epoch, model)" in message
    assert "save module.state_dict() alone" in message


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
    assert "cannot be read as .pt: " in load_in_vain(path)
    path.write_bytes(pickle.dumps(Command(str(trap))))
    assert "cannot be read as .pt: " in load_in_vain(path)
    assert not trap.exists()
