"""Training that can be killed: epochs, schedules, penalties, checkpoints, and the log of it all."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from pynq_kgrc.compress.augment import Augmentation, plain_batches, varied_batches
from pynq_kgrc.compress.dataset import Clips
from pynq_kgrc.compress.masks import Masks
from pynq_kgrc.errors import ConfigError, ModelError
from pynq_kgrc.graph import ClipSpec
from pynq_kgrc.storage import written_beside

T = TypeVar("T")

CHECKPOINT = "checkpoint.pt"
LOG = "log.csv"
CONFIG = "config.toml"


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a training run depends on but the data, the network and the penalty."""

    epochs: int = 60
    batch: int = 16
    lr: float = 2e-3
    """At its highest."""
    warmup: float = 0.07
    """Fraction of all steps in which the rate rises."""
    start: float = 0.0
    """Fraction of the schedule that is left out at its beginning (KRP's LR tracking)."""
    stages: int = 1
    """Times the rate starts over: rises, and falls along a cosine (KGRC, section VI-A)."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    distill: float = 0.5
    """Weight of the teacher's opinion, where there is a teacher."""
    temperature: float = 2.0
    average: float = 0.0
    """Decay of a running average of the weights that is kept instead of them; 0 keeps none."""
    seed: int = 0
    channels_last: bool = True
    mixed_precision: bool = False
    """bfloat16 where torch says it is safe; pays on GPUs and processors with bfloat16 units."""
    measure_every: int = 1
    """Epochs from one measurement on the test clips to the next; the last is always measured."""
    augment: Augmentation = Augmentation()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "stages", "measure_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} has to be 1 or more")
        for name in ("warmup", "start", "label_smoothing", "average", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}; accepted is 0 to below 1")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill = {self.distill}; accepted is 0 to 1")
        if not (self.lr > 0 and self.temperature > 0 and self.weight_decay >= 0):
            raise ConfigError("lr and temperature have to be above 0, weight_decay 0 or more")


def read_config(path: str | Path, kind: type[T]) -> T:
    """Settings from a TOML file of the fields of `kind`; what it leaves out keeps its default.

    Raises:
        ConfigError: no such file, no TOML, a field that is unknown, of another type or range.
    """
    try:
        return msgspec.toml.decode(Path(path).read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def write_config(config: TrainConfig, path: Path) -> None:
    """The TOML file that `read_config` reads."""
    with written_beside(path) as beside:
        beside.write_bytes(msgspec.toml.encode(config))


class Bar(Protocol):
    """Passes on what it is given, and shows how far it is."""

    def __call__(self, items: Iterable[T], text: str, total: int) -> Iterable[T]: ...


def no_bar(items: Iterable[T], text: str, total: int) -> Iterator[T]:
    """Shows nothing."""
    yield from items


class Penalty(Protocol):
    """What pruning and quantization algorithms add to training."""

    def loss(self) -> Tensor:
        """Added to the loss of every batch."""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken."""


class Row(msgspec.Struct, frozen=True):
    """One epoch in the log."""

    epoch: int
    lr: float
    loss: float
    penalty: float
    train_top1: float
    """On varied clips, while the weights changed."""
    test_top1: float | None
    seconds: float


def learning_rate(config: TrainConfig, done: float) -> float:
    """The rate after the fraction `done` of a run: linear warm-up, then a cosine, in each stage."""
    place = config.start + (1 - config.start) * done
    within = place * config.stages % 1 if place < 1 else 1.0
    if within < config.warmup:
        return config.lr * within / config.warmup
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
    watch: Callable[[Row], None] = lambda row: None,
    share: tuple[int, int] = (0, 1),
    note: str = "",
) -> list[Row]:
    """Train in place. Weights that are zero at the start stay zero.

    After every epoch a checkpoint is written beside its place and renamed. A run that finds one in
    its folder goes on behind it, and ends with the same bits as one that was never stopped.

    Args:
        module: a network for clips as `spec` says; its device is where the work is done.
        clips: to learn from, decoded at `wide_spec(spec)`.
        test: measured now and then, decoded at `spec`; never learned from.
        spec: what the network looks at.
        config: kept as config.toml in `folder`.
        folder: of this run alone: checkpoint.pt, log.csv, config.toml.
        penalty: a pruning or quantization algorithm at work.
        teacher: a network whose opinion counts (distillation).
        bar: shows progress over the batches of an epoch.
        watch: sees each row of the log.
        share: rank and number of processes under torchrun.
        note: what else the run depends on; a checkpoint with another note is another run's.

    Raises:
        ConfigError: fewer clips than a batch.
        ModelError: the folder holds the checkpoint of another run or network, or a damaged one; a
            loss that is no number.
    """
    if len(clips) < config.batch:
        raise ConfigError(f"{len(clips)} clips do not fill a batch of {config.batch}")
    run = _Run(module, clips, spec, config, penalty, teacher, share, note)
    rows = run.resume(folder / CHECKPOINT)
    chief = share[0] == 0
    if chief:
        write_config(config, folder / CONFIG)
        _write_log(folder / LOG, rows)
    for epoch in range(len(rows), config.epochs):
        begun = time.perf_counter()
        learned = run.epoch(epoch, bar)
        last = epoch == config.epochs - 1
        if last:
            run.finish()
        measured = last or (epoch + 1) % config.measure_every == 0
        top1 = measure_top1(run.measured, test, spec) if measured and chief else None
        row = Row(epoch, *learned, top1, round(time.perf_counter() - begun, 2))
        rows.append(row)
        if chief:
            run.save(folder / CHECKPOINT, rows)
            _write_log(folder / LOG, rows)
            watch(row)
    return rows


class _Run:
    """What changes while a network is trained."""

    def __init__(
        self,
        module: nn.Module,
        clips: Clips,
        spec: ClipSpec,
        config: TrainConfig,
        penalty: Penalty | None,
        teacher: nn.Module | None,
        share: tuple[int, int],
        note: str,
    ) -> None:
        self.clips, self.spec, self.config, self.share = clips, spec, config, share
        self.identity = _identity(module, clips, config, penalty, teacher, note)
        self.penalty, self.teacher = penalty, teacher
        self.plain = module
        self.device = next(module.parameters()).device
        if config.channels_last:
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.optimizer = _optimizer(module, config)
        self.masks = Masks(module)
        self.masks.hold(self.optimizer)
        self.average = (
            torch.optim.swa_utils.AveragedModel(
                module,
                multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(  # type: ignore[no-untyped-call]
                    config.average
                ),
                use_buffers=True,
            )
            if config.average
            else None
        )
        self.module: nn.Module = (
            nn.parallel.DistributedDataParallel(module) if share[1] > 1 else module
        )

    @property
    def measured(self) -> nn.Module:
        """The weights that count: the running average where one is kept."""
        averaged = self.average
        return self.plain if averaged is None else averaged.module

    def epoch(self, epoch: int, bar: Bar) -> tuple[float, float, float, float]:
        """Learn from every clip once: the last rate, mean loss and penalty, top-1."""
        config = self.config
        # the seed of an epoch is its own, so that a resumed run draws what it would have drawn
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
            raise ModelError(f"epoch {epoch + 1}: the loss is no number; use a lower lr")
        return rate, losses / steps, penalties / steps, right / seen

    def _step(self, values: Tensor, labels: Tensor) -> tuple[float, float, int]:
        values, labels = values.to(self.device), labels.to(self.device)
        if self.config.channels_last:
            values = values.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision):
            logits = self.module(values).flatten(1).float()
            loss = self._loss(logits, values, labels)
        added = torch.zeros((), device=self.device) if self.penalty is None else self.penalty.loss()
        self.optimizer.zero_grad()
        (loss + added).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.plain)
        return float(loss.detach()), float(added.detach()), int((logits.argmax(1) == labels).sum())

    def _loss(self, logits: Tensor, values: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if self.teacher is None or config.distill == 0:
            return loss
        self.teacher.eval()
        with torch.no_grad():
            opinion = self.teacher(values).flatten(1).float() / config.temperature
        distance = F.kl_div(
            F.log_softmax(logits / config.temperature, 1),
            F.log_softmax(opinion, 1),
            log_target=True,
            reduction="batchmean",
        )
        weight = config.distill
        return (1 - weight) * loss + weight * config.temperature**2 * distance

    def finish(self) -> None:
        """Leave the weights that count in the network that was given."""
        if self.average is not None:
            self.plain.load_state_dict(self.average.module.state_dict())

    def save(self, path: Path, rows: list[Row]) -> None:
        """Everything that the next epoch depends on, written beside its place and renamed."""
        state = {
            "identity": self.identity,
            "rows": [msgspec.structs.asdict(row) for row in rows],
            "module": self.plain.state_dict(),
            "zeros": self.masks.zeros,
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
        }
        with written_beside(path) as beside:
            torch.save(state, beside)

    def resume(self, path: Path) -> list[Row]:
        """Take up a checkpoint; the rows of its log, none if there is no checkpoint."""
        if not path.exists():
            return []
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            identity, rows = state["identity"], [Row(**row) for row in state["rows"]]
        except Exception as error:  # torch, zip and pickle each have errors of their own
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{path} is no whole checkpoint ({first}); remove it to start over"
            ) from error
        if identity != self.identity:
            raise ModelError(
                f"{path} belongs to another run: {_difference(identity, self.identity)}; "
                f"use another folder, or remove it to start over"
            )
        self.plain.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.masks.zeros = state["zeros"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.penalty is not None:
            self.penalty.load_state_dict(state["penalty"])
        return rows


def _identity(
    module: nn.Module,
    clips: Clips,
    config: TrainConfig,
    penalty: Penalty | None,
    teacher: nn.Module | None,
    note: str,
) -> str:
    """What has to be equal for a run to go on: where it started from included."""
    start = hashlib.sha256()
    for name, value in module.state_dict().items():
        start.update(f"{name}{list(value.shape)}".encode())
        start.update(value.detach().cpu().contiguous().numpy().tobytes())
    return json.dumps(
        {
            "network and its first weights": start.hexdigest()[:16],
            "config": msgspec.to_builtins(config),
            "clips": hashlib.sha256(clips.labels.tobytes()).hexdigest()[:16],
            "penalty": type(penalty).__name__,
            "teacher": teacher is not None,
            "note": note,
        }
    )


def _difference(theirs: str, ours: str) -> str:
    """The first thing in which two identities differ."""
    one, other = json.loads(theirs), json.loads(ours)
    config_one, config_other = one.pop("config"), other.pop("config")
    for before, now in ((one, other), (config_one, config_other)):
        for key in now:
            if before.get(key) != now[key]:
                return f"its {key} is {before.get(key)!r}, not {now[key]!r}"
    return "its settings differ"


def _optimizer(module: nn.Module, config: TrainConfig) -> Optimizer:
    """Weights decay; biases and the gains of batch norm do not."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr)


def _write_log(path: Path, rows: list[Row]) -> None:
    with written_beside(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row.__struct_fields__)
        writer.writerows(msgspec.structs.astuple(row) for row in rows)


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
    """The fraction of clips whose first label is right."""
    found = predict(module, clips, spec).argmax(1).numpy()
    return float(np.mean(found == clips.labels))
