"""Mutation run over the mathematics: small errors are planted one at a time, the tests must see them.

    python benchmarks/mutation.py [MODULE ...]

Each mutant is a copy of one module with one change: an operator, a comparison, a number, a sign, two
swapped arguments, a call or statement left out. Its own tests run in a forked child that finds torch
already imported, in a temporary copy of the package. A mutant that fails a test, or never ends, is
killed. Survivors are printed; those that cannot be told from the original stand in EQUIVALENT.
"""

from __future__ import annotations

import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("flow", "solvers", "schedule", "timesteps", "objectives")
GOAL = 0.90

TYPES_ONLY = "only type checkers read it"
SAME_TENSOR = "float() of float32 is the tensor itself"
SYMMETRIC = "the difference of the two is squared"
SYMMETRIC_SUM = "the two are only added"
LAST_AXIS = "axis 1 of two is the last one"
ONLY_RATIOS = "only the ratios of the weights count"
EQUIVALENT = {
    "flow : TypeVar('Time', float, 'Tensor')  ->  TypeVar(float, 'Time', 'Tensor')": TYPES_ONLY,
    "solvers integrate: x.element_size() < 4  ->  x.element_size() <= 4": SAME_TENSOR,
    "solvers integrate: x.element_size() < 4  ->  x.element_size() < 5": SAME_TENSOR,
    "schedule Schedule.halved: (t, s)  ->  (s, t)": SYMMETRIC_SUM,
    "schedule bellman: axis=1  ->  axis=-1": LAST_AXIS,
    "schedule local_cost: axis=1  ->  axis=-1": LAST_AXIS,
    "objectives SquaredL2.__call__: self.difference(v_hat, v, t).square().flatten(1).mean(1)"
    "  ->  self.difference(v_hat, v, t).square().flatten(1).mean(-1)": LAST_AXIS,
    "objectives L2.__call__: dim=1  ->  dim=-1": LAST_AXIS,
    "objectives L2.__call__: difference.shape[1]  ->  difference.shape[-1]": LAST_AXIS,
    "timesteps Mixture.from_uniform: [1.0]  ->  [2.0]": ONLY_RATIOS,
    "timesteps Mixture.from_uniform: [1.0]  ->  [-1.0]": ONLY_RATIOS,
    "objectives PseudoHuber.__call__: self.difference(v_hat, v, t)"
    "  ->  self.difference(v, v_hat, t)": SYMMETRIC,
    "objectives L2.__call__: self.difference(v_hat, v, t)  ->  self.difference(v, v_hat, t)": SYMMETRIC,
    "objectives SquaredL2.__call__: self.difference(v_hat, v, t)"
    "  ->  self.difference(v, v_hat, t)": SYMMETRIC,
    "objectives pseudo_huber: squares.shape[1]  ->  squares.shape[-1]": LAST_AXIS,
    "objectives pseudo_huber: squares.sum(1)  ->  squares.sum(-1)": LAST_AXIS,
    "objectives wcfm_weight: squares.shape[1]  ->  squares.shape[-1]": LAST_AXIS,
    "objectives wcfm_weight: squares.sum(1)  ->  squares.sum(-1)": LAST_AXIS,
}
"""Mutants that no test could tell from the original, and why."""

SWAPPED_OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
SWAPPED_NAMES = {
    "min": "max",
    "max": "min",
    "argmin": "argmax",
    "sum": "mean",
    "mean": "sum",
    "all": "any",
    "ge": "gt",
    "gt": "ge",
    "le": "lt",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    function: str
    line: int
    change: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.module} {self.function}: {self.change}"


@singledispatch
def replacements(node: ast.AST) -> Iterable[ast.AST]:
    """Every node that may stand in the place of `node`."""
    return ()


@replacements.register(ast.BinOp)
@replacements.register(ast.BoolOp)
def _(node: ast.BinOp | ast.BoolOp) -> Iterable[ast.AST]:
    return [changed(node, op=other()) for other in SWAPPED_OPERATORS.get(type(node.op), ())]


@replacements.register
def _(node: ast.UnaryOp) -> Iterable[ast.AST]:
    return [node.operand]


@replacements.register
def _(node: ast.Compare) -> Iterable[ast.AST]:
    for i, old in enumerate(node.ops):
        for other in SWAPPED_OPERATORS.get(type(old), ()):
            yield changed(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])


@replacements.register
def _(node: ast.Constant) -> Iterable[ast.AST]:
    return [ast.Constant(value) for value in other_values(node.value)]


@replacements.register
def _(node: ast.IfExp) -> Iterable[ast.AST]:
    return [changed(node, body=node.orelse, orelse=node.body)]


@replacements.register
def _(node: ast.If) -> Iterable[ast.AST]:
    return [changed(node, test=ast.UnaryOp(ast.Not(), node.test))]


@replacements.register(ast.Tuple)
@replacements.register(ast.List)
def _(node: ast.Tuple | ast.List) -> Iterable[ast.AST]:
    return [changed(node, elts=node.elts[::-1])] if len(node.elts) == 2 else []


@replacements.register
def _(node: ast.Raise) -> Iterable[ast.AST]:
    return [ast.Pass()]


@replacements.register
def _(node: ast.Expr) -> Iterable[ast.AST]:
    return [ast.Pass()] if isinstance(node.value, ast.Call) else []


@replacements.register
def _(node: ast.Assign) -> Iterable[ast.AST]:
    return [ast.Pass()] if isinstance(node.targets[0], ast.Subscript) else []


@replacements.register
def _(call: ast.Call) -> Iterable[ast.AST]:
    """Arguments swapped, another function of the kind, or none: x.clamp(0) becomes x."""
    if len(call.args) >= 2 and not any(isinstance(arg, ast.Starred) for arg in call.args[:2]):
        yield changed(call, args=[call.args[1], call.args[0], *call.args[2:]])
    for i, keyword in enumerate(call.keywords):
        if keyword.arg in SWAPPED_NAMES:
            renamed = changed(keyword, arg=SWAPPED_NAMES[keyword.arg])
            yield changed(call, keywords=[*call.keywords[:i], renamed, *call.keywords[i + 1 :]])
    if isinstance(call.func, ast.Attribute):
        yield call.func.value
        if call.func.attr in SWAPPED_NAMES:
            yield changed(call, func=changed(call.func, attr=SWAPPED_NAMES[call.func.attr]))
    elif isinstance(call.func, ast.Name) and call.func.id in SWAPPED_NAMES:
        yield changed(call, func=ast.Name(SWAPPED_NAMES[call.func.id], ast.Load()))


def other_values(value: object) -> list[int | float]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, -value] if value else [value + 1]
    return []


def changed(node: ast.AST, **fields: object) -> ast.AST:
    twin = copy.copy(node)
    for name, value in fields.items():
        setattr(twin, name, value)
    return twin


def places(tree: ast.AST, function: str = "") -> Iterator[tuple[ast.AST, str, int | None, ast.AST, str]]:
    """(parent, field, index, node, function) of all code: no annotation, decorator, text or import."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for index, node in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(node, ast.AST) or skipped(node):
                continue
            yield tree, name, index if isinstance(value, list) else None, node, function
            inner = f"{function}.{node.name}".strip(".") if hasattr(node, "name") else function
            yield from places(node, inner)


def skipped(node: ast.AST) -> bool:
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    alias = isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias"
    return typing_only or alias or isinstance(node, ast.JoinedStr | ast.ImportFrom | ast.Import)


def mutants(module: str) -> list[Mutant]:
    tree = ast.parse((ROOT / "flowdistill" / f"{module}.py").read_text())
    original = ast.unparse(tree)
    found: dict[str, Mutant] = {}
    for parent, field, index, node, function in list(places(tree)):
        for replacement in replacements(node):
            in_parent = isinstance(node, ast.Constant)  # a bare number does not say where it stands
            before = ast.unparse(parent if in_parent else node)
            put(parent, field, index, replacement)
            source = ast.unparse(ast.fix_missing_locations(tree))
            change = f"{before}  ->  {ast.unparse(parent if in_parent else replacement)}"
            put(parent, field, index, node)
            line = getattr(node, "lineno", 0)
            if source != original:
                found.setdefault(source, Mutant(module, function, line, change, source))
    return list(found.values())


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def warm_up() -> None:
    """Import what every child needs, once; nothing of the package, and no thread is started."""
    import hypothesis.extra.numpy
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import yaml  # noqa: F401

    torch.set_num_threads(1)
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # imports sympy, two seconds
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile(
        "mutation", database=None, derandomize=True, deadline=None, max_examples=30, phases=phases
    )
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"


def survives(folder: Path, module: str, source: str, limit_s: float) -> bool:
    """Whether the module's tests pass with this source, in a forked child."""
    (folder / "flowdistill" / f"{module}.py").write_text(source)
    child = os.fork()
    if child == 0:
        run_tests(folder, module)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run_tests(folder: Path, module: str) -> None:
    code = 99
    try:
        import pytest

        os.chdir(folder)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.path.insert(0, str(folder))
        plugins = ["-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin"]
        options = ["-o", "addopts=", "-x", "--assert=plain", "--hypothesis-profile=mutation"]
        code = int(pytest.main([*options, *plugins, f"tests/test_{module}.py"]))
    finally:
        os._exit(code)


def judge(folder: Path, module: str) -> tuple[int, int, list[Mutant]]:
    """(killed, equivalent, survivors) of one module."""
    original = (ROOT / "flowdistill" / f"{module}.py").read_text()
    start = time.monotonic()
    if not survives(folder, module, original, limit_s=600):
        sys.exit(f"tests/test_{module}.py fails without any mutation")
    limit_s = 20 + 5 * (time.monotonic() - start)
    killed, equivalent = 0, 0
    survivors: list[Mutant] = []
    for mutant in mutants(module):
        if mutant.name in EQUIVALENT:
            equivalent += 1
        elif survives(folder, module, mutant.source, limit_s):
            survivors.append(mutant)
            print(f"survived line {mutant.line}, {mutant.name}", flush=True)
        else:
            killed += 1
    (folder / "flowdistill" / f"{module}.py").write_text(original)
    return killed, equivalent, survivors


def main() -> int:
    chosen = sys.argv[1:] or MODULES
    sys.dont_write_bytecode = True
    warm_up()
    killed_all = 0
    survivors_all: list[Mutant] = []
    print(f"{'module':12} {'mutants':>8} {'killed':>7} {'survived':>9} {'equivalent':>11} {'%':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clutter = shutil.ignore_patterns("__pycache__", "assets", ".hypothesis")
        for part in ("flowdistill", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=clutter)
        shutil.copy(ROOT / "pyproject.toml", folder)
        for module in chosen:
            killed, equivalent, survivors = judge(folder, module)
            total = killed + len(survivors)
            row = f"{total:8} {killed:7} {len(survivors):9} {equivalent:11} {killed / total:6.1%}"
            print(f"{module:12} {row}", flush=True)
            killed_all, survivors_all = killed_all + killed, survivors_all + survivors
    share = killed_all / (killed_all + len(survivors_all))
    print(f"killed {killed_all} of {killed_all + len(survivors_all)}: {share:.1%}, goal {GOAL:.0%}")
    return 0 if share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
