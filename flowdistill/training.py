"""The one training loop, on accelerate.

Everything random in a step is a pure function of (seed, purpose, step), and the position in the data is the
step itself. So the state of a run is: weights, their moving average, the optimizer, the step. A run that is
killed and run again ends in the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowdistill import artifact, randomness
from flowdistill.errors import Diverged, UsageError
from flowdistill.sources import Draws
from flowdistill.teachers import Card, Model
from flowdistill.work import Done, Progress

if TYPE_CHECKING:
    from flowdistill.objectives import Distance, Labelled
    from flowdistill.stages import Ema, Optimizer, Training
    from flowdistill.work import Stop, Work

CHECKPOINT = "checkpoints/last.safetensors"
LOG = "log.jsonl"
MODEL = "model.safetensors"
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Batch:
    """What a loss sees: data x0 and noise eps [B, *shape], labels [B] or None, fresh random numbers.

    The label number `classes` stands for no label.
    """

    x0: Tensor
    eps: Tensor
    labels: Tensor | None
    classes: int
    draw: Draws
    progress: float
    """Share of the training that is done, in [0, 1)."""
    perceptual: Distance | None = None


class State:
    """Weights, moving average, optimizer and step; what a checkpoint holds."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> None:
        self.network = network
        self.optimizer = optimizer
        self.ema = ema
        self.step = 0
        self.window = Window()
        self.average = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights; buffers are copied."""
        rate = 1.0 - self.ema.decay_at(self.step)
        weights = dict(self.network.named_parameters())
        torch._foreach_lerp_([self.average[name] for name in weights], list(weights.values()), rate)
        for name, value in self.network.named_buffers():
            if name in self.average:
                self.average[name].copy_(value)

    def save(self, path: Path, key: str, scaler: dict[str, Any]) -> None:
        """Write all of it; `key` names the run that may continue from it."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        header = {"key": key, "step": self.step, "window": self.window.sums, "scaler": scaler}
        artifact.save_tensors(path, tensors, header)

    def load(self, path: Path, key: str) -> dict[str, Any]:
        """Read what `save` wrote and return the loss scaler's state; another run's file is refused."""
        tensors, header = artifact.load_tensors(path)
        if header["key"] != key:
            raise UsageError(
                f"{path}: this checkpoint belongs to other settings or inputs; "
                "restore the recipe, choose another --out, or start over with --fresh"
            )
        groups: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "optimizer": {}}
        for name, value in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = value
        self.network.load_state_dict(groups["network"])
        for name, value in groups["average"].items():
            self.average[name].copy_(value)
        self.optimizer.load_state_dict(
            self.optimizer.state_dict() | {"state": self._moments(groups["optimizer"])}
        )
        self.step = header["step"]
        self.window = Window(header["window"])
        return dict(header["scaler"])

    def _moments(self, named: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state by parameter, each moment laid out in memory as its parameter is.

        Fused kernels walk parameter and moments in the order of memory and would pair the wrong entries.
        """
        parameters = list(self.network.parameters())
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in named.items():
            index, _, moment = name.partition(".")
            like = parameters[int(index)]
            alike = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            moments.setdefault(int(index), {})[moment] = alike
        return moments


@dataclass
class Window:
    """Running means of the loss terms since the last line of the log."""

    sums: dict[str, float] = field(default_factory=dict)

    def add(self, terms: dict[str, float]) -> None:
        for name, value in {**terms, "count": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Means so far; starts a new window."""
        count = self.sums.pop("count", 1.0)
        means = {name: total / count for name, total in sorted(self.sums.items())}
        self.sums = {}
        return means


class Log:
    """`log.jsonl`: one line for each window, without times, so that equal runs write equal bytes."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.lines = [line for line in lines if _step_of(line) <= step]

    def add(self, step: int, figures: dict[str, float]) -> None:
        self.lines.append(json.dumps({"step": step, **figures}))

    def save(self) -> None:
        artifact.atomic_write(self.path, "".join(f"{line}\n" for line in self.lines).encode())


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def make_optimizer(settings: Optimizer, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the recipe, fused where the device has such a kernel."""
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(
        network.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def fit(stage: Training, work: Work) -> Done:
    """Train `stage`'s student and write `model.safetensors`, the average of its weights.

    Raises `Diverged` when a loss or gradient is not finite (no state is written from that step on) and
    `Interrupted` after a signal, with the state saved.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps one precision for the whole process, but each stage of a recipe has its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=work.device == "cpu", mixed_precision=_MIXED[stage.precision])
    student = stage.student(work)
    perceptual = stage.perceptual(work, student.card)
    network = student.network.to(accelerator.device).train()
    state = State(network, make_optimizer(stage.optimizer, network), stage.ema)
    key = artifact.digest([dict(work.settings), dict(work.parents), work.seed])
    path = work.folder / CHECKPOINT
    artifact.create_folder(path.parent)
    scaler = state.load(path, key) if path.exists() else {}
    wrapped, optimizer = accelerator.prepare(network, state.optimizer)
    if scaler:
        accelerator.scaler.load_state_dict(scaler)
    log = Log(work.folder / LOG, state.step)

    def save() -> None:
        if accelerator.is_main_process:
            log.save()
            state.save(path, key, accelerator.scaler.state_dict() if accelerator.scaler else {})

    started, first, figures = time.monotonic(), state.step, {}
    for parts in _batches(stage, work, student.card, perceptual, accelerator, state.step):
        rate = stage.optimizer.lr_at(state.step, stage.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(randomness.key(work.seed, "dropout", state.step, accelerator.process_index))
        terms = _update(stage, wrapped, optimizer, parts, accelerator)
        state.step += 1
        state.update_average()
        if math.isfinite(terms["grad_norm"]):  # else the loss scaler has skipped the step
            state.window.add(terms)
        if state.step % stage.log_every == 0 or state.step == stage.steps:
            figures = state.window.take()
            log.add(state.step, {**figures, "lr": rate})
        per_second = (state.step - first) * stage.batch_size / (time.monotonic() - started)
        shown = {"loss": terms["loss"], "images/s": per_second}
        work.report(Progress(state.step, stage.steps, "step", shown))
        _agree(work.stop, accelerator)
        if work.stop.signum or state.step % stage.checkpoint_every == 0 or state.step == stage.steps:
            save()
        work.stop.check()
    if not accelerator.is_main_process:
        return Done((MODEL, LOG), figures)
    return _finish(stage, work, student, perceptual, state, figures, started, first)


def _agree(stop: Stop, accelerator: Any) -> None:
    """A signal to one process is one to all: they have to stop behind the same step."""
    if accelerator.num_processes > 1:
        signums = accelerator.gather(torch.tensor([stop.signum], device=accelerator.device))
        stop.signum = int(signums.max())


def _batches(
    stage: Training, work: Work, card: Card, perceptual: Distance | None, accelerator: Any, first: int
) -> Iterator[Iterator[Batch]]:
    """For each remaining step this process's part of the batch, itself in parts."""
    world, rank, pieces = accelerator.num_processes, accelerator.process_index, stage.accumulate
    if stage.batch_size % (world * pieces):
        accumulated = f" with accumulate {pieces}" if pieces > 1 else ""
        raise UsageError(
            f"{work.stage}.batch_size: {stage.batch_size} does not divide by {world} processes{accumulated}"
        )
    size = stage.batch_size // (world * pieces)
    source = stage.source(work)

    def batch(step: int, piece: int) -> Batch:
        start = (rank * pieces + piece) * size
        draw = Draws(work.seed, step, slice(start, start + size), stage.batch_size, accelerator.device)
        x0, eps, labels = source.batch(draw)
        x0, eps = x0.to(draw.device), eps.to(draw.device)
        labels = None if labels is None else labels.to(draw.device)
        return Batch(x0, eps, labels, card.classes, draw, step / stage.steps, perceptual)

    for step in range(first, stage.steps):
        yield (batch(step, piece) for piece in range(pieces))


def _update(
    stage: Training, network: nn.Module, optimizer: Any, parts: Iterable[Batch], accelerator: Any
) -> dict[str, float]:
    """One optimizer step; the means of the loss and its terms over all processes.

    Gradients add up over the parts of the batch, and processes exchange them at the last.
    """
    pieces = stage.accumulate
    means: dict[str, Tensor] = {}
    for number, batch in enumerate(parts, start=1):
        with nullcontext() if number == pieces else accelerator.no_sync(network):
            loss, terms = stage.per_sample(network, batch)
            accelerator.backward(loss.mean() / pieces)
        for name, values in {"loss": loss, **terms}.items():
            means[name] = means.get(name, 0) + values.detach().mean() / pieces
    clip = stage.optimizer.clip or math.inf
    norm = accelerator.clip_grad_norm_(network.parameters(), clip)
    shared = accelerator.reduce(torch.stack(list(means.values())), "mean").tolist()
    shown = dict(zip(means, shared, strict=True))
    shown["grad_norm"] = float(norm)
    # A loss scaler meets infinite gradients by design.
    judged = ("loss",) if accelerator.scaler else ("loss", "grad_norm")
    if not all(math.isfinite(shown[name]) for name in judged):
        raise Diverged(
            f"training diverged at step {batch.draw.step}: loss {shown['loss']}, gradient norm "
            f"{shown['grad_norm']}; lower optimizer.lr or set optimizer.clip (the last checkpoint is intact)"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return shown


def _finish(
    stage: Training,
    work: Work,
    student: Model,
    perceptual: Labelled | None,
    state: State,
    figures: dict[str, float],
    started: float,
    first: int,
) -> Done:
    student.network.load_state_dict(state.average)
    measured = stage.conclude(student.network.eval())
    if perceptual is not None:
        measured = {"perceptual_distance": perceptual.label, **measured}
    finished = replace(student, card=student.card.model_copy(update={"figures": measured}))
    finished.write(work.folder / MODEL, stage.weights)
    seconds = time.monotonic() - started
    rates = {
        "images_per_second": (state.step - first) * stage.batch_size / seconds,
        "seconds": seconds,
    }
    size = {
        "parameters": sum(p.numel() for p in student.network.parameters()),
        "processes": work.world.size,
    }
    return Done((MODEL, LOG), {**figures, **measured, **size, **rates}, _DTYPES[stage.precision])
