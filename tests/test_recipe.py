# ruff: noqa: E501  (messages stand here as they are printed)
"""Recipes: what is accepted, and the exact words for what is not.

The stages here are small stand-ins for the real ones, with every kind of field that a recipe can hold.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, get_args

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, Field, PositiveInt, model_validator
from pydantic_core.core_schema import ErrorType

from flowdistill import yaml_nodes
from flowdistill.errors import RecipeError
from flowdistill.recipe import (
    Recipe,
    Reference,
    Settings,
    StageSettings,
    json_schema,
    load,
    parse,
)
from flowdistill.settings import EXPECTED, check
from flowdistill.yaml_nodes import Place, read_value, scalar

patient = settings(max_examples=60, deadline=None)


class Adam(Settings):
    """Adam, Kingma and Ba 2015."""

    name: Literal["adam"] = "adam"
    lr: float = Field(2e-4, gt=0, le=1, description="learning rate")
    betas: tuple[float, float] = (0.9, 0.999)


class PseudoHuber(Settings):
    name: Literal["pseudo-huber"] = "pseudo-huber"
    c: float | None = None


class LpipsHuber(Settings):
    name: Literal["lpips-huber"] = "lpips-huber"
    divide_by_t: bool = False


class UShaped(Settings):
    name: Literal["a"] = "a"
    a: float = 4.0  # a key that is called like the choice it belongs to


class Uniform(Settings):
    name: Literal["uniform"] = "uniform"


Loss = Annotated[PseudoHuber | LpipsHuber, Field(discriminator="name")]
Timesteps = Annotated[UShaped | Uniform, Field(discriminator="name")]


class Pairs(StageSettings):
    """Pairs of noise and sample."""

    produces = "pairs"

    count: int = Field(20000, ge=1, multiple_of=2, description="number of pairs")
    solver: Literal["euler", "heun"] = "heun"
    dtype: Literal["float16", "float32"] | None = None


class Reflow(StageSettings):
    """Reflow."""

    produces = "model"

    pairs: Annotated[str | None, Reference("pairs")] = None
    init: Annotated[str | None, Reference("model", allow_teacher=True)] = None
    steps: int = Field(gt=0)
    batch_size: int | Literal["auto"] = 128
    compiled: bool = False
    loss: Loss = LpipsHuber()
    timesteps: Timesteps = UShaped()
    terms: tuple[Loss, ...] = ()
    optimizer: Adam = Adam()


class Boss(StageSettings):
    """Step sizes."""

    produces = "schedule"

    model: Annotated[str | None, Reference("model")] = None
    nfe: int | tuple[PositiveInt, ...] = 4
    grid: int = 100
    knots: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field((), max_length=2)

    @model_validator(mode="after")
    def _grid_is_fine_enough(self) -> Boss:
        if isinstance(self.nfe, int) and self.nfe > self.grid:
            raise ValueError(f"nfe {self.nfe} is more than the grid of {self.grid}; make it finer")
        return self


class Evaluate(StageSettings):
    """Numbers."""

    produces = "evaluation"

    models: Annotated[tuple[str, ...] | None, Reference("model", allow_teacher=True)] = None
    schedule: Annotated[str | None, Reference("schedule", optional=True)] = None
    against: Annotated[tuple[str, ...], Reference("model", allow_teacher=True)] = ("teacher",)
    note: str = Field("", max_length=5)


VERBS = {"pairs": Pairs, "reflow": Reflow, "boss": Boss, "eval": Evaluate}

GOOD = """\
seed: 3
stages:
  - pairs: {count: 10, solver: heun}
  - reflow:
      steps: 2000
      loss: {name: lpips-huber}
  - boss: {nfe: [2, 4]}
  - eval:
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str | bytes, *overrides: str, path: str = "recipe.yaml") -> Recipe[StageSettings]:
    data = text.encode() if isinstance(text, str) else text
    return parse(data, Path(path), VERBS, overrides)


def complaint(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- what is wrong, in whose words ------------------------------------------------------------------

PAIRS = "stages:\n  - pairs:\n"
REFLOW = PAIRS + "  - reflow:\n      steps: 10\n"  # what follows is line 5

BAD: list[tuple[str | bytes, str]] = [
    # not a recipe at all
    ("", "recipe.yaml: expected a recipe, a mapping with 'stages', found an empty file"),
    ("# nothing\n", "recipe.yaml: expected a recipe, a mapping with 'stages', found an empty file"),
    ("~", "recipe.yaml:1:1: expected a recipe, a mapping with 'stages', found an empty file"),
    ("hello", "recipe.yaml:1:1: expected a recipe, a mapping with 'stages', found 'hello'"),
    ("- pairs:", "recipe.yaml:1:1: expected a recipe, a mapping with 'stages', found a list of 1"),
    (b"\x89PNG\r\n\x00\x00", "recipe.yaml: a binary file, expected YAML text"),
    ("stages:".encode("utf-16"), "recipe.yaml: a binary file, expected YAML text"),
    (b"seed: \xe9", "recipe.yaml: not UTF-8 text (byte 0xe9 at offset 6); save it as UTF-8"),
    ("seed: 1\nout: a\x07b", r"recipe.yaml:2:7: control character '\x07' is not allowed"),
    ('seed: 1\nout: "a\\x00b"', r"recipe.yaml:2:6: control character '\x00' is not allowed"),
    # YAML that is not YAML
    ("a: b: c", "recipe.yaml:1:5: not valid YAML: mapping values are not allowed in this context; put quotes around text that holds ': '"),
    ("stages:\n\t- pairs:", "recipe.yaml:2:1: not valid YAML: found character that cannot start any token; a tab cannot indent, use spaces"),
    ("seed: [1,\nout: a", "recipe.yaml:3:1: not valid YAML: did not find expected ',' or ']' (while parsing a flow sequence that begins in line 1)"),
    ("seed: 'x", "recipe.yaml:1:9: not valid YAML: found unexpected end of stream"),
    ("seed: @x", "recipe.yaml:1:7: not valid YAML: found character that cannot start any token"),
    # YAML that is too much
    (PAIRS + "x: &here 1", "recipe.yaml:3:1: x: unknown key; known are seed, out, teacher, stages\n"
                           "recipe.yaml:3:4: anchor 'here' is not supported; remove it"),
    ("seed: *here", "recipe.yaml:1:7: alias 'here' is not supported; write the value out"),
    ("base: {seed: 1}\n<<: {seed: 2}", "recipe.yaml:2:1: merge key '<<' is not supported; write the keys out"),
    (PAIRS + "seed: !!int 3", "recipe.yaml:3:7: tag '!!int' is not supported; remove it"),
    (PAIRS + "teacher: !!python/object:os.system ls", "recipe.yaml:3:10: tag '!!python/object:os.system' is not supported; remove it\n"
                                                      "recipe.yaml:3:10: teacher: 'ls' does not exist (paths start from the recipe's folder); a teacher that ships is builtin:shapes"),
    ("seed: 1\n---\nseed: 2", "recipe.yaml:2:1: a second document; a recipe is one document, remove the '---'"),
    ("? [a, b]\n: 1", "recipe.yaml:1:3: a list or mapping as a key; keys are text"),
    (PAIRS + "seed: 1\nseed: 1", "recipe.yaml:4:1: duplicate key 'seed', already in line 3"),
    (PAIRS + "      count: 2\n      count: 4", "recipe.yaml:4:7: duplicate key 'count', already in line 3"),
    # the top level
    ("seed: 1", "recipe.yaml:1:1: stages: is required but missing"),
    ("stagse: []", "recipe.yaml:1:1: stagse: unknown key, did you mean 'stages'?"),
    (PAIRS + "lr: 1e-4", "recipe.yaml:3:1: lr: unknown key; known are seed, out, teacher, stages"),
    ("stages:", "recipe.yaml:1:8: stages: expected a list, found nothing"),
    ("stages: []", "recipe.yaml:1:9: stages: expected 1 or more values, found an empty list"),
    ("stages:\n  pairs: {}", "recipe.yaml:2:3: stages: expected a list, found a mapping"),
    (PAIRS + "seed: one", "recipe.yaml:3:7: seed: expected an integer, found 'one'"),
    (PAIRS + "seed: -1", "recipe.yaml:3:7: seed: expected a number >= 0, found -1"),
    (PAIRS + "seed: 9223372036854775808", "recipe.yaml:3:7: seed: expected a number <= 9223372036854775807, found 9223372036854775808"),
    (PAIRS + "seed: true", "recipe.yaml:3:7: seed: expected an integer, found true"),
    (PAIRS + "seed: 12:30", "recipe.yaml:3:7: seed: expected an integer, found '12:30'"),
    (PAIRS + "seed: 1e3", "recipe.yaml:3:7: seed: expected an integer, found 1000.0; write 1000"),
    # where the results go
    (PAIRS + "out: 7", 'recipe.yaml:3:6: out: expected text, found 7; write "7"'),
    (PAIRS + "out: ''", "recipe.yaml:3:6: out: expected 1 or more characters, found ''"),
    (PAIRS + "out: /tmp/x", "recipe.yaml:3:6: out: expected a folder inside the current one, found '/tmp/x'; use --out for another place"),
    (PAIRS + "out: runs/../../x", "recipe.yaml:3:6: out: expected a folder inside the current one, found 'runs/../../x'; use --out for another place"),
    (PAIRS + "out: ~/runs", "recipe.yaml:3:6: out: expected a folder inside the current one, found '~/runs'; use --out for another place"),
    # the teacher
    (PAIRS + "teacher: shapes", "recipe.yaml:3:10: teacher: 'shapes' does not exist (paths start from the recipe's folder); a teacher that ships is builtin:shapes"),
    (PAIRS + "teacher: a/model.safetensors", "recipe.yaml:3:10: teacher: 'a/model.safetensors' does not exist (paths start from the recipe's folder); a teacher that ships is builtin:shapes"),
    (PAIRS + "teacher: {guidance: 2}", "recipe.yaml:3:1: teacher.name: is required but missing"),
    (PAIRS + "teacher: {name: 3}", 'recipe.yaml:3:17: teacher.name: expected text, found 3; write "3"'),
    (PAIRS + "teacher: ''", "recipe.yaml:3:10: teacher: expected 1 or more characters or a mapping, found ''"),
    (PAIRS + "teacher: {name: ''}", "recipe.yaml:3:17: teacher.name: expected 1 or more characters, found ''"),
    (PAIRS + "teacher: [builtin]", "recipe.yaml:3:10: teacher: expected text or a mapping, found a list of 1"),
    # what is no stage
    ("stages: [pairs]", "recipe.yaml:1:10: stages[0]: expected one verb with its settings, found 'pairs'; write 'pairs:'"),
    ("stages: [5]", "recipe.yaml:1:10: stages[0]: expected one verb with its settings, found 5"),
    ("stages: [{}]", "recipe.yaml:1:10: stages[0]: expected one verb with its settings, found an empty mapping"),
    ("stages:\n- pairs:\n  count: 4", "recipe.yaml:2:3: stages[0]: expected one verb with its settings, found 2 keys (pairs, count); settings are indented deeper than their verb"),
    ("stages:\n- piars: {conut: 4}", "recipe.yaml:2:3: stages[0]: unknown stage 'piars', did you mean 'pairs'? (pairs, reflow, boss, eval)\n"
                                     "recipe.yaml:2:11: pairs.conut: unknown key, did you mean 'count'?"),
    ("stages:\n- optimise: {conut: 4}", "recipe.yaml:2:3: stages[0]: unknown stage 'optimise' (pairs, reflow, boss, eval)"),
    ("stages:\n- pairs: 4", "recipe.yaml:2:10: stages[0]: expected the settings of 'pairs', found 4"),
    # names
    (PAIRS + "      name: My pairs", "recipe.yaml:3:13: My pairs.name: expected up to 64 lower-case letters, digits and hyphens, the first no hyphen, found 'My pairs'"),
    (PAIRS + "      name: -pairs", "recipe.yaml:3:13: -pairs.name: expected up to 64 lower-case letters, digits and hyphens, the first no hyphen, found '-pairs'"),
    (PAIRS + "      name: ../pairs", "recipe.yaml:3:13: ../pairs.name: expected up to 64 lower-case letters, digits and hyphens, the first no hyphen, found '../pairs'"),
    (PAIRS + "      name: teacher", "recipe.yaml:3:13: teacher.name: the name 'teacher' is reserved; choose another"),
    (PAIRS + "      name: 3", 'recipe.yaml:3:13: pairs.name: expected text, found 3; write "3"'),
    (PAIRS + "  - pairs:", "recipe.yaml:3:5: pairs.name: already the name of the stage in line 2; give it another"),
    (PAIRS + "  - boss: {name: pairs, model: a.safetensors}", "recipe.yaml:3:18: pairs.name: already the name of the stage in line 2; give it another\n"
                                                              "recipe.yaml:3:32: pairs.model: 'a.safetensors' does not exist (paths start from the recipe's folder)"),
    # keys of a stage
    (PAIRS + "      conut: 4", "recipe.yaml:3:7: pairs.conut: unknown key, did you mean 'count'?"),
    (PAIRS + "      Count: 4", "recipe.yaml:3:7: pairs.Count: unknown key, did you mean 'count'?"),
    (PAIRS + "      lr: 4", "recipe.yaml:3:7: pairs.lr: unknown key; known are name, count, solver, dtype"),
    (PAIRS + "      no: 4", "recipe.yaml:3:7: pairs.no: unknown key; known are name, count, solver, dtype"),
    (PAIRS + "      '': 4", "recipe.yaml:3:7: pairs.'': unknown key; known are name, count, solver, dtype"),
    (PAIRS + '      "a\\nb": 4', r"recipe.yaml:3:7: pairs.'a\nb': unknown key; known are name, count, solver, dtype"),
    (PAIRS + "      name: my-pairs\n      conut: 4", "recipe.yaml:4:7: my-pairs.conut: unknown key, did you mean 'count'?"),
    (PAIRS + "  - reflow: {}", "recipe.yaml:3:5: reflow.steps: is required but missing"),
    (PAIRS + "  - reflow: {step: 4}", "recipe.yaml:3:14: reflow.step: unknown key, did you mean 'steps'?"),
    # values of a stage
    (PAIRS + "      count:", "recipe.yaml:3:13: pairs.count: expected an integer, found nothing"),
    (PAIRS + "      count: '4'", "recipe.yaml:3:14: pairs.count: expected an integer, found '4'; write 4"),
    (PAIRS + "      count: 20_000", "recipe.yaml:3:14: pairs.count: expected an integer, found '20_000'; write 20000"),
    (PAIRS + "      count: 4.5", "recipe.yaml:3:14: pairs.count: expected an integer, found 4.5"),
    (PAIRS + "      count: .inf", "recipe.yaml:3:14: pairs.count: expected an integer, found inf"),
    (PAIRS + "      count: 3", "recipe.yaml:3:14: pairs.count: expected a multiple of 2, found 3"),
    (PAIRS + "      count: {of: 3}", "recipe.yaml:3:14: pairs.count: expected an integer, found a mapping"),
    (PAIRS + "      solver: huen", "recipe.yaml:3:15: pairs.solver: unknown solver 'huen', did you mean 'heun'? (euler, heun)"),
    (PAIRS + "      solver: 1", "recipe.yaml:3:15: pairs.solver: expected 'euler' or 'heun', found 1"),
    (PAIRS + "      dtype: half", "recipe.yaml:3:14: pairs.dtype: unknown dtype 'half' (float16, float32)"),
    (REFLOW + "      compiled: no", "recipe.yaml:5:17: reflow.compiled: expected true or false, found 'no'; write false"),
    (REFLOW + "      compiled: 1", "recipe.yaml:5:17: reflow.compiled: expected true or false, found 1"),
    (REFLOW + "      batch_size: atuo", "recipe.yaml:5:19: reflow.batch_size: expected an integer or 'auto', found 'atuo'"),
    (REFLOW + "      optimizer: {lr: '1e-4'}", "recipe.yaml:5:23: reflow.optimizer.lr: expected a number, found '1e-4'; write 0.0001"),
    (REFLOW + "      optimizer: {lr: fast}", "recipe.yaml:5:23: reflow.optimizer.lr: expected a number, found 'fast'"),
    (REFLOW + "      optimizer: {lr: .nan}", "recipe.yaml:5:23: reflow.optimizer.lr: expected a finite number, found nan"),
    (REFLOW + "      optimizer: {lr: 0}", "recipe.yaml:5:23: reflow.optimizer.lr: expected a number > 0.0, found 0"),
    (REFLOW + "      optimizer: {betas: [0.9]}", "recipe.yaml:5:26: reflow.optimizer.betas: expected more values, found a list of 1"),
    (REFLOW + "      optimizer: {betas: [0.9, 0.99, 1]}", "recipe.yaml:5:26: reflow.optimizer.betas: expected 2 or fewer values, found a list of 3"),
    (REFLOW + "      optimizer: {betas: [0.9, b]}", "recipe.yaml:5:32: reflow.optimizer.betas[1]: expected a number, found 'b'"),
    (REFLOW + "      optimizer: adam", "recipe.yaml:5:18: reflow.optimizer: expected a mapping, found 'adam'; write {name: adam}"),
    (REFLOW + "      optimizer: [adam]", "recipe.yaml:5:18: reflow.optimizer: expected a mapping, found a list of 1"),
    # choices
    (REFLOW + "      loss: {nmae: pseudo-huber}", "recipe.yaml:5:14: reflow.loss.nmae: unknown key, did you mean 'name'?"),
    (REFLOW + "      loss: {name: psuedo-huber}", "recipe.yaml:5:20: reflow.loss.name: unknown loss 'psuedo-huber', did you mean 'pseudo-huber'? (pseudo-huber, lpips-huber)"),
    (REFLOW + "      loss: {name: 2}", "recipe.yaml:5:20: reflow.loss.name: unknown loss '2' (pseudo-huber, lpips-huber)"),
    (REFLOW + "      loss: {c: 0.1}", "recipe.yaml:5:7: reflow.loss.name: is required but missing (pseudo-huber, lpips-huber)"),
    (REFLOW + "      loss: {name: lpips-huber, c: 0.1}", "recipe.yaml:5:33: reflow.loss.c: unknown key; known are name, divide_by_t"),
    (REFLOW + "      loss: lpips-huber", "recipe.yaml:5:13: reflow.loss: expected a mapping, found 'lpips-huber'; write {name: lpips-huber}"),
    (REFLOW + "      loss: 3", "recipe.yaml:5:13: reflow.loss: expected a mapping, found 3"),
    (REFLOW + "      timesteps: {name: a, a: x}", "recipe.yaml:5:31: reflow.timesteps.a: expected a number, found 'x'"),
    (REFLOW + "      terms: [{name: pseudo-huber, c: x}, 3]", "recipe.yaml:5:39: reflow.terms[0].c: expected a number, found 'x'\n"
                                                              "recipe.yaml:5:43: reflow.terms[1]: expected a mapping, found 3"),
    # lists, and either this or that
    (REFLOW + "  - boss: {nfe: x}", "recipe.yaml:5:17: boss.nfe: expected an integer or a list, found 'x'"),
    (REFLOW + "  - boss: {nfe: [2, x]}", "recipe.yaml:5:21: boss.nfe[1]: expected an integer, found 'x'"),
    (REFLOW + "  - boss: {nfe: [0]}", "recipe.yaml:5:18: boss.nfe[0]: expected a number > 0, found 0"),
    (REFLOW + "  - boss: {knots: 0.5}", "recipe.yaml:5:19: boss.knots: expected a list, found 0.5; write [0.5]"),
    (REFLOW + "  - boss: {knots: [0.1, 0.2, 0.3]}", "recipe.yaml:5:19: boss.knots: expected 2 or fewer values, found a list of 3"),
    (REFLOW + "  - boss: {nfe: 200}", "recipe.yaml:5:5: boss: nfe 200 is more than the grid of 100; make it finer"),
    (REFLOW + "  - eval: {note: abcdefghi}", "recipe.yaml:5:18: eval.note: expected 5 or fewer characters, found 'abcdefghi'"),
    # references
    ("stages:\n- reflow: {steps: 1}", "recipe.yaml:2:3: reflow.pairs: no earlier stage makes pairs; add one above (pairs), or give a path"),
    (PAIRS + "  - boss:", "recipe.yaml:3:5: boss.model: no earlier stage makes a model; add one above (reflow), or give a path"),
    (REFLOW + "      pairs: paris", "recipe.yaml:5:14: reflow.pairs: unknown stage 'paris', did you mean 'pairs'? (pairs)"),
    (REFLOW + "      init: paris", "recipe.yaml:5:13: reflow.init: unknown stage 'paris' (teacher)"),
    (REFLOW + "      init: pairs", "recipe.yaml:5:13: reflow.init: expected a model, 'pairs' makes pairs (teacher)"),
    (REFLOW + "  - eval:\n  - boss: {model: eval}", "recipe.yaml:6:19: boss.model: expected a model, 'eval' makes an evaluation (reflow)"),
    (REFLOW + "      init: reflow", "recipe.yaml:5:13: reflow.init: a stage cannot be its own input (teacher)"),
    (REFLOW + "      pairs: teacher", "recipe.yaml:5:14: reflow.pairs: expected pairs, found the teacher (pairs)"),
    (REFLOW + "      pairs: more\n  - pairs: {name: more}", "recipe.yaml:5:14: reflow.pairs: stage 'more' comes later, in line 6; move it up (pairs)"),
    (REFLOW + "      pairs: [pairs]", "recipe.yaml:5:14: reflow.pairs: expected text, found a list of 1"),
    (REFLOW + "      pairs: 3", 'recipe.yaml:5:14: reflow.pairs: expected text, found 3; write "3"'),
    (REFLOW + "      pairs: ''", "recipe.yaml:5:14: reflow.pairs: unknown stage '' (pairs)"),
    (REFLOW + "      init: nets/a.safetensors", "recipe.yaml:5:13: reflow.init: 'nets/a.safetensors' does not exist (paths start from the recipe's folder)"),
    (REFLOW + "  - eval: {models: reflow}", "recipe.yaml:5:20: eval.models: expected a list, found 'reflow'; write [reflow]"),
    (REFLOW + "  - eval: {models: [reflow, relfow, pairs]}", "recipe.yaml:5:29: eval.models[1]: unknown stage 'relfow', did you mean 'reflow'? (teacher, reflow)\n"
                                                             "recipe.yaml:5:37: eval.models[2]: expected a model, 'pairs' makes pairs (teacher, reflow)"),
    (REFLOW + "  - eval: {schedule: boss}", "recipe.yaml:5:22: eval.schedule: unknown stage 'boss'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_recipe_is_refused_in_exactly_these_words(text: str | bytes, message: str) -> None:
    assert complaint(text) == message


def test_the_table_is_as_large_as_promised() -> None:
    assert len(BAD) >= 70
    assert len({message for _, message in BAD}) > 0.95 * len(BAD)


def test_every_choice_without_a_name_is_found() -> None:
    assert complaint(REFLOW + "      terms: [{c: 1}, {nme: lpips-huber, d: 2}]").split("\n") == [
        "recipe.yaml:5:15: reflow.terms[0].name: is required but missing (pseudo-huber, lpips-huber)",
        "recipe.yaml:5:24: reflow.terms[1].nme: unknown key, did you mean 'name'?",
        "recipe.yaml:5:42: reflow.terms[1].d: unknown key; known are name, c, divide_by_t",
    ]


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_text() -> None:
    text = """\
seed: -1
out: ../elsewhere
stages:
  - pairs: {count: 20.0, count: 4, sovler: heun}
  - relfow:
      pairs: paris
      loss: {nmae: lpips-huber}
      optimizer: {lr: 2}
  - boss: {knots: [3, 4]}
tacher: builtin
"""
    assert complaint(text).split("\n") == [
        "recipe.yaml:1:7: seed: expected a number >= 0, found -1",
        "recipe.yaml:2:6: out: expected a folder inside the current one, found '../elsewhere'; "
        "use --out for another place",
        "recipe.yaml:4:20: pairs.count: expected an integer, found 20.0; write 20",
        "recipe.yaml:4:26: duplicate key 'count', already in line 4",
        "recipe.yaml:4:36: pairs.sovler: unknown key, did you mean 'solver'?",
        "recipe.yaml:5:5: stages[1]: unknown stage 'relfow', did you mean 'reflow'? "
        "(pairs, reflow, boss, eval)",
        "recipe.yaml:5:5: reflow.steps: is required but missing",
        "recipe.yaml:6:14: reflow.pairs: unknown stage 'paris', did you mean 'pairs'? (pairs)",
        "recipe.yaml:7:14: reflow.loss.nmae: unknown key, did you mean 'name'?",
        "recipe.yaml:8:23: reflow.optimizer.lr: expected a number <= 1.0, found 2",
        "recipe.yaml:9:20: boss.knots[0]: expected a number <= 1.0, found 3",
        "recipe.yaml:9:23: boss.knots[1]: expected a number <= 1.0, found 4",
        "recipe.yaml:10:1: tacher: unknown key, did you mean 'teacher'?",
    ]


class Precision(Enum):
    SINGLE = "float32"
    HALF = "float16"


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise AssertionError(f"an even number, {value}, has a middle")
    return value


class Everything(Settings):
    """A field for every type of error that is translated, and two that are not."""

    flag: bool = False
    whole: int = 1
    number: float = Field(1.0, gt=0, lt=10)
    closed: int = Field(4, ge=0, le=8, multiple_of=2)
    text: str = Field("abc", min_length=2, max_length=4, pattern="^[a-z]+$")
    choice: Literal["x", "y"] = "x"
    kind: Precision = Precision.SINGLE
    nothing: None = None
    items: list[int] = Field([1], min_length=1, max_length=2)
    pair: tuple[int, int] = (1, 2)
    bag: set[int] = set()
    frozen: frozenset[int] = frozenset()
    table: dict[str, int] = {}
    inner: Adam = Adam()
    odd: Annotated[int, AfterValidator(_odd)] = 1
    raw: bytes = b""


MISFITS: list[tuple[str, str, str]] = [
    ("bool_type", "flag: maybe", "flag: expected true or false, found 'maybe'"),
    ("int_type", "whole: x", "whole: expected an integer, found 'x'"),
    ("float_type", "number: x", "number: expected a number, found 'x'"),
    ("finite_number", "number: -.inf", "number: expected a finite number, found -inf"),
    ("greater_than", "number: 0", "number: expected a number > 0.0, found 0"),
    ("less_than", "number: 10.5", "number: expected a number < 10.0, found 10.5"),
    ("greater_than_equal", "closed: -2", "closed: expected a number >= 0, found -2"),
    ("less_than_equal", "closed: 10", "closed: expected a number <= 8, found 10"),
    ("multiple_of", "closed: 3", "closed: expected a multiple of 2, found 3"),
    ("string_type", "text: 1.5", 'text: expected text, found 1.5; write "1.5"'),
    ("string_too_short", "text: a", "text: expected 2 or more characters, found 'a'"),
    ("string_too_long", "text: abcde", "text: expected 4 or fewer characters, found 'abcde'"),
    ("string_pattern_mismatch", "text: ABC", "text: expected text like ^[a-z]+$, found 'ABC'"),
    ("literal_error", "choice: [x]", "choice: expected 'x' or 'y', found a list of 1"),
    ("enum", "kind: {}", "kind: expected 'float32' or 'float16', found an empty mapping"),
    ("none_required", "nothing: 1", "nothing: expected nothing, found 1"),
    ("list_type", "items: 1", "items: expected a list, found 1; write [1]"),
    ("too_short", "items: []", "items: expected 1 or more values, found an empty list"),
    ("too_long", "items: [1, 2, 3]", "items: expected 2 or fewer values, found a list of 3"),
    ("tuple_type", "pair: {}", "pair: expected a list, found an empty mapping"),
    ("missing", "pair: [1]", "pair: expected more values, found a list of 1"),
    ("set_type", "bag: true", "bag: expected a list, found true"),
    ("frozen_set_type", "frozen: x", "frozen: expected a list, found 'x'"),
    ("dict_type", "table: x", "table: expected a mapping, found 'x'"),
    ("model_type", "inner: x", "inner: expected a mapping, found 'x'"),
    ("assertion_error", "odd: 4", "odd: an even number, 4, has a middle"),
    ("bytes_type", "raw: 4", "raw: expected something else (Input should be a valid bytes), found 4"),
    # not by that kind, and with a hint
    ("", "kind: float61", "kind: unknown kind 'float61', did you mean 'float16'? (float32, float16)"),
    ("", "flag: Off", "flag: expected true or false, found 'Off'; write false"),
    ("", "number: ' 1_0.5 '", "number: expected a number, found ' 1_0.5 '; write 10.5"),
    ("", "number: '.inf'", "number: expected a number, found '.inf'"),
    ("", "whole: '1.5'", "whole: expected an integer, found '1.5'"),
    ("", "items: a", "items: expected a list, found 'a'; write [a]"),
    ("", 'items: "a\\nb"', r"items: expected a list, found 'a\nb'"),
    ("", "items: " + "a" * 60, "items: expected a list, found '" + "a" * 58 + "…"),
    ("", "whole: 1e90", "whole: expected an integer, found 1e+90"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "message"), MISFITS)
def test_every_kind_of_misfit_has_our_words(kind: str, text: str, message: str) -> None:
    node, _ = yaml_nodes.read(text, "a.yaml")
    found = check(Everything, node, "")
    assert isinstance(found, list)
    assert [f"{problem.key}: {problem.message}" for problem in found] == [message]


def test_no_kind_of_misfit_is_left_out() -> None:
    assert set(EXPECTED) <= {kind for kind, _, _ in MISFITS}
    assert set(EXPECTED) <= set(get_args(ErrorType))


# --- files -----------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load(path, VERBS)
    return str(caught.value)


def test_what_cannot_be_read_is_named_in_one_line(folder: Path) -> None:
    (folder / "sub.yaml").mkdir()
    (folder / "loop.yaml").symlink_to("loop.yaml")
    assert refusal(Path("recipe.yaml")) == "recipe.yaml: no such file"
    assert refusal(Path("sub.yaml")) == "sub.yaml: a folder, expected a recipe file"
    assert refusal(Path("sub.yaml/x")) == "sub.yaml/x: no such file"
    assert refusal(Path("loop.yaml")).startswith("loop.yaml: cannot be read: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_file_without_permission_is_named(folder: Path) -> None:
    (folder / "recipe.yaml").touch(mode=0o000)
    assert refusal(Path("recipe.yaml")) == "recipe.yaml: cannot be read: Permission denied"


def test_ten_megabytes_are_refused_unread(folder: Path) -> None:
    with open("big.yaml", "wb") as file:
        file.truncate(10_000_000)
    message = "big.yaml: larger than 1,000,000 bytes, which is the most"
    assert refusal(Path("big.yaml")) == message


def test_a_recipe_knows_its_file(folder: Path) -> None:
    data = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    (folder / "my flow.yaml").write_bytes(data)
    recipe = load(Path("my flow.yaml"), VERBS)
    assert recipe.path == Path("my flow.yaml")
    assert recipe.out == Path("runs/my flow")
    assert recipe.text == GOOD.replace("\n", "\r\n")
    assert recipe.sha256 == hashlib.sha256(data).hexdigest()


# --- what a good recipe becomes ----------------------------------------------------------------------


def test_defaults_names_and_references_are_filled_in() -> None:
    recipe = read(GOOD)
    assert (recipe.seed, recipe.out, recipe.teacher) == (3, Path("runs/recipe"), "builtin:shapes")
    assert recipe.stages == (
        Pairs(name="pairs", count=10, solver="heun"),
        Reflow(name="reflow", pairs="pairs", init="teacher", steps=2000),
        Boss(name="boss", model="reflow", nfe=(2, 4)),
        Evaluate(name="eval", models=("reflow",)),
    )
    assert recipe.references == {
        "pairs": {},
        "reflow": {"pairs": "pairs", "init": "teacher"},
        "boss": {"model": "reflow"},
        "eval": {"models": ("reflow",), "schedule": None, "against": ("teacher",)},
    }


def test_references_lead_to_the_nearest_earlier_stage_unless_they_say_otherwise() -> None:
    recipe = read("""\
stages:
  - pairs: {name: first}
  - pairs: {name: second}
  - reflow: {steps: 1, pairs: first}
  - reflow: {steps: 1, name: again, init: teacher}
  - reflow: {steps: 1, name: third}
  - boss: {model: again}
  - boss: {name: late}
  - eval: {models: [teacher, again, reflow], schedule: boss, against: [again]}
""")
    assert recipe.references == {
        "first": {},
        "second": {},
        "reflow": {"pairs": "first", "init": "teacher"},
        "again": {"pairs": "second", "init": "teacher"},
        "third": {"pairs": "second", "init": "again"},
        "boss": {"model": "again"},
        "late": {"model": "third"},
        "eval": {
            "models": ("teacher", "again", "reflow"),
            "schedule": "boss",
            "against": ("again",),
        },
    }


def test_paths_start_from_the_recipe_and_stay_as_written_in_the_settings(folder: Path) -> None:
    (folder / "nets" / "old").mkdir(parents=True)
    (folder / "nets" / "a.safetensors").touch()
    text = """\
teacher: {name: a.safetensors, guidance: 2.0}
stages:
  - reflow: {steps: 1, pairs: ../nets/old, init: a.safetensors}
"""
    recipe = read(text, path="nets/recipe.yaml")
    assert recipe.teacher == {"name": "nets/a.safetensors", "guidance": 2.0}
    assert recipe.references["reflow"] == {"pairs": "nets/../nets/old", "init": "nets/a.safetensors"}
    settings = recipe.settings_json("reflow")
    assert (settings["pairs"], settings["init"]) == ("../nets/old", "a.safetensors")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("builtin", "builtin"),
        ("builtin:digits", "builtin:digits"),
        ("diffusers:stabilityai/sd-turbo", "diffusers:stabilityai/sd-turbo"),
        ("{name: analytic:ring, modes: [1, 2]}", {"name": "analytic:ring", "modes": [1, 2]}),
    ],
)
def test_teachers(written: str, meant: object) -> None:
    assert read(PAIRS + f"teacher: {written}").teacher == meant


def test_settings_are_json_and_depend_on_meaning_alone() -> None:
    brief = read(GOOD)
    verbose = read("""\
seed: 3
stages:
- pairs:  # the same in other words
    solver: "heun"
    count: 010
- reflow: {loss: {divide_by_t: false, name: 'lpips-huber'}, name: reflow, init: teacher, steps: 0x7d0,
           optimizer: {betas: [.9, 999e-3], lr: 2.0E-4}}
- boss: {nfe: [2, 4], grid: +100}
- eval: {schedule: ~}
""")
    for name in ("pairs", "reflow", "boss", "eval"):
        settings = brief.settings_json(name)
        assert json.dumps(settings) == json.dumps(verbose.settings_json(name))
        assert json.loads(json.dumps(settings)) == settings
    assert brief.settings_json("boss") == {
        "name": "boss",
        "model": "reflow",
        "nfe": [2, 4],
        "grid": 100,
        "knots": [],
    }


def test_settings_cannot_be_changed() -> None:
    recipe = read(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.stages[0].name = "other"


def test_later_problems_find_the_place_of_their_key() -> None:
    recipe = read(GOOD, "boss.grid=7")
    assert [
        str(recipe.problem(key, "no"))
        for key in ("seed", "reflow.loss.name", "reflow.loss.c", "reflow.optimizer.lr", "boss.nfe[1]",
                    "boss.grid", "eval", "teacher")
    ] == [
        "recipe.yaml:1:1: seed: no",
        "recipe.yaml:6:14: reflow.loss.name: no",
        "recipe.yaml:6:7: reflow.loss.c: no",
        "recipe.yaml:4:5: reflow.optimizer.lr: no",
        "recipe.yaml:7:21: boss.nfe[1]: no",
        "-s boss.grid=7: boss.grid: no",
        "recipe.yaml:8:5: eval: no",
        "recipe.yaml:1:1: teacher: no",
    ]  # fmt: skip


# --- where results go -------------------------------------------------------------------------------


def test_the_caller_may_send_results_anywhere(folder: Path) -> None:
    text = PAIRS + "out: /nowhere"
    assert parse(text.encode(), Path("a.yaml"), VERBS, out=Path("/tmp/x")).out == Path("/tmp/x")


def test_links_do_not_lead_results_out_of_the_current_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (folder / "inside").mkdir()
    (folder / "here").symlink_to(folder / "inside")
    (folder / "runs").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    assert read(PAIRS + "out: here/x").out == Path("here/x")
    way_out = "leads out of the current folder by a link; use --out for another place"
    assert complaint(PAIRS + "out: runs/x") == f"recipe.yaml:3:6: out: 'runs/x' {way_out}"
    assert complaint(PAIRS) == f"recipe.yaml:1:1: out: 'runs/recipe' {way_out}"


def test_results_do_not_go_into_a_file(folder: Path) -> None:
    (folder / "runs").touch()
    assert complaint(PAIRS) == "recipe.yaml:1:1: out: expected a folder, 'runs/recipe' is or is in a file"


# --- overrides --------------------------------------------------------------------------------------


def test_overrides_replace_add_and_reach_into_choices() -> None:
    recipe = read(
        GOOD,
        "seed=7",
        "out=runs/other",
        "teacher={name: analytic:ring, modes: 3}",
        "reflow.steps=500",
        "reflow.optimizer.lr=1e-3",
        "reflow.loss={name: pseudo-huber, c: 1}",
        "reflow.loss.c=0.5",
        "boss.nfe=[1, 2]",
        "eval.name=numbers",
        "numbers.note=",
        "numbers.note='7'",
    )
    assert (recipe.seed, recipe.out) == (7, Path("runs/other"))
    assert recipe.teacher == {"name": "analytic:ring", "modes": 3}
    _, reflow, boss, evaluate = recipe.stages
    assert isinstance(reflow, Reflow)
    assert isinstance(boss, Boss)
    assert isinstance(evaluate, Evaluate)
    assert (reflow.steps, reflow.optimizer, reflow.loss) == (500, Adam(lr=1e-3), PseudoHuber(c=0.5))
    assert boss.nfe == (1, 2)
    assert (evaluate.name, evaluate.note) == ("numbers", "7")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reflow", "-s reflow: expected KEY=VALUE, as in reflow.steps=500"),
        ("", "-s '': expected KEY=VALUE, as in reflow.steps=500"),
        ("=3", "-s =3: unknown stage or key '' (pairs, reflow, boss, eval, seed, out, teacher)"),
        ("reflow=3", "-s reflow=3: expected one key of a stage, as in reflow.steps=500"),
        ("stages=[]", "-s stages=[]: expected one key of a stage, as in reflow.steps=500"),
        ("relfow.steps=5", "-s relfow.steps=5: unknown stage or key 'relfow', did you mean 'reflow'? (pairs, reflow, boss, eval, seed, out, teacher)"),
        ("sed=5", "-s sed=5: unknown stage or key 'sed', did you mean 'seed'? (pairs, reflow, boss, eval, seed, out, teacher)"),
        ("reflow.stesp=5", "-s reflow.stesp=5: reflow.stesp: unknown key, did you mean 'steps'?"),
        ("reflow.steps=many", "-s reflow.steps=many: reflow.steps: expected an integer, found 'many'"),
        ("reflow.steps=", "-s reflow.steps=: reflow.steps: expected an integer, found nothing"),
        ("reflow.steps.more=5", "-s reflow.steps.more=5: 'steps' has no keys, it is 2000"),
        ("reflow.loss.nmae=x", "-s reflow.loss.nmae=x: reflow.loss.nmae: unknown key, did you mean 'name'?"),
        ("reflow.loss.name=huber", "-s reflow.loss.name=huber: reflow.loss.name: unknown loss 'huber', did you mean 'lpips-huber'? (pseudo-huber, lpips-huber)"),
        ("reflow.optimizer.betas=[1, x]", "-s reflow.optimizer.betas=[1, x]: reflow.optimizer.betas[1]: expected a number, found 'x'"),
        ("reflow.optimizer=adam", "-s reflow.optimizer=adam: reflow.optimizer: expected a mapping, found 'adam'; write {name: adam}"),
        ("reflow.pairs=paris", "-s reflow.pairs=paris: reflow.pairs: unknown stage 'paris', did you mean 'pairs'? (pairs)"),
        ("reflow.loss={name: a", "-s reflow.loss={name: a: not valid YAML: did not find expected ',' or '}' (while parsing a flow mapping that begins in line 1)"),
        ("reflow.loss={c: 1, c: 2}", "-s reflow.loss={c: 1, c: 2}: duplicate key 'c', already in line 1"),
        ("reflow.loss=&x 1", "-s reflow.loss=&x 1: anchor 'x' is not supported; remove it"),
        ("seed=3.5", "-s seed=3.5: seed: expected an integer, found 3.5"),
        ("out=..", "-s out=..: out: expected a folder inside the current one, found '..'; use --out for another place"),
        ("teacher=ring", "-s teacher=ring: teacher: 'ring' does not exist (paths start from the recipe's folder); a teacher that ships is builtin:shapes"),
        ("reflow." + "a." * 99 + "b=1", "-s 'reflow." + "a." * 25 + "a…: expected KEY=VALUE, as in reflow.steps=500"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named_as_it_was_typed(override: str, message: str) -> None:
    assert complaint(GOOD, override) == message


def test_problems_of_overrides_come_after_those_of_the_file() -> None:
    text = complaint(GOOD.replace("seed: 3", "sed: 3"), "reflow.steps=x", "boss.grid=y")
    assert [line.split(":")[0] for line in text.split("\n")] == [
        "recipe.yaml",
        "-s reflow.steps=x",
        "-s boss.grid=y",
    ]


# --- YAML -------------------------------------------------------------------------------------------

PARSERS = [getattr(yaml, "CSafeLoader", yaml.SafeLoader), yaml.SafeLoader]


@pytest.fixture(params=PARSERS, ids=["libyaml", "pure"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two parsers in turn."""
    monkeypatch.setattr(yaml_nodes, "_PARSER", request.param)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("nil", "nil"),
        ("true", True), ("False", False), ("yes", "yes"), ("no", "no"), ("on", "on"), ("y", "y"),
        ("0", 0), ("-12", -12), ("+3", 3), ("012", 12), ("0o17", 15), ("0x1F", 31), ("08", 8),
        ("1_000", "1_000"), ("12:30", "12:30"), ("1.2.3", "1.2.3"), ("0b11", "0b11"), ("-", "-"),
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e+3", -1500.0), ("1e999", math.inf),
        (".inf", math.inf), ("-.INF", -math.inf), ("inf", "inf"), ("nan", "nan"), (".", "."), ("e5", "e5"),
        ("2001-12-14", "2001-12-14"), ("=", "="), ("9" * 1000, int("9" * 1000)), ("9" * 5000, math.inf),
        ("\u0663", "\u0663"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = scalar(text)
    assert (found, type(found)) == (value, type(value))


def test_nan_is_a_number() -> None:
    assert math.isnan(scalar(".nan"))  # type: ignore[arg-type]


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("odd", list("\x0b\x1b\x7f\x80\x85\u2028\u2029\ufeff\uffff\ud800"))
def test_control_characters_are_refused_where_they_are(odd: str) -> None:
    for text in (f"a: 1\nbc{odd}: 2", f"a: 1\nb:{odd}", f"a: 1\n# {odd}", f'a: 1\nb "{odd}" c'):
        with pytest.raises(RecipeError, match=r"^a.yaml:2:\d: control character '.*' is not allowed$"):
            yaml_nodes.read(text, "a.yaml")


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("odd", list("\xa0\xad\u2027\u202a\ue000\ufdd0\ufefe\ufffd\U0001f300\U0010ffff"))
def test_all_other_characters_are_text(odd: str) -> None:
    text = f"{odd}a: x{odd}y\nb: '{odd}'  # {odd}"
    assert yaml_nodes.read(text, "a.yaml")[0].plain() == {f"{odd}a": f"x{odd}y", "b": odd}


def places(node: yaml_nodes.Node) -> dict[str, tuple[object, object]]:
    def at(place: Place | None) -> str | None:
        return place and f"{place.line}:{place.column}"

    return {key: (at(each.key), at(each.place)) for key, each in yaml_nodes.walk(node)}


@pytest.mark.usefixtures("parser")
def test_keys_and_values_know_line_and_column() -> None:
    text = """\
# a comment
a: 1
"b":
  - {c: x, "d": [2, '3']}
  -   é: |
        block
"""
    node, problems = yaml_nodes.read(text, "a.yaml")
    assert problems == []
    assert node.plain() == {"a": 1, "b": [{"c": "x", "d": [2, "3"]}, {"é": "block\n"}]}
    assert places(node) == {
        "": (None, "2:1"),
        "a": ("2:1", "2:4"),
        "b": ("3:1", "4:3"),
        "b[0]": (None, "4:5"),
        "b[0].c": ("4:6", "4:9"),
        "b[0].d": ("4:12", "4:17"),
        "b[0].d[0]": (None, "4:18"),
        "b[0].d[1]": (None, "4:21"),
        "b[1]": (None, "5:7"),
        "b[1].é": ("5:7", "5:10"),
    }


def test_values_on_their_own_are_at_one_place() -> None:
    place = Place("-s a=...")
    node = read_value("{a: [1, {b: no}]}", place)
    assert node.plain() == {"a": [1, {"b": "no"}]}
    assert {each.heading for _, each in yaml_nodes.walk(node)} == {place}


TEXT = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@patient
@given(value=JSON)
def test_json_is_read_as_it_is(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False).replace("Infinity", ".inf")
    assert yaml_nodes.read(text, "a.yaml")[0].plain() == value


# --- hostile texts ----------------------------------------------------------------------------------


def laughs(levels: int) -> str:
    lines = [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(["a0: &a0 [ha, ha, ha]", *lines])


def merges(levels: int) -> str:
    lines = [f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(["a0: &a0 {k: v}", *lines])


HOSTILE = {
    "brackets": ("[" * 999_999, "recipe.yaml:1:66: nested more than 64 levels deep"),
    "a million brackets": ("[" * 10**6, "recipe.yaml:1:66: nested more than 64 levels deep"),
    "too many brackets": ("[" * 10**6 + "\n", "recipe.yaml: larger than 1,000,000 bytes, which is the most"),
    "braces": ("{a: " * 200_000, "recipe.yaml:1:258: nested more than 64 levels deep"),
    "dashes": ("- " * 400_000, "recipe.yaml:1:131: nested more than 64 levels deep"),
    "questions": ("? " * 400_000, "recipe.yaml:1:3: a list or mapping as a key; keys are text"),
    "stairs": ("".join(f"{' ' * i}a:\n" for i in range(1200)), "recipe.yaml:65:65: nested more than 64 levels deep"),
    "laughs": (laughs(30), "recipe.yaml:1:5: anchor 'a0' is not supported; remove it\n"
                           "recipe.yaml:2:5: anchor 'a1' is not supported; remove it\n"
                           "recipe.yaml:2:10: alias 'a0' is not supported; write the value out"),
    "merges": (merges(30), "recipe.yaml:1:5: anchor 'a0' is not supported; remove it\n"
                           "recipe.yaml:2:5: anchor 'a1' is not supported; remove it\n"
                           "recipe.yaml:3:3: merge key '<<' is not supported; write the keys out"),
    "items": ("- a\n" * 200_000, "recipe.yaml:10000:3: more than 10,000 values"),
    "a long value": (PAIRS + "out: " + "x" * 900_000, None),
    "a long number": (PAIRS + "seed: " + "9" * 900_000, "recipe.yaml:3:7: seed: expected an integer, found inf"),
    "a long base": (PAIRS + "seed: 0x" + "f" * 900_000, "recipe.yaml:3:7: seed: expected an integer, found '0x" + "f" * 56 + "…"),
    "a long key": (PAIRS + "? " + "x" * 900_000, "recipe.yaml:3:3: '" + "x" * 58 + "…: unknown key; known are seed, out, teacher, stages"),
    "a long name": (PAIRS + "      name: " + "x" * 900_000, "recipe.yaml:3:13: '" + "x" * 58 + "….name: expected up to 64 lower-case letters, digits and hyphens, the first no hyphen, found '" + "x" * 58 + "…"),
    "a long anchor": ("seed: *" + "x" * 900_000, "recipe.yaml:1:7: alias '" + "x" * 58 + "… is not supported; write the value out"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_answered_briefly(name: str) -> None:
    """And quickly: none of these ends in a lifetime if anything in it is expanded or quadratic."""
    text, message = HOSTILE[name]
    if message is None:
        assert read(text).out == Path("x" * 900_000)
    else:
        assert complaint(text) == message


def test_thousands_of_mistakes_are_counted() -> None:
    with pytest.raises(RecipeError) as caught:
        read(PAIRS + "".join(f"      cuont{i}: 1\n" for i in range(1000)))
    assert len(caught.value.problems) == 1000
    assert str(caught.value).count("\n") == 20
    assert str(caught.value).endswith("\nand 980 more problems")


WORDS = [
    *("seed", "out", "teacher", "stages", "pairs", "reflow", "boss", "eval", "name", "steps", "loss"),
    *("nfe", "models", "model", "schedule", "count", "optimizer", "lr", "betas", "pseudo-huber", "a"),
    *("lpips-huber", "builtin", "1", "-3", "2.5", ".nan", "no", "true", "~", "'x'", '"\\0"', "/", ".."),
    *(": ", ":\n", "\n", "\n  ", "\n    ", "- ", "\n- ", "[", "]", "{", "}", ", ", "&x ", "*x", "<<", "!!int "),
    *("|", ">", "# ", "? ", "---\n", "%YAML 1.1\n", "\t", "\x85", "\ufeff", "\U0001f300"),
]  # fmt: skip


def is_a_recipe_or_refused(data: bytes, *overrides: str) -> bool:
    try:
        recipe = read(data, *overrides)
    except RecipeError as error:
        assert error.problems
        assert all(line.isprintable() for line in str(error).split("\n"))
        return False
    assert recipe.stages
    for stage in recipe.stages:
        json.dumps(recipe.settings_json(stage.name), allow_nan=False)
    return True


@patient
@given(data=st.binary(max_size=40))
def test_any_bytes_are_a_recipe_or_refused(data: bytes) -> None:
    is_a_recipe_or_refused(data)


@patient
@given(words=st.lists(st.sampled_from(WORDS), max_size=15))
def test_any_words_are_a_recipe_or_refused(words: Sequence[str]) -> None:
    is_a_recipe_or_refused("".join(words).encode())


@patient
@given(
    place=st.integers(0, len(GOOD)),
    cut=st.integers(0, 12),
    words=st.lists(st.sampled_from(WORDS), max_size=2),
)
def test_a_damaged_recipe_is_a_recipe_or_refused(place: int, cut: int, words: list[str]) -> None:
    damaged = GOOD[:place] + "".join(words) + GOOD[place + cut :]
    is_a_recipe_or_refused(damaged.encode())


@patient
@given(
    key=st.lists(st.sampled_from([*WORDS[:25], ""]), min_size=1, max_size=4),
    value=st.lists(st.sampled_from(WORDS), max_size=5).map("".join) | st.text(max_size=9),
)
def test_any_override_is_taken_or_refused(key: list[str], value: str) -> None:
    is_a_recipe_or_refused(GOOD.encode(), f"{'.'.join(key)}={value}")


def anything(random: Random, depth: int = 0) -> Any:
    """A value of any type, often one that fits somewhere."""
    kind = random.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [anything(random, depth + 1) for _ in range(random.randrange(3))]
    if kind == 7:
        return {random.choice(KEYS): anything(random, depth + 1) for _ in range(random.randrange(4))}
    return random.choice([None, True, 0, 1, 2.5, math.inf, *KEYS, "a/b", ".."])


KEYS = WORDS[:25]


def test_any_settings_are_a_recipe_or_refused() -> None:
    accepted = 0
    for seed in range(400):
        random = Random(seed)
        stages = []
        for verb in random.choices(list(VERBS), k=random.randrange(4)):
            fields = random.sample(list(VERBS[verb].model_fields), k=random.randrange(3))
            stages.append({verb: {field: anything(random) for field in fields}})
        head = {key: anything(random) for key in random.sample(KEYS[:3], k=random.randrange(2))}
        text = json.dumps({**head, "stages": stages}).replace("Infinity", ".inf")
        accepted += is_a_recipe_or_refused(text.encode())
    assert 5 < accepted < 300


# --- the schema -------------------------------------------------------------------------------------

SCHEMA = json_schema(VERBS)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_schema_is_valid_and_says_what_things_are() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    items = SCHEMA["properties"]["stages"]["items"]["properties"]
    assert list(items) == list(VERBS)
    pairs = SCHEMA["$defs"]["Pairs"]
    assert pairs["description"] == "Pairs of noise and sample."
    assert pairs["properties"]["count"] == {
        "default": 20000,
        "description": "number of pairs",
        "minimum": 1,
        "multipleOf": 2,
        "title": "Count",
        "type": "integer",
    }
    assert "default" not in pairs["properties"]["name"]
    json.dumps(SCHEMA, allow_nan=False)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        PAIRS,
        REFLOW + "      loss: {name: pseudo-huber, c: 0.1}\n      batch_size: auto\n      init: ~",
        REFLOW + "      optimizer: {betas: [0.9, 0.99]}\n  - eval: {models: [teacher]}",
        PAIRS + "teacher: {name: analytic:ring, modes: 3}",
    ],
)
def test_the_schema_accepts_good_recipes(text: str) -> None:
    read(text)
    VALIDATOR.validate(yaml_nodes.read(text, "a.yaml")[0].plain())


# What a schema cannot tell: names that must or must not be elsewhere, files, and what validators do.
BEYOND_A_SCHEMA = (
    *("does not exist", "inside the current one", "is reserved", "already the name", "no earlier stage"),
    *("unknown stage 'p", "unknown stage 'r", "unknown stage 'b", "unknown stage ''", " makes ", "its own"),
    *("comes later", "found the teacher", "make it finer", "duplicate key", "is not supported"),
    *("found 1000.0", "found 20.0"),  # integers, as JSON Schema has it
)  # fmt: skip


def bad_trees() -> list[Any]:
    """Every recipe of the table that is whole YAML, and wrong in a way that a schema knows."""
    trees = []
    for text, message in BAD:
        data = text.encode() if isinstance(text, str) else text
        try:
            node, _ = yaml_nodes.read_file(data, "a.yaml")
        except RecipeError:
            continue
        if not any(words in message for words in BEYOND_A_SCHEMA):
            trees.append(pytest.param(node.plain(), id=message[:60]))
    return trees


@pytest.mark.parametrize("tree", bad_trees())
def test_the_schema_refuses_bad_recipes(tree: Any) -> None:
    if "nan" not in str(tree):
        assert not VALIDATOR.is_valid(tree)
