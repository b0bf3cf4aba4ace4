"""Low-rank adaptation: what is trained, what is left alone, and what is written in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import content
from safetensors.torch import load_file
from test_cli import Shell
from test_straighten import RECIPE, flow_file
from tiny_pipelines import TINY, draw, make, reopen
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flowdistill import artifact, lora, randomness
from flowdistill.networks import architectures, build
from flowdistill.stages.straighten import Straighten
from flowdistill.teachers import open_model
from flowdistill.training import Batch

IMAGE, EDM = (
    (3, 8, 8),
    {"img_resolution": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
)
LABELS = torch.tensor([1, 0])
SMALL: dict[str, tuple[dict[str, Any], Tensor | None, set[str]]] = {
    "unet": (
        {"shape": IMAGE, "classes": 2, "channels": 8, "multipliers": [1, 2], "embedding": 16},
        LABELS,
        {"label.weight"},
    ),
    "mlp": ({"shape": [3], "classes": 2, "width": 8, "depth": 2}, LABELS, {"label.weight"}),
    "songunet": (EDM | {"model_channels": 8, "label_dim": 2}, LABELS, set()),
    "dhariwalunet": (EDM | {"model_channels": 64, "label_dim": 2}, LABELS, set()),
    "ncsnpp": (
        {"image_size": 8, "nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4]},
        None,
        set(),
    ),
    "admunet": (
        {
            "image_size": 8,
            "in_channels": 3,
            "model_channels": 32,
            "out_channels": 3,
            "num_res_blocks": 1,
            "attention_resolutions": [2],
            "channel_mult": [1, 2],
            "num_classes": 2,
            "num_heads": 2,
        },
        LABELS,
        {"label_emb.weight"},
    ),
    "dit": (
        {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 2},
        LABELS,
        {"y_embedder.embedding_table.weight", "pos_embed"},
    ),
}
"""Arguments, labels, and the tables and positions that are no linear maps."""
RANK, ALPHA = 3, 1.5


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """No layer is left at zero, behind which a mistake would hide."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in network.parameters():
            if weights.requires_grad:
                weights.add_(0.1 * torch.randn(weights.shape, generator=drawn))
    return network.eval()


def made_of(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A small network, and what it answers to some inputs."""
    arguments, labels, _ = SMALL[name]
    network = randomised(build(name, arguments))
    shape = (3,) if name == "mlp" else IMAGE
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return network, lambda each: each(x, torch.tensor([0.9, 0.3]), labels)


def adapted(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names before and shapes of the weights that something is added to."""
    return {
        name.replace("parametrizations.", "").removesuffix(".original"): tuple(value.shape)
        for name, value in network.named_parameters()
        if name.endswith(".original")
    }


def adapted_as(name: str) -> str:
    """Where what is added to a weight of this name is kept."""
    module, _, own = name.rpartition(".")
    return f"{module}.parametrizations.{own}".removeprefix(".")


def gradients(network: nn.Module, answer: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Of a sum, by the name of what is trained; zeros where it is not reached."""
    named = {name: value for name, value in network.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(answer(network).square().sum(), list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(named.items(), found, strict=True)
    }


def check(network: nn.Module, answer: Callable[[nn.Module], Tensor], left: set[str]) -> None:
    """All that holds of any network; of its matrices only those `left` are no linear maps."""
    reached = {name for name, value in gradients(network, answer).items() if value.any()}
    before, names = answer(network).detach(), list(network.state_dict())
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    matrices = {name: value for name, value in network.named_parameters() if value.ndim > 1}
    lora.attach(network, RANK, ALPHA)
    # Nothing changes at first, and what is added is all that is trained.
    torch.testing.assert_close(answer(network), before, atol=1e-6, rtol=0)
    assert matrices.keys() - adapted(network).keys() == left
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B"}
    count = sum(RANK * (shape[0] + torch.Size(shape[1:]).numel()) for shape in adapted(network).values())
    assert sum(value.numel() for value in network.parameters() if value.requires_grad) == count
    # A gradient reaches the second factor of each, the first is multiplied by its zeros.
    found = {name for name, value in gradients(network, answer).items() if value.any()}
    wanted = {adapted_as(name) + ".0.B" for name in adapted(network).keys() & reached}
    assert found == wanted and len(wanted) > 2

    drawn = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith(".B"):
                value.copy_(0.05 * torch.randn(value.shape, generator=drawn))
    changed = answer(network).detach()
    assert float((changed - before).abs().max()) > 1e-3
    state = {name: value.clone() for name, value in network.state_dict().items()}
    whole = lora.merged(network)
    torch.testing.assert_close(answer(whole), changed, atol=1e-5, rtol=1e-5)
    assert set(whole.state_dict()) == set(names)
    assert not any(parametrize.is_parametrized(module) for module in whole.modules())
    for name, value in whole.state_dict().items():
        if name in adapted(network):
            added = adapted_as(name)
            product = state[f"{added}.0.B"] @ state[f"{added}.0.A"]
            expected = weights[name] + ALPHA / RANK * product.reshape(value.shape)
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(value, weights[name])
    # The network that is trained on stays as it is, and the copy loads into a new one.
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_every_architecture_has_its_case() -> None:
    assert SMALL.keys() | {"classifier", "diffusersmodel"} == set(architectures())


@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_as_it_was_then_trained_by_two_factors_then_one_again(name: str) -> None:
    network, answer = made_of(name)
    check(network, answer, SMALL[name][2])
    whole = lora.merged(network)
    fresh = build(name, SMALL[name][0])
    fresh.load_state_dict(whole.state_dict())
    torch.testing.assert_close(answer(fresh.eval()), answer(whole), atol=0, rtol=0)


TABLES = ("table", "pad_token")
"""Of diffusers' networks."""


@pytest.mark.parametrize("name", sorted(TINY))
def test_networks_of_diffusers_are_adapted_as_any_other(name: str, tmp_path: Path) -> None:
    for needed in ("diffusers", "transformers"):
        pytest.importorskip(needed, reason="the extra flowdistill[diffusers] is not installed")
    make(tmp_path, name)
    opened = reopen(tmp_path, name)
    network, x, labels = opened.network, draw(name), torch.tensor([0, 1]) if opened.card.classes else None
    network.requires_grad_(True)
    left = {key for key, value in network.named_parameters() if value.ndim > 1 and key.endswith(TABLES)}
    check(network, lambda each: each(x, torch.tensor([0.9, 0.3]), labels), left)


def test_the_first_factor_is_random_by_the_seed_and_the_second_zero() -> None:
    made = []
    for seed in (1, 1, 2):
        network, _ = made_of("mlp")
        torch.manual_seed(seed)
        lora.attach(network, 2, 1.0)
        made.append({n: v for n, v in network.named_parameters() if n.endswith((".A", ".B"))})
    one, again, other = made
    for name in one:
        assert torch.equal(one[name], again[name])
        if name.endswith(".B"):
            assert not one[name].any()
        else:
            assert one[name].abs().min() > 0 and not torch.equal(one[name], other[name])


# In a training ---------------------------------------------------------------------------------------------

LORA = ("-s", "straighten.lora={rank: 2, alpha: 3.0}", "-s", "straighten.own_states=0.5")


class Killed(BaseException):
    pass


FILES = ("model.safetensors", "log.jsonl", "checkpoints/last.safetensors")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    flow_file(Path("flow.safetensors"))
    Path("r.yaml").write_text(RECIPE)
    return Shell(capsys)


def test_what_is_written_is_the_flow_and_a_product_of_low_rank(shell: Shell) -> None:
    more = ("-s", "straighten.ema={decay: 0.9, also: [0.5]}", "-s", "straighten.optimizer={weight_decay: 1}")
    answer = shell("straighten", "r.yaml", "-q", *LORA, *more)
    assert answer.code == 0, answer.err
    folder, before = Path("runs/r/straighten"), load_file("flow.safetensors")
    for name in ("model.safetensors", "model-ema-0.5.safetensors"):
        after = load_file(folder / name)
        assert after.keys() == before.keys()
        for key, value in after.items():
            change = (value - before[key]).double()
            if value.ndim > 1:
                sizes = torch.linalg.svdvals(change)
                assert float(sizes[0]) > 1e-4 and float(sizes[2:].sum()) < 1e-5 * float(sizes[0]) + 1e-6, key
            else:
                assert not change.any(), key
    student = open_model(str(folder))
    assert student.card.nfe == 3 and student.card.architecture == "mlp"
    assert not any(parametrize.is_parametrized(module) for module in student.network.modules())
    x = randomness.noise(0, range(4), (2,))
    assert student.field(x, torch.ones(4), None).isfinite().all()
    assert shell("sample", folder, "--nfe", "2", "--count", "4", "-q").code == 0


def test_a_network_with_a_convention_is_adapted_under_its_makers_names(shell: Shell) -> None:
    flow_file(Path("flow.safetensors"), convention={"prediction": "eps"})
    assert shell("straighten", "r.yaml", "-q", *LORA, "-s", "straighten.steps=4").code == 0
    before, after = (load_file(name) for name in ("flow.safetensors", "runs/r/straighten/model.safetensors"))
    assert before.keys() == after.keys()
    assert open_model("runs/r/straighten").card.convention == open_model("flow.safetensors").card.convention


def test_a_training_that_is_killed_ends_in_the_same_bytes(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("straighten", "r.yaml", "-q", "--out", "whole", *LORA).code == 0
    original = Straighten.per_sample

    def killed(self: Straighten, network: nn.Module, batch: Batch) -> Any:
        if batch.draw.step == 33:
            raise Killed
        return original(self, network, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Straighten, "per_sample", killed)
        assert shell("straighten", "r.yaml", "-q", "--out", "broken", *LORA).code == 1
    assert artifact.read_header(Path("broken/straighten/checkpoints/last.safetensors"))["step"] == 20
    assert shell("straighten", "r.yaml", "-q", "--out", "broken", *LORA).code == 0
    whole, broken = (content(Path(out) / "straighten") for out in ("whole", "broken"))
    for name in FILES:
        assert whole[name] == broken[name]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("lora={}", "sharded=true"), "lora: is not for trainings with `sharded`; leave one of them out"),
        (("lora={}", "post_hoc={every: 5}"), "lora: is not for trainings with `post_hoc`; leave one of them"),
        (("lora={rank: 0}",), "lora.rank: expected a number >= 1, found 0"),
        (("lora={alpha: 0}",), "lora.alpha: expected a number > 0"),
    ],
)
def test_adaptations_that_cannot_be_are_refused(shell: Shell, settings: tuple[str, ...], says: str) -> None:
    given = [part for each in settings for part in ("-s", f"straighten.{each}")]
    answer = shell("straighten", "r.yaml", "-q", *given)
    assert (answer.code, answer.out) == (2, "") and says in answer.err, answer.err
    assert len(answer.err.splitlines()) == 1 and not Path("runs").exists()
