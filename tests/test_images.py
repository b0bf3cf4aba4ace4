"""Samples of a user's own, as the model sees data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flowdistill import data, images
from flowdistill.errors import ArtifactError, MissingInput, UsageError

COLOURS = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)


def expected(count: int) -> torch.Tensor:
    return torch.from_numpy(COLOURS[:count].astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


def test_a_folder_of_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number, colours in enumerate(COLOURS):
        (tmp_path / f"{number % 2}").mkdir(exist_ok=True)
        Image.fromarray(colours).save(tmp_path / f"{number % 2}" / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = images.samples(str(tmp_path), (3, 4, 4), 3)
    torch.testing.assert_close(found, expected(5)[[0, 2, 4]])


def test_other_sizes_are_cut_to_the_middle_and_resized(tmp_path: Path) -> None:
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert bool((images.samples(str(tmp_path), (3, 2, 2), 9) > 0.8).all())
    assert images.samples(str(tmp_path), (1, 2, 2), 9).shape == (1, 1, 2, 2)


@pytest.mark.parametrize("name", ["arr_0", "images"])
def test_arrays_of_bytes_or_numbers_channels_first_or_last(tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "bytes.npz", **{name: COLOURS})
    torch.testing.assert_close(images.samples(str(tmp_path / "bytes.npz"), (3, 4, 4), 4), expected(4))
    numbers = expected(5).numpy() * 3
    np.savez(tmp_path / "numbers.npz", **{name: numbers})
    torch.testing.assert_close(
        images.samples(str(tmp_path / "numbers.npz"), (3, 4, 4), 9), torch.from_numpy(numbers)
    )


def test_safetensors_and_data_sets_that_ship(tmp_path: Path) -> None:
    latents = torch.randn(6, 4, 8, 8)
    save_file({"latents": latents}, tmp_path / "latents.safetensors")
    torch.testing.assert_close(
        images.samples(str(tmp_path / "latents.safetensors"), (4, 8, 8), 5), latents[:5]
    )
    found = images.samples("digits", (1, 8, 8), 3)
    torch.testing.assert_close(found, data.dataset("digits").batch(torch.arange(3))[0])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "bytes.npz", arr_0=COLOURS)
    with pytest.raises(UsageError, match=r"has shape \[5, 4, 4, 3\], expected \[n, 3, 8, 8\]"):
        images.samples(str(tmp_path / "bytes.npz"), (3, 8, 8), 4)
    with pytest.raises(MissingInput, match="no such file"):
        images.samples(str(tmp_path / "nothing.npz"), (3, 4, 4), 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingInput, match="no images"):
        images.samples(str(tmp_path / "empty"), (3, 4, 4), 4)
    (tmp_path / "empty" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    with pytest.raises(ArtifactError, match=r"torn\.png: cannot be read"):
        images.samples(str(tmp_path / "empty"), (3, 4, 4), 4)
    (tmp_path / "text.npz").write_bytes(b"rubbish")
    with pytest.raises(ArtifactError, match="cannot be read as an array"):
        images.samples(str(tmp_path / "text.npz"), (3, 4, 4), 4)
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ArtifactError, match="cannot be read as an array"):
        images.samples(str(tmp_path / "objects.npz"), (3, 4, 4), 4)
    with pytest.raises(UsageError, match="are no images"):
        images.samples(str(tmp_path / "empty"), (4, 8, 8), 4)
    with pytest.raises(MissingInput, match="expected images in a folder"):
        images.samples(str(tmp_path / "nowhere"), (3, 4, 4), 4)
