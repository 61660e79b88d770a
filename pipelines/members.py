"""A LoRA in a composition: the LoRA and the options that belong to it under every method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora.lora import Lora
from multilora.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Member:
    """One LoRA with its options.

    weight               a Schedule: the weight over the steps
    text_encoder_weight  weight of its text-encoder part; None follows the weight (its largest over the schedule)
    blocks               exact module path or glob (relative to the denoiser) -> factor
    positive_only        no effect on the negative (unconditional) prediction
    mask                 [H, W] in 0..1: where the LoRA acts, or None for everywhere
    reference            what the user named: a path, a library name, or ""
    mask_reference       path of the mask's picture, or ""
    """

    lora: Lora
    name: str = ""
    weight: Schedule = field(default_factory=lambda: Schedule.parse(1.0))
    text_encoder_weight: float | None = None
    blocks: Mapping[str, float] = field(default_factory=dict)
    positive_only: bool = False
    mask: Tensor | None = None
    reference: str = ""
    mask_reference: str = ""

    @property
    def text_weight(self) -> float:
        """The weight of the text-encoder part while the LoRA is fully in a row."""
        if self.text_encoder_weight is not None:
            return self.text_encoder_weight
        return self.weight.peak

    def scaled(self, scale: float) -> Member:
        """The same member with every weight times `scale`."""
        if scale == 1.0:
            return self
        text = None if self.text_encoder_weight is None else self.text_encoder_weight * scale
        return Member(**{**self.__dict__, "weight": self.weight * scale, "text_encoder_weight": text})


def read_mask(mask: Any, name: str) -> tuple[Tensor | None, str]:
    """A mask as [H, W] float32 in 0..1 and its path, from a path, a PIL picture, an array or a tensor.

    Raises ValueError naming the LoRA when it is not two-dimensional, not within 0..1 or not readable.
    """
    if mask is None:
        return None, ""
    reference = ""
    if isinstance(mask, (str, Path)):
        from PIL import Image, UnidentifiedImageError

        reference = str(mask)
        try:
            mask = Image.open(mask)
            mask.load()
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"mask of LoRA {name!r}: cannot read {reference}: {error}") from None
    if hasattr(mask, "convert"):
        mask = mask.convert("L")
        mask = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).reshape(mask.height, mask.width) / 255.0
    mask = torch.as_tensor(mask).detach().to("cpu", torch.float32)
    if mask.ndim != 2:
        raise ValueError(f"mask of LoRA {name!r}: wanted [height, width], got shape {list(mask.shape)}")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        span = f"{mask.min():g} to {mask.max():g}"
        raise ValueError(f"mask of LoRA {name!r}: values must lie within 0 and 1, got {span}")
    return mask, reference


def fit_mask(mask: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """A mask [H, W] averaged down to the latent grid [h, w].

    Raises ValueError when H, W is not a whole multiple of the grid with one factor for both sides.
    """
    (high, wide), (h, w) = mask.shape, size
    if high % h or wide % w or high // h != wide // w:
        raise ValueError(
            f"mask of LoRA {name!r}: height x width {high} x {wide} does not fit this picture, whose latent grid is "
            f"{h} x {w}; give the mask in the picture's size or that of the grid"
        )
    return torch.nn.functional.avg_pool2d(mask[None, None], high // h)[0, 0]
