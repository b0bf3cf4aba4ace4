"""Write docs/commands/*.md from the code's own help and settings: `python docs/make_commands.py`.

One page for each command; that of a verb also lists the settings of its stage. A test compares the pages with
what this script would write, so run it after any change of an option, a setting or its description.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from flowdistill import recipe, stages
from flowdistill.cli.application import application

FOLDER = Path(__file__).parent / "commands"
_MADE = "<!-- Made by docs/make_commands.py; change the code's help instead. -->"
_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}

Schema = Mapping[str, Any]


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    schema = recipe.json_schema(stages.verbs())
    commands = dict(_commands(typer.main.get_command(application())))
    found = {
        f"{name.replace(' ', '-')}.md": _page(name, command, schema) for name, command in commands.items()
    }
    listed = [
        f"- [`flowdistill {name}`]({name.replace(' ', '-')}.md): {_paragraphs(command.help)[0]}"
        for name, command in commands.items()
    ]
    intro = (
        "Each takes `--help`. Where RECIPE is asked for, a file or the name of a recipe that ships will do."
    )
    found["README.md"] = "\n".join([_MADE, "", "# Commands", "", intro, "", *listed, ""])
    return found


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name -> command, those of groups by both names."""
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _page(name: str, command: Any, schema: Schema) -> str:
    summary, *rest = _paragraphs(command.help)
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    words = [each.metavar if each.required else f"[{each.metavar}]" for each in arguments]
    parts = [
        _MADE,
        f"# flowdistill {name}",
        summary,
        _code(" ".join(["flowdistill", name, "[OPTIONS]", *words])),
    ]
    parts += [_code(text.split("\n", 2)[2], "Examples:") if text.startswith("\b") else text for text in rest]
    if arguments:
        parts += ["## Arguments", _table(("argument", "meaning", "default"), map(_parameter, arguments))]
    parts += ["## Options", _table(("option", "meaning", "default"), map(_parameter, options))]
    if name in stages.verbs():
        model = stages.verbs()[name].__name__
        intro = f"Keys of a `{name}` stage in a recipe. Bold ones have no default."
        rows = _settings(schema["$defs"][model], schema, "")
        parts += ["## Settings", intro, _table(("key", "value", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def _code(text: str, title: str = "") -> str:
    lines = [f"    {line.strip()}" for line in text.split("\n")]
    return "\n".join([title, "", *lines] if title else lines)


def _parameter(parameter: Any) -> tuple[str, str, str]:
    flags = parameter.opts if parameter.param_type_name == "option" else []
    value = "" if flags and parameter.is_flag else f" {parameter.metavar}"
    name = f"{', '.join(f'`{flag}`' for flag in flags)}{f' `{value.strip()}`' if value else ''}".strip()
    shown = parameter.default is not None and parameter.default is not False
    return name, parameter.help or "", f"`{parameter.default}`" if shown else ""


def _settings(model: Schema, schema: Schema, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Rows of a model's keys; those of models inside come below, with dotted keys."""
    for key, field in model["properties"].items():
        if "const" in field:  # the name that chooses the variant
            continue
        inner = {_choice(each): each for each in _models(field, schema)}
        required = key in model.get("required", ())
        name = f"**{prefix}{key}**" if required else f"{prefix}{key}"
        yield (
            name,
            _value(field, list(inner)),
            _default(field, required),
            _meaning(field, list(inner.values())),
        )
        for choice, each in inner.items():
            label = f" ({choice})" if choice else ""
            yield from _settings(each, schema, f"{prefix}{key}{label}.")


def _models(field: Schema, schema: Schema) -> list[Schema]:
    """The models that a field's value may be."""
    if "$ref" in field:
        return [schema["$defs"][field["$ref"].rpartition("/")[2]]]
    members = [*field.get("anyOf", ()), *field.get("oneOf", ())]
    return [model for member in members for model in _models(member, schema)]


def _choice(model: Schema) -> str:
    return str(model["properties"].get("name", {}).get("const", ""))


def _value(field: Schema, choices: Sequence[str]) -> str:
    if choices:
        return " or ".join(f"`{{name: {choice}}}`" if choice else "a mapping" for choice in choices)
    if "anyOf" in field:
        return " or ".join(_value(member, ()) for member in field["anyOf"] if member.get("type") != "null")
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        items = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_value(items, ())}"
    if field.get("type") == "object":
        return f"mapping to {_value(field['additionalProperties'], ())}"
    limits = [f"{sign} {field[key]}" for key, sign in _LIMITS.items() if key in field]
    return " ".join([field.get("type", "any"), " and ".join(limits)]).strip()


def _default(field: Schema, required: bool) -> str:
    default = field.get("default")
    if required or default is None:
        return ""
    if isinstance(default, Mapping):
        return f"`{default['name']}`" if "name" in default else ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _meaning(field: Schema, models: Sequence[Schema]) -> str:
    own = models[0].get("description", "") if len(models) == 1 else ""
    return str(field.get("description") or own.partition("\n")[0])


def _table(headings: Sequence[str], rows: Iterator[tuple[str, ...]] | map[tuple[str, ...]]) -> str:
    cells = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for file, content in made.items():
        (FOLDER / file).write_text(content, encoding="utf-8")
