"""X-LoRA checkpoints through PEFT's own classes (arXiv 2402.07148): load one, run it, see its weights.

    model, tokenizer = load_text("folder of the base")
    running = load_xlora("folder of the X-LoRA", model)          # a peft.PeftModel
    running.generate(**tokenizer("2+3=", return_tensors="pt"), max_new_tokens=8)
    token_weights(running)                                       # [B, T, layers, experts] of its last call

The model runs twice for every token, the first time without experts; a classifier on that run's last hidden state
gives each token its weights. There is no KV cache.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora.pipelines.text_load import PEFT_CONFIG, is_seq2seq

WEIGHTS = "adapter_model.safetensors"
CLASSIFIER = "internal_xlora_classifier"


def load_xlora(folder: str | Path, model: nn.Module, *, experts: Mapping[str, str | Path] | None = None) -> Any:
    """The X-LoRA of a folder that PEFT's `save_pretrained` wrote, on a loaded causal language model, for generation.

    model    is handed over: PEFT puts its layers into it, and switches its KV cache off
    experts  name -> folder of each LoRA, where they are no longer where the configuration says; the same names

    Raises ValueError naming the folder and what does not fit, before the model is touched. Nothing is downloaded.
    """
    folder = Path(folder).expanduser()
    fields = _fields(folder)
    found = _experts(folder, fields, experts)
    if is_seq2seq(model) or not hasattr(model, "generate"):
        raise ValueError(f"{folder.name}: X-LoRA runs on a causal language model, this is {type(model).__name__}")
    if getattr(model, "peft_config", None) or hasattr(model, "get_base_model"):
        raise ValueError(f"{folder.name}: this {type(model).__name__} carries adapters already; load the base anew")
    width, own = fields.get("hidden_size"), model.config.hidden_size
    if width != own:
        raise ValueError(
            f"{folder.name}: hidden_size is {width!r}, this {type(model).__name__} has {own}: another base?"
        )
    _check_classifier(folder, fields.get("xlora_depth", 1))

    from peft import PeftModel, XLoraConfig

    _warn_of_sums(folder.name, fields)
    config = XLoraConfig.from_pretrained(str(folder))
    # PEFT 0.21 loads expert i as "i", then looks for the names of the configuration, and fails with others
    config.adapters = {str(i): str(path) for i, path in enumerate(found.values())}
    model.config.use_cache = False  # XLoraModel wants it
    device = next(model.parameters()).device
    return PeftModel.from_pretrained(model, str(folder), config=config, torch_device=str(device)).eval()


def _fields(folder: Path) -> dict[str, Any]:
    path = folder / PEFT_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {PEFT_CONFIG} in it; wanted a folder that PEFT's save_pretrained wrote")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder.name}: {PEFT_CONFIG} is not JSON ({error})") from None
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != "XLORA":
        raise ValueError(f"{folder.name}: {PEFT_CONFIG} says peft_type={kind!r:.40}, wanted XLORA; a LoRA is read by "
                         "multilora.load")  # fmt: skip
    return fields


def _experts(folder: Path, fields: Mapping[str, Any], given: Mapping[str, str | Path] | None) -> dict[str, Path]:
    """Name -> folder, in the order of the configuration, which is that of the classifier's outputs."""
    named = fields.get("adapters")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{folder.name}: adapters is {named!r:.60}, wanted its experts' names and folders")
    if given is not None and set(given) != set(named):
        raise ValueError(f"{folder.name}: experts {', '.join(given)} given, wanted {', '.join(named)}")
    found = {}
    for name, where in named.items():
        path = Path(str(given[name] if given is not None else where)).expanduser()
        path = path if path.is_absolute() or path.is_dir() else folder / path
        if not (path / PEFT_CONFIG).is_file():
            raise ValueError(f"{folder.name}: expert {name!r} at {str(where)!r:.80}: no such folder with {PEFT_CONFIG}"
                             f"; say where it is: experts={{{name!r}: folder, ...}}")  # fmt: skip
        about = json.loads((path / PEFT_CONFIG).read_text(encoding="utf-8"))
        if about.get("peft_type") != "LORA" or about.get("use_dora"):
            what = "DoRA" if about.get("use_dora") else about.get("peft_type")
            raise ValueError(f"{folder.name}: expert {name!r} is {what!r:.40}; X-LoRA's are plain LoRAs")
        found[name] = path
    return found


def _warn_of_sums(name: str, fields: Mapping[str, Any]) -> None:
    """A softmax over all experts, and one over the top-k, are the settings whose weights sum to one."""
    dense, top_k, again = (fields.get(n) for n in ("enable_softmax", "top_k_lora", "enable_softmax_topk"))
    if again or (dense and not top_k):
        return
    warnings.warn(
        f"{name}: enable_softmax={dense}, top_k_lora={top_k}, enable_softmax_topk={again}: a token's weights do not "
        "sum to one. It runs as it was made",
        stacklevel=3,
    )


def _check_classifier(folder: Path, depth: int) -> None:
    """PEFT would leave what the file does not hold at its random start.

    A trap: PEFT 0.21.2's save_pretrained drops the classifier's layers 0 to k - 1, since the experts are adapters
    named "0" to "k - 1" and it takes the numbers in the keys for those.
    """
    from safetensors import safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder.name}: no {WEIGHTS} in it, so no classifier; only safetensors are read")
    with safe_open(path, framework="pt") as file:
        held = sum(CLASSIFIER in key and key.endswith(".weight") for key in file.keys())  # noqa: SIM118
    if held != depth:
        raise ValueError(
            f"{folder.name}: {WEIGHTS} holds {held} layers of the classifier, xlora_depth is {depth!r}. PEFT 0.21's "
            f"save_pretrained leaves some out; save the entries of model.state_dict() with {CLASSIFIER!r} in their "
            "name instead"
        )


def token_weights(running: Any) -> Tensor:
    """[B, T, layers, experts] the weights of the last call as the layers used them, top-k included.

    Raises ValueError for a model that is no X-LoRA, or that has not run yet.
    """
    from peft.tuners.xlora.layer import XLoraLayer
    from peft.tuners.xlora.model import XLoraModel

    inner = getattr(running, "base_model", None)
    if not isinstance(inner, XLoraModel):
        raise ValueError(f"wanted a model of load_xlora, got {type(running).__name__}")
    given = inner.get_latest_scalings()
    if given is None:
        raise ValueError("the X-LoRA has not run yet: call it first")
    owners = (getattr(module.forward, "__self__", None) for module in running.modules())
    layers = {layer.layer_number: layer for layer in owners if isinstance(layer, XLoraLayer)}
    return torch.stack([layers[n].get_maybe_topk_scalings(given) for n in sorted(layers)], 2)
