"""Typed settings, and every mistake in them in our own words, with its place in the text.

`check` puts a tree of YAML nodes into a pydantic model. Values are those of JSON, and nothing is
coerced but an integer to a float. What pydantic finds wrong comes back as `Problem`s: a wrong value
as `expected ..., found ...`, a wrong name with the nearest right one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from flowdistill.errors import Problem, bare, did_you_mean, listed, nearest, unknown
from flowdistill.yaml_nodes import Node, join, scalar

M = TypeVar("M", bound=BaseModel)


class Settings(BaseModel):
    """Base of everything that a recipe can set: strict, frozen, without unknown keys, nan or inf.

    The class's docstring and `Field(description=...)` are what `flowdistill schema` shows. A choice
    among several settings is a union of classes that each have their own `name: Literal[...]`, with
    `Field(discriminator="name")`.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, defer_build=True)


# What was expected, by pydantic's type of error; the gaps are filled from the error's context.
EXPECTED: Mapping[str, str] = {
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "{min_length} or more characters",
    "string_too_long": "{max_length} or fewer characters",
    "string_pattern_mismatch": "text like {pattern}",
    "enum": "{expected}",
    "literal_error": "{expected}",
    "none_required": "nothing",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "missing": "more values",  # of a tuple: a missing key is not a wrong value
    "too_short": "{min_length} or more values",
    "too_long": "{max_length} or fewer values",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "multiple_of": "a multiple of {multiple_of}",
}

_Path = tuple[str | int, ...]


def check(model: type[M], node: Node, key: str) -> M | list[Problem]:
    """The mapping `node`, whose dotted key is `key`, as a `model`, or all that is wrong with it."""
    try:
        # Strict JSON, unlike strict Python, takes lists for tuples and text for enumerations.
        return model.model_validate_json(json.dumps(node.plain()))
    except ValidationError as error:
        faults = [_Fault(details, model, node) for details in error.errors(include_url=False)]
        return [*_key_problems(faults, key), *_value_problems(faults, key)]


class _Fault:
    """An error of pydantic's, and where it leads among the nodes and the models.

    Of a key that is missing or unknown, `node` is the mapping in which it is.
    """

    def __init__(self, error: ErrorDetails, model: type[BaseModel], root: Node) -> None:
        self.error = error
        self.kind = error["type"]
        self.path: _Path = ()
        self.node = root
        self.models = [model]
        self._labelled = True
        location = error["loc"]
        for part in location[:-1] if self.kind in ("missing", "extra_forbidden") else location:
            self._enter(part)

    def _enter(self, part: str | int) -> None:
        inside = self.node.value
        if not self._labelled and self.tag is not None and self.tag.value == part:
            self.models = [model for model in self.models if part in _tags(model)]
            self._labelled = True
        elif isinstance(inside, dict) and isinstance(part, str) and part in inside:
            fields = [m.model_fields[part] for m in self.models if part in m.model_fields]
            self.models = [m for field in fields for m in models_in(field.annotation)]
            self._descend(part, inside[part])
        elif isinstance(inside, list) and isinstance(part, int) and part < len(inside):
            self._descend(part, inside[part])
        # Anything else only says which member of a union it was that refused: `int`.

    def _descend(self, part: str | int, node: Node) -> None:
        self.path, self.node, self._labelled = (*self.path, part), node, False

    @property
    def of_key(self) -> bool:
        """Whether a key or a choice is wrong, and not a value."""
        if self.kind == "missing":  # else it is a tuple that is too short
            return isinstance(self.node.value, dict)
        return self.kind in ("extra_forbidden", "union_tag_invalid", "union_tag_not_found")

    @property
    def tag(self) -> Node | None:
        """What chooses among the members of a union here."""
        return self.node.value.get("name") if isinstance(self.node.value, dict) else None

    @property
    def tags(self) -> list[str]:
        """What it may be."""
        return [tag for model in self.models for tag in _tags(model)]

    @property
    def keys(self) -> list[str]:
        """The keys that a mapping may have here."""
        return list(dict.fromkeys(key for model in self.models for key in model.model_fields))

    @property
    def meant(self) -> _Path:
        """Path of the known key that the unknown one is nearest to."""
        return (*self.path, nearest(str(self.error["loc"][-1]), self.keys) or "")

    @property
    def noun(self) -> str:
        """What the value here is called: the innermost key."""
        return next((part for part in reversed(self.path) if isinstance(part, str)), "value")


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """The values of `name` that choose `model` in a union."""
    return get_args(model.model_fields["name"].annotation) if "name" in model.model_fields else ()


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that occur in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def _key_problems(faults: list[_Fault], key: str) -> Iterator[Problem]:
    """Keys that are unknown or missing, and choices that do not exist."""
    of_keys = [fault for fault in faults if fault.of_key]
    misspelt = {fault.meant for fault in of_keys if fault.kind == "extra_forbidden"}
    for fault in of_keys:
        here, last = join(key, *fault.path), str(fault.error["loc"][-1])
        if fault.kind == "extra_forbidden":
            yield _unknown_key(fault, last, here)
        elif fault.kind == "missing":
            if (*fault.path, last) not in misspelt:
                yield fault.node.heading.problem("is required but missing", join(here, last))
        elif fault.tag is None:
            yield from _untagged(fault, here)
        else:
            message = unknown(fault.noun, str(fault.tag.plain()), fault.tags)
            yield fault.tag.place.problem(message, join(here, "name"))


def _unknown_key(fault: _Fault, name: str, key: str) -> Problem:
    assert isinstance(fault.node.value, dict)
    hint = did_you_mean(name, fault.keys) or f"; known are {listed(fault.keys)}"
    return fault.node.value[name].heading.problem(f"unknown key{hint}", join(key, name))


def _untagged(fault: _Fault, key: str) -> Iterator[Problem]:
    """A choice without its `name`, which may only be misspelt."""
    assert isinstance(fault.node.value, dict)
    strangers = [name for name in fault.node.value if name not in fault.keys]
    for name in strangers:
        yield _unknown_key(fault, name, key)
    if not any(nearest(name, fault.keys) == "name" for name in strangers):
        message = f"is required but missing ({listed(fault.tags)})"
        yield fault.node.heading.problem(message, join(key, "name"))


def _value_problems(faults: list[_Fault], key: str) -> Iterator[Problem]:
    """One problem for each value that is wrong, however many members of a union refuse it."""
    refused: dict[_Path, list[_Fault]] = {}
    wrong_inside: set[_Path] = set()
    for fault in faults:
        depth = len(fault.path)
        wrong_inside |= {fault.path[:n] for n in range(depth + fault.of_key)}
        if not fault.of_key:
            refused.setdefault(fault.path, []).append(fault)
    for path, refusals in refused.items():
        # `nfe: [1, x]` is neither an integer nor a list of them: only the `x` is worth a word.
        if not path or path not in wrong_inside:
            yield refusals[0].node.place.problem(_message(refusals), join(key, *path))


def _message(refusals: list[_Fault]) -> str:
    fault = refusals[0]
    context, value = fault.error.get("ctx", {}), fault.node.value
    said = [each.error["ctx"]["error"] for each in refusals if "error" in each.error.get("ctx", {})]
    if said:  # a validator's own words
        return str(said[0])
    if len(refusals) == 1 and fault.kind in ("literal_error", "enum") and isinstance(value, str):
        return unknown(fault.noun, value, re.findall(r"'([^']*)'", context["expected"]))
    expected = " or ".join(dict.fromkeys(map(_expected, refusals)))
    fix = _fix(fault) if len(refusals) == 1 else ""
    hint = f"; write {fix}" if fix and bare(fix) == fix else ""
    return f"expected {expected}, found {fault.node.shown()}{hint}"


def _expected(fault: _Fault) -> str:
    if fault.kind in EXPECTED:
        return EXPECTED[fault.kind].format(**fault.error.get("ctx", {}))
    return f"something else ({fault.error['msg']})"


_BOOLEANS = {"no": "false", "off": "false", "yes": "true", "on": "true"}


def _fix(fault: _Fault) -> str:
    """What a value of the wrong type was probably meant to be, as YAML; empty if that is unclear."""
    value, shown = fault.node.value, fault.node.shown()
    if isinstance(value, dict | list | None):
        return ""
    if fault.kind == "bool_type":
        return _BOOLEANS.get(str(value).lower(), "")
    if fault.kind in ("int_type", "float_type"):
        return _number(value, whole=fault.kind == "int_type")
    if fault.kind == "string_type":
        return f'"{shown}"'
    if fault.kind in ("list_type", "tuple_type"):
        return f"[{value if isinstance(value, str) else shown}]"
    tag = nearest(str(value), fault.tags)
    return f"{{name: {tag}}}" if tag else ""


def _number(value: bool | int | float | str, whole: bool) -> str:
    """The number that text like '5' or '1_000', or a float like 3.0, stands for."""
    number = scalar(value.strip().replace("_", "")) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        return ""
    if whole:
        return str(int(number)) if number == int(number) else ""
    return str(number)
