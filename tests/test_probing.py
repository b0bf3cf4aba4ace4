"""The probe passes what is right and names what is wrong, on networks that know something."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowdistill import artifact, data, importing, probing, teachers
from flowdistill.cli import execute
from flowdistill.conventions import Convention, Linear
from flowdistill.errors import ArtifactError
from flowdistill.flow import expand
from flowdistill.teachers import Model
from flowdistill.teachers.canonical import Canonical
from flowdistill.teachers.cards import Latent, Statistics

FIXTURES = Path(__file__).parent / "fixtures" / "teachers"
FOREIGN = ("edm", "sit", "ddpm")
OWN = ("builtin:shapes", "builtin:digits", "analytic:ring", "analytic:mixture", "analytic:gaussian")


def foreign(name: str) -> Model:
    return teachers.load(FIXTURES / f"{name}.safetensors")


def reread(model: Model, **changes: Any) -> Model:
    """The model under a card that reads it otherwise."""
    declared = model.card.convention or Convention()
    convention = Convention.model_validate({**declared.model_dump(), **changes})
    card = model.card.model_copy(update={"convention": convention})
    return replace(model, card=card, network=Canonical(model.weights, convention))


@pytest.mark.parametrize("name", OWN)
def test_own_models_pass(name: str) -> None:
    report = probing.probe(teachers.open_model(name))
    assert not report.wrong and not report.remedy
    assert {finding.name for finding in report.findings} == {
        *("direction", "path", "denoising", "clock", "scale"),
        *("round trip", "conditioning", "half precision"),
    }


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_models_pass(name: str) -> None:
    report = probing.probe(foreign(name))
    assert not report.wrong, report
    figures = {finding.name: finding.value for finding in report.findings}
    assert figures["round trip"] is not None and figures["round trip"] < 0.02
    assert figures["conditioning"] is not None and figures["conditioning"] > 0.1


class Wrapped(nn.Module):
    """A network whose maker had other ideas of sign, time and output than canonical ones."""

    def __init__(self, network: nn.Module, fault: str) -> None:
        super().__init__()
        self.network, self.fault = network, fault

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        time = {"clock": 1 - t, "both": 1 - t, "thousand": t / 1000}.get(self.fault, t)
        v: Tensor = self.network(x, time, labels)
        if self.fault == "eps":
            return x + expand(1 - t, x) * v
        return -v if self.fault in ("sign", "both") else v


FAULTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "sign": ("sign is reversed", {"sign": -1}),
    "clock": ("clock is reversed", {"clock": {"name": "linear", "scale": 1.0, "reversed": True}}),
    "both": (
        "sign is reversed and",
        {"sign": -1, "clock": {"name": "linear", "scale": 1.0, "reversed": True}},
    ),
    "thousand": ("1000 times as large", {"clock": {"name": "linear", "scale": 1000.0, "reversed": False}}),
    "eps": ("prediction of eps, read as velocity", {"prediction": "eps"}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["builtin:shapes", "builtin:digits", "analytic:ring"])
def test_faults_of_canonical_networks_are_named(name: str, fault: str) -> None:
    model = teachers.open_model(name)
    report = probing.probe(replace(model, network=Wrapped(model.network, fault)))
    words, remedy = FAULTS[fault]
    assert report.wrong
    assert words in report.diagnosis
    found = report.remedy["convention"]
    assert {key: found[key] for key in remedy} == remedy


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("fault", ["sign", "clock", "both", "thousand", "prediction"])
def test_wrong_cards_of_foreign_networks_are_mended(name: str, fault: str) -> None:
    model = foreign(name)
    truth = model.card.convention
    assert truth is not None
    changes: dict[str, Any] = {}
    if fault in ("sign", "both"):
        changes["sign"] = -truth.sign
    if fault in ("clock", "both", "thousand"):
        if not isinstance(truth.clock, Linear):
            pytest.skip("the logarithm of a noise level has no other direction")
        clock = truth.clock.model_dump()
        change = (
            {"scale": clock["scale"] / 1000} if fault == "thousand" else {"reversed": not clock["reversed"]}
        )
        changes["clock"] = clock | change
    if fault == "prediction":
        changes["prediction"] = "velocity" if truth.prediction != "velocity" else "eps"
    if fault in ("clock", "both") and truth.interpolant.name == "ddpm":
        pytest.skip("an index that is counted backwards has an offset of its own")
    report = probing.probe(reread(model, **changes))
    assert report.wrong
    assert Convention.model_validate_json(json.dumps(report.remedy["convention"])) == truth


@pytest.mark.parametrize(
    ("name", "factor"), [("edm", 0.5), ("sit", 2.0), ("sit", 5.49), ("ddpm", 5.49), ("builtin:digits", 0.5)]
)
def test_a_wrong_latent_scale_is_measured(name: str, factor: float) -> None:
    """Raw latents that the card's scale brings to another size than the model's."""
    model = teachers.open_model(name) if ":" in name else foreign(name)
    raw, _ = data.dataset("digits").batch(torch.arange(300))
    right = replace(model, card=model.card.model_copy(update={"latent": Latent(scale=(0.5,))}))
    assert not probing.probe(right, raw / 0.5).wrong
    wrong = replace(model, card=model.card.model_copy(update={"latent": Latent(scale=(0.5 * factor,))}))
    report = probing.probe(wrong, raw / 0.5)
    assert report.wrong and "scaled" in report.diagnosis
    assert report.remedy["latent"]["scale"][0] == pytest.approx(0.5, rel=0.1)


def test_statistics_in_the_card_stand_for_data() -> None:
    model = foreign("sit")
    for mean, std, wrong in ((-0.39, 0.74, False), (0.5, 0.74, True), (-0.39, 0.3, True)):
        card = model.card.model_copy(update={"statistics": Statistics(mean=(mean,), std=(std,))})
        assert probing.probe(replace(model, card=card)).wrong is wrong


def test_real_data_judge_an_unconditional_model() -> None:
    """With data that the model was not made for, the error of v is no better than a guess's."""
    ring = teachers.open_model({"name": "analytic:ring", "components": 8})
    marginal = replace(ring, card=ring.card.model_copy(update={"classes": 0}))
    real, _ = ring.network.data(range(1024), seed=3)  # type: ignore[operator]
    assert not probing.probe(marginal, real).wrong
    other = torch.randn(1024, 2, generator=torch.Generator().manual_seed(0)) * 0.7
    report = probing.probe(marginal, other)
    verdicts = {finding.name: finding.verdict for finding in report.findings}
    assert verdicts["denoising"] == "wrong" and verdicts["direction"] == "ok"


class Straight(nn.Module):
    """The 2-rectified flow of N(0, A^2) by its Gaussian teacher: x0 = A eps, v = (I - A) eps."""

    def __init__(self, stds: Tensor) -> None:
        super().__init__()
        self.register_buffer("stds", stds)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        at, stds = expand(t, x), self.get_buffer("stds")
        return (1 - stds) * x / ((1 - at) * stds + at)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_reflowed_model_is_judged_on_its_own_pairs(sign: int) -> None:
    """Its noise and data are not independent, which its card says; a wrong sign is found all the same."""
    stds = torch.linspace(0.2, 0.9, 3 * 64).reshape(3, 8, 8)
    card = teachers.Card(architecture="none", shape=(3, 8, 8), convention=Convention(), distilled=True)
    model = Model(card, Canonical(_raw(Straight(stds)), Convention(sign=sign)), "")  # type: ignore[arg-type]
    report = probing.probe(replace(model, card=card.model_copy(update={"convention": Convention(sign=sign)})))
    assert report.wrong is (sign == -1)
    if sign == -1:
        assert "sign is reversed" in report.diagnosis
    undeclared = card.model_copy(update={"distilled": False})
    assert probing.probe(replace(model, card=undeclared)).wrong


def _raw(network: nn.Module) -> nn.Module:
    return network


def test_a_student_of_ours_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stages = [
        {"pairs": {"count": 256, "solver": "heun", "steps": 6}},
        {"reflow": {"steps": 60, "batch_size": 32, "loss": {"name": "pseudo-huber"}}},
    ]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"teacher": "builtin:digits", "stages": stages}))
    assert execute(["run", "recipe.yaml", "-q", "--out", "runs"]) == 0
    assert execute(["probe", "runs/reflow"]) == 0


def test_an_untrained_network_has_no_remedy() -> None:
    card = foreign("sit").card
    torch.manual_seed(0)
    model = teachers.new(card)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    report = probing.probe(model)
    assert report.wrong and not report.remedy
    assert "trained to the end" in report.diagnosis and "distilled" in report.diagnosis


def test_classes_without_effect_are_noticed() -> None:
    class Deaf(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            v: Tensor = self.network(x, t, None)
            return v

    model = teachers.open_model("builtin:digits")
    report = probing.probe(replace(model, network=Deaf(model.network)))
    verdicts = {finding.name: finding.verdict for finding in report.findings}
    assert verdicts["conditioning"] == "wrong" and report.wrong
    assert "class" in report.diagnosis


# --- on the command line ------------------------------------------------------------------------------


def mistaken(folder: Path) -> Path:
    """The SiT with its sign reversed in the card."""
    made = reread(foreign("sit"), sign=1)
    path = folder / "mistaken.safetensors"
    made.write(path)
    return path


def test_what_the_probe_prints_mends_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = mistaken(tmp_path)
    assert execute(["probe", str(path)]) == 4
    printed = capsys.readouterr()
    assert "data-ward: sign is reversed" in printed.err
    stanza = tmp_path / "fix.yaml"
    stanza.write_text(printed.out.partition("mend it:\n")[2])
    mended = tmp_path / "mended.safetensors"
    assert execute(["import", str(path), str(mended), "--card", str(stanza)]) == 0
    assert execute(["probe", str(mended)]) == 0
    assert importing.read_stanza(stanza)["convention"]["sign"] == -1


def test_probing_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["probe", "analytic:ring", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["wrong"] is False and document["remedy"] == {}
    assert {"name", "verdict", "value", "text"} == set(document["findings"][0])


RECIPE = """
out: {out}
teacher: {teacher}
stages:
  - pairs: {{count: 8, solver: euler, steps: 2, batch_size: 8}}
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_stages_refuse_a_model_that_points_the_wrong_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trusted: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = mistaken(tmp_path)
    teacher = f"{{name: {path.name}, probe: false}}" if trusted else path.name
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(out="runs", teacher=teacher))
    code = execute(["run", "recipe.yaml", "-q"])
    assert code == (0 if trusted else 4)
    assert (tmp_path / "runs" / "pairs" / artifact.MANIFEST).exists() is trusted
    if not trusted:
        message = capsys.readouterr().err
        assert "sign is reversed" in message and "probe: false" in message and len(message.splitlines()) <= 3


def test_stages_take_a_foreign_model_that_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.safetensors").write_bytes((FIXTURES / "edm.safetensors").read_bytes())
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(out="runs", teacher="teacher.safetensors"))
    assert execute(["run", "recipe.yaml", "-q"]) == 0


def test_the_strict_probe_has_its_own_exit_code(tmp_path: Path) -> None:
    assert execute(["probe", "--strict", str(FIXTURES / "sit.safetensors")]) == 0
    assert execute(["probe", "--strict", str(mistaken(tmp_path))]) == 4
    with pytest.raises(ArtifactError, match="sign is reversed"):
        probing.strict(teachers.load(mistaken(tmp_path)), "mistaken")
