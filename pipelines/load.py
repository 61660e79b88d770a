"""From a name to a pipeline, and the embedded library of LoRAs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from multilora.method import unknown

EMBEDDED = "embedded"
# What the embedded base draws best with; other bases keep their pipeline's own defaults.
EMBEDDED_DEFAULTS = {"num_inference_steps": 30, "guidance_scale": 3.0}


def assets() -> Path:
    """The folder with the embedded models and LoRAs."""
    import multilora.assets

    return Path(next(iter(multilora.assets.__path__)))


def default_device() -> str:
    """ "cuda" where there is one, then "mps", else "cpu"."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_pipeline(
    base: str | Path = EMBEDDED, *, torch_dtype: Any = None, device: str | None = None, **kwargs: Any
) -> Any:
    """A diffusers pipeline from "embedded", a folder or a hub id, on a device.

    torch_dtype defaults to float32 on a CPU and for the embedded base, bfloat16 elsewhere. Raises ValueError when
    there is nothing to load at `base`, with what was looked for.
    """
    import torch
    from diffusers import DiffusionPipeline

    device = device or default_device()
    embedded = str(base) == EMBEDDED
    source = assets() / "base" if embedded else Path(base)
    if torch_dtype is None:
        torch_dtype = torch.float32 if embedded or device == "cpu" else torch.bfloat16
    if source.exists() or embedded:
        if not (source / "model_index.json").is_file():
            raise ValueError(
                f"base {str(base)!r}: {source} holds no diffusers pipeline (no model_index.json in it); wanted "
                "'embedded', the folder of a saved pipeline, or a hub id such as 'owner/name'"
            )
        name = str(source)
    elif str(base).count("/") == 1 and not str(base).startswith((".", "/", "~")):
        name = str(base)
    else:
        raise ValueError(
            f"base {str(base)!r}: no such folder; wanted 'embedded', the folder of a saved pipeline, or a hub id such "
            "as 'owner/name'"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(name, dtype=torch_dtype, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"base {str(base)!r} could not be loaded from {name}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_controlnet(folder: str | Path, *, torch_dtype: Any = None, device: Any = None) -> Any:
    """A ControlNet of any diffusers class from its folder (config.json and weights).

    Raises ValueError when there is none, with what was looked for.
    """
    import diffusers

    source = Path(folder).expanduser()
    try:
        name = json.loads((source / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"controlnet {str(folder)!r}: wanted the folder of a saved ControlNet; {source} has no config.json with a "
            "_class_name"
        ) from None
    cls = getattr(diffusers, str(name), None)
    if cls is None or "ControlNet" not in str(name):
        raise ValueError(
            f"controlnet {str(folder)!r}: its config.json names {name!r}, which is no ControlNet of diffusers"
        )
    try:
        model = cls.from_pretrained(str(source), dtype=torch_dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"controlnet {str(folder)!r} could not be loaded: {error}") from error
    return model.to(device) if device is not None else model


@functools.cache
def library() -> dict[str, dict[str, Any]]:
    """The embedded LoRAs by name: the entries of assets/loras/library.json, each with its "path"."""
    folder = assets() / "loras"
    listing = folder / "library.json"
    if not listing.is_file():
        raise ValueError(f"the embedded library is missing ({listing}); rebuild it with: multilora world train")
    entries = json.loads(listing.read_text())["loras"]
    return {e["name"]: {**e, "path": folder / e["file"]} for e in entries}


def find_lora(name: str | Path) -> tuple[Path, dict[str, Any] | None]:
    """The file or folder of a LoRA given by path or by its name in the embedded library, and its library entry.

    Raises UnknownName with the nearest names when it is neither.
    """
    if not isinstance(name, (str, Path)):
        raise ValueError(f"LoRA {name!r}: wanted a Lora, a .safetensors file, a PEFT folder or a library name")
    path = Path(name).expanduser()
    if path.exists() and (path.is_dir() or path.suffix == ".safetensors"):
        return path, None
    try:
        entries = library()
    except ValueError as error:
        raise ValueError(f"LoRA {str(name)!r}: no such .safetensors file or PEFT folder, and {error}") from None
    if str(name) in entries:
        return entries[str(name)]["path"], entries[str(name)]
    if path.suffix or path.parent != Path("."):
        raise ValueError(f"LoRA {str(name)!r}: no such file or PEFT folder, wanted a .safetensors file")
    raise unknown("LoRA", name, entries)
