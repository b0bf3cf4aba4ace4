"""The published LPIPS as a distance for training: frozen weights, gradients to the student's image alone.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924). A
classifier's maps at several depths; each place's vector is scaled to length 1, and squared differences are
weighed by learnt heads, averaged over places and summed over depths. The networks are the `lpips` package's;
rf++ (arXiv 2405.20320) uses piq 0.8.0's, which pools by the average, on images of 224 pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flowdistill import foreign
from flowdistill.errors import UsageError
from flowdistill.evaluation import lpipsweights
from flowdistill.flow import expand
from flowdistill.objectives import LEAST

if TYPE_CHECKING:
    from flowdistill.objectives import Distance, Lpips
    from flowdistill.teachers import Card

_CLASSES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet"}
_CHANNELS = {
    "vgg": (64, 128, 256, 512, 512),
    "alex": (64, 192, 384, 256, 256),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
_EPS = 1e-10
_SQUARES_AT_LEAST = 1e-30
"""Below it a vector counts as 0: the root's own slope is infinite there."""
_PIXELS_CPU, _PIXELS = 2**16, 2**21
"""How many are compared at a time, which bounds the memory: of 224 x 224 one image, and on a GPU 41."""


@dataclass(frozen=True)
class LpipsDistance:
    """LPIPS of images in [-1, 1], which are not clamped.

    `label` tells weights (the first digits of their file's SHA-256), pooling and resolution. Grey images
    count as coloured ones.
    """

    label: str
    network: Network
    resolution: int | None
    """Pixels a side to which images are resized; None leaves them."""

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x [B, 1 or 3, H, W] -> [B] float32; gradients reach x_hat alone."""
        on_cpu = x_hat.device.type == "cpu"
        layout = torch.channels_last if on_cpu else torch.preserve_format
        self.network.to(x_hat.device, memory_format=layout)  # type: ignore[call-overload]
        pixels = len(x_hat) * (self.resolution**2 if self.resolution else x_hat[0, 0].numel())
        parts = max(1, -(-pixels // (_PIXELS_CPU if on_cpu else _PIXELS)))
        pairs = zip(x_hat.chunk(parts), x.detach().chunk(parts), strict=True)
        compare = self._with_slopes if torch.is_grad_enabled() and x_hat.requires_grad else self._compared
        return torch.cat([compare(*pair) for pair in pairs])

    def _with_slopes(self, x_hat: Tensor, x: Tensor) -> Tensor:
        found: Tensor = _WithSlopes.apply(self._compared, x_hat, x)  # type: ignore[no-untyped-call]
        return found

    def _compared(self, x_hat: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.network(self._prepared(x_hat), self._prepared(x))
        return found

    def _prepared(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] float32, resized as rf++ does: bilinearly, without antialiasing."""
        images = images.float()
        if self.resolution is not None and images.shape[2:] != (self.resolution, self.resolution):
            size = (self.resolution, self.resolution)
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return images.expand(-1, 3, -1, -1)


class Network(nn.Module):
    """The distance in images [B, 3, H, W] as they are; built without memory, for `fill`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, settings: Lpips) -> None:
        super().__init__()
        networks = foreign.member("lpips", "pretrained_networks")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how lpips calls torchvision
            kind = getattr(networks, _CLASSES[settings.net])
            self.body = kind(pretrained=False, requires_grad=False)
        self.bf16 = settings.precision == "bf16"
        for number, channels in enumerate(_CHANNELS[settings.net]):
            self.register_buffer(f"lin{number}", torch.empty(1, channels, 1, 1))
        mean, std = torch.tensor(_MEAN).reshape(1, 3, 1, 1), torch.tensor(_STD).reshape(1, 3, 1, 1)
        self.register_buffer("shift", 2 * mean - 1)
        self.register_buffer("scale", 2 * std)
        if settings.pooling == "average":
            for number in range(1, self.depths + 1):
                _pool_by_average(self.body.get_submodule(f"slice{number}"))

    @property
    def depths(self) -> int:
        """How many maps are compared."""
        return int(self.body.N_slices)

    def fill(self, weights: lpipsweights.Weights) -> None:
        """Take these weights for good."""
        self.body.load_state_dict(weights.body, assign=True)
        for number, head in enumerate(weights.heads):
            self.register_buffer(f"lin{number}", head)
        if weights.scaling is not None:
            self.shift, self.scale = weights.scaling
        self.eval().requires_grad_(False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """x_hat, x [B, 3, H, W] float32 -> [B] float32."""
        total = x_hat.new_zeros(len(x_hat))
        with torch.no_grad():
            x = (x - self.shift) / self.scale
        x_hat = (x_hat - self.shift) / self.scale
        for part, head in self._parts():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                x_hat = part(x_hat)
                with torch.no_grad():
                    x = part(x)
            with torch.autocast(x.device.type, enabled=False):
                total = total + _Apart.apply(x_hat, x, head)  # type: ignore[no-untyped-call]
        return total

    def _parts(self) -> Iterator[tuple[nn.Module, Tensor]]:
        for number in range(self.depths):
            yield self.body.get_submodule(f"slice{number + 1}"), self.get_buffer(f"lin{number}")


def lpips_distance(settings: Lpips, card: Card, weights: Path | None = None) -> LpipsDistance:
    """The distance that a recipe's `settings` describe, for what a model of this card makes.

    `weights` is a file, None stands for torchvision's cache.

    Raises:
        UsageError: the data are no images, or too small ones; says which shape was found.
        MissingInput, ArtifactError: as `lpipsweights.read` does.
    """
    _refuse_others(settings, card)
    network = Network(settings)
    body = {name: tuple(value.shape) for name, value in network.body.state_dict().items()}
    heads = {f"lin{number}": (1, c, 1, 1) for number, c in enumerate(_CHANNELS[settings.net])}
    found = lpipsweights.read(settings.net, body, heads, weights)
    network.fill(found)
    label = f"lpips-{settings.net}@{found.sha256[:8]}-{settings.pooling}-{settings.resolution}"
    label += "" if settings.precision == "fp32" else f"-{settings.precision}"
    return LpipsDistance(label, network, None if settings.resolution == "native" else settings.resolution)


def _refuse_others(settings: Lpips, card: Card) -> None:
    """Data that are no images, or smaller ones than the network can take."""
    if len(card.shape) != 3 or card.shape[0] not in (1, 3) or card.latent is not None:
        what = "latents" if card.latent is not None else "data"
        raise UsageError(
            f"loss.distance: lpips compares images [1 or 3, H, W], found {what} of shape {list(card.shape)}\n"
            "choose squared-l2, l2 or pseudo-huber as loss"
        )
    least = LEAST[settings.net]
    if settings.resolution == "native" and min(card.shape[1:]) < least:
        raise UsageError(
            f"loss.distance: lpips with net: {settings.net} needs images of {least} pixels or more, found "
            f"shape {list(card.shape)}\ngive `resolution` a number instead of native; 224 is rf++'s"
        )


def _pool_by_average(layers: nn.Module) -> None:
    """Put an average in the place of every maximum over the same windows."""
    for name, layer in layers.named_children():
        if isinstance(layer, nn.MaxPool2d):
            pool = nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
            setattr(layers, name, pool)


class _WithSlopes(torch.autograd.Function):
    """A distance whose slopes are taken at once: the network's maps need not wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, distance: Distance, x_hat: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x_hat = x_hat.detach().requires_grad_()
            found = distance(x_hat, x)
            ctx.save_for_backward(*torch.autograd.grad(found.sum(), x_hat))
        return found.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return None, slopes * expand(slope, slopes).to(slopes), None


class _Apart(torch.autograd.Function):
    """sum_c head_c (a_c / |a| - b_c / |b|)^2, averaged over places, of maps a, b [B, C, H, W] -> [B] float32.

    The slope reaches a alone. Maps are large and many, and memory is what this costs: written out, each step
    would have a map of its own, forwards and backwards.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, head: Tensor) -> Tensor:
        ours, target = a.float(), b.float()
        room, apart = ours * ours, target * target
        length, of_target = _length(room), _length(apart)
        torch.div(ours, length + _EPS, out=apart)
        apart.addcdiv_(target, of_target + _EPS, value=-1)
        ctx.save_for_backward(a, length, apart, head)
        return (torch.mul(apart, apart, out=room).mean((2, 3)) * head.flatten()).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        a, length, apart, head = ctx.saved_tensors
        places = apart[0, 0].numel()
        along = apart * (expand(2 / places * slope, apart) * head)
        ours = a.float()
        inwards = (along * ours).sum(1, keepdim=True) / (length * (length + _EPS).square())
        along.div_(length + _EPS).addcmul_(ours, inwards, value=-1)
        return along.to(a), None, None


def _length(squares: Tensor) -> Tensor:
    """Of the vector at each place, [B, 1, H, W]; 0 counts as a little, so that it has a slope."""
    return squares.sum(1, keepdim=True).clamp_min_(_SQUARES_AT_LEAST).sqrt_()
