"""The adapter that docs/teachers.md writes works as it stands there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from flowdistill import networks

TEXT = (Path(__file__).parents[1] / "docs" / "teachers.md").read_text()
ADAPTER, TEST = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
(CARD,) = re.findall(r"```yaml\n(architecture: shallow\n.*?)```", TEXT, re.DOTALL)


def test_the_worked_adapter_passes_its_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(ADAPTER.splitlines()) < 40
    folder = tmp_path / "networks"
    folder.mkdir()
    (folder / "shallow.py").write_text(ADAPTER)
    (tmp_path / "shallow.yaml").write_text(CARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(folder)])
    importlib.invalidate_caches()
    scope: dict[str, Any] = {}
    exec(compile(TEST, "test_shallow.py", "exec"), scope)
    try:
        scope["test_the_teacher_is_the_colleagues_denoiser"](tmp_path)
    finally:
        sys.modules.pop("flowdistill.networks.shallow", None)
