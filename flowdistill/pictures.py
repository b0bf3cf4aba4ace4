"""Samples as PNG: grids of images, rows with captions, and points in the plane as scatter plots.

Small images are enlarged by a whole factor without smoothing, so that a pixel stays a pixel.
Samples are [N, C, H, W] in [-1, 1] with one or three channels, or points [N, 2].
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowdistill.errors import UsageError

_CELL = 64
"""Images are enlarged to at least this many pixels a side."""
_PANEL = 192
_GAP = 2
_FONT_SIZE = 14
_PAPER, _INK = (255, 255, 255), (32, 33, 36)
_DOT = (31, 97, 168)


def drawable(shape: Sequence[int]) -> bool:
    """Whether samples of this shape can be drawn."""
    return tuple(shape) == (2,) or (len(shape) == 3 and shape[0] in (1, 3))


def grid(samples: Tensor, columns: int) -> bytes:
    """PNG of images [N, C, H, W], `columns` in a row, or of all points [N, 2] in one panel."""
    return _png(_sheet(samples, columns, _extent([samples])))


def labelled_rows(rows: Sequence[tuple[str, Tensor]]) -> bytes:
    """PNG with a row for each (caption, samples), captions on the left; points share a scale."""
    if not rows:
        raise UsageError("a picture needs at least one row")
    extent = _extent([samples for _, samples in rows])
    sheets = [_sheet(samples, len(samples), extent) for _, samples in rows]
    font = ImageFont.load_default(_FONT_SIZE)
    left = max(math.ceil(font.getlength(caption)) for caption, _ in rows) + 3 * _FONT_SIZE // 2
    width = left + max(sheet.width for sheet in sheets)
    height = sum(sheet.height for sheet in sheets) - _GAP * (len(sheets) - 1)
    picture = Image.new("RGB", (width, height), _PAPER)
    draw, top = ImageDraw.Draw(picture), 0
    for (caption, _), sheet in zip(rows, sheets, strict=True):
        picture.paste(sheet, (left, top))
        middle = (left - _FONT_SIZE // 2, top + sheet.height // 2)
        draw.text(middle, caption, _INK, font, anchor="rm")
        top += sheet.height - _GAP
    return _png(picture)


def _sheet(samples: Tensor, columns: int, extent: float) -> Image.Image:
    if not len(samples):
        raise UsageError("there are no samples to draw")
    if not drawable(samples.shape[1:]):
        raise UsageError(
            f"samples of shape {tuple(samples.shape[1:])} cannot be drawn: "
            "expected images [C, H, W] of 1 or 3 channels, or points in the plane"
        )
    samples = samples.detach().cpu().float()
    return _scatter(samples, extent) if samples.ndim == 2 else _images(samples, columns)


def _images(images: Tensor, columns: int) -> Image.Image:
    """Enlarged images in rows of `columns`, with a gap around each."""
    count, _, height, width = images.shape
    factor = math.ceil(_CELL / max(height, width))
    pixels = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    step_x, step_y = factor * width + _GAP, factor * height + _GAP
    size = (step_x * min(columns, count) + _GAP, step_y * math.ceil(count / columns) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        cell = Image.fromarray(image.numpy()).resize(
            (factor * width, factor * height), Image.Resampling.NEAREST
        )
        sheet.paste(cell, (_GAP + column * step_x, _GAP + row * step_y))
    return sheet


def _scatter(points: Tensor, extent: float) -> Image.Image:
    """Points [N, 2] within [-extent, extent] in a square panel, the second coordinate upwards."""
    panel = Image.new("RGB", (_PANEL, _PANEL), _PAPER)
    draw = ImageDraw.Draw(panel)
    draw.rectangle((_GAP, _GAP, _PANEL - _GAP - 1, _PANEL - _GAP - 1), outline=(208, 208, 208))
    half = (_PANEL - 1) / 2
    scale = (half - 2 * _GAP) / extent
    inside = points[(points.abs() <= extent).all(1)]
    for x, y in (half + inside * scale * torch.tensor([1.0, -1.0])).round().int().tolist():
        draw.rectangle((x, y, x + 1, y + 1), fill=_DOT)
    return panel


def _extent(samples: Sequence[Tensor]) -> float:
    """Half the side of a square around 0 that holds nearly all points; not used for images."""
    points = torch.cat([each.detach().cpu().float().abs().flatten() for each in samples])
    if samples[0].ndim != 2 or not len(points):
        return 1.0
    # A tenth of room; a stray point in a thousand may lie outside.
    return max(1e-6, 1.1 * float(points.sort().values[int(0.999 * (len(points) - 1))]))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
