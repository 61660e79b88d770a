"""Pictures (and texts) as unit vectors: what CLIP and DINO scores share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from multilora.lab.score.cache import Vectors, picture_hash, text_hash, weights_hash

# How a cosine becomes a score. "torchmetrics" is what its CLIPScore prints for one picture: 100 max(cos, 0). Of many
# it prints max(mean of 100 cos, 0), which differs from our mean where a cosine is negative: take "cosine" for that.
Convention = Literal["torchmetrics", "cosine"]


class Embedder:
    """A model with its preprocessing. `name` says both, as every reported number should.

    Subclasses have model (a torch module), name and library, and define `preprocessing`, `_pictures`, `_texts`.
    """

    model: torch.nn.Module
    name: str
    library: ClassVar[str]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def preprocessing(self) -> str:
        """What happens to a picture before the model sees it, in words or as JSON."""
        raise NotImplementedError

    def _pictures(self, images: list[Image.Image]) -> torch.Tensor:
        raise NotImplementedError

    def _texts(self, texts: list[str]) -> torch.Tensor:
        raise ValueError(f"{self.name} reads no texts: wanted a CLIP")

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
        """Unit vectors [n, d], float32 on the CPU. Texts longer than the model's window are cut, with a warning."""
        return self._units(self._texts, list(texts), batch)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image], batch: int = 64) -> torch.Tensor:
        """Unit vectors [n, d], float32 on the CPU."""
        return self._units(self._pictures, [image.convert("RGB") for image in images], batch)

    def _units(self, run: Callable[[Any], torch.Tensor], things: list[Any], batch: int) -> torch.Tensor:
        # cuDNN runs float32 convolutions in TF32 by default, whose patch embeddings are wrong in the third digit.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if self.device.type == "cuda" else None
        with exact or contextlib.nullcontext():
            parts = [run(things[i : i + batch]) for i in range(0, len(things), batch)]
        if not parts:
            return torch.empty(0, 0)
        return torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1).cpu()

    def score(
        self, images: Sequence[Image.Image], texts: str | Sequence[str], convention: Convention = "torchmetrics"
    ) -> list[float]:
        """Text-image score per picture: one text for all pictures or one text each.

        convention says what becomes of the cosine: "torchmetrics" 100 max(cos, 0), "cosine" 100 cos. Raises
        ValueError when the counts differ.
        """
        texts = [texts] * len(images) if isinstance(texts, str) else list(texts)
        _same(len(images), len(texts), "texts")
        return _as((self.images(images) * self.texts(texts)).sum(-1), convention) if texts else []

    def image_score(
        self,
        images: Sequence[Image.Image],
        references: Sequence[Image.Image | Sequence[Image.Image]],
        convention: Convention = "torchmetrics",
    ) -> list[float]:
        """Image-image score per picture; one reference serves all. Of several references the mean cosine counts."""
        sets = [[r] if isinstance(r, Image.Image) else list(r) for r in references]
        sets = sets * len(images) if len(sets) == 1 else sets
        _same(len(images), len(sets), "references")
        if not sets:
            return []
        seen = self.images(images)
        known = self.images([r for one in sets for r in one]).split([len(one) for one in sets])
        cosines = torch.stack([(a @ b.T).mean() for a, b in zip(seen, known, strict=True)])
        return _as(cosines, convention)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the vectors depend on: library, weights by hash, precision, device kind, preprocessing."""
        return {
            "library": self.library,
            "weights": weights_hash(self.model),
            "dtype": str(next(self.model.parameters()).dtype),
            "device": self.device.type,
            "preprocessing": self.preprocessing,
        }


def _as(cosines: torch.Tensor, convention: Convention) -> list[float]:
    return (100 * cosines if convention == "cosine" else (100 * cosines).clamp(min=0)).tolist()


def _same(images: int, others: int, what: str) -> None:
    if images != others:
        raise ValueError(f"{images} pictures but {others} {what}: wanted one for all or one for each picture")


class Cached(Embedder):
    """An embedder whose vectors are computed once per picture and text, in memory and, with a path, in that file."""

    def __init__(self, inner: Embedder, path: str = "") -> None:
        self.inner, self.model, self.name = inner, inner.model, inner.name
        self._images = Vectors(inner.images, picture_hash, lambda: inner.facts, path)
        self._words = Vectors(inner.texts, text_hash, lambda: inner.facts, path)

    @property
    def preprocessing(self) -> str:
        return self.inner.preprocessing

    def images(self, images: Sequence[Image.Image], batch: int = 64) -> torch.Tensor:
        return self._images(images)

    def texts(self, texts: Sequence[str], batch: int = 64) -> torch.Tensor:
        return self._words(texts)


class Similarity:
    """The source of a score that compares pictures with texts or with references."""

    def __init__(self, embedder: Embedder, convention: Convention = "torchmetrics") -> None:
        self.embedder, self.convention = embedder, convention
        self.model = f"{embedder.name}; {'100 cos' if convention == 'cosine' else '100 max(cos, 0)'}"

    def numbers(
        self, images: list[Image.Image], texts: list[str], references: list[tuple[Image.Image, ...]]
    ) -> list[float]:
        if texts:
            return self.embedder.score(images, texts, self.convention)
        return self.embedder.image_score(images, references, self.convention)


def told(settings: dict[str, Any]) -> str:
    """Settings of a preprocessing as one line of JSON."""
    return json.dumps(settings, sort_keys=True, default=str)
