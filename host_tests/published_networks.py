"""What other libraries' definitions of our networks are: names and shapes, and logits.

`python host_tests/published_networks.py` writes published_networks.json from the libraries. It
needs torchvision 0.28, and for some rows PyTorchVideo 0.1.5 or mmaction2 1.2.0; the tests need the
file only. Weights and clips are pseudo-random numbers that depend on nothing but names and shapes.
"""

import json
import re
import sys
import types
import zlib
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_suffix(".json")

CLASSES = 7

SMALL = {
    "r2plus1d_34": (4, 32, 32),
    "s3d": (16, 224, 224),
    "alexnet": (1, 224, 224),
    "vgg_16": (1, 224, 224),
    "i3d_r50": (8, 64, 64),
    "csn_50": (8, 64, 64),
}
"""The clip that a network is compared on, where it is not 4 x 64 x 64 or 1 x 64 x 64 pixels."""


def clip_of(name, frames):
    size = SMALL.get(name, (min(frames, 4), 64, 64))
    values = np.random.RandomState(1).standard_normal((1, 3, *size)).astype(np.float32)
    return torch.from_numpy(values)


def values_of(name, shape):
    """Weights or statistics of a tensor: they depend on its name and shape only."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(size=shape).astype(np.float32)
    if name.endswith("running_var"):
        values = 1 + np.abs(values)
    elif len(shape) > 1:
        values *= np.sqrt(2 / values[0].size)
    else:
        values = 0.1 * values + (1 if name.endswith("weight") else 0)
    return torch.from_numpy(values.astype(np.float32))


def logits_of(module, clip):
    with torch.no_grad():
        return module.eval()(clip)[0].double()


# --- the libraries ---------------------------------------------------------------------------


def torchvision():
    """torchvision's models; operators are declared that it lacks where it is built for a GPU."""
    while True:
        try:
            import torchvision.models as models
        except RuntimeError as error:
            lacking = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not lacking:
                raise
            for name in [n for n in sys.modules if n.startswith("torchvision")]:
                del sys.modules[name]
            DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
            DECLARED[-1].define(f"{lacking[1]}(Tensor x) -> Tensor")
        else:
            return models


DECLARED = []
"""Kept alive: a library's operators end with it."""


def video(name):
    return lambda: getattr(torchvision().video, name)(num_classes=CLASSES)


def image(name):
    return lambda: Image(getattr(torchvision(), name)(num_classes=CLASSES))


class Image(torch.nn.Module):
    """A network for images on a clip of one frame; the names are its own."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def state_dict(self, *args, **kwargs):
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state, strict=True):
        return self.network.load_state_dict(state, strict)

    def forward(self, clip):
        return self.network(clip[:, :, 0])


def ig65m():
    """As ig65m-pytorch changes torchvision's network for the authors' weights."""
    v = torchvision().video.resnet
    network = v.VideoResNet(
        v.BasicBlock, [v.Conv2Plus1D] * 4, [3, 4, 6, 3], v.R2Plus1dStem, CLASSES
    )
    for layer, width in ((network.layer2, 128), (network.layer3, 256), (network.layer4, 512)):
        layer[0].conv2[0] = v.Conv2Plus1D(width, width, width * 9 // 4)
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm3d):
            part.eps = 1e-3
    return network


def pytorchvideo(name):
    def build():
        # its transforms ask for a module that newer torchvision does not have
        sys.modules.setdefault("torchvision.transforms.functional_tensor", types.ModuleType("gone"))
        from pytorchvideo.models import hub

        network = getattr(hub, name)(pretrained=False, model_num_class=CLASSES)
        head = network.blocks[-1]
        head.pool, head.output_pool = torch.nn.AdaptiveAvgPool3d(1), torch.nn.AdaptiveAvgPool3d(1)
        return network

    return build


def mmaction2(file, kind, **settings):
    def build():
        # its packages import everything else, for which other versions of mmcv are needed
        folder = next(Path(p, "mmaction") for p in sys.path if Path(p, "mmaction").is_dir())
        for package in (
            "mmaction",
            "mmaction.models",
            "mmaction.models.backbones",
            "mmaction.models.utils",
        ):
            part = sys.modules.setdefault(package, types.ModuleType(package))
            part.__path__ = [str(folder.joinpath(*package.split(".")[1:]))]
        module = import_module(f"mmaction.models.backbones.{file}")

        class Whole(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = getattr(module, kind)(
                    depth=50, pretrained=None, norm_eval=False, **settings
                )
                self.cls_head = torch.nn.ModuleDict({"fc_cls": torch.nn.Linear(2048, CLASSES)})

            def forward(self, clip):
                return self.cls_head["fc_cls"](self.backbone(clip).mean((2, 3, 4)))

        return Whole()

    return build


I3D = ((1, 1, 1), (1, 0, 1, 0), (1, 0, 1, 0, 1, 0), (0, 1, 0))
SLOW = dict(lateral=False, conv1_kernel=(1, 7, 7), conv1_stride_t=1, pool1_stride_t=1)

SOURCES = {
    ("r3d_18", "torchvision 0.28.0 video.r3d_18"): video("r3d_18"),
    ("mc3_18", "torchvision 0.28.0 video.mc3_18"): video("mc3_18"),
    ("r2plus1d_18", "torchvision 0.28.0 video.r2plus1d_18"): video("r2plus1d_18"),
    ("r2plus1d_34", "torchvision 0.28.0 VideoResNet, changed as by ig65m-pytorch"): ig65m,
    ("s3d", "torchvision 0.28.0 video.s3d"): video("s3d"),
    ("resnet_18", "torchvision 0.28.0 resnet18"): image("resnet18"),
    ("resnet_50", "torchvision 0.28.0 resnet50"): image("resnet50"),
    ("vgg_16", "torchvision 0.28.0 vgg16"): image("vgg16"),
    ("alexnet", "torchvision 0.28.0 alexnet"): image("alexnet"),
    ("mobilenet_v2", "torchvision 0.28.0 mobilenet_v2"): image("mobilenet_v2"),
    ("slowonly_r50", "PyTorchVideo 0.1.5 slow_r50"): pytorchvideo("slow_r50"),
    ("c2d_r50", "PyTorchVideo 0.1.5 c2d_r50"): pytorchvideo("c2d_r50"),
    ("i3d_r50", "mmaction2 1.2.0 ResNet3d as in its i3d_r50"): mmaction2(
        "resnet3d", "ResNet3d", conv1_kernel=(5, 7, 7), conv1_stride_t=2, pool1_stride_t=2,
        inflate=I3D, zero_init_residual=False, pretrained2d=False, conv_cfg=dict(type="Conv3d"),
    ),
    ("slowonly_r50", "mmaction2 1.2.0 ResNet3dSlowOnly as in its slowonly_r50"): mmaction2(
        "resnet3d_slowonly", "ResNet3dSlowOnly", inflate=(0, 0, 1, 1), **SLOW
    ),
    ("csn_50", "mmaction2 1.2.0 ResNet3dCSN, interaction-reduced"): mmaction2(
        "resnet3d_csn", "ResNet3dCSN", with_pool2=False, bottleneck_mode="ir", pretrained2d=False,
        zero_init_residual=False,
    ),
}  # fmt: skip
"""By our network and the source: a function that builds the library's network."""


def describe(name, source):
    """What a library's network is, for the file."""
    from pynq_kgrc.models import find_network

    _, clip = find_network(name)
    module = SOURCES[name, source]()
    tensors = {
        key: tuple(value.shape)
        for key, value in module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    state = {key: values_of(key, shape) for key, shape in tensors.items()}
    module.load_state_dict(state, strict=False)
    logits = logits_of(module, clip_of(name, clip.frames))
    return {
        "network": name,
        "source": source,
        "tensors": tensors,
        "logits": [float(f"{value:.7g}") for value in logits],
    }


def main():
    rows = []
    for name, source in SOURCES:
        print(name, source, flush=True)
        rows.append(describe(name, source))
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    FILE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
