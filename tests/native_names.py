"""Names of layers in the authors' own code and in kohya's files, from those in diffusers."""

from __future__ import annotations

from torch import nn


def _prefix(family: str, component: str) -> str:
    """As lycoris.kohya and sd-scripts name components; FLUX's T5 is their third text encoder."""
    if family == "flux" and component == "text_encoder_2":
        return "lora_te3"
    one = {"sd15": "lora_te"}.get(family, "lora_te1")
    return {"text_encoder": one, "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3", "": "lycoris"}.get(
        component, "lora_unet"
    )


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
