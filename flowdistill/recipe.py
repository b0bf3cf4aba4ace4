"""Recipes: one YAML file that says what is done with a teacher, stage by stage.

`load` checks all that can be known about a recipe without running it, and reports all mistakes at
once, each at its place. Which verbs there are, and what settings they take, is handed in: stages are
built on this module, not the other way round.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from flowdistill.errors import Problem, RecipeError, bare, listed, nearest, quoted, unknown
from flowdistill.references import TEACHER, Product, Reference, Resolved, Resolver
from flowdistill.settings import Settings, check
from flowdistill.yaml_nodes import (
    MAX_BYTES,
    MAX_DEPTH,
    Node,
    Place,
    join,
    read_file,
    read_value,
    walk,
)

__all__ = ["Recipe", "Reference", "Settings", "StageSettings", "json_schema", "load", "parse"]

_NAME = "[a-z0-9][a-z0-9-]{0,63}"
_TOP_LEVEL = ("seed", "out", TEACHER)
_RESERVED = (*_TOP_LEVEL, "stages")


def _stage_name(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        expected = "up to 64 lower-case letters, digits and hyphens, the first no hyphen"
        raise ValueError(f"expected {expected}, found {quoted(name)}")
    if name in _RESERVED:
        raise ValueError(f"the name '{name}' is reserved; choose another")
    return name


class StageSettings(Settings):
    """The settings of a verb, as far as a recipe knows them."""

    produces: ClassVar[str] = ""
    """The kind of artifact that the stage makes, for the references of others."""

    name: Annotated[str, AfterValidator(_stage_name)] = Field(
        default_factory=str,
        description="what other stages call this one; if left out, the verb",
        json_schema_extra={"pattern": f"^{_NAME}$"},
    )


S = TypeVar("S", bound=StageSettings)
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Recipe(Generic[S]):
    """A recipe without mistakes: every default filled in, every reference resolved."""

    path: Path
    text: str
    sha256: str
    """Of the file's bytes."""
    seed: int
    out: Path
    teacher: str | dict[str, Any]
    """A name (`builtin:shapes`), a path that can be opened, or a mapping of `name` and options."""
    stages: tuple[S, ...]
    references: Mapping[str, Mapping[str, Resolved]]
    """Stage's name -> field -> what it leads to."""
    places: Mapping[str, Place] = field(repr=False)
    """Dotted key, from the stage's name on -> where it is written."""
    missing: tuple[Problem, ...] = ()
    """Files that it names and that are not there, where it was read without them."""

    def settings_json(self, name: str) -> dict[str, Any]:
        """All settings of stage `name` as JSON values, with defaults and resolved references.

        Paths are as they are written, so a recipe that is moved with its files keeps its settings.
        """
        [stage] = [stage for stage in self.stages if stage.name == name]
        return stage.model_dump(mode="json")

    def problem(self, key: str, message: str) -> Problem:
        """A problem that was found after `load`, at the place of `key` or of what holds it."""
        holder = key
        while holder not in self.places:
            holder = holder[: max(holder.rfind("."), holder.rfind("["), 0)]
        return self.places[holder].problem(message, key)


class Teacher(Settings):
    """A teacher with options."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, description="as `teacher` itself; all other keys are options")


class _Head(Settings):
    """What is done with a teacher, stage by stage."""

    seed: int = Field(0, ge=0, le=2**63 - 1, description="where all randomness starts from")
    out: str | None = Field(
        None,
        min_length=1,
        description="folder of the results, inside the current one; if left out, runs/RECIPE'S-NAME",
    )
    teacher: Annotated[str, Field(min_length=1)] | Teacher = Field(
        "builtin:shapes",
        description="builtin:NAME, analytic:NAME, diffusers:FOLDER-OR-ID, or a path relative to the recipe",
    )
    stages: list[Any] = Field(
        min_length=1, description="what is done, in order: each item is a verb and its settings"
    )


def load(
    path: Path,
    verbs: Mapping[str, type[S]],
    overrides: Sequence[str] = (),
    out: Path | None = None,
    missing_ok: bool = False,
) -> Recipe[S]:
    """Read and check the recipe at `path`; raises `RecipeError` with all that is wrong with it.

    `verbs` has the settings of each verb, `overrides` are like `reflow.steps=500`. A folder `out`
    that the caller chose may be anywhere; the recipe's own has to be inside the current folder. With
    `missing_ok` the files that it names need not be there.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        message = "no such file"
    except IsADirectoryError:
        message = "a folder, expected a recipe file"
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
    else:
        return parse(data, path, verbs, overrides, out, missing_ok)
    raise RecipeError([Place(str(path)).problem(message)])


def parse(
    data: bytes,
    path: Path,
    verbs: Mapping[str, type[S]],
    overrides: Sequence[str] = (),
    out: Path | None = None,
    missing_ok: bool = False,
) -> Recipe[S]:
    """`load` for a recipe's bytes; `path` names it in messages, and its relative paths start there."""
    root, problems = read_file(data, str(path))
    if not isinstance(root.value, dict):
        found = "an empty file" if root.value is None else root.shown()
        message = f"expected a recipe, a mapping with 'stages', found {found}"
        raise RecipeError([*problems, root.place.problem(message)])
    draft = _Draft(path, root, root.value, verbs, problems)
    for override in overrides:
        draft.override(override)
    return draft.finish(data, out, missing_ok)


@dataclass(frozen=True)
class _StageDraft(Generic[S]):
    """A stage whose settings are still nodes."""

    verb: str
    model: type[S]
    place: Place
    keys: dict[str, Node]

    @property
    def name(self) -> str:
        """Its name, valid or not."""
        return _text(self.keys.get("name")) or self.verb

    @property
    def key(self) -> str:
        """What the dotted keys of its settings start with."""
        return join("", self.name)

    @property
    def node(self) -> Node:
        """Its settings."""
        return Node(self.keys, self.place)


class _Draft(Generic[S]):
    """A recipe while it is checked: mistakes are collected, and the checks go on."""

    def __init__(
        self,
        path: Path,
        root: Node,
        keys: dict[str, Node],
        verbs: Mapping[str, type[S]],
        problems: list[Problem],
    ) -> None:
        self._path = path
        self._root = root
        self._keys = keys
        self._verbs = verbs
        self._problems = problems
        items = keys["stages"].value if "stages" in keys else None
        self._stages: list[_StageDraft[S]] = []
        for index, item in enumerate(items if isinstance(items, list) else []):
            self._add_stage(item, join("stages", index))

    def override(self, text: str) -> None:
        """Put the value of `reflow.steps=500` in the place of the recipe's."""
        place = Place(f"-s {bare(text)}")
        key, equals, value = text.partition("=")
        first, *rest = key.split(".")
        stages = {stage.name: stage.keys for stage in self._stages}
        if not equals or len(rest) > MAX_DEPTH:
            self._note(place, "", "expected KEY=VALUE, as in reflow.steps=500")
        elif first == "stages" or (first in stages and not rest):
            self._note(place, "", "expected one key of a stage, as in reflow.steps=500")
        elif first in stages:
            self._put(stages[first], rest, value, place)
        elif first in _TOP_LEVEL:
            self._put(self._keys, [first, *rest], value, place)
        else:
            self._note(place, "", unknown("stage or key", first, [*stages, *_TOP_LEVEL]))

    def finish(self, data: bytes, out: Path | None, missing_ok: bool) -> Recipe[S]:
        """The checked recipe, or a `RecipeError` with all problems in the order of the text."""
        head = self._checked(_Head, self._root, "")
        self._settle_names()
        resolver = self._resolver()
        references = {
            stage.name: resolver.inputs(stage.model, stage.keys, index)
            for index, stage in enumerate(self._stages)
        }
        stages = [self._checked(stage.model, stage.node, stage.key) for stage in self._stages]
        folder, teacher = out or self._out(), self._teacher(resolver)
        if self._problems or not missing_ok:
            self._problems += resolver.missing
        if self._problems or head is None:
            self._problems.sort(key=_in_the_text)
            raise RecipeError(self._problems)
        trees = [("", self._root), *((stage.key, stage.node) for stage in self._stages)]
        return Recipe(
            path=self._path,
            text=data.decode("utf-8-sig"),
            sha256=hashlib.sha256(data).hexdigest(),
            seed=head.seed,
            out=folder,
            teacher=teacher,
            stages=tuple(stage for stage in stages if stage is not None),
            references=references,
            places={key: node.heading for name, tree in trees for key, node in walk(tree, name)},
            missing=tuple(sorted(resolver.missing, key=_in_the_text)),
        )

    def _note(self, place: Place, key: str, message: str) -> None:
        self._problems.append(place.problem(message, key))

    def _checked(self, model: type[M], node: Node, key: str) -> M | None:
        checked = check(model, node, key)
        if isinstance(checked, list):
            self._problems += checked
            return None
        return checked

    def _add_stage(self, item: Node, key: str) -> None:
        if not isinstance(item.value, dict) or len(item.value) != 1:
            return self._note(item.place, key, self._not_a_stage(item))
        [(verb, settings)] = item.value.items()
        meant: str | None = verb
        if verb not in self._verbs:
            self._note(settings.heading, key, unknown("stage", verb, self._verbs))
            meant = nearest(verb, self._verbs)  # whose settings can be checked all the same
        if not isinstance(settings.value, dict | None):
            found = f"found {settings.shown()}"
            self._note(settings.place, key, f"expected the settings of {quoted(verb)}, {found}")
        if meant is not None:
            keys = settings.value if isinstance(settings.value, dict) else {}
            draft = _StageDraft(meant, self._verbs[meant], settings.heading, keys)
            self._stages.append(draft)

    def _not_a_stage(self, item: Node) -> str:
        expected = "expected one verb with its settings"
        if not isinstance(item.value, dict) or not item.value:
            fix = f"; write '{item.value}:'" if item.value in list(self._verbs) else ""
            return f"{expected}, found {item.shown()}{fix}"
        found = f"{len(item.value)} keys ({listed(item.value)})"
        return f"{expected}, found {found}; settings are indented deeper than their verb"

    def _put(self, keys: dict[str, Node], parts: Sequence[str], value: str, place: Place) -> None:
        try:
            node = read_value(value, place)
        except RecipeError as error:
            self._problems += error.problems
            return
        *holders, last = parts
        for part in holders:
            holder = keys.get(part)
            if holder is None or holder.value is None:
                holder = keys[part] = Node({}, place, place)
            if not isinstance(holder.value, dict):
                return self._note(place, "", f"{quoted(part)} has no keys, it is {holder.shown()}")
            keys = holder.value
        keys[last] = node

    def _settle_names(self) -> None:
        """Who has no name is called by the verb; no two may have the same."""
        taken: dict[str, _StageDraft[S]] = {}
        for stage in self._stages:
            name = stage.keys.get("name")
            if name is None or name.value is None:
                name = stage.keys["name"] = Node(stage.verb, stage.place, stage.place)
            first = taken.setdefault(stage.name, stage)
            if first is not stage:
                message = f"already the name of the stage in line {first.place.line}"
                self._note(name.place, join(stage.key, "name"), f"{message}; give it another")

    def _resolver(self) -> Resolver:
        makers: dict[str, list[str]] = {}
        for verb, model in self._verbs.items():
            makers.setdefault(model.produces, []).append(verb)
        products = [Product(stage.name, stage.model.produces, stage.place) for stage in self._stages]
        return Resolver(products, makers, self._path.parent, self._problems, [])

    def _teacher(self, resolver: Resolver) -> str | dict[str, Any]:
        node = self._keys.get(TEACHER)
        if node is None or node.value is None:
            return str(_Head.model_fields[TEACHER].default)
        if not isinstance(node.value, dict):
            return _teacher_name(node, TEACHER, resolver)
        name = _teacher_name(node.value.get("name", Node(None, node.place)), join(TEACHER, "name"), resolver)
        options = node.plain()
        if prompts := _text(node.value.get("prompts")):
            place = node.value["prompts"].place
            options["prompts"] = resolver.path(prompts, place, join(TEACHER, "prompts"))
        return {**options, "name": name}

    def _out(self) -> Path:
        """The results' folder, which a recipe can have inside the current folder only."""
        node = self._keys.get("out") or Node(None, self._root.place)
        out = _text(node) or f"runs/{self._path.stem}"
        here, there = Path(os.path.realpath(os.curdir)), Path(os.path.realpath(out))
        if os.path.isabs(out) or out.startswith("~") or ".." in Path(out).parts:
            message = f"expected a folder inside the current one, found {quoted(out)}"
            self._note(node.place, "out", f"{message}; use --out for another place")
        elif not there.is_relative_to(here):
            message = f"{quoted(out)} leads out of the current folder by a link"
            self._note(node.place, "out", f"{message}; use --out for another place")
        elif any(os.path.isfile(part) for part in (there, *there.parents)):
            self._note(node.place, "out", f"expected a folder, {quoted(out)} is or is in a file")
        return Path(out)


def _in_the_text(problem: Problem) -> tuple[bool, int, int]:
    """Where it comes; what stands on the command line is last."""
    return problem.line is None, problem.line or 0, problem.column or 0


def _text(node: Node | None) -> str:
    return node.value if node is not None and isinstance(node.value, str) else ""


def _teacher_name(node: Node, key: str, resolver: Resolver) -> str:
    """A path, unless there is a scheme; what follows `diffusers:` may be a path too."""
    text = _text(node)
    scheme, _, rest = text.partition(":")
    if scheme == "diffusers" and (resolver.folder / rest).is_dir():
        return f"{scheme}:{resolver.folder / rest}"
    if not text or text == "builtin" or re.match("[a-z]+:", text):
        return text
    return resolver.path(text, node.place, key, "; a teacher that ships is builtin:shapes")


def json_schema(verbs: Mapping[str, type[StageSettings]]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a whole recipe, for editors."""
    mode: JsonSchemaMode = "validation"
    references, schema = models_json_schema([(_Head, mode), *((m, mode) for m in verbs.values())])
    definitions: dict[str, dict[str, Any]] = schema["$defs"]
    head = definitions.pop("_Head") | {"title": "flowdistill recipe"}
    stages: dict[str, Any] = {}
    for verb, model in verbs.items():
        reference = references[model, mode]
        required = definitions[reference["$ref"].rpartition("/")[2]].get("required")
        stages[verb] = reference if required else {"anyOf": [reference, {"type": "null"}]}
    head["properties"]["stages"]["items"] = {
        "type": "object",
        "properties": stages,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    schema = {**head, "$defs": definitions}
    for choice in list(_choices(schema)):
        chosen = definitions[choice.rpartition("/")[2]]
        chosen["required"] = sorted({"name", *chosen.get("required", ())})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _choices(schema: Any) -> Iterator[str]:
    """The members of all unions: each has a default name, but without one no member is chosen."""
    if isinstance(schema, dict):
        yield from schema.get("discriminator", {}).get("mapping", {}).values()
    for inner in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(inner, dict | list):
            yield from _choices(inner)
