"""CLIP scores, text-image and image-image, through clip-anytorch: OpenAI's names, files, and the embedded scorer.

The embedded scorer is a small CLIP in OpenAI's layout, built by clip-anytorch's own `build_model` and fed by its own
`clip.tokenize`. Its file keeps the token embedding's used rows only: every other token shares one row.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

VOCABULARY = 49408  # clip.tokenize's BPE
SUFFIXES = (".pt", ".safetensors")


def _clip() -> Any:
    with warnings.catch_warnings():  # clip-anytorch imports pkg_resources, which warns of its own end
        warnings.simplefilter("ignore")
        try:
            import clip
        except ImportError as error:
            raise ValueError("CLIP scores need clip-anytorch: pip install clip-anytorch") from error
    return clip


def expand(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A stored state dict in OpenAI's layout: "token_embedding.rows" and ".ids" become the full ".weight".

    rows: [m + 1, width], row 0 for every token not in ids; ids: [m] ascending token numbers.
    """
    state = dict(state)
    if "token_embedding.rows" in state:
        rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.ids").long()
        weight = rows[:1].expand(VOCABULARY, -1).clone()
        weight[ids] = rows[1:]
        state["token_embedding.weight"] = weight
    return state


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its preprocessing; `name` says both, as every reported number should."""

    model: torch.nn.Module
    preprocess: Any
    name: str

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [n, d], float32 on the CPU. Texts beyond 77 tokens are cut."""
        tokens = _clip().tokenize(list(texts), truncate=True).to(self.device)
        return _unit(self.model.encode_text(tokens))

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image], batch: int = 64) -> torch.Tensor:
        """Unit vectors [n, d], float32 on the CPU."""
        inputs = [self.preprocess(image.convert("RGB")) for image in images]
        parts = [torch.stack(inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
        return torch.cat([_unit(self.model.encode_image(part.to(self.device))) for part in parts])

    def score(self, images: Sequence[Image.Image], texts: str | Sequence[str]) -> list[float]:
        """CLIP score per picture, 100 max(cos, 0): one text for all pictures or one text each.

        Raises ValueError when the counts differ. The definition is https://arxiv.org/abs/2104.08718 with w = 1, as
        torchmetrics prints it.
        """
        texts = [texts] * len(images) if isinstance(texts, str) else list(texts)
        _same(len(images), len(texts), "texts")
        return _cosines(self.images(images), self.texts(texts))

    def image_score(self, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float]:
        """Image-image score per pair, 100 max(cos, 0). One reference serves all pictures."""
        references = list(references) * len(images) if len(references) == 1 else list(references)
        _same(len(images), len(references), "references")
        return _cosines(self.images(images), self.images(references))


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def _same(images: int, others: int, what: str) -> None:
    if images != others:
        raise ValueError(f"{images} pictures but {others} {what}: wanted one for all or one for each picture")


def _cosines(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    return (100 * (a * b).sum(-1)).clamp(min=0).tolist()


@functools.cache
def load_clip(name: str = "embedded", device: str = "cpu") -> Clip:
    """A scorer: "embedded", an OpenAI name ("ViT-B/32"), or the path of a .pt or .safetensors file in OpenAI's layout.

    Weights are float32. Raises ValueError for an unknown name (with the known ones) or a missing file.
    """
    clip = _clip()
    path = Path(name)
    if name == "embedded":
        from multilora.pipelines.load import assets

        path = assets() / "clip" / "model.safetensors"
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"CLIP scorer {name!r}: {path} is missing; the embedded one: multilora world train")
        model = built(path)
    elif name in clip.available_models() or (path.suffix == ".pt" and path.is_file()):
        model = clip.load(name, device="cpu", jit=False)[0].float()
    else:
        raise ValueError(
            f"CLIP scorer {name!r}: wanted 'embedded', one of {', '.join(clip.available_models())}, or the path of "
            f"an existing {' or '.join(SUFFIXES)} file"
        )
    size = model.visual.input_resolution
    preprocess = clip.clip._transform(size)
    label = f"clip-anytorch {name}, float32, bicubic {size} px centre crop"
    return Clip(model.to(device).eval(), preprocess, label)


def built(path: Path) -> torch.nn.Module:
    """clip-anytorch's `build_model` on a safetensors file. build_model converts weights to half: back to float32."""
    from safetensors.torch import load_file

    try:
        return _clip().model.build_model(expand(load_file(path))).float()
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"CLIP scorer {path}: not a CLIP in OpenAI's layout ({error})") from error
