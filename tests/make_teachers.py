"""Train the small foreign teachers of the tests: python tests/make_teachers.py [NAME ...], minutes each.

Each has the layout, the labels of time and the prediction of a family that is imported: EDM's preconditioned
U-Net, SiT, a DDPM that predicts the noise. They learn the digits that ship with the package, so that the
probe and the chain of stages are tested on networks that know something.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from flowdistill import randomness, teachers
from flowdistill.conventions import Convention, Linear, Logarithmic
from flowdistill.data import dataset
from flowdistill.interpolants import DDPM, EDM
from flowdistill.teachers import Card

FOLDER = Path(__file__).parent / "fixtures" / "teachers"
SHAPE, CLASSES, STEPS, BATCH = (1, 8, 8), 10, 4000, 64
COMMON = {"shape": SHAPE, "classes": CLASSES, "data": "digits", "licence": "Apache-2.0; data CC BY 4.0"}
CARDS = {
    "edm": Card(
        architecture="songunet",
        arguments={
            "img_resolution": 8,
            "in_channels": 1,
            "out_channels": 1,
            "label_dim": CLASSES,
            "model_channels": 16,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attn_resolutions": [4],
            "dropout": 0.0,
        },
        convention=Convention(interpolant=EDM(), prediction="v", sign=-1, clock=Logarithmic(scale=0.25)),
        **COMMON,
    ),
    "sit": Card(
        architecture="dit",
        arguments={
            "input_size": 8,
            "patch_size": 2,
            "in_channels": 1,
            "hidden_size": 48,
            "depth": 4,
            "num_heads": 3,
            "num_classes": CLASSES,
        },
        convention=Convention(sign=-1, clock=Linear(reversed=True)),
        **COMMON,
    ),
    "ddpm": Card(
        architecture="admunet",
        arguments={
            "image_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "model_channels": 32,
            "channel_mult": [1, 1],
            "attention_resolutions": [2],
            "num_classes": CLASSES,
            # With one channel in a group the norm would undo a shift, and the network be deaf to time.
            "use_scale_shift_norm": True,
        },
        convention=Convention(interpolant=DDPM(), prediction="eps"),
        **COMMON,
    ),
}


def times(card: Card, u: Tensor) -> Tensor:
    """t of u [B] in (0, 1): log-normal noise levels for EDM, else uniform in the family's own time."""
    convention = card.convention
    assert convention is not None
    if isinstance(convention.interpolant, EDM):
        return (-0.8 + 1.5 * torch.special.ndtri(u)).sigmoid().clamp(*convention.span)
    if isinstance(convention.interpolant, DDPM):
        return convention.interpolant.t_at(999 * u).clamp(*convention.span)
    return u


def train(name: str) -> None:
    """The averaged weights go to fixtures/teachers/NAME.safetensors as float16."""
    card, data = CARDS[name], dataset("digits")
    torch.manual_seed(0)
    model = teachers.new(card)
    network = model.network.train()
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    average = {key: value.detach().clone() for key, value in network.state_dict().items()}
    for step in range(STEPS):
        rate = 2e-3 * min(1.0, (step + 1) / 100) * min(1.0, 2.0 * (1.01 - step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        indices = randomness.integers(1, "order", range(step * BATCH, (step + 1) * BATCH), 1797)
        x0, labels = data.batch(indices)
        eps = randomness.noise(2, range(step * BATCH, (step + 1) * BATCH), SHAPE)
        t = times(card, randomness.uniforms(3, "t", step, BATCH).clamp(1e-6, 1 - 1e-6)).float()
        at = t.reshape(-1, 1, 1, 1)
        error = network((1 - at) * x0 + at * eps, t, labels) - (eps - x0)
        loss = (card.convention.loss_weight(t).float() * error.square().flatten(1).mean(1)).mean()  # type: ignore[union-attr]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value, 1 - decay)
        if step % 200 == 0:
            print(name, step, round(loss.item(), 4), flush=True)
    network.load_state_dict(average)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model.write(FOLDER / f"{name}.safetensors", "float16")


if __name__ == "__main__":
    for name in sys.argv[1:] or CARDS:
        train(name)
