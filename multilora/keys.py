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
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".diff_b": "bias",
    ".diff": "diff",
    ".alpha": "alpha",
    ".base_layer.bias": "whole_bias",
    ".bias": "whole_bias",
}
# Words in a key that mean another kind of adapter; a file with one of them is refused by its kind.
OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a Tucker core (lora_mid)",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "oft_R": "OFT",
    "boft_": "BOFT",
    "ia3_l": "IA3",
    ".on_input": "IA3",
    "vera_lambda": "VeRA",
    "modules_to_save": "modules_to_save",
    "trainable_tokens": "trainable tokens",
    "emb_params": "textual inversion",
    ".a1.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".w_norm": "LyCORIS norm",
    ".b_norm": "LyCORIS norm",
}
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
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
    "img_mod", "txt_mod",
}  # fmt: skip
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
# FLUX and SD3 layers in the code of their authors (as sd-scripts and ComfyUI write them) -> ours; several names mean
# that the rows of one projection are split, by equal parts or, for linear1, q, k, v of the input's width and the rest.
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
    r"single_blocks_(\d+)_modulation_lin": ("single_transformer_blocks.{}.norm", ("linear",)),
    r"joint_blocks_(\d+)_x_block_attn_qkv": ("transformer_blocks.{}.attn", _QKV),
    r"joint_blocks_(\d+)_x_block_attn2_qkv": ("transformer_blocks.{}.attn2", _QKV),
    r"joint_blocks_(\d+)_x_block_attn_proj": ("transformer_blocks.{}.attn", ("to_out.0",)),
    r"joint_blocks_(\d+)_x_block_attn2_proj": ("transformer_blocks.{}.attn2", ("to_out.0",)),
    r"joint_blocks_(\d+)_x_block_mlp_fc1": ("transformer_blocks.{}.ff", ("net.0.proj",)),
    r"joint_blocks_(\d+)_x_block_mlp_fc2": ("transformer_blocks.{}.ff", ("net.2",)),
    r"joint_blocks_(\d+)_context_block_attn_qkv": ("transformer_blocks.{}.attn", _ADDED),
    r"joint_blocks_(\d+)_context_block_attn_proj": ("transformer_blocks.{}.attn", ("to_add_out",)),
    r"joint_blocks_(\d+)_context_block_mlp_fc1": ("transformer_blocks.{}.ff_context", ("net.0.proj",)),
    r"joint_blocks_(\d+)_context_block_mlp_fc2": ("transformer_blocks.{}.ff_context", ("net.2",)),
}
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
_UNET_FIRST = ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding", "add_embedding")
_TRANSFORMER_FIRST = ("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder")


def split(key: str) -> tuple[str, str]:
    """(name of the layer as the file spells it, what the tensor is to it). Raises ValueError for an unknown end."""
    for word, kind in OTHER_KINDS.items():
        if word in key:
            raise ValueError(f"key {key}: this is {kind}, which is not read here; convert it to a plain LoRA first")
    for end, role in SUFFIXES.items():
        if key.endswith(end) and len(key) > len(end):
            name = key[: -len(end)]
            if end.startswith("_lora."):
                head, _, last = name.rpartition(".")
                old = _OLD_TEXT.get(last, last) if head.endswith("self_attn") else last.replace("to_out", "to_out.0")
                name = f"{head}.{old}"
            return name.replace(".processor.", "."), role
    raise ValueError(f"key {key}: no name of a LoRA tensor (known ends: .lora_A.weight, .lora_down.weight, ...)")


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


def native(name: str) -> tuple[str, ...] | None:
    """The transformer paths that a FLUX or SD3 layer of the original code stands for, in row order; None: not one."""
    for pattern, parent, leaves in _NATIVE:
        found = pattern.fullmatch(name)
        if found:
            return tuple(f"transformer.{parent.format(found[1])}.{leaf}" for leaf in leaves)
    return None


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
    for start, component in PREFIXES.items():
        if name.startswith(start):
            rest = name[len(start) :]
            if component.startswith("text_encoder"):
                rest = rest.removeprefix("text_model_")
            for real in (component, "transformer" if component == "unet" else component):
                if f"{real}.{rest}" in flat:
                    return (flat[f"{real}.{rest}"],)
            fused = native(rest) if component in ("unet", "transformer") else None
            if fused:
                return fused
            return (plain(component, (component == "unet" and ldm(rest, layers)) or dotted(rest)),)
    if name in known:
        return (name,)
    for start in ("model.diffusion_model.", "diffusion_model."):
        if name.startswith(start):
            rest = name[len(start) :].replace(".", "_")
            return native(rest) or (plain("unet", ldm(rest, layers) or name[len(start) :]),)
    component, _, rest = name.partition(".")
    if component in COMPONENTS and rest:
        return (plain(component, rest),)
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        if plain(component, name) in known:
            return (plain(component, name),)
    if not known and component != name:
        first = name.split(".", 1)[0]
        guess = "unet" if first in _UNET_FIRST else "transformer" if first in _TRANSFORMER_FIRST else ""
        return (plain(guess, name),)
    return (name,)
