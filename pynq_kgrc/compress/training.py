"""Resumable training: epochs, learning rates, penalties, checkpoints and the log."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import msgspec
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from pynq_kgrc.compress.augment import Augmentation, plain_batches, varied_batches
from pynq_kgrc.compress.dataset import Clips
from pynq_kgrc.compress.masks import Masks, Pruned, list_pruned
from pynq_kgrc.compress.weights import save_weights
from pynq_kgrc.errors import ConfigError, ModelError
from pynq_kgrc.files import written_beside
from pynq_kgrc.graph import ClipSpec

T = TypeVar("T")

CHECKPOINT = "checkpoint.pt"
LOG = "log.csv"
CONFIG = "config.toml"
TRAINED = "trained.safetensors"
"""The trained weights of a run whose result is their running average."""


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a training run depends on, except the data, the network and the penalty."""

    epochs: int = 60
    batch: int = 16
    lr: float = 2e-3
    """The highest learning rate of the schedule."""
    warmup: float = 0.07
    """Fraction of each stage in which the learning rate rises linearly."""
    start: float = 0.0
    """Fraction of the schedule that is skipped at its beginning."""
    track: int = 0
    """Learning rate tracking (KRP paper, figure 4): the rates are those of the last `epochs` of a
    run of this many epochs, such as the dense network's; 0: of the own schedule."""
    steps: tuple[float, ...] = ()
    """Fractions of each stage after which the rate is divided by ten (KRP paper, figure 11(a)).
    Without them it falls as a cosine."""
    stages: int = 1
    """How many times the rate restarts: warm-up, then a cosine (KGRC paper, section VI-A)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    distill: float = 0.5
    """Weight of the distillation loss, if there is a teacher."""
    temperature: float = 2.0
    average: float = 0.0
    """Decay of an exponential moving average of the weights, which is then the result; 0: none.

    It warms up: after t steps the decay is at most (1 + t) / (10 + t), so that the initial weights
    are forgotten in a short run too. The trained weights are kept in trained.safetensors."""
    seed: int = 0
    channels_last: bool = True
    mixed_precision: bool = False
    """torch.autocast to bfloat16; faster only on GPUs and processors with bfloat16 units."""
    measure_every: int = 1
    """Epochs between two measurements on the test clips; the last epoch is always measured."""
    augment: Augmentation = Augmentation()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "stages", "measure_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} has to be 1 or more")
        for name in ("warmup", "start", "label_smoothing", "average", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; accepted is 0 to below 1")
        if list(self.steps) != sorted(self.steps) or not all(0 < step < 1 for step in self.steps):
            raise ConfigError(f"steps = {list(self.steps)}; accepted are rising numbers in 0 to 1")
        if self.track and (self.start or self.track < self.epochs):
            raise ConfigError(
                f"track = {self.track}, start = {self.start}, epochs = {self.epochs}; a tracked "
                f"run has at least as many epochs, and track replaces start"
            )
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill = {self.distill}; accepted is 0 to 1")
        if not (self.lr > 0 and self.temperature > 0 and self.weight_decay >= 0):
            raise ConfigError("lr and temperature have to be above 0, weight_decay 0 or more")


def read_config(path: str | Path, kind: type[T]) -> T:
    """Settings from a TOML file with the fields of `kind`; missing fields keep their defaults.

    Raises:
        ConfigError: no such file, no TOML, an unknown field, a value of another type or range.
    """
    try:
        return msgspec.toml.decode(Path(path).read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def average_decay(average: float, steps: int) -> float:
    """The decay of the running average after `steps` steps (as TensorFlow's `num_updates`)."""
    return min(average, (1 + steps) / (10 + steps))


def write_config(config: TrainConfig, path: Path) -> None:
    """The TOML file that `read_config` reads."""
    with written_beside(path) as beside:
        beside.write_bytes(msgspec.toml.encode(config))


class Bar(Protocol):
    """A progress bar: yields the items it is given and shows how many are done."""

    def __call__(self, items: Iterable[T], text: str, total: int) -> Iterable[T]: ...


def no_bar(items: Iterable[T], text: str, total: int) -> Iterator[T]:
    """A progress bar that shows nothing."""
    yield from items


class Penalty(Protocol):
    """A term that a pruning or quantization algorithm adds to the loss, and its state."""

    def loss(self) -> Tensor:
        """The term, added to the loss of every batch."""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before epoch `epoch` (from 0) of `epochs`."""

    def settled(self) -> bool:
        """Whether training may end before its last epoch; asked after each epoch."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint has to hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class EpochRecord(msgspec.Struct, frozen=True):
    """One epoch: a line of the log."""

    epoch: int
    lr: float
    loss: float
    penalty: float
    train_top1: float
    """On the augmented clips, while the weights changed."""
    test_top1: float | None
    seconds: float


def learning_rate(config: TrainConfig, done: float) -> float:
    """The rate after the fraction `done` of a run.

    In each stage it rises linearly, then falls as a cosine or in steps.
    """
    start = 1 - config.epochs / config.track if config.track else config.start
    place = start + (1 - start) * done
    within = place * config.stages % 1 if place < 1 else 1.0
    if within < config.warmup:
        return config.lr * within / config.warmup
    if config.steps:
        return config.lr * 0.1 ** sum(within >= step for step in config.steps)
    fall = (within - config.warmup) / (1 - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * fall))


def train(
    module: nn.Module,
    clips: Clips,
    test: Clips,
    spec: ClipSpec,
    config: TrainConfig,
    folder: Path,
    penalty: Penalty | None = None,
    teacher: nn.Module | None = None,
    bar: Bar = no_bar,
    watch: Callable[[EpochRecord], None] = lambda record: None,
    share: tuple[int, int] = (0, 1),
    note: str = "",
    pruned: Pruned | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> list[EpochRecord]:
    """Train a network in place. Pruned weights stay zero; other zeros learn.

    A checkpoint is written after every epoch, atomically. If the folder holds one, the run resumes
    after it, and ends with the same weights, bit for bit, as a run that was never stopped.

    Args:
        module: a network that takes clips of `spec`; training runs on its device.
        clips: training clips, decoded at `wide_spec(spec)`.
        test: test clips, decoded at `spec`: measured, never trained on.
        spec: the clip that the network takes.
        config: written to config.toml in `folder`.
        folder: for this run alone: checkpoint.pt, log.csv, config.toml, and trained.safetensors
            if the result is a running average.
        penalty: term of a pruning or quantization algorithm.
        teacher: network whose logits are distilled.
        bar: shows progress over the batches of an epoch.
        watch: called with the record of each epoch.
        share: rank and number of processes, as torchrun sets them.
        note: anything else the run depends on; a checkpoint with another note is refused.
        pruned: what pruning set to zero; nothing by default.
        say: receives messages: what is pruned, and where a run resumes.

    Raises:
        ConfigError: fewer clips than a batch, a label beyond the network's classes, or a mask that
            does not fit the network.
        ModelError: the folder holds a damaged checkpoint, or one of another run or network, or
            cannot be written; the loss is not finite.
    """
    if len(clips) < config.batch:
        raise ConfigError(f"{len(clips)} clips do not fill a batch of {config.batch}")
    masks = Masks(module, pruned or {})
    run = _Run(module, clips, test, spec, config, penalty, teacher, share, note, masks)
    chief = share[0] == 0
    if chief:
        for stale in folder.glob(f".{CHECKPOINT}.*"):  # of a process that was killed in writing
            stale.unlink(missing_ok=True)
    records = run.resume(folder / CHECKPOINT)
    say(f"{folder}: {list_pruned(masks.zeros)}")
    if run.finished:
        return records
    if records:
        say(f"{folder}: resumes after epoch {len(records)} of {config.epochs}")
    if chief:
        with _written(folder):
            write_config(config, folder / CONFIG)
            _write_log(folder / LOG, records)
    for epoch in range(len(records), config.epochs):
        begun = time.perf_counter()
        learned = run.epoch(epoch, bar)
        settled = penalty is not None and penalty.settled()
        last = settled or epoch == config.epochs - 1
        if last:
            with _written(folder):
                run.finish(folder / TRAINED if chief else None)
        measured = last or (epoch + 1) % config.measure_every == 0
        top1 = measure_top1(run.result, test, spec) if measured and chief else None
        record = EpochRecord(epoch, *learned, top1, round(time.perf_counter() - begun, 2))
        records.append(record)
        if chief:
            with _written(folder):
                run.save(folder / CHECKPOINT, records, last)
                _write_log(folder / LOG, records)
            watch(record)
        if settled:
            say(f"{folder}: settled after epoch {epoch + 1} of {config.epochs}")
            break
    return records


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk or a folder without permission into a ModelError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise ModelError(
            f"{folder} cannot be written ({error}); what it held before is unchanged, and the same "
            f"command goes on from there"
        ) from error


@dataclass(frozen=True)
class TrainingSetup:
    """What all training runs of a command share: clips, progress display, processes."""

    clips: Clips
    """Training clips, decoded at `wide_spec(spec)`."""
    test: Clips
    """Test clips, decoded at `spec`."""
    spec: ClipSpec
    bar: Bar = no_bar
    watch: Callable[[EpochRecord], None] = field(default=lambda record: None)
    share: tuple[int, int] = (0, 1)
    """Rank and number of processes."""
    say: Callable[[str], None] = field(default=lambda message: None)
    """Receives messages: what is pruned, and where a run resumes."""

    def train(
        self,
        module: nn.Module,
        config: TrainConfig,
        folder: Path,
        penalty: Penalty | None = None,
        teacher: nn.Module | None = None,
        note: str = "",
        pruned: Pruned | None = None,
    ) -> list[EpochRecord]:
        """As the function `train`, on these clips."""
        return train(
            module,
            self.clips,
            self.test,
            self.spec,
            config,
            folder,
            penalty,
            teacher,
            self.bar,
            self.watch,
            self.share,
            note,
            pruned,
            self.say,
        )


class _Run:
    """The state of a training run: network, optimizer, masks, average."""

    def __init__(
        self,
        module: nn.Module,
        clips: Clips,
        test: Clips,
        spec: ClipSpec,
        config: TrainConfig,
        penalty: Penalty | None,
        teacher: nn.Module | None,
        share: tuple[int, int],
        note: str,
        masks: Masks,
    ) -> None:
        self.clips, self.spec, self.config, self.share = clips, spec, config, share
        self.masks = masks
        self.masks.apply()
        self.identity = {
            "mask of pruned weights": _digest(masks.zeros),
            "network and its first weights": _digest(module.state_dict()),
            "config": msgspec.to_builtins(config),
            "clip": asdict(spec),
            "clips": clips.identity,
            "test clips": test.identity,
            "penalty": type(penalty).__name__,
            "teacher": _digest(teacher.state_dict()) if teacher is not None else None,
            "number of processes": share[1],
            "note": note,
        }
        self.labels = 1 + int(max(clips.labels.max(), test.labels.max()))
        self.penalty, self.teacher = penalty, teacher
        self.finished = False
        """Whether the checkpoint that was resumed is that of the last epoch."""
        self.unwrapped = module
        self.device = next(module.parameters()).device
        if config.channels_last:
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.optimizer = _optimizer(module, config)
        self.masks.apply_after(self.optimizer)
        self.average = (
            torch.optim.swa_utils.AveragedModel(
                module, multi_avg_fn=partial(_move_average, config.average), use_buffers=True
            )
            if config.average
            else None
        )
        self.module: nn.Module = (
            nn.parallel.DistributedDataParallel(module) if share[1] > 1 else module
        )

    @property
    def result(self) -> nn.Module:
        """The network whose weights are the result: the moving average, if there is one."""
        averaged = self.average
        return self.unwrapped if averaged is None else averaged.module

    def epoch(self, epoch: int, bar: Bar) -> tuple[float, float, float, float]:
        """Train on every clip once. Returns the last rate, mean loss, mean penalty, top-1."""
        config = self.config
        # each epoch has a seed of its own, so that a resumed run draws the same numbers
        seed = int.from_bytes(hashlib.sha256(f"{config.seed},{epoch}".encode()).digest()[:7], "big")
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        if self.penalty is not None:
            self.penalty.start_epoch(epoch, config.epochs)
        self.module.train()
        batches = varied_batches(
            self.clips, self.spec, config.augment, config.batch, generator, self.share
        )
        steps = len(self.clips) // config.batch
        losses, penalties, right, seen, rate = 0.0, 0.0, 0, 0, 0.0
        for step, (values, labels) in enumerate(bar(batches, f"epoch {epoch + 1}", steps)):
            rate = learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, added, hits = self._step(values, labels)
            losses += loss
            penalties += added
            right += hits
            seen += len(labels)
        if not math.isfinite(losses):
            raise ModelError(f"epoch {epoch + 1}: the loss is not finite; use a lower lr")
        return rate, losses / steps, penalties / steps, right / seen

    def _step(self, values: Tensor, labels: Tensor) -> tuple[float, float, int]:
        values, labels = values.to(self.device), labels.to(self.device)
        if self.config.channels_last:
            values = values.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision):
            logits = self.module(values).flatten(1).float()
            if logits.shape[1] < self.labels:
                raise ConfigError(
                    f"the network has {logits.shape[1]} classes; a clip has the label "
                    f"{self.labels - 1}; accepted are 0 to {logits.shape[1] - 1}"
                )
            loss = self._loss(logits, values, labels)
        added = torch.zeros((), device=self.device) if self.penalty is None else self.penalty.loss()
        self.optimizer.zero_grad()
        (loss + added).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.unwrapped)
        return float(loss.detach()), float(added.detach()), int((logits.argmax(1) == labels).sum())

    def _loss(self, logits: Tensor, values: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if self.teacher is None or config.distill == 0:
            return loss
        self.teacher.eval()
        with torch.no_grad():
            target = self.teacher(values).flatten(1).float() / config.temperature
        distance = F.kl_div(
            F.log_softmax(logits / config.temperature, 1),
            F.log_softmax(target, 1),
            log_target=True,
            reduction="batchmean",
        )
        weight = config.distill
        return (1 - weight) * loss + weight * config.temperature**2 * distance

    def finish(self, path: Path | None) -> None:
        """Copy the moving average, if there is one, into the network; its own weights go to `path`.

        `path` is None in all processes but the first.
        """
        if self.average is not None:
            if path is not None:
                save_weights(self.unwrapped, path, self.masks.zeros)
            self.unwrapped.load_state_dict(self.average.module.state_dict())

    def save(self, path: Path, records: list[EpochRecord], finished: bool) -> None:
        """Write a checkpoint of everything the next epoch depends on, atomically."""
        state = {
            "identity": json.dumps(self.identity),
            "rows": [msgspec.structs.asdict(record) for record in records],
            "finished": finished,
            "module": self.unwrapped.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
        }
        with written_beside(path) as beside:
            torch.save(state, beside)

    def resume(self, path: Path) -> list[EpochRecord]:
        """Load a checkpoint, if there is one. Returns the records of its epochs."""
        if not path.exists():
            return []
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            identity = json.loads(state["identity"])
            records = [EpochRecord(**record) for record in state["rows"]]
        except Exception as error:  # torch, zip and pickle raise different errors
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{path} is no whole checkpoint ({first}); remove it to start over"
            ) from error
        # a setting that did not exist when the checkpoint was written had its default
        identity["config"] = msgspec.to_builtins(TrainConfig()) | identity["config"]
        self.finished = bool(state.get("finished", len(records) == self.config.epochs))
        identity = json.loads(json.dumps(identity))
        own = json.loads(json.dumps(self.identity))
        if identity != own:
            raise ModelError(
                f"{path} belongs to another run: {_difference(identity, own)}; "
                f"use another folder, or remove it to start over"
            )
        self.unwrapped.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.penalty is not None:
            self.penalty.load_state_dict(state["penalty"])
        return records


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of named tensors: names, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in tensors.items():
        found.update(f"{name}{list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first difference of two identities, in words."""
    pairs = [(theirs.get("config") or {}, ours["config"]), (theirs, ours)]
    for before, now in reversed(pairs):
        for key in now:
            if key != "config" and before.get(key) != now[key]:
                return f"its {key} is {before.get(key)!r}, not {now[key]!r}"
    return "its settings differ"


def _move_average(
    average: float, averaged: list[Tensor], current: list[Tensor], steps: Tensor
) -> None:
    """One step of the running average, in place; integers are copied."""
    with torch.no_grad():
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - average_decay(average, int(steps)))
            return
        for ours, now in zip(averaged, current, strict=True):
            ours.copy_(now)


def _optimizer(module: nn.Module, config: TrainConfig) -> Optimizer:
    """Weight decay applies to weights, not to biases or the scales of batch norm."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr)


def _write_log(path: Path, records: list[EpochRecord]) -> None:
    with written_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(EpochRecord.__struct_fields__)
        writer.writerows(msgspec.structs.astuple(record) for record in records)


def predict(module: nn.Module, clips: Clips, spec: ClipSpec, batch: int = 32) -> Tensor:
    """Logits [clips, classes] of clips decoded at `spec`, in evaluation mode."""
    device = next(module.parameters()).device
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            parts = [
                module(values.to(device)).flatten(1).cpu()
                for values, _ in plain_batches(clips, spec, batch)
            ]
    finally:
        module.train(training)
    return torch.cat(parts)


def measure_top1(module: nn.Module, clips: Clips, spec: ClipSpec) -> float:
    """The fraction of clips whose best label is right."""
    return measure_top(module, clips, spec, (1,))[0]


def measure_top(
    module: nn.Module, clips: Clips, spec: ClipSpec, counts: Sequence[int]
) -> tuple[float, ...]:
    """For each k of `counts`, the fraction of clips whose label is among the best k."""
    order = (-predict(module, clips, spec)).argsort(dim=1, stable=True).numpy()
    right = order == clips.labels[:, None]
    return tuple(float(right[:, :k].any(axis=1).mean()) for k in counts)


def join_processes(device: str) -> tuple[int, int]:
    """Rank and number of processes; under torchrun, the process group is set up here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def to_device(module: nn.Module, device: str) -> None:
    """Move a network to a device in place; "cuda" under torchrun is this process's own GPU.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        module.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} is not there ({error}); use cpu") from error
