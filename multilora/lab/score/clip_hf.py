"""CLIP models in transformers' layout: a folder with config.json, weights, tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL
import torch
from PIL import Image

from multilora.lab.score.clip import warn_cut
from multilora.lab.score.embed import Embedder, told


class HfClip(Embedder):
    """A CLIPModel with its CLIPProcessor."""

    library = "transformers"

    def __init__(self, model: torch.nn.Module, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name

    @property
    def preprocessing(self) -> str:
        import torchvision
        import transformers

        own = self.processor.image_processor
        versions = {"transformers": transformers.__version__, "torchvision": torchvision.__version__}
        return told(own.to_dict() | versions | {"class": type(own).__name__, "pillow": PIL.__version__})

    def _texts(self, texts: list[str]) -> torch.Tensor:
        """Raw text features [n, d]. A text that is too long is cut before its end token, as clip.tokenize cuts."""
        window = self.model.config.text_config.max_position_embeddings
        lengths = [len(ids) for ids in self.processor.tokenizer(texts)["input_ids"]]
        warn_cut(sum(n > window for n in lengths), len(texts), window)
        read = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True, max_length=window)
        found = self.model.get_text_features(
            input_ids=read["input_ids"].to(self.device), attention_mask=read["attention_mask"].to(self.device)
        )
        return found.pooler_output

    def _pictures(self, images: list[Image.Image]) -> torch.Tensor:
        read = self.processor(images=images, return_tensors="pt")
        return self.model.get_image_features(pixel_values=read["pixel_values"].to(self.device)).pooler_output


def load_clip_hf(folder: str | Path, device: str = "cpu") -> HfClip:
    """The CLIP in a folder, float32. Nothing is downloaded. Raises ValueError when there is none, and why."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model, report = CLIPModel.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        processor = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"CLIP scorer {str(folder)!r}: wanted a folder with transformers' CLIPModel, tokenizer and image "
            f"processor ({error})"
        ) from error
    if report["missing_keys"]:
        # from_pretrained fills these with random numbers and goes on
        raise ValueError(
            f"CLIP scorer {str(folder)!r}: its weights lack {len(report['missing_keys'])} of CLIPModel's tensors, "
            f"such as {sorted(report['missing_keys'])[0]}"
        )
    label = f"transformers {folder}, float32, {_told_size(processor.image_processor)}"
    return HfClip(model.to(device).eval(), processor, label)


def _told_size(processor: Any) -> str:
    size = dict(processor.crop_size or processor.size or {})
    kind = Image.Resampling(processor.resample).name.lower() if processor.do_resize else "no resize"
    crop = " centre crop" if processor.do_center_crop else ""
    return f"{kind} {size.get('height', next(iter(size.values()), '?'))} px{crop}"
