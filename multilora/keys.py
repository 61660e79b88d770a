"""Spellings of LoRA keys: which layer a tensor's name means, and what the tensor is to it.

One table per question. Formats differ in three places: the end of a key (SUFFIXES), the prefix that names the model
(PREFIXES), and the layer's path, which may be underscored (WORDS), that of the original Stable Diffusion code (`ldm`)
or that of the original FLUX / SD3 code with fused projections (NATIVE).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from multilora.lora import COMPONENTS

# End of a key -> what the tensor is. Longer ends first.
SUFFIXES = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "dora_scale",
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1",
    ".hada_t2": "hada_t2",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".lokr_w1": "lokr_w1",
    ".lokr_w2": "lokr_w2",
    ".lokr_t2": "lokr_t2",
    ".diff_b": "bias",
    ".diff": "diff",
    ".w_norm": "norm",
    ".b_norm": "bias",
    ".alpha": "alpha",
    ".base_layer.bias": "whole_bias",
    ".bias": "whole_bias",
}
# Words in a key that mean another kind of adapter; a file with one of them is refused by its kind.
OTHER_KINDS = {
    "boft_": "BOFT",  # before OFT, whose names it contains
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R": "OFT",
    "ia3_l": "IA3",
    ".on_input": "IA3",
    "vera_lambda": "VeRA",
    "modules_to_save": "modules_to_save",
    "trainable_tokens": "trainable tokens",
    "emb_params": "textual inversion",
    ".a1.weight": "GLoRA",
    ".b1.weight": "GLoRA",
}
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lora_prior_unet_": "prior",
    "lycoris_": "unet",  # lycoris-lora around a bare model (SimpleTuner): of its denoiser
}
# ComfyUI's names of text encoders -> components that they may be, the likeliest first.
ENCODERS = {
    "text_encoders.clip_l.transformer.": ("text_encoder",),
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "text_encoder_2"),
    "text_encoders.qwen25_7b.transformer.": ("text_encoder",),
    "text_encoders.qwen3_4b.transformer.": ("text_encoder",),
}
# Names of modules that hold underscores themselves: the others are single words between the dots of a path.
WORDS = {
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks", "to_q", "to_k",
    "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "norm_q", "norm_k", "norm_added_q",
    "norm_added_k", "proj_in", "proj_out", "proj_mlp", "conv_in", "conv_out", "conv_norm_out", "conv_shortcut",
    "time_emb_proj", "time_embedding", "add_embedding", "class_embedding", "linear_1", "linear_2", "group_norm",
    "ff_context", "norm1_context", "norm2_context", "norm_out", "x_embedder", "context_embedder", "pos_embed",
    "time_text_embed", "timestep_embedder", "guidance_embedder", "text_embedder", "image_embedder", "text_model",
    "self_attn", "encoder_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection", "token_embedding",
    "position_embedding", "layer_norm", "layer_norm1", "layer_norm2", "final_layer_norm",
    "relative_attention_bias", "wi_0", "wi_1", "gate_proj", "up_proj", "down_proj", "o_proj", "embed_tokens",
    "lm_head", "input_layernorm", "noise_refiner", "context_refiner", "img_in", "txt_in", "img_mlp", "txt_mlp",
    "img_mod", "txt_mod", "txt_norm", "feed_forward", "adaLN_modulation", "attention_norm1", "attention_norm2",
    "ffn_norm1", "ffn_norm2", "cap_embedder", "t_embedder", "all_x_embedder", "all_final_layer",
    "post_attention_layernorm", "embed_positions", "final_norm",
}  # fmt: skip
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
# FLUX, SD3 and Z-Image layers in the code of their authors (as sd-scripts, musubi-tuner and ComfyUI write them) ->
# ours; several names mean that the rows of one projection are split, by the base's rows, else by equal parts or, for
# linear1, q, k, v of the input's width and the rest.
NATIVE = {
    r"double_blocks_(\d+)_img_attn_qkv": ("transformer_blocks.{}.attn", _QKV),
    r"double_blocks_(\d+)_img_attn_proj": ("transformer_blocks.{}.attn", ("to_out.0",)),
    r"double_blocks_(\d+)_img_mlp_0": ("transformer_blocks.{}.ff", ("net.0.proj",)),
    r"double_blocks_(\d+)_img_mlp_2": ("transformer_blocks.{}.ff", ("net.2",)),
    r"double_blocks_(\d+)_img_mod_lin": ("transformer_blocks.{}.norm1", ("linear",)),
    r"double_blocks_(\d+)_txt_attn_qkv": ("transformer_blocks.{}.attn", _ADDED),
    r"double_blocks_(\d+)_txt_attn_proj": ("transformer_blocks.{}.attn", ("to_add_out",)),
    r"double_blocks_(\d+)_txt_mlp_0": ("transformer_blocks.{}.ff_context", ("net.0.proj",)),
    r"double_blocks_(\d+)_txt_mlp_2": ("transformer_blocks.{}.ff_context", ("net.2",)),
    r"double_blocks_(\d+)_txt_mod_lin": ("transformer_blocks.{}.norm1_context", ("linear",)),
    r"single_blocks_(\d+)_linear1": ("single_transformer_blocks.{}", tuple(f"attn.{q}" for q in _QKV) + ("proj_mlp",)),
    r"single_blocks_(\d+)_linear2": ("single_transformer_blocks.{}", ("proj_out",)),
    r"single_blocks_(\d+)_qkv": ("single_transformer_blocks.{}.attn", _QKV),
    r"single_blocks_(\d+)_modulation_lin": ("single_transformer_blocks.{}.norm", ("linear",)),
    r"joint_blocks_(\d+)_x_block_attn_qkv": ("transformer_blocks.{}.attn", _QKV),
    r"joint_blocks_(\d+)_x_block_attn2_qkv": ("transformer_blocks.{}.attn2", _QKV),
    r"joint_blocks_(\d+)_x_block_attn_proj": ("transformer_blocks.{}.attn", ("to_out.0",)),
    r"joint_blocks_(\d+)_x_block_attn2_proj": ("transformer_blocks.{}.attn2", ("to_out.0",)),
    r"joint_blocks_(\d+)_x_block_adaLN_modulation_1": ("transformer_blocks.{}.norm1", ("linear",)),
    r"joint_blocks_(\d+)_x_block_mlp_fc1": ("transformer_blocks.{}.ff", ("net.0.proj",)),
    r"joint_blocks_(\d+)_x_block_mlp_fc2": ("transformer_blocks.{}.ff", ("net.2",)),
    r"joint_blocks_(\d+)_context_block_attn_qkv": ("transformer_blocks.{}.attn", _ADDED),
    r"joint_blocks_(\d+)_context_block_attn_proj": ("transformer_blocks.{}.attn", ("to_add_out",)),
    r"joint_blocks_(\d+)_context_block_mlp_fc1": ("transformer_blocks.{}.ff_context", ("net.0.proj",)),
    r"joint_blocks_(\d+)_context_block_adaLN_modulation_1": ("transformer_blocks.{}.norm1_context", ("linear",)),
    r"joint_blocks_(\d+)_context_block_mlp_fc2": ("transformer_blocks.{}.ff_context", ("net.2",)),
    r"(layers_\d+|noise_refiner_\d+|context_refiner_\d+)_attention_qkv": ("{}.attention", _QKV),
    r"(layers_\d+|noise_refiner_\d+|context_refiner_\d+)_attention_out": ("{}.attention", ("to_out.0",)),
}
# Layers outside the blocks -> what they may be, by family; the first that the base has.
NATIVE_TOP = {
    "img_in": ("img_in", "x_embedder"),
    "txt_in": ("txt_in", "context_embedder"),
    "x_embedder": ("x_embedder", "all_x_embedder.2-1"),
    "time_in_in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in_out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in_in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in_out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in_in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in_out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "t_embedder_mlp_0": ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    "t_embedder_mlp_2": ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    "y_embedder_mlp_0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder_mlp_2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer_linear": ("proj_out", "all_final_layer.2-1.linear"),
    "final_layer_adaLN_modulation_1": ("norm_out.linear", "all_final_layer.2-1.adaLN_modulation.1"),
}
# What a name was taken for without a base -> what it is, where the other layers tell the family.
FAMILY_NAMES = {
    "flux": {
        "transformer.img_in": "transformer.x_embedder",
        "transformer.txt_in": "transformer.context_embedder",
        "text_encoder_3.": "text_encoder_2.",  # sd-scripts calls T5 the third text encoder there too
    },
    "sd3": {
        "transformer.t_embedder.mlp.0": "transformer.time_text_embed.timestep_embedder.linear_1",
        "transformer.t_embedder.mlp.2": "transformer.time_text_embed.timestep_embedder.linear_2",
    },
    "zimage": {
        "transformer.x_embedder": "transformer.all_x_embedder.2-1",
        "transformer.proj_out": "transformer.all_final_layer.2-1.linear",
        "transformer.norm_out.linear": "transformer.all_final_layer.2-1.adaLN_modulation.1",
    },
}
# Their two halves, scale and shift, lie in the other order in diffusers: in FLUX and SD3, where they make 2 * width.
_HALVES = re.compile(r"(?:final_layer|joint_blocks_\d+_context_block)_adaLN_modulation_1")
# XLabs' FLUX files: processor names that stand for projections of the original code.
_XLABS = re.compile(
    r"(?:diffusion_model\.)?(double|single)(_blocks\.\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight"
)
_NATIVE = [(re.compile(pattern), *target) for pattern, target in NATIVE.items()]
_LDM_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_LDM_SINGLE = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_UNET_FIRST = (
    "down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "conv_norm_out", "time_embedding", "add_embedding",
)  # fmt: skip
_TRANSFORMER_FIRST = (
    "transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder", "noise_refiner",
    "context_refiner", "img_in", "txt_in", "time_text_embed", "norm_out", "cap_embedder", "t_embedder",
    "all_x_embedder", "all_final_layer",
)  # fmt: skip


def other_kind(key: str) -> str:
    """The kind of adapter that is not read, by a word in one of its keys; "" for all others."""
    return next((kind for word, kind in OTHER_KINDS.items() if word in key), "")


def split(key: str) -> tuple[str, str]:
    """(name of the layer as the file spells it, what the tensor is to it). Raises ValueError for an unknown end."""
    kind = other_kind(key)
    if kind:
        raise ValueError(f"key {key}: this is {kind}, which is not read here; convert it to a plain LoRA first")
    xlabs = _XLABS.fullmatch(key)
    if xlabs:
        side, block, what, stream, role = xlabs.groups()
        leaf = {"qkv": "qkv", "proj": "linear2"}[what]
        leaf = leaf if side == "single" else f"{'txt' if stream == '2' else 'img'}_attn.{what}"
        return f"diffusion_model.{side}{block}.{leaf}", role
    for end, role in SUFFIXES.items():
        if key.endswith(end) and len(key) > len(end):
            name = key[: -len(end)]
            if end.startswith("_lora."):
                head, _, last = name.rpartition(".")
                old = _OLD_TEXT.get(last, last) if head.endswith("self_attn") else last.replace("to_out", "to_out.0")
                name = f"{head}.{old}"
            return name.replace(".processor.", "."), role
    raise ValueError(f"key {key}: no name of a LoRA tensor (known ends: .lora_A.weight, .lora_down.weight, ...)")


def halves_swapped(name: str) -> bool:
    """Whether the two halves of a layer's rows lie in the other order in diffusers, if it makes twice its input."""
    return bool(_HALVES.search(name.replace(".", "_")))


def plain(component: str, path: str) -> str:
    """The canonical key: text encoders lose `text_model.`."""
    if component.startswith("text_encoder"):
        path = path.removeprefix("text_model.")
    return f"{component}.{path}" if component else path


def dotted(name: str) -> str:
    """An underscored path with its dots back: "mid_block_attentions_0_proj_in" -> "mid_block.attentions.0.proj_in"."""
    words, i, path = name.split("_"), 0, []
    while i < len(words):
        for n in (4, 3, 2, 1):
            word = "_".join(words[i : i + n])
            if n == 1 or word in WORDS:
                path.append(word)
                i += n
                break
    return ".".join(path)


def ldm(name: str, layers_per_block: int = 2) -> str | None:
    """The diffusers path of a layer of the original Stable Diffusion UNet; None when it has no layer of this name."""
    if name in _LDM_SINGLE:
        return _LDM_SINGLE[name]
    found = re.fullmatch(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)|(middle_block)_(\d+)_(.+)", name)
    if not found:
        return None
    side, number, _, rest, middle, part, middle_rest = found.groups()
    rest = rest or middle_rest
    tail = _LDM_RESNET.get(rest) or dotted(rest)
    resnet = rest in _LDM_RESNET
    if middle:
        n = int(part)
        return f"mid_block.resnets.{n // 2}.{tail}" if n != 1 else f"mid_block.attentions.0.{tail}"
    each = layers_per_block + 1
    if side == "input_blocks":
        block, layer = divmod(int(number) - 1, each)
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        return f"down_blocks.{block}.{'resnets' if resnet else 'attentions'}.{layer}.{tail}"
    block, layer = divmod(int(number), each)
    if rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    return f"up_blocks.{block}.{'resnets' if resnet else 'attentions'}.{layer}.{tail}"


def native(name: str, known: Mapping[str, object] | None = None) -> tuple[str, ...] | None:
    """The transformer paths that a layer of the authors' code stands for, in row order; None: not one of these.

    Raises nothing; `known` are the base's layers, which decide where the same name means different layers.
    """
    for pattern, parent, leaves in _NATIVE:
        found = pattern.fullmatch(name)
        if found:
            head = parent.format(found[1] if found[1].isdigit() else dotted(found[1]))
            return tuple(f"transformer.{head}.{leaf}" for leaf in leaves)
    there = [f"transformer.{path}" for path in NATIVE_TOP.get(name, ())]
    return (next((path for path in there if path in (known or {})), there[0]),) if there else None


def of_family(key: str, family: str) -> str:
    """The canonical key of a layer that was located without a base, once the family is known."""
    for start, real in FAMILY_NAMES.get(family, {}).items():
        if key == start or (start.endswith(".") and key.startswith(start)):
            return real + key[len(start) :]
    return key


def _denoiser(path: str) -> str:
    """The component that a denoiser's path without one belongs to."""
    first, second = (*path.split("."), "")[:2]
    return "transformer" if first in _TRANSFORMER_FIRST or (first == "layers" and second.isdigit()) else "unet"


def _underscored(start: str, rest: str, known: Mapping, flat: Mapping[str, str], layers: int) -> tuple[str, ...]:
    """The keys of an underscored name behind one of PREFIXES."""
    component = PREFIXES[start]
    rest = rest.removeprefix("text_model_") if component.startswith("text_encoder") else rest
    # sd-scripts calls T5 the third text encoder in FLUX too; lycoris-lora says nothing of the component.
    others = {"lora_te3_": ("text_encoder_2",), "lora_unet_": ("transformer",)}.get(start, ())
    others = ("transformer", "") if start == "lycoris_" else others
    for real in (component, *others):
        if f"{real}.{rest}" in flat:
            return (flat[f"{real}.{rest}"],)
    if component not in ("unet", "transformer"):
        return (plain(component, dotted(rest)),)
    path = native(rest, known)
    if path:
        return path
    path = (component == "unet" and ldm(rest, layers)) or dotted(rest)
    if start == "lycoris_" and _denoiser(path) == "unet" and not path.startswith(_UNET_FIRST):
        return (path,)
    return (plain(component if component == "transformer" else _denoiser(path), path),)


def locate(
    name: str, known: Mapping[str, object] | None = None, flat: Mapping[str, str] | None = None, layers: int = 2
) -> tuple[str, ...]:
    """The canonical keys that a layer's name in a file stands for; several for a fused projection.

    known   the base's layers by canonical key, where there is a base: its real names win over any guess
    flat    the same by component and underscored path: "unet.mid_block_attentions_0_proj_in"
    layers  resnets per block of the base's UNet
    """
    known, flat = known or {}, flat or {}
    name = name.removeprefix("base_model.model.")
    for start in PREFIXES:
        if name.startswith(start):
            return _underscored(start, name[len(start) :], known, flat, layers)
    if name in known:
        return (name,)
    for start in ("model.diffusion_model.", "diffusion_model."):
        if name.startswith(start):
            rest = name[len(start) :]
            for component in ("transformer", "unet"):
                if f"{component}.{rest}" in known:
                    return (f"{component}.{rest}",)
            fused = native(rest.replace(".", "_"), known)
            return fused or (plain(_denoiser(rest), ldm(rest.replace(".", "_"), layers) or rest),)
    for start, components in ENCODERS.items():
        if name.startswith(start):
            named = [plain(component, name[len(start) :]) for component in components]
            return (next((key for key in named if key in known), named[0]),)
    component, _, rest = name.partition(".")
    if component in COMPONENTS and rest:
        # A file may name the component and spell the rest as the authors do.
        fused = native(rest.replace(".", "_"), known) if component == "transformer" else None
        return fused or (plain(component, rest),)
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        if plain(component, name) in known:
            return (plain(component, name),)
    first = name.split(".", 1)[0]
    if first in ("double_blocks", "single_blocks", "joint_blocks"):
        return native(name.replace(".", "_"), known) or (name,)
    if not known and first != name:
        guess = "unet" if first in _UNET_FIRST else "transformer" if first in _TRANSFORMER_FIRST else ""
        return (plain(guess, name),)
    return (name,)
