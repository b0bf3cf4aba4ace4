"""A scheduler of diffusers that takes the steps it was made with, whatever its pipeline asks for.

This file needs diffusers and nothing else: `flowdistill export SCHEDULE DEST --as diffusers` puts a copy of
it into DEST, for machines without flowdistill.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config

SIGMAS = "sigmas.json"


class FixedSigmas(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """Euler's steps through `fixed_sigmas`, which fall from 1; the 0 behind the last is understood.

    For pipelines whose call takes no `sigmas`, such as Wan and LTX, and right in all others for flows, too.
    What a pipeline computes by itself, `sigmas` and `mu`, is ignored; a number of steps that is not that of
    the sigmas is refused, since pipelines count with it.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_train_timesteps: int = 1000, fixed_sigmas: Sequence[float] = ()) -> None:
        falls = all(a > b for a, b in pairwise([*fixed_sigmas, 0.0]))
        if not (fixed_sigmas and falls and fixed_sigmas[0] <= 1):
            raise ValueError(
                f"fixed_sigmas must fall from 1 and end above 0, found {list(fixed_sigmas)}; "
                f"`from_pretrained` reads them from {SIGMAS} in the folder"
            )
        super().__init__(num_train_timesteps=num_train_timesteps)

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None, **options: Any) -> Any:
        """The scheduler in a folder: of an export, or of a pipeline that was saved with it."""
        beside = Path(folder, subfolder or "", SIGMAS)
        if beside.is_file():
            options.setdefault("fixed_sigmas", json.loads(beside.read_text()))
        return super().from_pretrained(folder, subfolder=subfolder, **options)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> Any:
        """Whatever else another scheduler's config holds, such as a shift, has no part in these steps."""
        own = {key: config[key] for key in ("num_train_timesteps", "fixed_sigmas") if key in config}
        return super().from_config(own, **options)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin anew; `sigmas` and `mu` are ignored, another number of steps is a ValueError."""
        own = list(self.config.fixed_sigmas)
        asked = num_inference_steps if sigmas is None else len(sigmas)
        if asked not in (None, len(own)):
            raise ValueError(
                f"this scheduler has {len(own)} steps, asked for {asked}: pass num_inference_steps={len(own)}"
            )
        super().set_timesteps(sigmas=own, device=device)
