"""Transformers and U-Nets of diffusers in the package's one calling convention.

Each family has its own way of being called: tokens or pictures, lists or batches, position ids, masks,
pooled embeddings. Here all are `(x [B, *shape], time [B], labels [B] | None) -> [B, *shape]`, where x is
the latent in space (video: [B, C, frames, H, W]), `time` is what the transformer itself is fed, and the
output is its own, whatever its sign. What the pipelines of diffusers do around the call is done here, and
only that.

A prompt is a label: its embeddings are a row of a table that belongs to the module, so nothing else in the
package has to know of text. Weights have their names in diffusers, after `model.`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from flowdistill import foreign

Config: TypeAlias = Mapping[str, Any]
Constants: TypeAlias = Mapping[str, Any]


class Rows(NamedTuple):
    """What a batch is conditioned on.

    Embeddings of its prompts [B, L, D], whether each of the L counts [B, L], pooled embeddings [B, P];
    classes [B] where the network knows classes instead of prompts.
    """

    embeds: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    classes: Tensor | None = None


class Conditions(nn.Module):
    """Embeddings of all prompts, a row each; with `null`, the last row is the empty or negative prompt."""

    prompt_embeds: Tensor | None
    prompt_mask: Tensor | None
    pooled: Tensor | None

    def __init__(self, rows: int, tokens: int, width: int, pooled: int, masked: bool) -> None:
        super().__init__()
        self.register_buffer("prompt_embeds", torch.zeros(rows, tokens, width) if rows else None)
        mask = torch.ones(rows, tokens, dtype=torch.bool) if rows and masked else None
        self.register_buffer("prompt_mask", mask)
        self.register_buffer("pooled", torch.zeros(rows, pooled) if rows and pooled else None)

    def forward(self, index: Tensor, dtype: torch.dtype) -> Rows:
        """Rows of index [B], embeddings in `dtype`."""
        embeds, mask, pooled = (
            None if table is None else table[index]
            for table in (self.prompt_embeds, self.prompt_mask, self.pooled)
        )
        return Rows(
            None if embeds is None else embeds.to(dtype), mask, None if pooled is None else pooled.to(dtype)
        )


@dataclass(frozen=True)
class Family:
    """How one class of diffusers is called.

    `call(model, x, time, rows, constants) -> output`; `width` and `pooled` give the widths of prompt
    embeddings from its config, `constants` the names of the numbers that it is conditioned on besides;
    `packing` channels of a token make one of the latent, and are places of it.
    """

    call: Callable[[Any, Tensor, Tensor, Rows, Constants], Tensor]
    width: Callable[[Config], int] = lambda config: 0
    pooled: Callable[[Config], int] = lambda config: 0
    constants: Callable[[Config], tuple[str, ...]] = lambda config: ()
    masked: bool = False
    packing: int = 1

    def channels(self, config: Config) -> int:
        """Channels of the latent; ValueError where the network wants more than a latent."""
        into: int = config["in_channels"]
        out = config.get("out_channels") or into
        if out not in (into, 2 * into, into // self.packing):
            raise ValueError(
                f"{into} channels in, {out} out: it takes a picture or mask besides the latent, "
                "which is not supported"
            )
        return into // self.packing


class DiffusersModel(nn.Module):
    """Raw network of class `name` of diffusers, built from the `config` that lies beside its weights.

    `prompts` prompts of `tokens` embeddings each are the labels 0 to prompts - 1; with `null` there is one
    more row, which labels None stand for. `constants` are numbers that the network is conditioned on
    whatever the prompt: {"guidance": 3.5} of FLUX, {"time_ids": [height, width, top, left, height, width]}
    of SDXL, {"rope_interpolation_scale": [seconds a latent frame, pixels a place, pixels a place]} of LTX.

    Raises ValueError for classes, configs and constants that do not fit.
    """

    model: Any

    def __init__(
        self,
        name: str,
        config: Config,
        prompts: int = 0,
        tokens: int = 0,
        null: bool = False,
        constants: Constants | None = None,
    ) -> None:
        super().__init__()
        family = FAMILIES.get(name)
        if family is None:
            raise ValueError(f"no such family: '{name}', known are {', '.join(FAMILIES)}")
        self.model = _construct(name, config)
        settled: Config = self.model.config
        self.constants = dict(constants or {})
        _check(family, settled, prompts, tokens, self.constants)
        self.prompts, self.null = prompts, null
        self.conditions = Conditions(
            prompts and prompts + null, tokens, family.width(settled), family.pooled(settled), family.masked
        )
        self._call = family.call
        self._classes = prompts == 0 and bool(settled.get("num_class_embeds"))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        dtype: torch.dtype = self.model.dtype
        rows = self._rows(labels, x, dtype)
        out = self._call(self.model, x.to(dtype), time.float(), rows, self.constants)
        return out[:, : x.shape[1]].to(x.dtype)  # a learned variance comes after the mean

    def _rows(self, labels: Tensor | None, x: Tensor, dtype: torch.dtype) -> Rows:
        if not self.prompts:
            if self._classes and labels is None:
                raise ValueError("this network has classes and no null class: labels must be given")
            return Rows(classes=labels if self._classes else None)
        if labels is None:
            if not self.null:
                raise ValueError(
                    "labels are None, but there is no null prompt: add null.* to the prompt embeddings"
                )
            labels = torch.full((len(x),), self.prompts, dtype=torch.int64, device=x.device)
        rows: Rows = self.conditions(labels, dtype)
        return rows


def _construct(name: str, config: Config) -> nn.Module:
    constructor = foreign.member("diffusers", name)
    parameters = inspect.signature(constructor.__init__).parameters
    unknown = [key for key in config if key not in parameters]
    if unknown:
        raise ValueError(f"{name} has no config key {', '.join(map(repr, unknown))}")
    model: nn.Module = constructor(**config)
    return model


def _check(family: Family, config: Config, prompts: int, tokens: int, constants: Constants) -> None:
    family.channels(config)
    if family.width(config) and not (prompts and tokens):
        raise ValueError("it is conditioned on text: prompts and tokens must be at least 1")
    if prompts and not family.width(config):
        raise ValueError("it is not conditioned on text: prompts must be 0")
    wanted = family.constants(config)
    if sorted(constants) != sorted(wanted):
        found = ", ".join(constants) or "none"
        raise ValueError(f"constants are {found}, expected {', '.join(wanted) or 'none'}")


# --- how each is called ---------------------------------------------------------------------------


def _sd3(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    return _first(
        model(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=rows.embeds,
            pooled_projections=rows.pooled,
            return_dict=False,
        )
    )


def _flux(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    assert rows.embeds is not None
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    tokens = _first(
        model(
            hidden_states=_pack(x),
            timestep=time,
            guidance=_guidance(time, constants),
            encoder_hidden_states=rows.embeds,
            pooled_projections=rows.pooled,
            txt_ids=torch.zeros(rows.embeds.shape[1], 3, device=x.device),
            img_ids=_grid(1, height, width, device=x.device),
            return_dict=False,
        )
    )
    return _unpack(tokens, height, width)


def _flux2(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    assert rows.embeds is not None
    height, width = x.shape[-2:]
    tokens = _first(
        model(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=time,
            guidance=_guidance(time, constants),
            encoder_hidden_states=rows.embeds,
            txt_ids=_grid(1, 1, 1, rows.embeds.shape[1], device=x.device),
            img_ids=_grid(1, height, width, 1, device=x.device),
            return_dict=False,
        )
    )
    return _in_space(tokens, height, width)


def _qwen(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    assert rows.embeds is not None
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    shapes = [[(1, height, width)]] * len(x)
    # It keeps its rotations for later calls; made in inference mode they could not be trained through.
    with torch.inference_mode(False):
        model.pos_embed(shapes, max_txt_seq_len=rows.embeds.shape[1], device=x.device)
    tokens = _first(
        model(
            hidden_states=_pack(x),
            timestep=time,
            guidance=_guidance(time, constants),
            encoder_hidden_states=rows.embeds,
            encoder_hidden_states_mask=rows.mask,
            img_shapes=shapes,
            return_dict=False,
        )
    )
    return _unpack(tokens, height, width)


def _z_image(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    assert rows.embeds is not None and rows.mask is not None
    lengths = rows.mask.sum(1).tolist()
    prompts = [row[:length] for row, length in zip(rows.embeds, lengths, strict=True)]
    pictures = _first(model(list(x.unsqueeze(2).unbind()), time, prompts, return_dict=False))
    return torch.stack(list(pictures)).squeeze(2)


def _masked(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    return _first(
        model(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=rows.embeds,
            encoder_attention_mask=rows.mask,
            return_dict=False,
        )
    )


def _wan(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    return _first(model(hidden_states=x, timestep=time, encoder_hidden_states=rows.embeds, return_dict=False))


def _ltx(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    frames, height, width = x.shape[-3:]
    tokens = _first(
        model(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=time,
            encoder_hidden_states=rows.embeds,
            encoder_attention_mask=rows.mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=tuple(constants["rope_interpolation_scale"]),
            return_dict=False,
        )
    )
    return _in_space(tokens, frames, height, width)


def _text_unet(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    added = None
    if rows.pooled is not None:
        ids = torch.tensor(constants["time_ids"], device=x.device, dtype=x.dtype)
        added = {"text_embeds": rows.pooled, "time_ids": ids.expand(len(x), -1)}
    return _first(
        model(x, time, encoder_hidden_states=rows.embeds, added_cond_kwargs=added, return_dict=False)
    )


def _plain_unet(model: Any, x: Tensor, time: Tensor, rows: Rows, constants: Constants) -> Tensor:
    return _first(model(x, time, class_labels=rows.classes, return_dict=False))


def _first(outputs: tuple[Tensor, ...]) -> Tensor:
    return outputs[0]


def _guidance(time: Tensor, constants: Constants) -> Tensor | None:
    return torch.full_like(time, constants["guidance"]) if "guidance" in constants else None


def _pack(x: Tensor) -> Tensor:
    """x [B, C, H, W] as tokens [B, H/2 W/2, 4 C] of 2 x 2 places."""
    batch, channels, height, width = x.shape
    places = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return places.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `_pack`; height and width count tokens."""
    places = tokens.reshape(len(tokens), height, width, -1, 2, 2)
    return places.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 2 * height, 2 * width)


def _in_space(tokens: Tensor, *sizes: int) -> Tensor:
    """Tokens [B, places, C] as [B, C, *sizes]."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *sizes)


def _grid(*sizes: int, device: torch.device) -> Tensor:
    """Coordinates [places, dims] of a grid of these sizes, the last running fastest."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in sizes]
    return torch.cartesian_prod(*axes)


def _embedded(config: Config) -> tuple[str, ...]:
    return ("guidance",) if config["guidance_embeds"] else ()


def _time_ids(config: Config) -> tuple[str, ...]:
    return ("time_ids",) if config["addition_embed_type"] == "text_time" else ()


def _pooled_beside_ids(config: Config) -> int:
    """Width of SDXL's pooled embedding: it shares one projection with the embeddings of 6 numbers."""
    if not _time_ids(config):
        return 0
    width: int = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return width


def _key(name: str) -> Callable[[Config], int]:
    return lambda config: config[name]


FAMILIES: Mapping[str, Family] = {
    "SD3Transformer2DModel": Family(_sd3, _key("joint_attention_dim"), _key("pooled_projection_dim")),
    "FluxTransformer2DModel": Family(
        _flux, _key("joint_attention_dim"), _key("pooled_projection_dim"), _embedded, packing=4
    ),
    "Flux2Transformer2DModel": Family(_flux2, _key("joint_attention_dim"), constants=_embedded),
    "QwenImageTransformer2DModel": Family(
        _qwen, _key("joint_attention_dim"), constants=_embedded, masked=True, packing=4
    ),
    "ZImageTransformer2DModel": Family(_z_image, _key("cap_feat_dim"), masked=True),
    "Lumina2Transformer2DModel": Family(_masked, _key("cap_feat_dim"), masked=True),
    "SanaTransformer2DModel": Family(_masked, _key("caption_channels"), masked=True),
    "WanTransformer3DModel": Family(_wan, _key("text_dim")),
    "LTXVideoTransformer3DModel": Family(
        _ltx, _key("caption_channels"), constants=lambda config: ("rope_interpolation_scale",), masked=True
    ),
    "UNet2DConditionModel": Family(_text_unet, _key("cross_attention_dim"), _pooled_beside_ids, _time_ids),
    "UNet2DModel": Family(_plain_unet),
}
"""Class in diffusers -> how it is called."""
