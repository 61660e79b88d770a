"""What else is trained on a language model's texts, to compare LoRAs with: all of its weights, or (IA)^3 vectors.

What the vectors are, and PEM's arithmetic with them: multilora.pipelines.text_ia3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora.lab.train import adapt
from multilora.lab.train.text import TextRun, borrowed, padding
from multilora.lab.train.text_data import digest, read_texts, tokenised
from multilora.pipelines.text_ia3 import Scale
from multilora.pipelines.text_load import check_tokenizer, is_seq2seq, text_family


def train_whole(
    data: str | Path | Sequence[Mapping[str, str]],
    model: nn.Module,
    tokenizer: Any,
    *,
    steps: int = 100,
    lr: float = 5e-4,
    batch: int = 16,
    warmup: int = 10,
    weight_decay: float = 0.0,
    length: int = 512,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Full fine-tuning: {parameter name: tensor} afterwards. The model itself is left as it was.

    data, loss and steps are those of `multilora.lab.train.text.train`. Raises ValueError as that does.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        with borrowed(model, seed) as accelerator:
            model.requires_grad_(True)
            given = {"steps": steps, "lr": lr, "batch": batch, "warmup": warmup, "weight_decay": weight_decay}
            given |= {"length": length, "seed": seed}
            _fit(data, model, tokenizer, list(model.parameters()), given, accelerator)
        return {name: p.detach().clone() for name, p in model.named_parameters()}
    finally:
        put(model, before)
        for p, gradient in gradients:
            p.grad = gradient


def train_ia3(
    data: str | Path | Sequence[Mapping[str, str]],
    model: nn.Module,
    tokenizer: Any,
    *,
    steps: int = 100,
    lr: float = 2e-2,
    batch: int = 16,
    warmup: int = 10,
    length: int = 512,
    seed: int = 0,
) -> dict[str, Scale]:
    """(IA)^3 vectors by module path, on the layers that PEFT knows for the architecture; the model is left as it was.

    Raises ValueError as `multilora.lab.train.text.train` does, and for an architecture that PEFT has no layers for.
    """
    from peft import IA3Config, inject_adapter_in_model
    from peft.tuners.ia3 import IA3Layer
    from peft.utils import constants

    family = text_family(model)
    ends = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(family)
    if ends is None:
        raise ValueError(
            f"(IA)^3 for {type(model).__name__} ({family or 'no model type'}): PEFT names no layers for it"
        )
    adapt.refuse_adapters(model)
    inner = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family]
    with borrowed(model, seed) as accelerator:
        try:
            model.requires_grad_(False)
            config = IA3Config(target_modules=list(ends), feedforward_modules=list(inner))
            inject_adapter_in_model(config, model, adapt.ADAPTER)
            layers = {path: m for path, m in model.named_modules() if isinstance(m, IA3Layer)}
            vectors = [layer.ia3_l[adapt.ADAPTER] for layer in layers.values()]
            for vector in vectors:
                vector.data = vector.data.float()
                vector.requires_grad_(True)
            given = {"steps": steps, "lr": lr, "batch": batch, "warmup": warmup, "weight_decay": 0.0}
            given |= {"length": length, "seed": seed}
            _fit(data, model, tokenizer, vectors, given, accelerator)
            return {
                path: Scale(
                    layer.ia3_l[adapt.ADAPTER].detach().flatten().clone(), "in" if layer.is_feedforward else "out"
                )
                for path, layer in layers.items()
            }
        finally:
            for path, layer in [(p, m) for p, m in model.named_modules() if isinstance(m, IA3Layer)]:
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
            if hasattr(model, "peft_config"):
                del model.peft_config


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the model's parameters of those names. Raises KeyError for a name that it lacks."""
    own = dict(model.named_parameters())
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def _fit(
    data: Any, model: nn.Module, tokenizer: Any, parameters: Sequence[nn.Parameter], given: dict[str, Any],
    accelerator: Any,
) -> list[float]:  # fmt: skip
    """Losses of all steps; no checkpoints."""
    check_tokenizer(model, tokenizer)
    examples = read_texts(data)
    store = tokenised(examples, tokenizer, seq2seq=is_seq2seq(model), length=given["length"])
    settings = {**given, "accumulate": 1}
    bound = settings | {"data": digest(examples)}
    run = TextRun(model, store, padding(tokenizer), parameters, settings, bound, accelerator, Path("unsaved"))
    return run.steps(False, 0, 0, (), None, None, lambda line: None)[0]
