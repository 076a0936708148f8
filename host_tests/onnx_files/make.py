"""Makes the ONNX files beside it with the exporters that people use; seeded weights.

    pip install -c constraints.txt torch onnx onnxscript onnxruntime
    pip install --no-deps brevitas dependencies==2.0.1 unfoldNd onnxoptimizer
    python host_tests/onnx_files/make.py

The files are in the repository, so that tests need neither these packages nor their versions.
Made with torch 2.13.0, onnx 1.22.0, onnxscript 0.7.2, onnxruntime 1.31.1 and brevitas 0.13.4.
What an exporter writes about the machine (stack traces) is removed.
"""

import tempfile
import warnings
from pathlib import Path

import brevitas.nn as qnn
import numpy as np
import onnx
import torch
from brevitas.export import export_onnx_qcdq, export_qonnx
from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

HERE = Path(__file__).resolve().parent
KEPT = ("pkg.torch.onnx.name_scopes",)
"""The properties of nodes that are read; others hold paths of the machine."""


class Block(nn.Module):
    """A residual block with a strided shortcut, as in ResNet and R(2+1)D."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(filters)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(filters, filters, (1, 3, 3), 1, (0, 1, 1), bias=False)
        self.bn2 = nn.BatchNorm3d(filters)
        self.downsample = None
        if stride != 1 or channels != filters:
            shortcut = nn.Conv3d(channels, filters, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(filters))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Residual(nn.Module):
    """Clips of 4 x 12 x 12: residual blocks, a mean over the map, a linear."""

    shape = (1, 3, 4, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 4, 3, 1, 1), nn.BatchNorm3d(4), nn.ReLU())
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.layer1 = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2))
        self.drop = nn.Dropout()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.layer1(self.pool(self.stem(x))).mean((2, 3, 4))
        return self.fc(self.drop(torch.flatten(x, 1)))


class Images(nn.Module):
    """Frames of 16 x 16: ReLU6, padding, a batch norm alone, a concat, groups, dilation."""

    shape = (1, 3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2, bias=False)
        self.act = nn.ReLU6()
        self.depth = nn.Conv2d(4, 4, 3, 1, 2, 2, groups=4)
        self.point = nn.Conv2d(4, 3, 1)
        self.norm = nn.BatchNorm2d(7)
        self.avg = nn.AvgPool2d(3, 1, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(7, 4)

    def forward(self, x):
        x = self.act(self.first(nn.functional.pad(x, (0, 1, 0, 1))))
        y = self.point(self.act(self.depth(x)))
        x = torch.relu(self.norm(torch.cat([self.avg(x), y], 1)))
        x = self.pool(x)
        return self.fc(x.view(x.size(0), -1))


def seeded(build) -> nn.Module:
    """The network with weights and statistics from a seed."""
    torch.manual_seed(0)
    network = build().eval()
    for part in network.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm3d)):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
    return network


def clean(path: Path) -> None:
    """Remove what says where and how the file was made."""
    model = onnx.load(path)
    for node in model.graph.node:
        node.doc_string = ""
        kept = [entry for entry in node.metadata_props if entry.key in KEPT]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]
    for part in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.save(model, path)


def export(build, opset: int, dynamo: bool) -> Path:
    """Export by torch's exporter through TorchScript, or by the one through torch.export."""
    network = seeded(build)
    way = "dynamo" if dynamo else "legacy"
    path = HERE / f"{build.__name__.lower()}-{way}{opset}.onnx"
    given = {"external_data": False, "verbose": False} if dynamo else {"input_names": ["clip"]}
    example = (torch.zeros(build.shape),)
    torch.onnx.export(network, example, path, opset_version=opset, dynamo=dynamo, **given)
    clean(path)
    return path


class Clips(CalibrationDataReader):
    """Four clips of noise."""

    def __init__(self, shape) -> None:
        rng = np.random.default_rng(1)
        clips = [rng.normal(0, 1, shape).astype(np.float32) for _ in range(4)]
        self.clips = iter([{"clip": clip} for clip in clips])

    def get_next(self):
        return next(self.clips, None)


def quantize(build, name: str, kind: QuantType, symmetric: bool) -> None:
    """ONNX Runtime's static quantization of the export at opset 17, scales for each filter."""
    source = HERE / f"{build.__name__.lower()}-legacy17.onnx"
    out = HERE / f"qdq-{build.__name__.lower()}-{name}.onnx"
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.onnx"
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            out,
            Clips(build.shape),
            quant_format=QuantFormat.QDQ,
            activation_type=kind,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"ActivationSymmetric": symmetric},
        )
    clean(out)


class Trained(nn.Module):
    """Frames of 14 x 14, quantized in training by Brevitas: input 8 bits, the rest `bits`."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        given = {"weight_bit_width": bits, "weight_quant": Int8WeightPerChannelFloat}
        self.inp = qnn.QuantIdentity(bit_width=8)
        self.conv1 = qnn.QuantConv2d(3, 4, 3, padding=1, bias=True, **given)
        self.relu1 = qnn.QuantReLU(bit_width=bits)
        self.conv2 = qnn.QuantConv2d(4, 4, 3, stride=2, bias=False, **given)
        self.relu2 = qnn.QuantReLU(bit_width=bits)
        self.pool = nn.MaxPool2d(2)
        given["weight_quant"] = Int8WeightPerTensorFloat
        self.fc = qnn.QuantLinear(36, 5, bias=True, **given)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(self.inp(x)))))
        return self.fc(torch.flatten(self.pool(x), 1))


def export_trained(bits: int) -> None:
    """One network by both of Brevitas' exporters."""
    torch.manual_seed(0)
    network = Trained(bits)
    for _ in range(3):  # statistics of the scales
        network(torch.randn(8, 3, 14, 14))
    network.eval()
    for name, way in (("qcdq", export_onnx_qcdq), ("qonnx", export_qonnx)):
        path = HERE / f"{name}-{bits}bit.onnx"
        example = torch.randn(1, 3, 14, 14)
        way(network, args=example, export_path=str(path), opset_version=17, dynamo=False)
        clean(path)


def main() -> None:
    warnings.filterwarnings("ignore")
    for build in (Residual, Images):
        for opset, dynamo in ((11, False), (17, False), (18, True), (23, True)):
            export(build, opset, dynamo)
    quantize(Residual, "u8", QuantType.QUInt8, False)
    quantize(Images, "s8", QuantType.QInt8, False)
    quantize(Residual, "symmetric", QuantType.QInt8, True)
    for bits in (8, 4):
        export_trained(bits)


if __name__ == "__main__":
    main()
