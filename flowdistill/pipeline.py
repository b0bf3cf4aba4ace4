"""From a recipe to artifacts: what is done, what is stale and why, and doing the rest in order.

A stage's folder is `OUT/NAME`. `started.json` says what an unfinished stage is being made from, the manifest,
written last, what a finished one was made from. Both are compared with the recipe as it is now; where they
differ nothing is touched, unless `fresh` asks for it, and then the old folder is kept beside the new one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from flowdistill import artifact, teachers
from flowdistill.errors import (
    FlowdistillError,
    Interrupted,
    MissingInput,
    RecipeError,
    UsageError,
    unknown,
)
from flowdistill.processes import World
from flowdistill.recipe import Recipe, Reference
from flowdistill.references import references
from flowdistill.stages import Stage
from flowdistill.students import CHOSEN
from flowdistill.work import Progress, Stop, Work

STARTED = "started.json"
TEACHER = "teacher"
_ALONE = World()

State = Literal["done", "stale", "partial", "missing"]


@dataclass(frozen=True)
class Standing:
    """How a stage stands.

    `conflicts` say in what the settings or inputs of what is there differ from the recipe's, `waits` which
    inputs are not done. A finished stage with either is stale.
    """

    stage: str
    verb: str
    folder: Path
    state: State
    inputs: Mapping[str, str]
    """Reference field -> what it resolved to, as a person would write it."""
    conflicts: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    manifest: artifact.Manifest | None = None


@dataclass(frozen=True)
class Started:
    """A stage begins (or continues)."""

    stage: str
    verb: str


@dataclass(frozen=True)
class Advanced:
    """A stage reports how far it is."""

    stage: str
    progress: Progress


@dataclass(frozen=True)
class Finished:
    """A stage is done; `skipped` where it was done before."""

    stage: str
    verb: str
    folder: Path
    manifest: artifact.Manifest
    skipped: bool


Event = Started | Advanced | Finished


class Pipeline:
    """The stages of one recipe and their folders below its `out`.

    Raises `RecipeError` where the teacher cannot be what the recipe says.
    """

    def __init__(self, recipe: Recipe[Stage]) -> None:
        self.recipe = recipe
        self.out = recipe.out
        try:
            self._teacher_digest = teachers.identify(recipe.teacher)
        except UsageError as error:
            raise RecipeError([recipe.problem("teacher", str(error))]) from None
        self.stages = {stage.name: stage for stage in recipe.stages}

    def status(self) -> list[Standing]:
        """Every stage, in the recipe's order."""
        standings: dict[str, Standing] = {}
        for name in self.stages:
            standings[name] = self._standing(name, standings)
        return list(standings.values())

    def select(self, verb: str | None, stage: str | None) -> str | None:
        """Name of the stage that a command means; None is all of them."""
        if stage is not None:
            if stage not in self.stages:
                raise UsageError(f"--stage: {unknown('stage', stage, self.stages)}")
            if verb not in (None, self.stages[stage].verb):
                raise UsageError(f"--stage: '{stage}' is a {self.stages[stage].verb} stage, expected {verb}")
        if verb is None or stage is not None:
            return stage
        found = [name for name, each in self.stages.items() if each.verb == verb]
        if not found:
            raise UsageError(f"{self.recipe.path}: has no stage '{verb}' (it has {', '.join(self.stages)})")
        if len(found) > 1:
            raise UsageError(
                f"{self.recipe.path}: has {len(found)} stages '{verb}'; choose with --stage {'|'.join(found)}"
            )
        return found[0]

    def run(
        self,
        target: str | None,
        *,
        only: bool,
        fresh: bool,
        device: str,
        observe: Callable[[Event], None],
        stop: Stop,
        parallel: Callable[[str], None] | None = None,
        world: World = _ALONE,
    ) -> None:
        """Do stage `target` (None: all) and, unless `only`, what it needs and is not done.

        A shared stage is done together with whoever else is at it, a collective one by the processes of
        `world`. `parallel`, where it is given, does such stages by their names, in other processes.
        """
        chosen = self.needed(target)
        standings = {standing.stage: standing for standing in self.status()}
        if only and target is not None:
            missing = [name for name in chosen[:-1] if standings[name].state != "done"]
            if missing:
                raise MissingInput(
                    f"{target}: needs {', '.join(missing)}, which is not done; run without --only"
                )
            chosen = [target]
        redo = {target} if fresh and target else set()
        if not fresh:
            _refuse([standings[name] for name in chosen])
        for name in chosen:
            if standings[name].state != "done" or name in redo:
                self.stages[name].preflight(self._inputs(name))
        artifact.create_folder(self.out)
        for name in chosen:
            if fresh:
                self._renew(name, standings, redo)
            launched = parallel is not None and self._launch(name, standings, stop, parallel)
            if self.stages[name].collective:
                world.wait()  # for those who still share the stage before
            with self._held(name, world):
                standing = standings[name] = self._standing(name, standings)
                if standing.state == "done" and standing.manifest:
                    skipped = not launched
                    observe(Finished(name, standing.verb, standing.folder, standing.manifest, skipped))
                    continue
                _refuse([standing])
                stop.check()
                observe(Started(name, standing.verb))
                manifest = self._do(replace(self.work(name, device, observe, stop), world=world))
                standings[name] = self._standing(name, standings)
                observe(Finished(name, standing.verb, standing.folder, manifest, skipped=False))

    def _renew(self, name: str, standings: Mapping[str, Standing], redo: Collection[str]) -> None:
        """Set aside what is there of a stage, where it has to be made anew."""
        with artifact.lock(self.out):
            standing = self._standing(name, standings)
            anew = standing.conflicts or name in redo or standing.state == "partial"
            if anew and standing.folder.exists():
                _set_aside(standing.folder)

    def _launch(
        self, name: str, standings: Mapping[str, Standing], stop: Stop, parallel: Callable[[str], None]
    ) -> bool:
        """Do a stage in other processes, if it can be and is not done; whether that was so."""
        standing = self._standing(name, standings)
        if standing.state == "done" or not self.can_share(name):
            return False
        _refuse([standing])
        stop.check()
        parallel(name)
        return True

    def _held(self, name: str, world: World) -> AbstractContextManager[None]:
        """The folder of the results, against others; the first process holds it for those in step with it."""
        stage = self.stages[name]
        if stage.collective and world.rank:
            return nullcontext()
        return artifact.lock(self.out, shared=stage.shared)

    def work(self, name: str, device: str, observe: Callable[[Event], None], stop: Stop) -> Work:
        """What stage `name` is given to run."""
        from flowdistill import randomness

        return Work(
            stage=name,
            folder=self.out / name,
            seed=randomness.key(self.recipe.seed, name),
            device=device,
            inputs=self._inputs(name),
            parents=self._parents(name),
            settings=self.recipe.settings_json(name),
            report=lambda progress: observe(Advanced(name, progress)),
            stop=stop,
        )

    def _do(self, work: Work) -> artifact.Manifest:
        stage = self.stages[work.stage]
        if stage.collective and work.world.rank:
            stage.run(work)
            work.world.wait()
            return artifact.Manifest.read(work.folder)
        started = datetime.now(UTC)
        _same_device(work.folder, work.device)
        begun = {
            "stage": work.stage,
            "verb": stage.verb,
            "settings": work.settings,
            "inputs": work.parents,
            "locations": work.inputs,
            "seed": self.recipe.seed,
            "device": work.device,
        }
        artifact.create_folder(work.folder)
        try:
            with artifact.joined(work.folder):
                artifact.save_json(work.folder / STARTED, begun)
                manifest = seal(stage, work, self.recipe.seed, started)
            if stage.collective:
                work.world.wait()
            return manifest
        except Interrupted:
            raise
        except FlowdistillError:
            _tidy(work.folder)
            raise

    def _standing(self, name: str, earlier: Mapping[str, Standing]) -> Standing:
        stage, folder = self.stages[name], self.out / name
        references = self._references(name)
        inputs = {field: _spoken(each) for field, each in references.items() if each is not None}
        manifest = _manifest(folder)
        if manifest is not None:
            before: Mapping[str, Any] = manifest.model_dump(include={"settings", "inputs", "seed"})
            state: State = "done"
        elif (folder / STARTED).is_file():
            before, state = artifact.load_json(folder / STARTED), "partial"
        else:
            return Standing(name, stage.verb, folder, "missing", inputs)
        conflicts = _differences({"seed": before["seed"]}, {"seed": self.recipe.seed})
        conflicts += _differences(before["settings"], self.recipe.settings_json(name))
        waits = [
            f"input {e} is {earlier[e].state}" for e in self.needed(name)[:-1] if earlier[e].state != "done"
        ]
        if not waits:
            conflicts += _differences(before["inputs"], self._parents(name), "input ")
        if state == "done" and (conflicts or waits):
            state = "stale"
        return Standing(name, stage.verb, folder, state, inputs, tuple(conflicts), tuple(waits), manifest)

    def _references(self, name: str) -> dict[str, Any]:
        """Field -> resolved reference (or list of them) of a stage."""
        return dict(self.recipe.references[name])

    def can_share(self, name: str) -> bool:
        """Whether several processes can do a stage."""
        return self.stages[name].shared or self.stages[name].collective

    def needed(self, name: str | None) -> list[str]:
        """The stage and all that it rests on, in the recipe's order; None: all."""
        if name is None:
            return list(self.stages)
        needed, queue = {name}, [name]
        while queue:
            for reference in _flat(self._references(queue.pop()).values()):
                if reference in self.stages and reference not in needed:
                    needed.add(reference)
                    queue.append(reference)
        return [other for other in self.stages if other in needed]

    def missing(self, name: str, but: Collection[str]) -> list[str]:
        """The stages that a stage rests on and that are not done, through its references `but` these."""
        named = _flat(value for field, value in self._references(name).items() if field not in but)
        needed = {
            other for reference in named if reference in self.stages for other in self.needed(reference)
        }
        return [each.stage for each in self.status() if each.stage in needed and each.state != "done"]

    def _inputs(self, name: str) -> dict[str, Any]:
        """Reference field -> what `Work` opens."""
        return {field: self._locations(reference) for field, reference in self._references(name).items()}

    def _locations(self, reference: Any) -> Any:
        """What `Work` opens: a folder, a path, or the teacher; (name, location) in lists."""
        if isinstance(reference, list | tuple):
            return [(each, self._locations(each)) for each in reference]
        if reference == TEACHER:
            return self.recipe.teacher
        return str(self.out / reference) if reference in self.stages else reference

    def _parents(self, name: str) -> dict[str, str]:
        """Name of each input -> digest of what it is now."""
        marks = references(type(self.stages[name]))
        return {
            reference: self._digest(reference, marks[field])
            for field, value in self._references(name).items()
            for reference in _flat([value])
        }

    def _digest(self, reference: str, mark: Reference) -> str:
        if mark.files:
            return reference if reference in mark.names else artifact.fingerprint(Path(reference))
        if reference in self.stages:
            manifest = _manifest(self.out / reference)
            return manifest.digest if manifest else "not done"
        if reference == TEACHER:
            return self._teacher_digest
        manifest = _manifest(Path(reference))
        return manifest.digest if manifest else teachers.identify(reference)


def seal(stage: Stage, work: Work, seed: int, started: datetime) -> artifact.Manifest:
    """Run a stage and declare it done. Of several processes at one stage, one does; all give its manifest."""
    from flowdistill import hardware

    done = None if _manifest(work.folder) else stage.run(work)
    with artifact.claimed(work.folder / artifact.CLAIMS / "manifest", wait=True):
        manifest = _manifest(work.folder)
        if manifest is None and done is not None:
            manifest = artifact.Manifest(
                stage=work.stage,
                verb=stage.verb,
                settings=dict(work.settings),
                inputs=dict(work.parents),
                outputs={
                    output: done.digests.get(output) or artifact.sha256(work.folder / output)
                    for output in done.outputs
                },
                seed=seed,
                dtype=done.dtype,
                started=started,
                finished=datetime.now(UTC),
                figures=done.figures,
                **hardware.describe(work.device),
            )
            manifest.write(work.folder)
    assert manifest is not None
    return manifest


def _tidy(folder: Path) -> None:
    """Leave no folder of a stage that was refused before it made anything."""
    with suppress(OSError, UsageError), artifact.lock(folder):
        if {each.name for each in folder.rglob("*") if each.is_file()} <= {STARTED, ".lock", CHOSEN}:
            shutil.rmtree(folder)


def _flat(references: Iterable[Any]) -> list[str]:
    found: list[str] = []
    for reference in references:
        if isinstance(reference, list | tuple):
            found += reference
        elif reference is not None:
            found.append(reference)
    return found


def _spoken(reference: Any) -> str:
    return ", ".join(reference) if isinstance(reference, list | tuple) else str(reference)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every key, nested ones dotted, that is not the same in both."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {_short(old)} -> {_short(new)}")
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) > 40 else text


def _manifest(folder: Path) -> artifact.Manifest | None:
    return artifact.Manifest.read(folder) if (folder / artifact.MANIFEST).exists() else None


def _refuse(standings: list[Standing]) -> None:
    """Stop before anything is touched that was made from something else."""
    lines = [
        f"{s.folder}: made with other settings or inputs ({'; '.join(s.conflicts)})"
        for s in standings
        if s.conflicts
    ]
    if lines:
        fix = "fix: add --fresh to make it anew (what is there is kept beside), or choose another --out"
        raise UsageError("\n".join([*lines, fix]))


def _same_device(folder: Path, device: str) -> None:
    """Refuse to continue on another device: the bytes would be neither those of the one nor of the other."""
    if (folder / STARTED).is_file() and not (folder / artifact.MANIFEST).exists():
        before = artifact.load_json(folder / STARTED)["device"]
        if before.partition(":")[0] != device.partition(":")[0]:
            raise UsageError(
                f"{folder}: begun on {before}, this is {device}\n"
                f"continue with --device {before}, or start over with --fresh"
            )


def _set_aside(folder: Path) -> None:
    """Rename a folder to the next free NAME.old-N."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
