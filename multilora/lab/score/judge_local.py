"""A vision-language model in a folder of transformers: any class of image-text-to-text with a chat template."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from multilora.lab.score.cache import weights_hash
from multilora.lab.score.judge import Answer
from multilora.lab.score.record import ScoreFailed

OUTPUT_TOKENS = 160


class LocalVlm:
    """An answerer on this machine, decoding greedily. One call at a time: the model's memory is the limit."""

    parallel = 1

    def __init__(self, model: torch.nn.Module, processor: Any, name: str, output_tokens: int = OUTPUT_TOKENS) -> None:
        self.model, self.processor, self.output_tokens = model, processor, output_tokens
        kind = str(model.dtype).removeprefix("torch.")
        self.name = f"judge {name}, {type(model).__name__} of transformers, {kind}"
        self._lock = threading.Lock()

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        import transformers

        return {
            "library": f"transformers {transformers.__version__}",
            "weights": weights_hash(self.model),
            "processor": json.loads(json.dumps(self.processor.to_dict(), sort_keys=True, default=str)),
            "dtype": str(self.model.dtype),
            "output_tokens": self.output_tokens,
        }

    def reach(self) -> None:
        """It is here, or it would not have been loaded."""

    def _inputs(self, question: str, pictures: Sequence[Image.Image]) -> Any:
        content: list[dict[str, Any]] = [{"type": "image", "image": picture.convert("RGB")} for picture in pictures]
        content.append({"type": "text", "text": question})
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip

    @torch.no_grad()
    def answer(self, question: str, pictures: Sequence[Image.Image]) -> Answer:
        """Raises ScoreFailed when the model runs out of memory."""
        with self._lock:
            inputs = self._inputs(question, pictures).to(self.model.device)
            try:
                out = self.model.generate(**inputs, max_new_tokens=self.output_tokens, do_sample=False)
            except torch.OutOfMemoryError as error:
                raise ScoreFailed(f"{self.name}: out of memory on {self.model.device}: {error}") from error
        given = inputs["input_ids"].shape[1]
        text = self.processor.decode(out[0, given:], skip_special_tokens=True)
        return Answer(text, given, out.shape[1] - given)

    def input_tokens(self, question: str, sizes: Sequence[tuple[int, int]]) -> int:
        """Exactly: those of the question with white pictures of these sizes."""
        return int(self._inputs(question, [Image.new("RGB", size, "white") for size in sizes])["input_ids"].shape[1])


@functools.cache
def load_vlm(folder: str, device: str = "cpu") -> LocalVlm:
    """The model in a folder: float32 on a CPU, bfloat16 elsewhere. Nothing is downloaded.

    Raises ValueError when there is none, it is incomplete, or it has no chat template.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(
            f"judge model {folder!r}: wanted the folder of a vision-language model of transformers; {path} has no "
            "config.json. For a model behind a server give its url too"
        )
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            str(path), dtype=torch.float32 if device == "cpu" else torch.bfloat16, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        processor = AutoProcessor.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise ValueError(f"judge model {folder!r} could not be loaded: {error}") from error
    if report["missing_keys"]:
        # from_pretrained fills these with random numbers and goes on
        first = sorted(report["missing_keys"])[0]
        raise ValueError(
            f"judge model {folder!r}: its weights lack {len(report['missing_keys'])} tensors, e.g. {first}"
        )
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"judge model {folder!r}: its processor has no chat template, so it cannot be asked")
    return LocalVlm(model.to(device).eval(), processor, folder)
