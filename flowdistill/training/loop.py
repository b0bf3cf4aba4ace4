"""Step by step: gradients, what is done about those that are not finite, and what is left behind."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowdistill import artifact, randomness
from flowdistill.errors import Diverged, UsageError
from flowdistill.sources import Draws
from flowdistill.timesteps import sorted_by_time
from flowdistill.training import averages, records, sharding
from flowdistill.training.batches import nothing_measured, parts
from flowdistill.training.state import State
from flowdistill.work import Cost, Done, Progress

if TYPE_CHECKING:
    from flowdistill.optimization import Optimizer
    from flowdistill.sources import Source
    from flowdistill.stages import Training
    from flowdistill.teachers import Card
    from flowdistill.work import Work

CHECKPOINT = "checkpoints/last.safetensors"
LOG = "log.jsonl"
MODEL = "model.safetensors"
TENSORBOARD = "tensorboard"
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_TRIAL_S = 3.0


def fit(stage: Training, work: Work) -> Done:
    """Train `stage`'s student and write `model.safetensors`, the average of its weights.

    Raises `Diverged` when a loss or gradient is not finite and the recipe does not say to go on (no state is
    written from that step on), and `Interrupted` after a signal, with the state saved.
    """
    return _Trainer(stage, work).run()


def rehearse(stage: Training, work: Work) -> Cost:
    """Steps on made-up samples, timed, and what the whole training comes to; nothing is written."""
    trainer = _Trainer(stage, work, rehearsal=True)
    trainer.update()  # the first is slower: memory is laid out, kernels are chosen
    done, started = 0, time.monotonic()
    while not done or time.monotonic() - started < _TRIAL_S:
        trainer.update()
        done += 1
    per_second = done / (time.monotonic() - started)
    return Cost(stage.steps, "step", per_second, stage.steps / per_second, trainer.size_bytes())


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


class _MadeUp:
    """Noise in the shape of data."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def batch(self, draw: Draws) -> tuple[Tensor, Tensor, Tensor | None]:
        x0, eps = (draw.normal(purpose, self.card.shape) for purpose in ("data", "noise"))
        labels = draw.numbers % self.card.classes if self.card.classes else None
        return x0, eps, labels


class _Trainer:
    """One training: its network, state and surroundings."""

    def __init__(self, stage: Training, work: Work, rehearsal: bool = False) -> None:
        self.stage, self.work = stage, work
        self.accelerator = _accelerator(stage, work)
        self.student = stage.new_student(work)
        card = self.student.card
        source: Source = _MadeUp(card) if rehearsal else stage.source(work, card)
        if stage.previews:
            records.check_drawable(self.student, work.stage)
        self.perceptual = stage.perceptual(work, card)
        network = self._prepared(self.student.network)
        if not stage.sharded:  # else the device gets its part only
            for each in (network, self.plain):
                each.to(self.accelerator.device)
        rules = averages.chosen(stage.ema, stage.post_hoc, MODEL)
        self.state = State(network, make_optimizer(stage.optimizer, network), rules)
        self.parts = parts(stage, work, source, card, self.perceptual, self.accelerator)
        self.network = self.accelerator.prepare_model(network, evaluation_mode=stage.sharded)
        self.optimizer = self.accelerator.prepare_optimizer(self.state.optimizer)
        self.key = artifact.digest([dict(work.settings), dict(work.parents), work.seed])
        self.path = work.folder / CHECKPOINT

    def _prepared(self, network: nn.Module) -> nn.Module:
        """The network in the place and order in which it is trained."""
        network.train()
        if self.stage.channels_last:
            if len(self.student.card.shape) != 3:
                shape = list(self.student.card.shape)
                raise UsageError(f"{self.work.stage}.channels_last: expected images, found shape {shape}")
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        special = self.stage.sharded or self.stage.compile
        self.plain = copy.deepcopy(network) if special else network
        """The network without what is done to it for size and speed, for pictures and the end."""
        if self.stage.sharded:
            sharding.shard(network, self.accelerator, self.work.stage)
        if self.stage.compile:
            network.compile()
        return network

    # --- the course of it -------------------------------------------------------------------------

    def run(self) -> Done:
        stage, state = self.stage, self.state
        artifact.create_folder(self.path.parent)
        if self.path.exists():
            self._load()
        elif stage.non_finite.policy == "roll-back":
            self._save()
        self.log = records.Log(self.work.folder / LOG, state.step)
        if stage.trackers:
            self.accelerator.init_trackers(TENSORBOARD)
        started, first = time.monotonic(), state.step
        while state.step < stage.steps:
            terms, by_time = self.update()
            if not self._counts(terms, by_time):
                continue
            if state.step % stage.log_every == 0 or state.step == stage.steps:
                self._log()
            self._show()
            per_second = (state.step - first) * stage.batch_size / (time.monotonic() - started)
            shown = {"loss": terms["loss"], "images/s": per_second}
            self.work.report(Progress(state.step, stage.steps, "step", shown))
            self._agree()
            if self.work.stop.signum or state.step % stage.checkpoint_every == 0 or state.step == stage.steps:
                self._save()
            self.work.stop.check()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self._finish(time.monotonic() - started, state.step - first)

    def update(self) -> tuple[dict[str, float], Tensor]:
        """One optimizer step, unless its gradient is not finite.

        Returns the means of the loss and its terms over all processes, and the loss by t. Gradients add up
        over the parts of the batch, and processes exchange them at the last.
        """
        stage, state = self.stage, self.state
        rate = stage.optimizer.lr_at(state.step, stage.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        purpose = (self.work.seed, "dropout", state.draws, self.accelerator.process_index)
        torch.manual_seed(randomness.key(*purpose))
        means: dict[str, Tensor] = {}
        by_time = nothing_measured().to(self.accelerator.device, torch.float32)
        for number, batch in enumerate(self.parts(state), start=1):
            with self._alone(number < stage.accumulate):
                loss, terms = stage.per_sample(self.network, batch)
                self.accelerator.backward(loss.mean() / stage.accumulate)
            found = {"loss": loss, **terms}
            t = found.pop("t", None)
            if t is not None:
                by_time += sorted_by_time(t.float(), loss.detach().float())
            for name, values in found.items():
                means[name] = means.get(name, 0) + values.detach().float().mean() / stage.accumulate
        clip = stage.optimizer.clip or math.inf
        norm = sharding.whole(self.accelerator.clip_grad_norm_(self.network.parameters(), clip))
        together = torch.cat([torch.stack(list(means.values())), by_time.flatten()])
        world = self.accelerator.num_processes
        summed = self.accelerator.reduce(together, "sum").cpu().double()
        shared = (summed[: len(means)] / world).tolist()
        shown = dict(zip(means, shared, strict=True)) | {"grad_norm": float(norm.detach())}
        if self._finite(shown):
            self.optimizer.step()
        elif self.accelerator.scaler:
            self.accelerator.scaler.update()  # it has unscaled this gradient, and waits for its end
        self.optimizer.zero_grad(set_to_none=True)
        return shown, summed[len(means) :].reshape(by_time.shape)

    def _alone(self, alone: bool) -> AbstractContextManager[Any]:
        """Gradients stay with this process, as long as more of the batch is to come."""
        if not alone:
            return nullcontext()
        if self.stage.sharded:
            return sharding.unsynchronised(self.state.network)
        context: AbstractContextManager[Any] = self.accelerator.no_sync(self.network)
        return context

    # --- what is not finite -----------------------------------------------------------------------

    def _finite(self, terms: Mapping[str, float]) -> bool:
        # A loss scaler meets infinite gradients by design, and leaves out the step itself.
        judged = ("loss",) if self.accelerator.scaler else ("loss", "grad_norm")
        return all(math.isfinite(terms[name]) for name in judged)

    def _counts(self, terms: Mapping[str, float], by_time: Tensor) -> bool:
        """Count a step; False where the training was rolled back instead. Raises `Diverged`."""
        state, settings = self.state, self.stage.non_finite
        if self._finite(terms):
            scaled_away = not math.isfinite(terms["grad_norm"])
            state.advance({} if scaled_away else terms, nothing_measured() if scaled_away else by_time)
            return True
        state.setbacks += 1
        if settings.policy == "abort" or state.setbacks > settings.limit:
            often = "" if settings.policy == "abort" else f" ({state.setbacks} times by now)"
            raise Diverged(
                f"training diverged at step {state.step}{often}: loss {terms['loss']}, gradient norm "
                f"{terms['grad_norm']}; lower optimizer.lr or set optimizer.clip "
                "(the last checkpoint is intact)"
            )
        if settings.policy == "skip":
            state.step += 1
            return True
        self._roll_back()
        return False

    def _roll_back(self) -> None:
        """To the last checkpoint, and past all batches that were drawn since."""
        setbacks, drawn = self.state.setbacks, self.state.draws + 1
        self._load()
        self.state.setbacks, self.state.skipped = setbacks, drawn - self.state.step
        self.log = records.Log(self.work.folder / LOG, self.state.step)
        self._save()

    # --- what is left behind ----------------------------------------------------------------------

    def _load(self) -> None:
        scaler = self.state.load(self.path, self.key)
        if scaler:
            self.accelerator.scaler.load_state_dict(scaler)

    def _save(self) -> None:
        main = self.accelerator.is_main_process
        if main and self.state.step:
            self.log.save()
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
        self.state.save(self.path, self.key, scaler, write=main)

    def _log(self) -> None:
        step = self.state.step
        figures, by_time = self.state.window.take()
        shown = {**figures, "lr": self.stage.optimizer.lr_at(step - 1, self.stage.steps)}
        self.log.add(step, {**shown, "loss_by_t": by_time} if by_time else shown)
        if self.stage.trackers:
            self.accelerator.log(shown, step=step)

    def _show(self) -> None:
        """The picture and the averages that are due at this step."""
        stage, step = self.stage, self.state.step
        kept, previews = stage.post_hoc, stage.previews
        last = step == stage.steps
        if previews and (step % previews.every == 0 or last):
            weights = self._average(0)
            if self.accelerator.is_main_process:
                picture = records.preview(self.student, self.plain, weights, previews, self.work.seed)
                self._write(f"{records.PREVIEWS}/{step:08d}.png", picture)
        if kept and (step % kept.every == 0 or last):
            for number, rule in enumerate(self.state.rules):
                if rule.std is not None:
                    self._keep(number, step, rule.std)

    def _keep(self, number: int, step: int, std: float) -> None:
        weights = self._average(number)
        if self.accelerator.is_main_process:
            path = self.work.folder / averages.snapshot_file(step, std)
            artifact.create_folder(path.parent)
            dtype = getattr(torch, self.stage.weights)
            names = replace(self.student, network=self.plain).weights.state_dict()
            kept = {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in zip(names, weights.values(), strict=True)
            }
            artifact.save_tensors(path, kept, {"kind": "average", "step": step, "std": std})

    def _write(self, name: str, content: bytes) -> None:
        path = self.work.folder / name
        artifact.create_folder(path.parent)
        artifact.atomic_write(path, content)

    def _average(self, number: int) -> dict[str, Tensor]:
        """All weights of an average; all processes have to ask together."""
        return {name: sharding.whole(value) for name, value in self.state.averages[number].items()}

    def _agree(self) -> None:
        """A signal to one process is one to all: they have to stop behind the same step."""
        stop = self.work.stop
        if self.accelerator.num_processes > 1:
            stop.signum = self.work.world.largest(stop.signum, self.accelerator.device)

    def _finish(self, seconds: float, steps: int) -> Done:
        stage, state, figures = self.stage, self.state, self.log.figures()
        files = {rule.file: self._average(n) for n, rule in enumerate(state.rules) if rule.file}
        if not self.accelerator.is_main_process:
            return Done(self._outputs(), figures)
        measured: dict[str, Any] = {}
        for number, (file, weights) in enumerate(files.items()):
            self.plain.load_state_dict(weights)
            whole = stage.finished(self.plain.eval())
            if number == 0:
                measured = stage.conclude(whole)
                if self.perceptual is not None:
                    measured = {"perceptual_distance": self.perceptual.label, **measured}
            card = self.student.card.model_copy(update={"figures": measured})
            replace(self.student, card=card, network=whole).write(self.work.folder / file, stage.weights)
        size = {
            "parameters": sum(p.numel() for p in whole.parameters()),
            "trained": sum(p.numel() for p in self.plain.parameters() if p.requires_grad),
            "processes": self.work.world.size,
        }
        if size["trained"] == size["parameters"]:
            del size["trained"]
        if state.setbacks:
            size["not_finite"] = state.setbacks
        rates = {"images_per_second": steps * stage.batch_size / seconds, "seconds": seconds}
        return Done(self._outputs(), {**figures, **measured, **size, **rates}, _DTYPES[stage.precision])

    def _outputs(self) -> list[str]:
        """Names of all files that are made, in an order."""
        folder = self.work.folder
        made = [rule.file for rule in self.state.rules if rule.file]
        for name in (records.PREVIEWS, averages.SNAPSHOTS):
            made += sorted(f"{name}/{path.name}" for path in (folder / name).glob("[0-9]*"))
        return [*made, LOG]

    def size_bytes(self) -> int:
        """What the training leaves on the disk, pictures and log apart."""
        stage = self.stage
        weights = sum(value.numel() for value in self.plain.state_dict().values())
        shipped = 2 if stage.weights == "float16" else 4
        rules = self.state.rules
        times = -(-stage.steps // stage.post_hoc.every) if stage.post_hoc else 0
        models = sum(1 if rule.file else times for rule in rules)
        return int(weights * (shipped * models + 4 * (3 + len(rules))))


def _accelerator(stage: Training, work: Work) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if stage.precision == "fp16" and work.device == "cpu":  # accelerate would compute in fp32, and not say so
        raise UsageError(f"{work.stage}.precision: fp16 is for GPUs, this is a CPU; use bf16 or fp32")
    # accelerate keeps one precision for the whole process, but each stage of a recipe has its own.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=work.device == "cpu",
        mixed_precision=_MIXED[stage.precision],
        log_with=list(stage.trackers) or None,
        project_dir=str(work.folder),
    )
