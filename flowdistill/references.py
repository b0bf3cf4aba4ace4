"""References: how a stage of a recipe names its inputs, and what the names lead to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowdistill.errors import Problem, listed, quoted, unknown
from flowdistill.settings import models_in
from flowdistill.yaml_nodes import Node, Place, join

TEACHER = "teacher"

Resolved = str | tuple[str, ...] | None
"""The name of an earlier stage, `teacher`, or a path that can be opened; a list; or nothing."""


@dataclass(frozen=True)
class Reference:
    """Makes a stage's field, `Annotated[str | None, Reference("pairs")] = None`, one of its inputs.

    Its value is the name of an earlier stage that `produces` this kind, or the path of a file or
    folder, told by a `/` or the ending `.safetensors` and relative to the recipe. Left out, it is
    the nearest earlier stage of the kind. With `allow_teacher` the teacher may be named, too, and
    is taken where there is no such stage. An `optional` reference that is left out stays None. The
    field may be a list of such values; a default other than None is taken as if it were written.

    With `files` it is no artifact of ours: a file or folder, or one of `names`, which stand for themselves.
    An optional reference may also stand in settings inside a stage's; its key is dotted then, as in
    `loss.distance.weights`, and is an input only where it is written.
    """

    kind: str
    allow_teacher: bool = False
    optional: bool = False
    files: bool = False
    names: tuple[str, ...] = ()

    def fitting(self, earlier: Sequence[Product]) -> list[str]:
        """The names that may be used, the nearest last."""
        names = [product.name for product in earlier if product.kind == self.kind]
        return list(dict.fromkeys([TEACHER, *names] if self.allow_teacher else names))


@dataclass(frozen=True)
class Product:
    """What a stage makes, `place` being that of the stage."""

    name: str
    kind: str
    place: Place


@dataclass(frozen=True)
class Resolver:
    """Resolves the references of all stages; what leads nowhere is added to `problems`."""

    products: Sequence[Product]
    """One for each stage, in order."""
    makers: Mapping[str, Sequence[str]]
    """Kind -> the verbs that make it."""
    folder: Path
    """Where relative paths start."""
    problems: list[Problem]
    missing: list[Problem]
    """Files that are not there."""

    def inputs(self, model: type[BaseModel], keys: dict[str, Node], stage: int) -> dict[str, Resolved]:
        """Field -> what it leads to, for a stage with settings `keys`; what they lack is added."""
        resolved: dict[str, Resolved] = {}
        for field, (info, reference) in _marked(model).items():
            key = join("", self.products[stage].name, field)
            if "." in field:
                inner = _inside(keys, field)
                if inner is not None:
                    resolved[field] = self._one(key, inner, reference, stage)
                continue
            if field not in keys or keys[field].value is None:
                chosen = self._left_out(key, info, reference, stage)
                if chosen is None:
                    resolved[field] = None
                    continue
                keys[field] = chosen
            value = keys[field].value
            if isinstance(value, list):
                resolved[field] = tuple(
                    self._one(join(key, index), item, reference, stage) for index, item in enumerate(value)
                )
            else:
                resolved[field] = self._one(key, keys[field], reference, stage)
        return resolved

    def path(self, text: str, place: Place, key: str, hint: str = "") -> str:
        """The path of a file or folder, noted where it is not there."""
        path = self.folder / text
        if not os.path.exists(path):
            message = f"{quoted(text)} does not exist (paths start from the recipe's folder){hint}"
            self.missing.append(place.problem(message, key))
        return str(path)

    def _left_out(self, key: str, info: FieldInfo, reference: Reference, stage: int) -> Node | None:
        place = self.products[stage].place
        default = info.get_default(call_default_factory=True)
        if default is None and not reference.optional:
            fitting = reference.fitting(self.products[:stage])
            if not fitting:
                verbs = " or ".join(self.makers.get(reference.kind, ()))
                message = f"no earlier stage makes {_a(reference.kind)}"
                fix = f"add one above ({verbs}), or give a path" if verbs else "give a path"
                self.problems.append(place.problem(f"{message}; {fix}", key))
                return None
            default = [fitting[-1]] if _only_lists(info.annotation) else fitting[-1]
        if isinstance(default, list | tuple):
            return Node([Node(each, place) for each in default], place, place)
        return None if default is None else Node(default, place, place)

    def _one(self, key: str, node: Node, reference: Reference, stage: int) -> str:
        if not isinstance(node.value, str):
            return ""  # the settings' own check refuses it
        text = node.value
        if text in reference.names:
            return text
        if reference.files or "/" in text or text.endswith(".safetensors"):
            hint = f"; or name one of {listed(reference.names)}" if reference.names else ""
            return self.path(text, node.place, key, hint)
        fitting = reference.fitting(self.products[:stage])
        if text not in fitting:
            message = self._misfit(text, reference, fitting, stage)
            self.problems.append(node.place.problem(message, key))
        return text

    def _misfit(self, text: str, reference: Reference, fitting: list[str], stage: int) -> str:
        named = next((product for product in self.products if product.name == text), None)
        choices = f" ({listed(fitting)})" if fitting else ""
        if text == TEACHER:
            return f"expected {_a(reference.kind)}, found the teacher{choices}"
        if named is None:
            return unknown("stage", text, fitting)
        if named.kind != reference.kind:
            return f"expected {_a(reference.kind)}, {quoted(text)} makes {_a(named.kind)}{choices}"
        if named is self.products[stage]:
            return f"a stage cannot be its own input{choices}"
        return f"stage {quoted(text)} comes later, in line {named.place.line}; move it up{choices}"


def references(model: type[BaseModel]) -> dict[str, Reference]:
    """Field -> what it refers to."""
    return {field: reference for field, (_, reference) in _marked(model).items()}


def _marked(model: type[BaseModel], prefix: str = "") -> dict[str, tuple[FieldInfo, Reference]]:
    """Fields that are references, those of settings inside dotted; several choices may share one."""
    found = {}
    for field, info in model.model_fields.items():
        for mark in info.metadata:
            if isinstance(mark, Reference):
                found[f"{prefix}{field}"] = info, mark
        for inner in models_in(info.annotation):
            found |= _marked(inner, f"{prefix}{field}.")
    return found


def _inside(keys: Mapping[str, Node], field: str) -> Node | None:
    """The node at a dotted key; None where nothing is written there."""
    first, _, rest = field.partition(".")
    node = keys.get(first)
    if node is None or node.value is None:
        return None
    if not rest:
        return node
    return _inside(node.value, rest) if isinstance(node.value, dict) else None


def _only_lists(annotation: Any) -> bool:
    """Whether a reference has to be a list, even of one."""
    members = get_args(annotation) if get_origin(annotation) not in (list, tuple) else (annotation,)
    return str not in members and any(get_origin(member) in (list, tuple) for member in members)


def _a(kind: str) -> str:
    """`a model`, `an evaluation`, `pairs`."""
    if not kind or kind.endswith("s"):
        return kind or "nothing to refer to"
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
