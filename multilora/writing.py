"""Write a Lora as a diffusers or kohya file or as a PEFT folder, atomically.

Every format is written with alpha equal to the rank, which all readers take as scale 1.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora import __version__
from multilora.bases import base_of
from multilora.lora import COMPONENTS, Dense, Lora, LowRank
from multilora.method import unknown

FORMATS = ("diffusers", "kohya", "peft")
DTYPES = {"float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
           "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}  # fmt: skip
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Of a card's provenance, what goes into a file: how it was made, from what.
_RECIPE = ("terms", "merge", "truncated", "energy_lost", "energy_kept")


def _text_path(path: str) -> str:
    """A text encoder's path as files spell it: CLIP's layers lie under `text_model.`, T5's and projections do not."""
    clip = path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"text_model.{path}" if clip else path


def _split(key: str, fmt: str) -> tuple[str, str]:
    component, _, path = key.partition(".")
    if component not in COMPONENTS or not path:
        raise ValueError(
            f"key {key}: {fmt} files hold LoRAs of a pipeline's components ({', '.join(COMPONENTS[:5])}, ...); "
            "a LoRA of a bare model is saved with format='peft'"
        )
    return component, path


def _up(part: LowRank) -> Tensor:
    """`up` as files keep it: a convolution's has a 1 x 1 kernel."""
    return part.up.reshape(*part.up.shape, *[1] * (part.down.ndim - 2)) if part.kind == "conv" else part.up


def _cannot(key: str, what: str, fmt: str, instead: str) -> ValueError:
    return ValueError(f"key {key}: the {fmt} format cannot hold {what}; {instead}")


def _diffusers(lora: Lora) -> dict[str, Tensor]:
    out = {}
    for key, part in lora.items():
        component, path = _split(key, "diffusers")
        if not isinstance(part, LowRank):
            raise _cannot(key, "a dense update", "diffusers", "truncate(rank=...) it first, or save as kohya")
        if part.bias is not None:
            raise _cannot(key, "a bias", "diffusers", "save as kohya or peft")
        if part.kind == "embedding":
            raise _cannot(key, "an embedding", "diffusers", "save as peft")
        # diffusers renames the older text-encoder spelling as a whole, but mixes styles when a file has both or only
        # layers it does not list; in UNets and transformers the newer one is read for every layer, convolutions too.
        text = component.startswith("text_encoder")
        path = _text_path(path) if text else path
        low, high = ("lora_linear_layer.down", "lora_linear_layer.up") if text else ("lora_A", "lora_B")
        out[f"{component}.{path}.{low}.weight"] = part.down
        out[f"{component}.{path}.{high}.weight"] = _up(part)
    return out


def _kohya(lora: Lora) -> dict[str, Tensor]:
    two = any(key.startswith(("text_encoder_2.", "text_encoder_3.", "transformer.")) for key in lora)
    prefixes = {
        "unet": "lora_unet",
        "transformer": "lora_transformer",
        "text_encoder": "lora_te1" if two else "lora_te",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }
    out = {}
    for key, part in lora.items():
        component, path = _split(key, "kohya")
        if component not in prefixes:
            raise _cannot(key, f"component {component}", "kohya", "save as diffusers or peft")
        path = _text_path(path) if component.startswith("text_encoder") else path
        name = f"{prefixes[component]}_{path.replace('.', '_')}"
        if part.kind == "embedding":
            raise _cannot(key, "an embedding", "kohya", "save as peft")
        if part.bias is not None:
            out[f"{name}.diff_b"] = part.bias
        if isinstance(part, Dense):
            if part.weight is not None:
                out[f"{name}.diff"] = part.weight
            continue
        out[f"{name}.lora_down.weight"] = part.down
        out[f"{name}.lora_up.weight"] = _up(part)
        out[f"{name}.alpha"] = torch.tensor(float(part.rank))
    return out


def _peft(lora: Lora) -> dict[str, Tensor]:
    """Keys keep their component before the path; `save` drops it, one folder per component."""
    biased = any(p.bias is not None for p in lora.values())
    out = {}
    for key, part in lora.items():
        if not isinstance(part, LowRank):
            raise _cannot(key, "a dense update", "peft", "truncate(rank=...) it first, or save as kohya")
        name = f"base_model.model.{key}"
        if part.kind == "embedding":
            if biased:
                raise _cannot(key, "an embedding beside biases", "peft", "save them apart")
            out[f"{name}.lora_embedding_A"], out[f"{name}.lora_embedding_B"] = part.down, part.up
            continue
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = part.down, _up(part)
        if biased:  # PEFT has the bias on all layers or on none
            out[f"{name}.lora_B.bias"] = part.up.new_zeros(part.up.shape[0]) if part.bias is None else part.bias
    return out


_WRITERS: dict[str, Callable[[Lora], dict[str, Tensor]]] = {"diffusers": _diffusers, "kohya": _kohya, "peft": _peft}


def state(lora: Lora, format: str = "diffusers") -> dict[str, Tensor]:
    """The tensors of a file in a format, by its keys; pure. Raises ValueError for what the format cannot hold."""
    if format not in _WRITERS:
        raise unknown("LoRA format", format, FORMATS)
    if not lora:
        raise ValueError("an empty LoRA cannot be saved")
    return _WRITERS[format](lora)


def _peft_config(parts: Mapping[str, LowRank]) -> dict[str, Any]:
    ranks = {path: p.rank for path, p in parts.items()}
    usual = collections.Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{path}": r for path, r in ranks.items() if r != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": sorted(parts),
        "lora_bias": any(p.bias is not None for p in parts.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _texts(lora: Lora, metadata: Mapping[str, Any] | None, **more: Any) -> dict[str, str]:
    """Header texts: the card, and the caller's entries; what is no text becomes JSON."""
    card = lora.card
    own = {"version": 1, "name": card.name, "category": card.category, "triggers": list(card.triggers)}
    own |= {"family": card.family, **more}
    recipe = {n: card.provenance[n] for n in _RECIPE if card.provenance.get(n) is not None}
    if recipe:
        made = recipe.get("merge", {})  # numbers of every module would make a header of megabytes
        recipe |= {"merge": {n: v for n, v in made.items() if not n.endswith("_by_module")}} if made else {}
        own |= {**recipe, "library": f"multilora {__version__}"}
    texts = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    for name in ("lora_adapter_metadata", "format"):
        if name in texts:
            raise ValueError(f"metadata {name!r} is reserved: readers take the scale of the LoRA from it")
    return {"format": "pt", "multilora": json.dumps(own), **texts}


def _write(path: Path, data: bytes | Iterable[Any]) -> None:
    """All of `data` (whole, or its pieces in order) under `path`, or nothing: a temporary file, fsync, rename."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            for piece in [data] if isinstance(data, bytes) else data:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _not_an_input(lora: Lora, path: Path) -> None:
    """The files a LoRA came from are known by their hash: writing over one would destroy the only copy."""
    inputs = {lora.card.sha256, *(t.get("sha256") for t in lora.card.terms())} - {"", None}
    if inputs and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() in inputs:
        raise ValueError(f"{path.name}: an input of the LoRA, never written over; choose another name")


def _packed(
    tensors: Mapping[str, Tensor], texts: dict[str, str], dtype: torch.dtype | None, where: str
) -> list[bytes | memoryview]:
    """A safetensors file in pieces. Equal tensors and texts give equal bytes, which safetensors' own writer does not
    promise: it puts the metadata in a random order."""
    ready = {}
    for key, tensor in tensors.items():
        moved = tensor.detach().to("cpu", dtype if dtype is not None and not key.endswith(".alpha") else tensor.dtype)
        if not torch.isfinite(moved).all():
            wide = "values that are NaN or infinite" if dtype is None else f"values that do not fit {dtype}"
            raise ValueError(f"{where}: key {key} has {wide}; nothing was written")
        ready[key] = moved.contiguous()
    header: dict[str, Any] = {"__metadata__": texts}
    pieces, end = [], 0
    for key in sorted(ready, key=lambda k: (-ready[k].element_size(), k)):  # so that every tensor is aligned
        data = memoryview(ready[key].reshape(-1).view(torch.uint8).numpy())
        at = [end, end + len(data)]
        header[key] = {"dtype": _CODES[ready[key].dtype], "shape": list(ready[key].shape), "data_offsets": at}
        pieces.append(data)
        end = at[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *pieces]


def save(
    lora: Lora,
    path: str | Path,
    *,
    format: str = "diffusers",
    dtype: torch.dtype | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    base: Any = None,
    card: str | None = None,
) -> Path:
    """Write a Lora; the path that was written comes back.

    path      a .safetensors file, for "peft" a folder: a LoRA of several components gets a subfolder for each
    dtype     float32, float16 or bfloat16 (or its name); None keeps what the tensors have
    metadata  header entries, e.g. {"recipe": {...}}; values that are no text become JSON
    base      for "peft": the model whose real paths are written (text encoders differ between versions)
    card      Markdown (multilora.modelcard.model_card), written as <name>.md beside the file, README.md in a folder

    The header holds the Lora's card with its recipe: method, options, inputs with their hashes. Equal Loras give equal
    bytes. A file appears complete or not at all, so does a new folder, and never over a file that the Lora was read
    from. Raises ValueError naming the key when the format cannot hold a part or a value does not fit the dtype;
    OSError when the disk does.
    """
    path = Path(path).expanduser()
    ready = rendered(lora, path, format=format, dtype=dtype, metadata=metadata, base=base, card=card)
    return put(lora, path, ready)


def put(lora: Lora, path: Path, ready: Mapping[Path, list[Any]]) -> Path:
    """Write what `rendered` made of a Lora for `path`; as save promises."""
    for file in ready:
        _not_an_input(lora, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path in ready:
        for file, data in ready.items():
            _write(file, data)
    else:
        _write_folder(path, ready)
    return path


def rendered(
    lora: Lora,
    path: Path,
    *,
    format: str = "diffusers",
    dtype: torch.dtype | str | None = None,
    metadata: Mapping[str, Any] | None = None,
    base: Any = None,
    card: str | None = None,
) -> dict[Path, list[Any]]:
    """The files that `save` would write: path -> their bytes, in pieces. Nothing is written; arguments as of save."""
    tensors = state(lora, format)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise unknown("dtype of a LoRA file", dtype, DTYPES)
        dtype = DTYPES[dtype]
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"dtype {dtype}: a LoRA file is written in float32, float16 or bfloat16")
    if format == "peft":
        ready = _rendered_peft(lora, path, dtype, metadata, base)
        return ready if card is None else {**ready, path / "README.md": [card.encode()]}
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name}: a {format} file is named *.safetensors")
    ready = {path: _packed(tensors, _texts(lora, metadata), dtype, path.name)}
    return ready if card is None else {**ready, path.with_suffix(".md"): [card.encode()]}


def _rendered_peft(
    lora: Lora, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, Any] | None, base: Any
) -> dict[Path, list[Any]]:
    if path.suffix == ".safetensors":
        raise ValueError(f"{path.name}: the peft format is a folder, give a name without .safetensors")
    real = {} if base is None else base_of(base).paths
    ready: dict[Path, list[Any]] = {}
    for component in lora.components:
        prefix = component + "." if component else ""
        own = {k: p for k, p in lora.items() if k.startswith(prefix) and (component or _bare(k))}
        parts = {real.get(k, k[len(prefix) :]): p for k, p in own.items()}
        folder = path / component if len(lora.components) > 1 and component else path
        texts = _texts(lora, metadata, component=component)
        ready[folder / "adapter_model.safetensors"] = _packed(_peft(Lora(parts)), texts, dtype, folder.name)
        ready[folder / "adapter_config.json"] = [json.dumps(_peft_config(parts), indent=2).encode()]
    return ready


def _write_folder(path: Path, ready: Mapping[Path, list[Any]]) -> None:
    """The files of the folder `path`; a new one appears complete or not at all, in one that exists each file does."""
    fresh = not path.exists()
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)) if fresh else path
    try:
        for file, data in ready.items():
            target = beside / file.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, data)
        if fresh:
            os.chmod(beside, 0o755)
            os.replace(beside, path)
    except BaseException:
        if fresh:
            shutil.rmtree(beside, ignore_errors=True)
        raise


def _bare(key: str) -> bool:
    return key.split(".", 1)[0] not in COMPONENTS
