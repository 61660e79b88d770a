"""From a name to a language model with its tokenizer, and LoRAs that belong to it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from multilora import files
from multilora.lora import Lora
from multilora.method import unknown
from multilora.pipelines.load import EMBEDDED, assets, default_device
from multilora.pipelines.text_ia3 import PEFT_CONFIG, is_ia3, load_ia3

_WANTED = "'embedded', a folder that `save_pretrained` wrote, or a hub id such as 'owner/name'"


def load_text(
    base: str | Path = EMBEDDED, *, torch_dtype: Any = None, device: str | None = None, **kwargs: Any
) -> Any:
    """(model, tokenizer) from "embedded", a folder or a hub id: any causal or seq2seq language model, on a device.

    torch_dtype defaults to float32 on a CPU and for the embedded model, bfloat16 elsewhere. kwargs go to the model's
    `from_pretrained`. Raises ValueError when there is nothing to load at `base`, or the tokenizer is another model's.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    device = device or default_device()
    embedded = str(base) == EMBEDDED
    source = assets() / "text" if embedded else Path(base).expanduser()
    if embedded or source.exists():
        if not (source / "config.json").is_file():
            hint = "; rebuild it with: multilora world train --text" if embedded else f"; wanted {_WANTED}"
            raise ValueError(f"base {str(base)!r}: {source} holds no language model (no config.json in it){hint}")
        name = str(source)
    elif str(base).count("/") == 1 and not str(base).startswith((".", "/", "~")):
        name = str(base)
    else:
        raise ValueError(f"base {str(base)!r}: no such folder; wanted {_WANTED}")
    if torch_dtype is None:
        torch_dtype = torch.float32 if embedded or device == "cpu" else torch.bfloat16
    try:
        config = AutoConfig.from_pretrained(name)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(name, dtype=torch_dtype, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"base {str(base)!r} could not be loaded from {name}: {error}") from error
    check_tokenizer(model, tokenizer)
    return model.eval().to(device), tokenizer


def is_seq2seq(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def text_family(model: nn.Module) -> str:
    """The architecture as transformers names it ("llama", "qwen2", "t5"), which LoRAs of it carry on their card."""
    return str(getattr(model.config, "model_type", ""))


def check_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Raise ValueError when the tokenizer makes tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}, {highest + 1} tokens) does not belong to this "
            f"{type(model).__name__}, which embeds {rows}; load both from the same folder"
        )


def check_known(tokenizer: Any, prompts: list[str], ids: list[list[int]]) -> None:
    """Warn of words that the tokenizer does not know; ValueError when they are half of a prompt: a wrong tokenizer."""
    unk = getattr(tokenizer, "unk_token_id", None)
    if unk is None or unk == tokenizer.eos_token_id:
        return
    special = {*tokenizer.all_special_ids} - {unk}
    for prompt, own in zip(prompts, ids, strict=True):
        words = [i for i in own if i not in special]
        missed = words.count(unk)
        if missed and 2 * missed >= len(words):
            raise ValueError(
                f"prompt {prompt!r:.80}: {missed} of its {len(words)} tokens are unknown to the tokenizer; is it the "
                f"model's own, and the prompt in its language?"
            )
        if missed:
            warnings.warn(f"prompt {prompt!r:.80}: {missed} of its {len(words)} tokens are unknown", stacklevel=3)


def text_library() -> dict[str, Path]:
    """The LoRAs of the embedded text model by name: the PEFT folders in assets/text/loras."""
    folder = assets() / "text" / "loras"
    return {p.parent.name: p.parent for p in sorted(folder.glob(f"*/{PEFT_CONFIG}"))}


def find_text_lora(name: str | Path) -> Path:
    """The file or folder of a LoRA given by path or by its name in the embedded text library.

    Raises UnknownName with the nearest names when it is neither.
    """
    if not isinstance(name, (str, Path)):
        raise ValueError(f"LoRA {name!r}: wanted a Lora, a .safetensors file, a PEFT folder or a library name")
    path = Path(name).expanduser()
    if path.exists() and (path.is_dir() or path.suffix == ".safetensors"):
        return path
    if path.suffix or path.parent != Path("."):
        raise ValueError(f"LoRA {str(name)!r}: no such PEFT folder or .safetensors file")
    known = text_library()
    if str(name) not in known:
        raise unknown("text LoRA", name, known)
    return known[str(name)]


def text_lora(model: nn.Module, lora: Any, name: str | None = None) -> Lora:
    """A Lora, a path or a library name as a Lora that fits `model`; a PEFT folder of (IA)^3 vectors is one too.

    Raises ValueError when it was made for another architecture or its layers are not the model's.
    """
    if not isinstance(lora, Lora):
        path = find_text_lora(lora)
        lora = load_ia3(path, model, name) if is_ia3(path) else files.load(path, base=model, name=name)
    made, here = lora.card.family, text_family(model)
    if made and here and made != here:
        raise ValueError(
            f"LoRA {name or lora.card.name or 'without a name'!r} was made for a {made} model, this is "
            f"{type(model).__name__} ({here}): LoRAs of one composition share their base"
        )
    files.fits(lora, model, source=name or lora.card.name or "LoRA")
    return lora


@contextlib.contextmanager
def left_padded(tokenizer: Any, seq2seq: bool) -> Any:
    """The tokenizer padding where generation wants it (a decoder: left), with a padding token, for one block."""
    before: Mapping[str, Any] = {"padding_side": tokenizer.padding_side, "pad_token": tokenizer.pad_token}
    try:
        if not seq2seq:
            tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        yield tokenizer
    finally:
        for key, value in before.items():
            setattr(tokenizer, key, value)
