"""A judgement for machines of others: JUnit XML, Markdown, GitHub's workflow commands."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from flowdistill.comparison.gating import Judgement

_SUITE = "flowdistill gate"
_SIGNS = {"pass": "✅", "regression": "❌", "inconclusive": "⚠️", "missing": "⚠️"}
# What XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(judgement: Judgement) -> bytes:
    """JUnit XML with a case for each check of the gate.

    A regression is a failure; what is inconclusive is skipped, or a failure where it fails the gate;
    what is missing is an error.
    """
    strict = judgement.policy.on_inconclusive == "fail"
    tags = {"regression": "failure", "inconclusive": "failure" if strict else "skipped", "missing": "error"}
    found = [tags.get(outcome.status, "") for outcome in judgement.outcomes]
    counts = {
        "tests": str(len(found)),
        "failures": str(found.count("failure")),
        "errors": str(found.count("error")),
        "skipped": str(found.count("skipped")),
    }
    root = ElementTree.Element("testsuites", {"name": _SUITE, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _SUITE, **counts})
    for outcome, tag in zip(judgement.outcomes, found, strict=True):
        names = {"classname": "flowdistill.gate", "name": _xml(outcome.check.name)}
        case = ElementTree.SubElement(suite, "testcase", names)
        if tag:
            ElementTree.SubElement(case, tag, {"message": _xml(outcome.message)})
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(outcome.message)
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def markdown(judgement: Judgement) -> str:
    """A heading with the verdict and a table of all checks, for the summary of a job."""
    rows = [
        f"| {_SIGNS[outcome.status]} {outcome.status} | {_cell(outcome.check.row)} "
        f"| {_code(outcome.check.rule.text)} | {_cell(outcome.message)} |"
        for outcome in judgement.outcomes
    ]
    head = [f"### flowdistill gate: {judgement.headline}", ""]
    table = ["| | row | rule | found |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([*head, *table, ""])


def workflow_commands(judgement: Judgement) -> list[str]:
    """`::error` for what fails the gate, `::warning` for what else did not pass; one line each."""
    strict = judgement.policy.on_inconclusive == "fail"
    return [
        f"::{'error' if strict or outcome.status == 'regression' else 'warning'} "
        f"title={_property(f'gate, {outcome.check.row}')}::{_data(outcome.message)}"
        for outcome in judgement.outcomes
        if outcome.status != "pass"
    ]


def lines(judgement: Judgement) -> list[tuple[str, str, str, str]]:
    """Verdict, row, rule and what was found, for a table in the terminal."""
    return [(each.status, each.check.row, each.check.rule.text, each.message) for each in judgement.outcomes]


def _xml(text: str) -> str:
    return _NOT_XML.sub("?", text)


def _cell(text: str) -> str:
    """Text in a cell of a table, where a bar, a line end or markup would mean something."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
    return " ".join(escaped.split())


def _code(text: str) -> str:
    """Text in a cell that is shown as it is."""
    return f"`{text.replace('|', chr(92) + '|')}`"


def _data(text: str) -> str:
    """The message of a workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
