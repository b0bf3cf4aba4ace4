"""PNG files, decoded again and compared pixel by pixel."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from flowdistill import pictures
from flowdistill.errors import UsageError


def decoded(png: bytes) -> NDArray[np.uint8]:
    """[height, width, 3]"""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def gradient(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.linspace(-1, 1, count * channels * size * size).reshape(count, channels, size, size)


def test_every_pixel_of_a_grid_becomes_a_square_of_its_value() -> None:
    images = gradient(5, 3, 16)
    found = decoded(pictures.grid(images, columns=3))
    factor, gap = 4, 2
    assert found.shape == (2 * (16 * factor + gap) + gap, 3 * (16 * factor + gap) + gap, 3)
    expected = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    expected = expected.repeat(factor, axis=1).repeat(factor, axis=2)
    for index in range(5):
        row, column = divmod(index, 3)
        top, left = gap + row * (64 + gap), gap + column * (64 + gap)
        assert (found[top : top + 64, left : left + 64] == expected[index]).all()
    assert (found[:gap] == 255).all(), "the gaps are paper"
    assert (found[gap + 64 + gap :, gap + 2 * (64 + gap) :] == 255).all(), "the missing sixth, too"


@pytest.mark.parametrize(("size", "factor"), [(8, 8), (24, 3), (64, 1), (100, 1)])
def test_small_images_are_enlarged_by_whole_factors(size: int, factor: int) -> None:
    found = decoded(pictures.grid(torch.zeros(1, 1, size, size), columns=8))
    assert found.shape[:2] == (size * factor + 4, size * factor + 4)


def test_grey_and_out_of_range_values() -> None:
    images = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).reshape(5, 1, 1, 1).expand(5, 1, 64, 64)
    found = decoded(pictures.grid(images, columns=5))[10, 10::66]
    assert found.tolist() == [[value] * 3 for value in (0, 0, 128, 255, 255)]


def test_labelled_rows_have_their_caption_on_the_left_and_their_images_below_each_other() -> None:
    dark, light = -torch.ones(4, 3, 16, 16), 0.5 * torch.ones(3, 3, 16, 16)
    found = decoded(pictures.labelled_rows([("a", dark), ("a much longer caption", light)]))
    left = found.shape[1] - 4 * 66 - 2
    assert left > 100
    assert (found[2:66, left + 2 : left + 66] == 0).all()
    assert (found[68:132, left + 2 : left + 66] == 191).all()
    assert (found[68:132, left + 3 * 66 + 2 :] == 255).all(), "the second row has three images"
    ink = (found[:, :left] < 128).any(2)
    assert ink[:66].any() and ink[68:].any()
    assert ink[68:].sum() > 3 * ink[:66].sum()
    assert not ink[:, -4:].any(), "the captions end before the images"


def test_points_are_drawn_where_they_are() -> None:
    points = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -0.5]])
    found = decoded(pictures.grid(points, columns=8))
    height, width, _ = found.shape
    assert height == width
    rows, columns = np.nonzero((found == (31, 97, 168)).all(2))
    centre, scale = (width - 1) / 2, ((width - 1) / 2 - 4) / 1.1
    assert len(rows) == 3 * 4
    for x, y in points.tolist():
        distance = np.hypot(columns - (centre + x * scale), rows - (centre - y * scale))
        assert distance.min() < 1.0, "upwards is the second coordinate"


def test_rows_of_points_share_a_scale() -> None:
    near, far = 0.1 * torch.ones(1, 2), torch.ones(1, 2)
    found = decoded(pictures.labelled_rows([("near", near), ("far", far)]))
    rows, columns = np.nonzero((found == (31, 97, 168)).all(2))
    middle = found.shape[1] - 192 / 2
    reach = [float(columns[part].mean() - middle) for part in (rows < 190, rows > 190)]
    assert reach[1] == pytest.approx(10 * reach[0], abs=6)


def test_what_cannot_be_drawn_is_refused() -> None:
    assert [pictures.drawable(shape) for shape in ((2,), (1, 8, 8), (3, 16, 16))] == [True] * 3
    assert not any(pictures.drawable(shape) for shape in ((5,), (2, 8, 8), (8, 8), ()))
    with pytest.raises(UsageError, match=r"\(4, 8, 8\) cannot be drawn"):
        pictures.grid(torch.zeros(2, 4, 8, 8), columns=2)
    with pytest.raises(UsageError, match="no samples"):
        pictures.grid(torch.zeros(0, 3, 8, 8), columns=2)
    with pytest.raises(UsageError, match="at least one row"):
        pictures.labelled_rows([])
