"""DINO similarity of pictures: how alike two things look, where CLIP says how alike they are called."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import PIL
import torch
from PIL import Image

from multilora.lab.score.clip import CACHE, DEVICE, shared
from multilora.lab.score.embed import Cached, Embedder, Similarity, told
from multilora.lab.score.record import score
from multilora.method import Opt

# Model types of transformers whose `pooler_output` is the trained vector of the whole picture. The first DINO is a
# "vit", whose pooler is a layer that its training never saw: it is loaded without, and gives its class token.
POOLED = ("dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")
PLAIN = ("vit",)


class Dino(Embedder):
    """A DINO model of transformers with its image processor. A picture's vector is the normed class token."""

    library = "transformers"

    def __init__(self, model: torch.nn.Module, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name

    @property
    def preprocessing(self) -> str:
        import torchvision
        import transformers

        versions = {"transformers": transformers.__version__, "torchvision": torchvision.__version__}
        return told(
            self.processor.to_dict() | versions | {"class": type(self.processor).__name__, "pillow": PIL.__version__}
        )

    def _pictures(self, images: list[Image.Image]) -> torch.Tensor:
        read = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        found = self.model(pixel_values=read)
        return found.last_hidden_state[:, 0] if self.model.config.model_type in PLAIN else found.pooler_output


def model_type(folder: str | Path) -> str:
    """The model type in a folder's config.json; "" when there is none."""
    try:
        return str(json.loads((Path(folder).expanduser() / "config.json").read_text()).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


@functools.cache
def load_dino(folder: str, device: str = "cpu") -> Dino:
    """DINO (ViT), DINOv2 or DINOv3 in a folder of transformers, float32. Nothing is downloaded.

    Raises ValueError when there is none, and why.
    """
    path, kind = Path(folder).expanduser(), model_type(folder)
    if kind not in POOLED + PLAIN:
        raise ValueError(
            f"DINO {folder!r}: wanted a folder whose config.json says one of {', '.join(POOLED + PLAIN)}, got "
            f"{kind or 'no config.json with a model_type'}"
        )
    from transformers import AutoImageProcessor, AutoModel

    try:
        model, report = AutoModel.from_pretrained(
            str(path), dtype=torch.float32, local_files_only=True, output_loading_info=True,
            **({"add_pooling_layer": False} if kind in PLAIN else {}),
        )  # fmt: skip
        processor = AutoImageProcessor.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"DINO {folder!r} could not be loaded: {error}") from error
    if report["missing_keys"]:
        # from_pretrained fills these with random numbers and goes on
        first = sorted(report["missing_keys"])[0]
        raise ValueError(f"DINO {folder!r}: its weights lack {len(report['missing_keys'])} tensors, such as {first}")
    name = f"transformers {kind} {folder}, float32, {type(processor).__name__}"
    return Dino(model.to(device).eval(), processor, name)


@functools.cache
def load_embedder(name: str = "embedded", device: str = "cpu", cache: str = "") -> Embedder:
    """What makes vectors of pictures, kept: a DINO by its folder, else a CLIP as load_clip takes it."""
    if model_type(name) in POOLED + PLAIN:
        return Cached(load_dino(name, device), cache)
    return shared(name, device, cache)


@score(
    title="DINO similarity, picture and reference", needs=("references",), unit="100 cos",
    paper="https://arxiv.org/abs/2208.12242",
)  # fmt: skip
def dino(
    *,
    model: Annotated[str, Opt("folder of a DINO, DINOv2 or DINOv3 of transformers")] = "",
    device: Annotated[str, DEVICE] = "cpu",
    cache: Annotated[str, CACHE] = "",
) -> Similarity:
    """How much each picture looks like its reference pictures; of several the mean counts, as in DreamBooth."""
    if not model:
        raise ValueError("score dino needs a model: the folder of a DINO, DINOv2 or DINOv3 of transformers")
    load_dino(model, device)
    return Similarity(load_embedder(model, device, cache), "cosine")
