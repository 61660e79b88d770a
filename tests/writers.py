"""LoRA files of every format and family, by their real writers, with each layer's update computed by hand.

`write(format, family, folder, **more)` gives (path for files.load, {canonical key: update in float64}, base). The
updates are computed with numpy from the writers' own parameters and share nothing with multilora. For kohya's and
ComfyUI's spellings there is no package: they are written here by the names of sd-scripts, musubi-tuner and ComfyUI.
"""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import numpy as np
import peft
import torch
from diffusers import (
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from lycoris import LycorisNetwork
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from tests import tiny, tiny_more
from tests.handupdates import _lycoris_update, f64, hand_dora, hand_loha, hand_lokr, hand_lora
from tests.native_names import _prefix, native

_TEXT = ("layers.1.self_attn.q_proj", "layers.0.mlp.fc1")
_T5 = ("SelfAttention.k", "DenseReluDense.wo")
_UNET = ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.2", "attentions.0.proj_in", "resnets.0.conv1",
         "conv_shortcut", "downsamplers.0.conv", "time_emb_proj", "up_blocks.1.resnets.1.conv2",
         "conv_in")  # fmt: skip
_JOINT = tuple(
    f"transformer_blocks.0.attn.{n}"
    for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
)
_SINGLE = tuple(f"single_transformer_blocks.1.{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
# family -> component -> ends of the paths of the layers that a file adapts.
LAYERS = {
    "sd15": {"unet": _UNET, "text_encoder": _TEXT},
    "sdxl": {"unet": _UNET, "text_encoder": _TEXT, "text_encoder_2": _TEXT},
    "sd3": {
        "transformer": (*_JOINT, "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_context.net.2",
                        "transformer_blocks.0.norm1.linear", "transformer_blocks.1.norm1_context.linear",
                        "norm_out.linear"),
        "text_encoder": _TEXT, "text_encoder_2": _TEXT, "text_encoder_3": _T5,
    },
    "flux": {
        "transformer": (*_JOINT, "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_context.net.2",
                        *_SINGLE, "single_transformer_blocks.1.proj_out", "x_embedder", "norm_out.linear"),
        "text_encoder": _TEXT, "text_encoder_2": _T5,
    },
    "qwenimage": {"transformer": (*_JOINT, "transformer_blocks.0.img_mlp.net.0.proj",
                                  "transformer_blocks.0.txt_mlp.net.2", "transformer_blocks.0.img_mod.1", "img_in")},
    "zimage": {
        "transformer": (*(f"{block}.attention.{n}" for block in ("layers.1", "context_refiner.0")
                          for n in ("to_q", "to_k", "to_v")),
                        "layers.1.attention.to_out.0", "layers.0.feed_forward.w2", "layers.0.adaLN_modulation.0",
                        "noise_refiner.0.feed_forward.w1", "all_x_embedder.2-1", "all_final_layer.2-1.linear"),
    },
    "llama": {"": ("q_proj", "k_proj", "mlp.down_proj")},
}  # fmt: skip
PIPES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline,
         "flux": FluxPipeline, "qwenimage": QwenImagePipeline, "zimage": ZImagePipeline}  # fmt: skip
FAMILIES = tuple(LAYERS)
RANK, ALPHA = 3, 5.0


@functools.cache
def base_of(family: str):
    """One copy for all cells: nothing changes it."""
    return getattr(tiny_more if family in ("qwenimage", "zimage", "llama") else tiny, family)()


def modules(family: str):
    """(base, {component: (its module, the paths of the adapted layers)})"""
    base = base_of(family)
    found = {}
    for component, ends in LAYERS[family].items():
        module = getattr(base, component) if component and not isinstance(base, nn.Module) else base
        paths = [p for p, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        chosen = [next((p for p in paths if p.endswith(end)), "") for end in ends]
        assert all(chosen), (family, component, ends, chosen)
        found[component] = module, list(dict.fromkeys(chosen))
    return base, found


def canonical(component: str, path: str) -> str:
    path = path.removeprefix("text_model.") if component.startswith("text_encoder") else path
    return f"{component}.{path}" if component else path


def randomise(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


# -- PEFT and diffusers ---------------------------------------------------------------------------------------------


def _peft_updates(model: nn.Module, component: str, base: nn.Module, scale) -> dict[str, np.ndarray]:
    """By the parameters of PEFT's layers; scale(path, rank) gives the factor."""
    found, plain = {}, dict(base.named_modules())
    for name, layer in model.named_modules():
        path = name.removeprefix("base_model.model.")
        own = {n.split(".")[0]: p for n, p in layer.named_parameters() if "default" in n and "base_layer" not in n}
        if path not in plain or not any(n.startswith(("lora_A", "hada", "lokr")) for n in own):
            continue
        weight = plain[path].weight
        if "lora_A" in own:
            rank = own["lora_A"].shape[0]
            delta = hand_lora(own["lora_A"], own["lora_B"], scale(path, rank), weight.shape)
            if "lora_magnitude_vector" in own:
                magnitude = f64(own["lora_magnitude_vector"])
                delta = hand_dora(weight, delta, magnitude, per_output=True)
        else:
            short = {n.split("_", 1)[1]: p for n, p in own.items()}
            hand = hand_loha if "hada_w1_a" in own else hand_lokr
            delta = hand(short, scale(path, RANK), weight.shape)
        found[canonical(component, path)] = delta
    return found


def _write_peft(family, folder, make_config, scale=lambda path, rank: ALPHA / rank, dtype=None):
    base, found = modules(family)
    want = {}
    for seed, (component, (module, paths)) in enumerate(found.items()):
        model = peft.get_peft_model(copy.deepcopy(module), make_config(paths))
        own = [p for n, p in model.named_parameters() if ".default" in n]
        randomise(own, seed)
        for p in own:
            p.data = p.data.to(dtype or p.dtype)
        model.save_pretrained(folder / component if len(found) > 1 else folder)
        want |= _peft_updates(model, component, module, scale)
    return folder, want, base


def peft_lora(family, folder, *, rank=RANK, dtype=None):
    return _write_peft(family, folder, lambda paths: peft.LoraConfig(
        r=rank, lora_alpha=ALPHA, target_modules=paths, rank_pattern={paths[0]: 2}), dtype=dtype)  # fmt: skip


def peft_rslora(family, folder):
    last = {paths[-1] for _, paths in modules(family)[1].values()}

    def config(paths):
        pattern = {"alpha_pattern": {f"^{paths[-1]}": 2.0}, "rank_pattern": {paths[0]: 1}}
        return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=paths, use_rslora=True, **pattern)

    return _write_peft(family, folder, config, lambda path, rank: (2.0 if path in last else ALPHA) / rank**0.5)


def peft_dora(family, folder):
    return _write_peft(
        family, folder, lambda paths: peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=paths, use_dora=True)
    )


def peft_loha(family, folder):
    return _write_peft(family, folder, lambda paths: peft.LoHaConfig(
        r=RANK, alpha=ALPHA, target_modules=paths, use_effective_conv2d=True))  # fmt: skip


def peft_lokr(family, folder):
    return _write_peft(family, folder, lambda paths: peft.LoKrConfig(
        r=RANK, alpha=ALPHA, target_modules=paths, use_effective_conv2d=True, decompose_factor=2))  # fmt: skip


def diffusers(family, folder):
    base, found = modules(family)
    encoders = {"sd15": 1, "sdxl": 2, "sd3": 2, "flux": 1}.get(family, 0)
    want, arguments = {}, {}
    for seed, (component, (module, paths)) in enumerate(found.items()):
        if component.startswith("text_encoder") and int(component[-1] if component[-1].isdigit() else 1) > encoders:
            continue
        model = copy.deepcopy(module)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=paths, rank_pattern={paths[0]: 2})
        model.add_adapter(config)
        randomise([p for n, p in model.named_parameters() if ".default" in n], seed)
        want |= _peft_updates(model, component, module, lambda path, rank: ALPHA / rank)
        arguments[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        arguments[f"{component}_lora_adapter_metadata"] = config.to_dict() | {"target_modules": paths}
    PIPES[family].save_lora_weights(folder, **arguments)
    return folder / "pytorch_lora_weights.safetensors", want, base


# -- lycoris-lora ---------------------------------------------------------------------------------------------------


def _lycoris(family, folder, algorithm, *, rank=2, alpha=ALPHA, decomposed="", norms=False, dtype=None, **options):
    """decomposed: "out" or "in" for DoRA with the norm over each output's or each input's weights."""
    base, found = modules(family)
    tensors, want = {}, {}
    for seed, (component, (module, paths)) in enumerate(found.items()):
        kinds = (nn.LayerNorm, nn.GroupNorm)
        affine = [p for p, m in module.named_modules() if type(m) in kinds and m.weight is not None]
        extra = affine[:2] if norms else []
        LycorisNetwork.apply_preset({
            "enable_conv": True, "target_module": [], "lora_prefix": _prefix(family, component),
            "target_name": [f"{re.escape(p)}$" for p in paths + extra], "module_algo_map": {}, "name_algo_map": {},
        })  # fmt: skip
        net = LycorisNetwork(
            module, lora_dim=rank, conv_lora_dim=rank, alpha=alpha, conv_alpha=alpha, network_module=algorithm,
            weight_decompose=bool(decomposed), wd_on_out=decomposed != "in", train_norm=norms, **options,
        )  # fmt: skip
        assert len(net.loras) == len(paths) + len(extra), (family, component, [m.lora_name for m in net.loras])
        for lora in net.loras:
            net.add_module(lora.lora_name, lora)
        randomise(net.parameters(), seed)
        own = {k: v.to(dtype or v.dtype) for k, v in net.state_dict().items()}
        tensors |= own
        flat = {p.replace(".", "_"): p for p in paths + extra}
        for lora in net.loras:
            path = flat[lora.lora_name.removeprefix(_prefix(family, component) + "_")]
            mine = {k[len(lora.lora_name) + 1 :]: v for k, v in own.items() if k.startswith(lora.lora_name + ".")}
            want[canonical(component, path)] = _lycoris_update(mine, module.get_submodule(path), decomposed)
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "a.safetensors",
              {"ss_network_module": "lycoris.kohya", "ss_network_dim": str(rank)})  # fmt: skip
    return folder / "a.safetensors", want, base


def locon(family, folder, **more):
    return _lycoris(family, folder, "locon", use_tucker=True, **more)


def loha(family, folder, **more):
    return _lycoris(family, folder, "loha", **more)


def loha_tucker(family, folder, **more):
    return _lycoris(family, folder, "loha", use_tucker=True, **more)


def lokr(family, folder, **more):
    return _lycoris(family, folder, "lokr", factor=2, **more)


def lokr_both(family, folder):
    return _lycoris(family, folder, "lokr", rank=1, factor=4, decompose_both=True, use_tucker=True)


def lokr_whole(family, folder):
    return _lycoris(family, folder, "lokr", factor=4, full_matrix=True)


def lycoris_rslora(family, folder):
    return _lycoris(family, folder, "locon", rs_lora=True)


def dora_out(family, folder):
    return _lycoris(family, folder, "locon", decomposed="out")


def dora_in(family, folder):
    return _lycoris(family, folder, "loha", decomposed="in", use_tucker=True)


def dora_lokr(family, folder):
    return _lycoris(family, folder, "lokr", decomposed="out", factor=2)


def full(family, folder):
    return _lycoris(family, folder, "full", norms=True)


# -- the authors' own names, as sd-scripts, musubi-tuner and ComfyUI write them -------------------------------------


def _spelled(family, folder, name_of, *, low, high, authors, dtype=None, alphas=True, rank=RANK):
    base, found = modules(family)
    tensors, want = {}, {}
    generator = torch.Generator().manual_seed(0)
    for component, (module, paths) in found.items():
        text = component.startswith("text_encoder")
        table = {p: (p, ()) for p in paths} if text or not authors else native(family, module, paths)
        for i, (theirs, (path, leaves)) in enumerate(table.items()):
            fused = isinstance(leaves, tuple) and leaves
            real = [f"{path}.{leaf}" for leaf in leaves] if fused else [path]
            shapes = [module.get_submodule(p).weight.shape for p in real]
            r, shape = rank + i % 2, shapes[0]
            rows = sum(s[0] for s in shapes)
            down = torch.randn(r, *shape[1:], generator=generator)
            up = torch.randn(rows, r, *[1] * (len(shape) - 2), generator=generator)
            down, up = down.to(dtype or down.dtype), up.to(dtype or up.dtype)
            name = name_of(component, theirs)
            tensors |= {f"{name}.{low}.weight": down, f"{name}.{high}.weight": up}
            if alphas:
                tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
            whole = hand_lora(down, up, ALPHA / r if alphas else 1.0, (rows, *shape[1:]))
            if leaves == "swapped":
                whole = np.concatenate([whole[rows // 2 :], whole[: rows // 2]])
            start = 0
            for p, s in zip(real, shapes, strict=True):
                want[canonical(component, p)], start = whole[start : start + s[0]], start + s[0]
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors", want, base


def kohya(family, folder, *, authors=True, **more):
    def name_of(component, path):
        clip = component.startswith("text_encoder") and path.startswith("encoder.layers")
        path = f"text_model.{path}" if clip else path
        return f"{_prefix(family, component)}_{path}".replace(".", "_")

    return _spelled(family, folder, name_of, low="lora_down", high="lora_up", authors=authors, **more)


def kohya_diffusers_names(family, folder):
    return kohya(family, folder, authors=False)


def comfyui(family, folder):
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl" if family == "flux" else "clip_g",
                "text_encoder_3": "t5xxl"}  # fmt: skip

    def name_of(component, path):
        if component in encoders:
            clip = path.startswith("encoder.layers")
            return f"text_encoders.{encoders[component]}.transformer.{'text_model.' if clip else ''}{path}"
        return f"diffusion_model.{path}"

    return _spelled(family, folder, name_of, low="lora_A", high="lora_B", authors=True)


# name -> (writer, format of the card, algorithms that it must name)
FORMATS = {
    "diffusers": (diffusers, "diffusers", {"lora"}),
    "peft": (peft_lora, "peft", {"lora"}),
    "peft_rslora": (peft_rslora, "peft", {"lora", "rslora"}),
    "peft_dora": (peft_dora, "peft", {"lora", "dora"}),
    "peft_loha": (peft_loha, "peft", {"loha"}),
    "peft_lokr": (peft_lokr, "peft", {"lokr"}),
    "kohya": (kohya, "kohya", {"lora"}),
    "kohya_diffusers_names": (kohya_diffusers_names, "kohya", {"lora"}),
    "comfyui": (comfyui, "kohya", {"lora"}),
    "locon": (locon, "", {"lora"}),
    "loha": (loha, "lycoris", {"loha"}),
    "loha_tucker": (loha_tucker, "lycoris", {"loha"}),
    "lokr": (lokr, "lycoris", {"lokr"}),
    "lokr_both": (lokr_both, "lycoris", {"lokr"}),
    "lokr_whole": (lokr_whole, "lycoris", {"lokr"}),
    "lycoris_rslora": (lycoris_rslora, "", {"lora"}),
    "dora_out": (dora_out, "lycoris", {"lora", "dora"}),
    "dora_in": (dora_in, "lycoris", {"loha", "dora"}),
    "dora_lokr": (dora_lokr, "lycoris", {"lokr", "dora"}),
    "full": (full, "", {"diff"}),
}
NOT_FOR_LANGUAGE_MODELS = {"diffusers", "kohya", "kohya_diffusers_names", "comfyui"}
CELLS = [(fmt, fam) for fmt in FORMATS for fam in FAMILIES if fam != "llama" or fmt not in NOT_FOR_LANGUAGE_MODELS]


def write(fmt: str, family: str, folder: Path, **more):
    return FORMATS[fmt][0](family, folder, **more)
