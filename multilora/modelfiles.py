"""The weights of a whole model on disk by canonical name, whatever it is spelled and however it is stored.

A model is a .safetensors file (diffusers, transformers or the original Stable Diffusion spelling), the folder of one
model (a file or shards), or the folder of a pipeline. Names and shapes come from the files' headers; a tensor is read
when it is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from multilora import keys as spelling
from multilora.lora import COMPONENTS
from multilora.stored import Stored

# Beginnings of names in single-file checkpoints: the component that follows, or None for parts that no LoRA adapts.
_PARTS = {
    "first_stage_model.": None,
    "vae.": None,
    "model_ema.": None,
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Models whose linears are transformers' Conv1D, which keeps its weight as [in, out].
_TRANSPOSED_MODELS, _TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt"), (".c_attn", ".c_proj", ".c_fc", ".q_attn")
_EMBEDDINGS = ("embedding", "embeddings", "embed_tokens", ".wte", ".wpe", "shared", "relative_attention_bias")


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, its name there, its shape [out, in, ...], and whether the file keeps it transposed."""

    file: Stored
    name: str
    shape: tuple[int, ...]
    transposed: bool = False


class ModelFiles:
    """The tensors of a model: the key of a layer as LoRAs name it, then ".weight" or ".bias" -> Entry, in `entries`.

    A projection that a file keeps fused stands under its first layer's name; `fused` lists all of them, in row order.
    Use it in a `with` block, or `close()` it. Raises ValueError, naming the file, when there is no model at `path`, a
    file is no safetensors, or it is not clear which files are meant.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        self.name = path.stem if path.is_file() else path.name
        self.entries: dict[str, Entry] = {}
        self.fused: dict[str, tuple[str, ...]] = {}
        self._open = contextlib.ExitStack()
        try:
            for file, component, transposed in _files(path):
                self._take(self._open.enter_context(Stored(file)), component, transposed)
        except BaseException:
            self._open.close()
            raise
        if not self.entries:
            self._open.close()
            raise ValueError(f"model {path}: holds no tensors of a denoiser or text encoder")

    def _take(self, file: Stored, component: str, transposed: bool) -> None:
        for name, (_, shape) in file.layout.items():
            located = _located(name, component)
            if located is None:
                continue
            keys, end = located
            full = f"{keys[0]}{end}"
            if full in self.entries:
                other = self.entries[full]
                raise ValueError(f"{file.path.name}: {other.name} and {name} are the same tensor {full}")
            turned = transposed and end == ".weight" and len(shape) == 2 and keys[0].endswith(_TRANSPOSED)
            self.entries[full] = Entry(file, name, shape[::-1] if turned else shape, turned)
            if len(keys) > 1:
                self.fused[full] = keys

    def read(self, name: str) -> Tensor:
        """One tensor, [out, in, ...]."""
        entry = self.entries[name]
        tensor = entry.file[entry.name]
        return tensor.T if entry.transposed else tensor

    def sha256(self) -> str:
        """Of the file; of several, that of their hashes in the order of their paths."""
        found = []
        for path in sorted({entry.file.path for entry in self.entries.values()}):
            with path.open("rb") as stream:
                found.append(hashlib.file_digest(stream, "sha256").hexdigest())
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def is_embedding(key: str) -> bool:
    """Whether a layer with a two-dimensional weight is a table of vectors, by its name; the weight does not tell."""
    return key.endswith(_EMBEDDINGS)


def _files(path: Path) -> list[tuple[Path, str, bool]]:
    """(file, component that its names lack or "", whether linears are transposed) of a model."""
    if path.is_file():
        return [(path, "", False)]
    if (path / "model_index.json").is_file():
        index = _json(path / "model_index.json")
        return [(file, c, False) for c in COMPONENTS if c in index for file in _weights(path / c, False)]
    if not path.is_dir():
        raise ValueError(f"model {path}: no such file or folder")
    component, transposed = _said(path)
    return [(file, component, transposed) for file in _weights(path, True)]


def _weights(folder: Path, required: bool) -> list[Path]:
    """The weight files of one model: those without a variant (fp16, ema) where several lie side by side."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        groups.setdefault(_SHARD.sub("", file.stem), []).append(file)
    chosen: Mapping[str, list[Path]] = {stem: files for stem, files in groups.items() if "." not in stem} or groups
    if len(chosen) > 1:
        names = ", ".join(sorted(f.name for files in chosen.values() for f in files)[:6])
        raise ValueError(f"model {folder}: several models lie there ({names}); give the path of one file")
    if not chosen and required:
        pickles = sorted(p.name for end in ("*.bin", "*.ckpt", "*.pt", "*.pth") for p in folder.glob(end))
        hint = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        raise ValueError(f"model {folder}: no .safetensors file in it{hint}")
    return next(iter(chosen.values()), [])


def _json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, wanted an object")
    return found


def _said(folder: Path) -> tuple[str, bool]:
    """(component, whether linears are transposed) that a model's config.json says."""
    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name = str(config.get("_class_name") or [*(config.get("architectures") or []), ""][0])
    if "_class_name" in config:
        component = "unet" if "UNet" in name else "transformer" if "Transformer" in name else ""
    else:
        component = "text_encoder" if name.startswith("CLIPTextModel") else ""
    return component, config.get("model_type") in _TRANSPOSED_MODELS


def _located(name: str, component: str) -> tuple[tuple[str, ...], str] | None:
    """(layers that a tensor belongs to, its end ".weight", ".bias" or ""); None for parts that no LoRA adapts."""
    end = next((e for e in (".weight", ".bias") if name.endswith(e)), "")
    layer = name[: len(name) - len(end)]
    if component:
        return (spelling.plain(component, layer),), end
    for start, part in _PARTS.items():
        if name.startswith(start):
            return None if part is None else ((spelling.plain(part, layer[len(start) :]),), end)
    return spelling.locate(layer), end
