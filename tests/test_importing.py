"""From foreign checkpoints to model files: the originals' outputs come out, and nothing wrong gets in."""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowdistill import artifact, checkpoints, flow, importing, networks, teachers
from flowdistill.cli import execute
from flowdistill.errors import ArtifactError, FlowdistillError, RecipeError, UsageError
from flowdistill.importing import families

FIXTURES = Path(__file__).parent / "fixtures"
SNAPSHOT = FIXTURES / "checkpoints" / "snapshot_like_edm.pkl.gz"
RECTIFIED = FIXTURES / "checkpoints" / "ckpt_ddpmpp.pth"
TINY_SIT = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def snapshot(folder: Path) -> Path:
    path = folder / "network-snapshot.pkl"
    path.write_bytes(gzip.decompress(SNAPSHOT.read_bytes()))
    return path


def card_file(folder: Path, content: Mapping[str, Any]) -> Path:
    path = folder / "card.yaml"
    path.write_text(json.dumps(content))
    return path


def shaken(network: nn.Module) -> nn.Module:
    """Weights that are nowhere zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def tiny(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return shaken(networks.build(architecture, arguments))


def saved(folder: Path, content: Any) -> Path:
    path = folder / "checkpoint.pt"
    torch.save(content, path)
    return path


# --- EDM ----------------------------------------------------------------------------------------------


def test_an_edm_snapshot_denoises_as_the_original(tmp_path: Path) -> None:
    """v at (x / (1 + sigma), t) is (z - D) / t, with D of the original code."""
    made = importing.convert(snapshot(tmp_path), tmp_path / "edm.safetensors")
    model = teachers.load(made.path)
    expected = load_file(FIXTURES / "checkpoints" / "snapshot_like_edm.safetensors")
    sigma = expected["in.sigma"].double()
    t = flow.t_from_sigma(sigma)
    z = expected["in.x"].double() / (1 + sigma).reshape(-1, 1, 1, 1)
    denoised = z - t.reshape(-1, 1, 1, 1) * model.network(z, t)
    torch.testing.assert_close(denoised.float(), expected["out.D"], atol=1e-5, rtol=1e-5)


def test_the_card_says_where_the_model_came_from(tmp_path: Path) -> None:
    source = snapshot(tmp_path)
    card = importing.convert(source, tmp_path / "edm.safetensors").card
    assert card.source is not None
    assert (card.source.file, card.source.sha256) == (source.name, artifact.sha256(source))
    assert (card.source.family, card.source.format, card.source.weights) == ("EDM", "pickle", "ema")
    assert card.licence.startswith("CC BY-NC-SA")
    assert (card.shape, card.classes, card.architecture) == ((3, 8, 8), 0, "songunet")
    assert card.foreign


def test_each_edm_preconditioning_has_its_convention() -> None:
    """D of EDM's table 1 from the convention, with any network F."""
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4)
    sigma = torch.tensor([0.05, 1.3, 30.0], dtype=torch.float64)
    s, sd = sigma[:, None], 0.5
    norm, table = (s**2 + sd**2).sqrt(), _iddpm_levels()
    log = (2 * 19.9 * (1 + sigma**2).log() + 0.01).sqrt()
    nearest = 999 - (sigma[:, None] - table).abs().argmin(1).double()
    columns = {
        "EDMPrecond": (sd**2 / norm**2, s * sd / norm, 1 / norm, sigma.log() / 4),
        "VPPrecond": (1, -s, 1 / (s**2 + 1).sqrt(), 999 * (log - 0.1) / 19.9),
        "VEPrecond": (1, s, torch.ones_like(s), (sigma / 2).log()),
        "iDDPMPrecond": (1, -s, 1 / (s**2 + 1).sqrt(), nearest),
    }

    def network(state: Tensor, label: Tensor) -> Tensor:
        return (state + 0.01 * label[:, None]).sin()

    for wrapper, (skip, out, scale, label) in columns.items():
        convention = teachers.cards.Convention.model_validate_json(
            json.dumps(families.edm_reading(wrapper, {}))
        )
        denoised = skip * x + out * network(scale * x, label)
        z, t = x / (1 + s), sigma / (1 + sigma)
        found = z - t[:, None] * convention.canonical(network, z, t)
        torch.testing.assert_close(found, denoised, rtol=1e-8, atol=1e-8)


def _iddpm_levels() -> Tensor:
    """u_j of EDM's appendix C.3.2, by its recursion."""
    share = lambda j: torch.tensor(j * torch.pi / 2 / (1000 * 1.008), dtype=torch.float64).sin() ** 2  # noqa: E731
    levels = [torch.zeros((), dtype=torch.float64)]
    for j in range(1000, 0, -1):
        ratio = (share(j - 1) / share(j)).clamp(min=0.001)
        levels.append(((levels[-1] ** 2 + 1) / ratio - 1).sqrt())
    return torch.stack(levels[::-1])


# --- RectifiedFlow ------------------------------------------------------------------------------------


def rectified_card(folder: Path) -> Path:
    content = {
        "architecture": "ncsnpp",
        "arguments": {"image_size": 8, "nf": 4, "ch_mult": [1], "attn_resolutions": [8]},
    }
    return card_file(folder, content)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_list_average_is_mapped_to_names(tmp_path: Path, weights: Any) -> None:
    made = importing.convert(
        RECTIFIED, tmp_path / "rf.safetensors", preset="rf", card=rectified_card(tmp_path), weights=weights
    )
    expected = load_file(FIXTURES / "ncsnpp" / "ckpt_ddpmpp.expected.safetensors")
    model = teachers.load(made.path)
    label = expected["probe.labels"]
    found = model.weights(expected["probe.x"], label, None)
    torch.testing.assert_close(found, expected[f"probe.y_{'ema' if weights == 'ema' else 'raw'}"])
    # Canonical: v = -network(z, 999 (1 - t)).
    t = 1 - label.double() / 999
    inside = t <= 0.999
    v = model.network(expected["probe.x"], t, None)
    torch.testing.assert_close(v[inside], -found[inside])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ema: ema.pop(), "average has 93 tensors, the network 94"),
        (lambda ema: ema.append(torch.zeros(3)), "average has 95 tensors"),
        (lambda ema: ema.reverse(), "has shape"),
    ],
)
def test_a_list_average_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[list[Tensor]], Any], message: str
) -> None:
    names = load_file(FIXTURES / "ncsnpp" / "ckpt_ddpmpp.expected.safetensors")
    order = json.loads((FIXTURES / "ncsnpp" / "ckpt_ddpmpp.json").read_text())["ema_param_order"]
    average = [names[f"ema.{name}"].clone() for name in order]
    trained = {name: value.clone() for name, value in _raw(names).items()}
    change(average)
    path = saved(tmp_path, {"model": trained, "ema": {"decay": 0.9, "shadow_params": average}, "step": 3})
    with pytest.raises(ArtifactError, match=message):
        importing.convert(path, tmp_path / "rf.safetensors", preset="rf", card=rectified_card(tmp_path))
    assert not (tmp_path / "rf.safetensors").exists()


def _raw(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    raw = {name.removeprefix("final."): value for name, value in names.items() if name.startswith("final.")}
    prefix = "module." if all(name.startswith("module.") for name in raw) else ""
    return raw | {f"{prefix}sigmas": torch.zeros(1000, dtype=torch.float64)}


# --- other layouts ------------------------------------------------------------------------------------


def test_sit_checkpoints_tell_their_reading(tmp_path: Path) -> None:
    network, other = tiny("dit", TINY_SIT), tiny("dit", TINY_SIT | {"depth": 1})
    args = argparse.Namespace(path_type="GVP", prediction="noise", image_size=64, vae="ema")
    content = {"model": other.state_dict(), "ema": network.state_dict(), "opt": {}, "args": args}
    stanza = card_file(tmp_path, {"arguments": TINY_SIT})  # 48 channels do not tell the number of heads
    made = importing.convert(saved(tmp_path, content), tmp_path / "sit.safetensors", card=stanza)
    convention = made.card.convention
    assert convention is not None
    assert (convention.interpolant.name, convention.prediction, convention.sign) == ("cosine", "eps", 1)
    assert made.card.shape == (4, 8, 8)
    assert made.card.latent is not None and made.card.latent.scale == (0.18215,)
    # eps = x at (x, native time), so the canonical velocity follows from the raw network.
    z, t = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 0.8])
    labels = torch.tensor([0, 4, 2])
    angle = torch.atan2(t, 1 - t)
    scale = (angle.cos() + angle.sin()).reshape(-1, 1, 1, 1)
    eps = network(scale * z, 1 - angle / (torch.pi / 2), labels)
    expected = (eps - z) / (1 - t.reshape(-1, 1, 1, 1))
    found = teachers.load(made.path).network(z, t, labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["sit", "dit", "lfm"])
def test_bare_weights_are_read_as_the_family_that_is_named(tmp_path: Path, preset: str) -> None:
    network = tiny("dit", TINY_SIT)
    path = saved(tmp_path, {f"module.{name}": value for name, value in network.state_dict().items()})
    stanza = card_file(tmp_path, {"arguments": TINY_SIT})
    made = importing.convert(path, tmp_path / "out.safetensors", preset=preset, card=stanza)
    assert made.card.source is not None
    assert made.card.source.family == families.FAMILIES[preset].title
    z, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    v = teachers.load(made.path).network(z, t, labels)
    if preset == "sit":
        torch.testing.assert_close(v, -network(z, 1 - t, labels))
    assert bool(v.isfinite().all())


def test_a_torchcfm_checkpoint(tmp_path: Path) -> None:
    arguments = {"image_size": 8, "model_channels": 32, "channel_mult": [1], "num_head_channels": 16}
    network, other = tiny("admunet", arguments), networks.build("admunet", arguments)
    content = {
        "net_model": other.state_dict(),
        "ema_model": network.state_dict(),
        "sched": {"_step_count": 3},
        "optim": {"state": {}, "param_groups": []},
        "step": 3,
    }
    stanza = card_file(tmp_path, {"architecture": "admunet", "arguments": arguments})
    made = importing.convert(
        saved(tmp_path, content), tmp_path / "cfm.safetensors", preset="cfm", card=stanza
    )
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.6])
    torch.testing.assert_close(teachers.load(made.path).network(z, t), -network(z, 1 - t))


def test_an_rfpp_student_is_an_edm_network_without_its_wrapper(tmp_path: Path) -> None:
    arguments = {"img_resolution": 8, "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    network = tiny("songunet", arguments)
    path = saved(tmp_path, {f"model.{name}": value for name, value in network.state_dict().items()})
    stanza = card_file(tmp_path, {"architecture": "songunet", "arguments": arguments})
    made = importing.convert(path, tmp_path / "rfpp.safetensors", preset="rfpp", card=stanza)
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.6])
    sigma = (t / (1 - t)).reshape(-1, 1, 1, 1)
    norm = (sigma**2 + 0.25).sqrt()
    x = z * (1 + sigma)
    raw = network(x / norm, sigma.flatten().log() / 4)
    denoised = 0.25 / norm**2 * x + sigma * 0.5 / norm * raw
    expected = (z - denoised) / t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(teachers.load(made.path).network(z, t), expected, atol=2e-5, rtol=1e-5)


def test_plain_safetensors_with_a_card(tmp_path: Path) -> None:
    network = tiny("dit", TINY_SIT)
    path = tmp_path / "plain.safetensors"
    save_file(network.state_dict(), path)
    content = {
        "architecture": "dit",
        "arguments": TINY_SIT,
        "convention": {"sign": -1, "clock": {"name": "linear", "scale": 1000.0}},
        "guidance": {"scale": 2.0, "channels": 3},
        "licence": "mine",
    }
    made = importing.convert(path, tmp_path / "out.safetensors", card=card_file(tmp_path, content))
    z, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    conditional, null = (-network(z, 1000 * t, each) for each in (labels, None))
    expected = torch.cat([(null + 2 * (conditional - null))[:, :3], conditional[:, 3:]], dim=1)
    torch.testing.assert_close(teachers.load(made.path).field(z, t, labels), expected)
    # The file that was made is itself such a source; a stanza mends it.
    stanza = card_file(tmp_path, {"convention": {"sign": 1}})
    again = importing.convert(made.path, tmp_path / "mended.safetensors", card=stanza)
    assert again.card.convention is not None and again.card.convention.sign == 1
    assert again.card.licence == "mine"


def test_a_published_network_is_recognised_by_its_weights(tmp_path: Path) -> None:
    network = networks.build(*networks.presets()["slimflow-3m"])
    average = [value.detach() for value in network.parameters()]
    content = {
        "model": {f"module.{name}": value for name, value in network.state_dict().items()},
        "ema": {"shadow_params": average},
    }
    made = importing.convert(saved(tmp_path, content), tmp_path / "out.safetensors")
    assert (made.parameters, made.card.shape) == (3_437_123, (3, 32, 32))
    assert made.card.source is not None and made.card.source.family == "SlimFlow"


# --- refusals -----------------------------------------------------------------------------------------


def rejected(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The message of an import that must fail and leave nothing behind."""
    before = {each.name for each in folder.iterdir()}
    destination = folder / "out.safetensors"
    assert execute(["import", arguments[0], str(destination), *arguments[1:]]) == code
    assert {each.name for each in folder.iterdir()} == before
    message = capsys.readouterr().err
    assert len(message.splitlines()) <= 3
    assert Path(arguments[0]).name in message or "--" in message
    return message


def states(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], list[str]]:
    """A bare SiT checkpoint with something changed."""

    def make(folder: Path) -> list[str]:
        state: dict[str, Any] = dict(tiny("dit", TINY_SIT).state_dict())
        change(state)
        stanza = card_file(folder, {"arguments": TINY_SIT})
        return [str(saved(folder, state)), "--preset", "sit", "--card", str(stanza)]

    return make


def named(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [str(folder / name)]

    return make


def without_preset(folder: Path) -> list[str]:
    return [str(saved(folder, dict(tiny("admunet", {}).state_dict())))]


def a_folder(folder: Path) -> list[str]:
    (folder / "model.pkl").mkdir()
    return [str(folder / "model.pkl")]


def wrong_preset(folder: Path) -> list[str]:
    return [str(saved(folder, dict(tiny("dit", TINY_SIT).state_dict()))), "--preset", "cfm-cifar10"]


def truncated(folder: Path) -> list[str]:
    path = snapshot(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return [str(path)]


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (states(lambda state: state.pop("t_embedder.mlp.0.weight")), 4, "t_embedder.mlp.0.weight"),
        (states(lambda state: state.update(odd=torch.zeros(2))), 4, "odd"),
        (
            states(lambda state: state.update({"t_embedder.mlp.0.bias": torch.zeros(7)})),
            4,
            "t_embedder.mlp.0.bias",
        ),
        (
            states(lambda state: state.update({"t_embedder.mlp.0.bias": torch.full((48,), torch.nan)})),
            4,
            "not finite",
        ),
        (
            states(lambda state: state.update({"t_embedder.mlp.0.bias": torch.full((48,), torch.inf)})),
            4,
            "not finite",
        ),
        (wrong_preset, 4, "expects"),
        (without_preset, 2, "no preset"),
        (truncated, 4, ""),
        (a_folder, 2, "folder"),
        (named("x.pkl", b"<!DOCTYPE html><html><body>Not found</body></html>"), 4, "web page"),
        (named("x.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"), 4, "lfs"),
        (named("x.pkl", b""), 4, "empty"),
        (named("x.pkl", b"cos\nsystem\n(S'touch /tmp/x'\ntR."), 4, "os.system"),
        (lambda folder: [str(folder / "nothing.pkl")], 3, "no such file"),
        (lambda folder: [str(RECTIFIED), "--preset", "rf-cifer10"], 2, "did you mean 'rf-cifar10'"),
        (lambda folder: [str(RECTIFIED), "--weights", "raw"], 2, "ema, model"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], list[str]],
    code: int,
    message: str,
) -> None:
    assert message.casefold() in rejected(make(tmp_path), tmp_path, capsys, code).casefold()


def test_an_existing_destination_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = tmp_path / "out.safetensors"
    destination.write_bytes(b"precious")
    assert execute(["import", str(RECTIFIED), str(destination)]) == 2
    assert destination.read_bytes() == b"precious"
    assert "is there already" in capsys.readouterr().err
    assert execute(["import", str(RECTIFIED), str(tmp_path / "out.pt")]) == 2


def test_mistakes_in_a_card_are_told_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("convention:\n  sing: -1\n  clock: {name: linaer}\nshape: [3, x, 8]\n")
    with pytest.raises(RecipeError) as caught:
        importing.read_stanza(path)
    text = str(caught.value)
    assert "card.yaml:2" in text and "did you mean 'sign'" in text
    assert "card.yaml:3" in text and "linear" in text
    assert "card.yaml:4" in text


def edm_record(**changes: Any) -> dict[str, Any]:
    """The fixture's snapshot as the reader gives it, with attributes of its network changed."""
    import copy

    with tempfile.TemporaryDirectory() as folder:
        content = checkpoints.read(snapshot(Path(folder))).content
    network = content["ema"].state["_modules"]["model"]
    state = copy.copy(network.state) | changes
    modules = {
        "model": replace(network, state={key: value for key, value in state.items() if value != "gone"})
    }
    return {"ema": replace(content["ema"], state={**content["ema"].state, "_modules": modules})}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_modules": [1]}, "'_modules' of one of its modules is a list"),
        ({"_parameters": {3: None}}, "expected a dict by name"),
        ({"_init_kwargs": "gone"}, "missing|not there|unknown|another"),
        ({"_init_kwargs": [1]}, "'_init_kwargs' of one of its modules"),
        ({"_init_kwargs": {"img_resolution": {"a": 1}}}, "expected plain values"),
        ({"_init_kwargs": {"img_resolution": "eight"}}, "shape"),
        ({"_init_kwargs": {"num_blocks": 10**5}}, "far more than the file has"),
        ({"_init_kwargs": {"num_blocks": 10**5, "model_channels": 10**9}}, "songunet"),
    ],
)
def test_an_edm_file_that_lies_about_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    read = checkpoints.Checkpoint(tmp_path / "x.pkl", "pickle", "0" * 64, edm_record(**changes))
    monkeypatch.setattr(checkpoints, "read", lambda path: read)
    with pytest.raises((ArtifactError, UsageError), match=message):
        importing.convert(tmp_path / "x.pkl", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("wrapper", "state"),
    [
        ("EDMPrecond", {"sigma_data": "half"}),
        ("EDMPrecond", {"sigma_data": torch.ones(1)}),
        ("VPPrecond", {"M": float("inf")}),
        ("iDDPMPrecond", {"C_1": 0.5}),
        ("Precond", {}),
    ],
)
def test_constants_of_a_wrapper_that_are_none(wrapper: str, state: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError):
        families.edm_reading(wrapper, state)


def test_a_model_file_that_lies_about_its_network(tmp_path: Path) -> None:
    """A card is a claim: a network that is far larger than the file is not built."""
    network = tiny("dit", TINY_SIT)
    card = {"architecture": "dit", "arguments": TINY_SIT | {"depth": 10**7}, "shape": [4, 8, 8]}
    artifact.save_tensors(tmp_path / "x.safetensors", network.state_dict(), card)
    with pytest.raises(ArtifactError, match="far more than the file has"):
        teachers.load(tmp_path / "x.safetensors")


def test_a_stanza_changes_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    made = importing.convert(snapshot(tmp_path), tmp_path / "edm.safetensors")
    stanza = card_file(tmp_path, {"convention": {"t_max": 0.9}, "arguments": {"dropout": 0.5}})
    again = importing.convert(made.path, tmp_path / "again.safetensors", card=stanza)
    assert made.card.convention is not None and again.card.convention is not None
    assert again.card.convention == made.card.convention.model_copy(update={"t_max": 0.9})
    assert again.card.arguments == made.card.arguments | {"dropout": 0.5}
    assert again.card.source == made.card.source  # where the weights come from does not change


def test_a_shape_that_is_not_the_networks_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, dict(tiny("dit", TINY_SIT).state_dict()))
    stanza = card_file(tmp_path, {"arguments": TINY_SIT, "shape": [3, 8, 8]})
    with pytest.raises(UsageError, match=r"says shape \[3, 8, 8\], its network has \[4, 8, 8\]"):
        importing.convert(path, tmp_path / "x.safetensors", preset="sit", card=stanza)


@pytest.mark.parametrize("preset", ["sit", "rf-cifar10"])
def test_a_preset_of_another_family_is_refused(tmp_path: Path, preset: str) -> None:
    with pytest.raises(UsageError, match="it is a file of EDM"):
        importing.convert(snapshot(tmp_path), tmp_path / "x.safetensors", preset=preset)
    with pytest.raises(UsageError, match="is for admunet, the weights are of ncsnpp"):
        importing.convert(RECTIFIED, tmp_path / "x.safetensors", preset="cfm", card=rectified_card(tmp_path))


def test_damage_to_a_file_of_ours_is_not_sealed_anew(tmp_path: Path) -> None:
    made = importing.convert(snapshot(tmp_path), tmp_path / "edm.safetensors")
    content = bytearray(made.path.read_bytes())
    content[-5] ^= 1
    made.path.write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256"):
        importing.convert(made.path, tmp_path / "again.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_are_floating_point_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in tiny("dit", TINY_SIT).state_dict().items()}
    stanza = card_file(tmp_path, {"arguments": TINY_SIT})
    with pytest.raises(ArtifactError, match="expected floating-point numbers"):
        importing.convert(saved(tmp_path, state), tmp_path / "x.safetensors", preset="sit", card=stanza)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 77}, "77 classes"),
        ({"latent": {"scale": [1.0, 2.0]}}, "latent.scale has 2 numbers for 4 channels"),
        ({"statistics": {"mean": [0.0], "std": [1.0, 1.0]}}, "statistics.std has 2"),
    ],
)
def test_a_card_that_does_not_fit_the_network_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path, dict(tiny("dit", TINY_SIT).state_dict()))
    stanza = card_file(tmp_path, {"arguments": TINY_SIT, **change})
    with pytest.raises(UsageError, match=message):
        importing.convert(path, tmp_path / "x.safetensors", preset="sit", card=stanza)


def test_a_flowturbo_refiner_is_refused_by_name(tmp_path: Path) -> None:
    refiner = tiny("dit", TINY_SIT | {"depth": 1, "in_channels": 8})
    with pytest.raises(ArtifactError, match="FlowTurbo"):
        importing.convert(
            saved(tmp_path, dict(refiner.state_dict())), tmp_path / "x.safetensors", preset="sit"
        )


def test_every_preset_has_a_card_that_builds(tmp_path: Path) -> None:
    for name in networks.presets():
        content = families.card_of(name)
        content.pop("family")
        card = teachers.Card.parse(content, Path(name))
        with torch.device("meta"):
            network = networks.build(card.architecture, card.arguments)
        assert sum(each.numel() for each in network.parameters()) > 1e6
        assert card.convention is not None and card.licence != "Apache-2.0"


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("rf-cifar10", 61_804_419),
        ("slimflow-28m", 27_906_179),
        ("slimflow-15m", 15_707_235),
        ("slimflow-7m", 6_989_891),
        ("slimflow-3m", 3_437_123),
        ("slimflow-imagenet64-81m", 80_685_315),
        ("slimflow-imagenet64-45m", 44_685_827),
        ("lfm-ffhq256-adm", 406_396_420),
        ("lfm-imagenet256-adm", 407_420_420),
        ("edm-cifar10-vp", 55_733_891),
        ("rfpp-cifar10", 56_397_827),
        ("cfm-cifar10", 35_746_307),
        ("sit-xl-2", 675_129_632),
    ],
)
def test_published_networks_have_the_published_size(preset: str, count: int) -> None:
    with torch.device("meta"):
        network = networks.build(*networks.presets()[preset])
    assert sum(each.numel() for each in network.parameters()) == count


def test_importing_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = tmp_path / "edm.safetensors"
    assert execute(["import", str(snapshot(tmp_path)), str(destination), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["sha256"] == artifact.sha256(destination)
    assert document["convention"]["interpolant"]["name"] == "edm"
    assert document["source"]["family"] == "EDM"


def test_the_same_file_imports_to_the_same_bytes(tmp_path: Path) -> None:
    source = snapshot(tmp_path)
    first, second = (
        importing.convert(source, tmp_path / f"{name}.safetensors").sha256 for name in ("one", "two")
    )
    assert first == second


def test_errors_are_those_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(FlowdistillError):
        importing.convert(tmp_path / "none.pkl", tmp_path / "x.safetensors")
    with pytest.raises(UsageError):
        importing.convert(RECTIFIED, tmp_path / "x.bin")
