"""Random torch networks, one for each seed, for tests of everything between torch and the codes."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pynq_kgrc.graph import ClipSpec


class Movement(nn.Module):
    """Moves the elements of a map, or scales its channels: what compiles to one layer or none."""

    def __init__(self, rng: np.random.Generator, shape) -> None:
        super().__init__()
        channels, size = shape[1], shape[2:]
        kinds = ["slice", "channels", "pad", "shift", "constants", "list", "between"]
        if channels % 2 == 0:
            kinds.append("shuffle")
        if size[0] > 1:
            kinds += ["frames", "frames"]
        self.kind = str(rng.choice(kinds))
        self.axis = int(rng.integers(2, 5))
        length = shape[self.axis]
        self.start = int(rng.integers(0, length))
        self.end = int(rng.integers(self.start + 1, length + 1))
        self.step = int(rng.choice([1, 1, 2, 3]))
        self.first = int(rng.integers(0, channels))
        self.fold = max(1, channels // 4)
        self.widths = [int(n) for n in rng.integers(-1, 3, 8)]
        for axis, length in enumerate(reversed(shape[1:])):  # something is left of each axis
            if length + self.widths[2 * axis] + self.widths[2 * axis + 1] < 1:
                self.widths[2 * axis : 2 * axis + 2] = [0, 1]
        self.order = torch.from_numpy(rng.permutation(channels))
        spread = (channels, *[1] * 3)
        self.gain = nn.Parameter(torch.from_numpy(rng.normal(1, 0.5, spread)).float())
        self.offset = torch.from_numpy(rng.normal(0, 0.5, spread)).float()
        if self.kind == "frames":
            self.flat = nn.Conv2d(channels, int(rng.integers(1, 9)), 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, d, h, w = x.shape
        if self.kind == "slice":
            places = [slice(None)] * 5
            places[self.axis] = slice(self.start, self.end, self.step)
            return x[tuple(places)]
        if self.kind == "channels":
            return x[:, self.first :]
        if self.kind == "pad":
            return F.pad(x, self.widths)
        if self.kind == "shift":
            out = torch.zeros_like(x)
            out[:, : self.fold, :-1] = x[:, : self.fold, 1:]
            out[:, self.fold :] = x[:, self.fold :]
            return out
        if self.kind == "constants":
            return (x * self.gain - self.offset) / 2 + 0.25
        if self.kind == "between":
            return (
                F.relu(x - 0.25 * x[:, :, :1].expand_as(x))
                if d == 1
                else x[:, :, 1:] - x[:, :, :-1]
            )
        if self.kind == "list":
            return x[:, self.order]
        if self.kind == "shuffle":
            a, b = x.view(n, 2, c // 2, d, h, w).transpose(1, 2).reshape(x.shape).chunk(2, 1)
            return torch.cat([b, F.relu(a)], 1)
        frames = F.relu(self.flat(x.transpose(1, 2).reshape(n * d, c, h, w)))
        return frames.view(n, d, -1, h, w).transpose(1, 2)


class RandomNetwork(nn.Module):
    """Up to eight random steps of convolutions, pools, adds and concats, then a head.

    With `moving`, a third of the steps move elements or multiply by constants, and some networks
    end with a soft-max.
    """

    def __init__(self, seed: int, moving: bool = False) -> None:
        super().__init__()
        self._moving = moving
        self._rng = rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        size = rng.integers(1, 7), rng.integers(4, 13), rng.integers(4, 18)
        if rng.random() < 0.1:
            size = rng.integers(4, 9), rng.integers(12, 17), rng.integers(12, 17)
        self.clip = ClipSpec(*map(int, size), short_side=int(size[1]))
        self.steps = nn.ModuleList()
        self._plan = []
        """For each step: what it does, and the indices of the values that it reads."""
        values = [torch.zeros(1, 3, *map(int, size))]
        for _ in range(int(rng.integers(1, 9))):
            self._add_step(values)
        self._add_head(values)
        self.eval()

    def _add_step(self, values: list) -> None:
        rng = self._rng
        last = len(values) - 1 if rng.random() < 0.7 else int(rng.integers(len(values)))
        source = values[last]
        alike = [i for i, v in enumerate(values) if v.shape == source.shape and i != last]
        stackable = [i for i, v in enumerate(values) if v.shape[2:] == source.shape[2:]]
        kind = rng.choice(["conv", "conv", "conv", "max", "mean", "add", "cat"])
        if self._moving and rng.random() < 0.35:
            self._append(values, "step", [last], Movement(rng, source.shape))
            return
        if kind == "add" and alike:
            self._append(values, kind, [last, int(rng.choice(alike))], nn.Identity())
        elif kind == "cat" and len(stackable) > 1 and source.shape[1] < 40:
            parts = [int(i) for i in rng.choice(stackable, int(rng.integers(2, 4)))]
            self._append(values, kind, parts, nn.Identity())
        elif kind in ("max", "mean"):
            self._append(values, "step", [last], self._pool(kind, source.shape[2:]))
        else:
            self._append(values, "step", [last], self._convolution(source.shape))

    def _append(self, values: list, kind: str, reads: list, part: nn.Module) -> None:
        self._plan.append((kind, reads))
        self.steps.append(part.eval())
        with torch.no_grad():
            values.append(self._run(len(self.steps) - 1, values))

    def _run(self, number: int, values: list) -> torch.Tensor:
        kind, reads = self._plan[number]
        read = [values[i] for i in reads]
        if kind == "add":
            return torch.relu(read[0] + read[1]) if number % 2 else read[0] + read[1]
        if kind == "cat":
            return torch.cat(read, 1)
        return self.steps[number](read[0])

    def _convolution(self, shape) -> nn.Module:
        rng = self._rng
        channels = shape[1]
        groups = int(rng.choice([1, 1, 1, channels, 2 if channels % 2 == 0 else 1]))
        filters = groups * int(rng.integers(1, max(2, 24 // groups)))
        kernel = [int(rng.choice([1, 2, 3, min(7, size)])) for size in shape[2:]]
        dilation = [int(rng.choice([1, 1, 1, 2])) for _ in range(3)]
        padding = [
            int(rng.integers(0, (k - 1) * d // 2 + 1))
            for k, d in zip(kernel, dilation, strict=True)
        ]
        for axis, size in enumerate(shape[2:]):
            if (kernel[axis] - 1) * dilation[axis] + 1 > size + 2 * padding[axis]:
                kernel[axis], dilation[axis], padding[axis] = 1, 1, 0
        stride = [int(rng.choice([1, 1, 2, 3])) for _ in range(3)]
        bias = bool(rng.random() < 0.7)
        convolution = nn.Conv3d(
            channels, filters, kernel, stride, padding, dilation, groups, bias=bias
        )
        parts: list[nn.Module] = [convolution]
        with torch.no_grad():
            case = rng.random()
            if case < 0.05:
                convolution.weight[: filters // 2] = 0
            elif case < 0.1 and bias:
                convolution.bias[:] = -100  # the ReLU after it is dead
            elif case < 0.15:
                convolution.weight *= float(10 ** rng.uniform(-3, 3))
        if rng.random() < 0.4:
            norm = nn.BatchNorm3d(filters)
            with torch.no_grad():
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.2, 2)
                norm.weight.normal_(1, 0.5)
                norm.bias.normal_(0, 0.3)
            parts.append(norm)
        parts.append(rng.choice([nn.ReLU(), nn.ReLU(), nn.ReLU6(), nn.Identity()]))
        return nn.Sequential(*parts)

    def _pool(self, kind: str, sizes) -> nn.Module:
        rng = self._rng
        if rng.random() < 0.15:
            whole = nn.AdaptiveMaxPool3d(1) if kind == "max" else nn.AdaptiveAvgPool3d(1)
            return whole
        kernel = [min(int(rng.choice([1, 2, 2, 3, 16])), int(size)) for size in sizes]
        stride = [int(rng.choice([1, 2, k])) for k in kernel]
        padding = [int(rng.integers(0, k // 2 + 1)) for k in kernel]
        if rng.random() < 0.5:
            stride, padding = kernel, [0, 0, 0]
        if kind == "max":
            return nn.MaxPool3d(kernel, stride, padding, ceil_mode=bool(rng.random() < 0.3))
        return nn.AvgPool3d(kernel, stride, padding)

    def _add_head(self, values: list) -> None:
        rng = self._rng
        shape = values[-1].shape
        parts: list[nn.Module] = []
        if rng.random() < 0.5:
            parts.append(nn.AdaptiveAvgPool3d(1))
            shape = (*shape[:2], 1, 1, 1)
        features = int(np.prod(shape[1:]))
        if rng.random() < 0.9:
            parts += [nn.Flatten(), nn.Linear(features, int(rng.integers(2, 9)))]
            with torch.no_grad():
                if rng.random() < 0.05:
                    parts[-1].weight.zero_()
        elif not parts:
            parts.append(nn.Conv3d(shape[1], 4, 1))
        self._append(values, "step", [len(values) - 1], nn.Sequential(*parts))

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        values = [clip]
        for number in range(len(self.steps)):
            values.append(self._run(number, values))
        return values[-1]
