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


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def randomise(parameters, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


# -- by hand --------------------------------------------------------------------------------------------------------


def hand_lora(down, up, scale: float, shape) -> np.ndarray:
    down, up = f64(down), f64(up)
    out = np.zeros((up.shape[0], down[0].size))
    for r in range(down.shape[0]):
        out += np.outer(up[:, r].ravel(), down[r].ravel())
    return (scale * out).reshape(shape)


def hand_core(core, left, right) -> np.ndarray:
    """sum over i, j of core[i, j, k..] left[i, o] right[j, c] as [o, c, k..]"""
    half = np.tensordot(f64(left).T, f64(core), 1)  # [o, j, k..]
    return np.moveaxis(np.tensordot(half, f64(right), ([1], [0])), -1, 1)


def hand_loha(p: dict, scale: float, shape) -> np.ndarray:
    if p.get("t1") is not None:
        one, two = (hand_core(p[f"t{i}"], p[f"w{i}_a"], p[f"w{i}_b"]) for i in (1, 2))
        return (scale * one * two).reshape(shape)
    return (scale * (f64(p["w1_a"]) @ f64(p["w1_b"])) * (f64(p["w2_a"]) @ f64(p["w2_b"]))).reshape(shape)


def hand_lokr(p: dict, scale: float, shape) -> np.ndarray:
    one = f64(p["w1"]) if p.get("w1") is not None else f64(p["w1_a"]) @ f64(p["w1_b"])
    if p.get("w2") is not None:
        two = f64(p["w2"])
    elif p.get("t2") is not None:
        two = hand_core(p["t2"], p["w2_a"], p["w2_b"])
    else:
        two = f64(p["w2_a"]) @ f64(p["w2_b"])
    two = two.reshape(two.shape[0], shape[1] // one.shape[1], *shape[2:])
    whole = np.zeros(shape)
    for i in range(one.shape[0]):
        for j in range(one.shape[1]):
            rows = slice(i * two.shape[0], (i + 1) * two.shape[0])
            whole[rows, j * two.shape[1] : (j + 1) * two.shape[1]] = one[i, j] * two
    return scale * whole


def hand_dora(weight, delta: np.ndarray, magnitude: np.ndarray, *, per_output: bool, eps: float = 0.0) -> np.ndarray:
    weight = f64(weight)
    new, whole = weight + delta, np.zeros_like(weight)
    for i in range(weight.shape[0] if per_output else weight.shape[1]):
        at = i if per_output else (slice(None), i)
        whole[at] = magnitude.ravel()[i] * new[at] / (np.sqrt((new[at] ** 2).sum()) + eps) - weight[at]
    return whole


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


def _prefix(family: str, component: str) -> str:
    """As lycoris.kohya and sd-scripts name components; FLUX's T5 is their third text encoder."""
    if family == "flux" and component == "text_encoder_2":
        return "lora_te3"
    one = {"sd15": "lora_te"}.get(family, "lora_te1")
    return {"text_encoder": one, "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3", "": "lycoris"}.get(
        component, "lora_unet"
    )


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


def _lycoris_update(own: dict, layer: nn.Module, decomposed: str) -> np.ndarray:
    shape, alpha = layer.weight.shape, float(own["alpha"]) if "alpha" in own else 0.0
    if "diff" in own or "w_norm" in own:
        return f64(own.get("diff", own.get("w_norm"))).reshape(shape)
    if "lora_up.weight" in own:
        scale = alpha / own["lora_down.weight"].shape[0]
        if "lora_mid.weight" in own:
            up, down = own["lora_up.weight"].flatten(1).T, own["lora_down.weight"].flatten(1)
            delta = scale * hand_core(own["lora_mid.weight"], up, down)
        else:
            delta = hand_lora(own["lora_down.weight"], own["lora_up.weight"], scale, shape)
    elif "hada_w1_a" in own:
        short = {k.removeprefix("hada_"): v for k, v in own.items()}
        delta = hand_loha(short, alpha / own["hada_w1_b"].shape[0], shape)
    else:
        short = {k.removeprefix("lokr_"): v for k, v in own.items()}
        ranks = [own[k].shape[0] for k in ("lokr_w1_b", "lokr_w2_b") if k in own]
        delta = hand_lokr(short, alpha / ranks[0] if ranks else 1.0, shape)
    if not decomposed:
        return delta
    eps = float(np.finfo(np.float32).eps)
    return hand_dora(layer.weight, delta, f64(own["dora_scale"]), per_output=decomposed == "out", eps=eps)


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

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
           "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip


def stable_diffusion(path: str, layers: int) -> str:
    """A U-Net layer's name in the code of Stable Diffusion (ldm, sgm), from its name in diffusers."""
    if path == "conv_in":
        return "input_blocks.0.0"
    side, rest = path.split(".", 1)
    if side == "mid_block":
        kind, n, rest = rest.split(".", 2)
        return f"middle_block.{2 * int(n) if kind == 'resnets' else 1}.{_RESNET.get(rest, rest)}"
    block, kind, n, rest = rest.split(".", 3)
    block, n = int(block), int(n)
    if side == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.op"
        return f"input_blocks.{(layers + 1) * block + n + 1}.{int(kind == 'attentions')}.{_RESNET.get(rest, rest)}"
    return f"output_blocks.{(layers + 1) * block + n}.{int(kind == 'attentions')}.{_RESNET.get(rest, rest)}"


_FLUX = {
    "double_blocks.0.img_attn.qkv": ("transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
    "double_blocks.0.txt_attn.qkv": ("transformer_blocks.0.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn.to_out.0", ()),
    "double_blocks.0.txt_attn.proj": ("transformer_blocks.0.attn.to_add_out", ()),
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj", ()),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.net.2", ()),
    "single_blocks.1.linear1": ("single_transformer_blocks.1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    "single_blocks.1.linear2": ("single_transformer_blocks.1.proj_out", ()),
    "img_in": ("x_embedder", ()),
    "final_layer.adaLN_modulation.1": ("norm_out.linear", "swapped"),
}
_SD3 = {
    "joint_blocks.0.x_block.attn.qkv": ("transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
    "joint_blocks.0.context_block.attn.qkv": ("transformer_blocks.0.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    "joint_blocks.0.x_block.attn.proj": ("transformer_blocks.0.attn.to_out.0", ()),
    "joint_blocks.0.context_block.attn.proj": ("transformer_blocks.0.attn.to_add_out", ()),
    "joint_blocks.0.x_block.mlp.fc1": ("transformer_blocks.0.ff.net.0.proj", ()),
    "joint_blocks.0.context_block.mlp.fc2": ("transformer_blocks.0.ff_context.net.2", ()),
    "joint_blocks.0.x_block.adaLN_modulation.1": ("transformer_blocks.0.norm1.linear", ()),
    "joint_blocks.1.context_block.adaLN_modulation.1": ("transformer_blocks.1.norm1_context.linear", "swapped"),
    "final_layer.adaLN_modulation.1": ("norm_out.linear", "swapped"),
}
_ZIMAGE = {
    "layers.1.attention.qkv": ("layers.1.attention", ("to_q", "to_k", "to_v")),
    "context_refiner.0.attention.qkv": ("context_refiner.0.attention", ("to_q", "to_k", "to_v")),
    "layers.1.attention.out": ("layers.1.attention.to_out.0", ()),
    "layers.0.feed_forward.w2": ("layers.0.feed_forward.w2", ()),
    "layers.0.adaLN_modulation.0": ("layers.0.adaLN_modulation.0", ()),
    "noise_refiner.0.feed_forward.w1": ("noise_refiner.0.feed_forward.w1", ()),
    "x_embedder": ("all_x_embedder.2-1", ()),
    "final_layer.linear": ("all_final_layer.2-1.linear", ()),
}


def native(family: str, module: nn.Module, paths: list[str]) -> dict[str, tuple]:
    """name in the authors' code -> (path, leaves of a fused projection or "swapped")"""
    if family in ("sd15", "sdxl"):
        return {stable_diffusion(path, module.config.layers_per_block): (path, ()) for path in paths}
    return {"flux": _FLUX, "sd3": _SD3, "zimage": _ZIMAGE}.get(family) or {path: (path, ()) for path in paths}


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
