"""What a LoRA needs to know of its base: the layers' names and shapes, and the family. No weights are copied.

A base is a diffusers pipeline, a module, the folder of a saved pipeline, or "embedded"; of folders only the headers of
the weight files are read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from multilora import keys as spelling
from multilora.lora import COMPONENTS, Lora
from multilora.reading import read_header

FAMILIES = {
    "sd15": "SD 1.5",
    "sd2": "SD 2",
    "sdxl": "SDXL",
    "sd3": "SD 3",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "qwenimage": "Qwen-Image",
    "zimage": "Z-Image",
    "": "another model",
}
# Width of the text that a UNet's cross-attention reads -> family; only real models have these widths.
_TEXT_WIDTH = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
_INSIDE_ADAPTER = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_dropout", "lora_magnitude_vector")


@dataclass(frozen=True, eq=False)
class Base:
    """The layers of a base by canonical key, with the shape of each weight.

    components  those whose layers are known: keys of others are not checked
    layers      resnets per block of its UNet, which the names of the original Stable Diffusion code need
    modules     live modules by canonical key, empty for a folder
    paths       the real path of a module within its component, where it differs from the canonical one
    """

    name: str
    family: str
    components: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    layers: int = 2
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def flat(self) -> dict[str, str]:
        """Underscored spelling "unet.mid_block_attentions_0_proj_in" -> canonical key; of a bare model ".layers_0"."""
        found = {}
        for key in self.shapes:
            component, _, path = key.partition(".")
            component, path = (component, path) if component in COMPONENTS else ("", key)
            found[f"{component}.{path.replace('.', '_')}"] = key
        return found

    def locate(self, name: str) -> tuple[str, ...]:
        return spelling.locate(name, self.shapes, self.flat, self.layers)


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Shape of a layer's weight as a LoRA sees it, (out, in, ...), of quantised layers too; None without one."""
    if hasattr(module, "base_layer"):
        return weight_shape(module.base_layer)
    out = getattr(module, "out_features", None)
    wide = getattr(module, "in_features", None)
    if isinstance(out, int) and isinstance(wide, int):
        return (out, wide)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.ndim:
        return None
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:  # transformers keeps GPT-2's linears transposed
        return (weight.shape[1], weight.shape[0])
    return tuple(weight.shape)


def component_of(module: nn.Module) -> str:
    """The pipeline component that a bare module would be, by its class; "" for any other model."""
    name, home = type(module).__name__, type(module).__module__.split(".")[0]
    if home == "diffusers":
        return "unet" if "UNet" in name else "transformer" if "Transformer" in name else ""
    return "text_encoder" if name.startswith("CLIPTextModel") else ""


def _family_of_class(name: str, config: Any) -> str:
    get = config.get if isinstance(config, Mapping) else lambda k, d=None: getattr(config, k, d)
    if "UNet" in name:
        width = get("cross_attention_dim")
        width = width[0] if isinstance(width, (list, tuple)) else width
        if get("addition_embed_type") in ("text_time", "text"):
            return "sdxl"
        return _TEXT_WIDTH.get(width, "sd15")
    for start, family in (("SD3", "sd3"), ("Flux2", "flux2"), ("Flux", "flux"), ("QwenImage", "qwenimage")):
        if name.startswith(start):
            return family
    return name.partition("Transformer")[0].lower() if "Transformer" in name else ""


def family_of_model(model: Any) -> str:
    """The family of a pipeline, a denoiser or any other module: "sd15", "sdxl", "flux", ...; "" when it has none."""
    if not isinstance(model, nn.Module):
        found = (getattr(model, name, None) for name in ("unet", "transformer"))
        model = next((m for m in found if isinstance(m, nn.Module)), None)
        if model is None:
            return ""
    model = getattr(model, "_orig_mod", model)
    is_denoiser = component_of(model) in ("unet", "transformer")
    return _family_of_class(type(model).__name__, getattr(model, "config", {})) if is_denoiser else ""


def family_of(lora: Lora | Iterable[str]) -> str:
    """The family that a LoRA was made for, from its canonical keys and, given a Lora, its shapes; "" when unclear."""
    names = list(lora)
    unet = [n for n in names if n.startswith("unet.")]
    if unet:
        if isinstance(lora, Lora):
            for key in unet:
                shape = lora[key].shape
                if key.endswith(("attn2.to_k", "attn2.to_v")) and shape and shape[1] in _TEXT_WIDTH:
                    return _TEXT_WIDTH[shape[1]]
        if any("add_embedding" in n or ".transformer_blocks.1." in n for n in unet):
            return "sdxl"
        if any(n.startswith(("unet.down_blocks.0.attentions", "unet.up_blocks.3.")) for n in unet):
            return "sd15"
        return "sdxl" if any(n.startswith(("text_encoder_2.", "unet.up_blocks.0.attentions")) for n in names) else ""
    made = [n for n in names if n.startswith("transformer.")]
    if any(".single_transformer_blocks." in n for n in made):
        return "flux2" if any(".to_qkv_mlp_proj" in n for n in made) else "flux"
    if any(".img_mlp." in n or ".img_mod." in n for n in made):
        return "qwenimage"
    if any(".attention.to_" in n and n.split(".")[1] in ("layers", "noise_refiner", "context_refiner") for n in made):
        return "zimage"
    if any(".feed_forward.w" in n for n in made):
        return "zimage"
    if any(".add_q_proj" in n or ".ff_context." in n or ".norm1_context." in n for n in made):
        return _joint_family(lora, made)
    return ""


def _joint_family(lora: Lora | Iterable[str], made: list[str]) -> str:
    """SD 3, Qwen-Image and FLUX's double blocks have the same attention: the depth and width of real models tell."""
    blocks = [int(n.split(".")[2]) for n in made if n.startswith("transformer.transformer_blocks.")]
    if max(blocks, default=0) >= 38:  # 60 in Qwen-Image, 38 in SD 3.5 Large, 19 in FLUX.1
        return "qwenimage"
    shapes = [lora[n].shape for n in made if n.endswith(".attn.to_q")] if isinstance(lora, Lora) else []
    return "flux" if any(shape and shape[1] == 3072 for shape in shapes) else "sd3"


def _layers_of(component: str, module: nn.Module) -> Iterable[tuple[str, str, nn.Module]]:
    for path, layer in getattr(module, "_orig_mod", module).named_modules():
        words = path.split(".")
        if not path or "base_layer" in words or any(w in _INSIDE_ADAPTER for w in words):
            continue
        yield spelling.plain(component, path), path, layer


def _of_modules(name: str, family: str, modules: Mapping[str, nn.Module]) -> Base:
    shapes, live, paths, layers = {}, {}, {}, 2
    for component, module in modules.items():
        if component == "unet":
            each = getattr(getattr(module, "config", None), "layers_per_block", 2)
            layers = each if isinstance(each, int) else 2
        for key, path, layer in _layers_of(component, module):
            shape = weight_shape(layer)
            if shape is not None:
                shapes[key], live[key], paths[key] = shape, layer, path
    return Base(name, family, tuple(modules), shapes, layers, live, paths)


def _of_folder(folder: Path, name: str) -> Base:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"base {name!r}: {folder} holds no diffusers pipeline (no model_index.json in it)")
    shapes, found, family, layers = {}, [], "", 2
    for component in json.loads(index.read_text()):
        files = sorted((folder / component).glob("*.safetensors")) if component in COMPONENTS else []
        if not files:
            continue
        found.append(component)
        config = json.loads((folder / component / "config.json").read_text())
        if component in ("unet", "transformer"):
            family = _family_of_class(config.get("_class_name", ""), config)
            layers = config.get("layers_per_block", 2) if isinstance(config.get("layers_per_block", 2), int) else 2
        for file in files:
            with file.open("rb") as stream:
                start = stream.read(8)
                start += stream.read(struct.unpack("<Q", start)[0])
            for key, entry in read_header(start, file.stat().st_size, str(file)).items():
                if key.endswith(".weight") and entry.get("shape"):
                    shapes[spelling.plain(component, key[: -len(".weight")])] = tuple(entry["shape"])
    return Base(FAMILIES.get(family, family), family, tuple(found), shapes, layers)


def base_of(base: Any) -> Base:
    """The Base of a pipeline, a module, a saved pipeline's folder or "embedded"; ValueError for anything else."""
    if isinstance(base, Base):
        return base
    if isinstance(base, nn.Module):
        component, family = component_of(base), family_of_model(base)
        return _of_modules(FAMILIES.get(family, family) if family else type(base).__name__, family, {component: base})
    if isinstance(base, (str, Path)):
        folder = Path(base)
        if str(base) == "embedded":
            import multilora.assets

            folder = Path(next(iter(multilora.assets.__path__))) / "base"
        return _of_folder(folder, str(base))
    parts = {name: getattr(base, name, None) for name in COMPONENTS}
    modules = {name: m for name, m in parts.items() if isinstance(m, nn.Module)}
    if not modules:
        wanted = "a diffusers pipeline, a torch module, the folder of a saved pipeline, or 'embedded'"
        raise ValueError(f"base {type(base).__name__}: wanted {wanted}")
    family = family_of_model(base)
    return _of_modules(FAMILIES.get(family, family) if family else type(base).__name__, family, modules)
