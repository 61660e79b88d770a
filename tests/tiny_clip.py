"""A CLIP with seeded random weights in OpenAI's layout, the same in transformers' layout, and pictures for both."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

SIZE, WINDOW, VOCABULARY = 32, 77, 49408


def openai() -> torch.nn.Module:
    """clip-anytorch's own class. Weights are such as half precision holds: build_model rounds to it."""
    from clip.model import CLIP

    torch.manual_seed(5)
    # 48-wide vectors; vision: 32 px, 2 layers, 128 wide (2 heads), patches of 8; text: 64 wide, 1 head, 2 layers
    model = CLIP(48, SIZE, 2, 128, 8, WINDOW, VOCABULARY, 64, 1, 2).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and "logit" not in name:
                p.add_(torch.randn_like(p) * 0.2)  # biases and norms that a wrong mapping cannot hide in
            p.copy_(p.half().float())
    return model


def transformers_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenAI's names and layouts as transformers' CLIPModel has them."""
    found = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
    }
    for ours, theirs in (
        ("ln_final", "text_model.final_layer_norm"),
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
    ):
        for end in ("weight", "bias"):
            found[f"{theirs}.{end}"] = state[f"{ours}.{end}"]
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for ours, theirs in (("transformer", "text_model"), ("visual.transformer", "vision_model")):
        for layer in range(2):
            a, b = f"{ours}.resblocks.{layer}", f"{theirs}.encoder.layers.{layer}"
            for end in ("weight", "bias"):
                for part, name in parts.items():
                    found[f"{b}.{name}.{end}"] = state[f"{a}.{part}.{end}"]
                for letter, value in zip("qkv", state[f"{a}.attn.in_proj_{end}"].chunk(3), strict=True):
                    found[f"{b}.self_attn.{letter}_proj.{end}"] = value
    return {key: value.contiguous() for key, value in found.items()}


def write(folder: Path) -> tuple[Path, Path]:
    """The same weights as a file in OpenAI's layout and as a folder in transformers'."""
    from clip.simple_tokenizer import SimpleTokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    model = openai()
    file = folder / "openai.safetensors"
    save_file({key: value.clone() for key, value in model.state_dict().items()}, file)
    common = {"num_hidden_layers": 2, "projection_dim": 48, "hidden_act": "quick_gelu"}
    config = CLIPConfig(
        projection_dim=48,
        text_config=common | {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1,
                              "vocab_size": VOCABULARY, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config=common | {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2,
                                "patch_size": 8, "image_size": SIZE},
    )  # fmt: skip
    theirs = CLIPModel(config)
    missing, unexpected = theirs.load_state_dict(transformers_state(model.state_dict()), strict=False)
    assert not unexpected, unexpected
    assert all("position_ids" in key for key in missing), missing
    words = SimpleTokenizer()
    tokenizer = CLIPTokenizer(vocab=words.encoder, merges=list(words.bpe_ranks))
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    theirs.save_pretrained(folder / "hf")
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder / "hf")
    return file, folder / "hf"


def pictures(count: int, size: tuple[int, int] = (SIZE, SIZE)) -> list[Image.Image]:
    """Noise of several coarsenesses, colours and directions: pictures whose vectors differ."""
    found = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        coarse = torch.rand(3, 2 + i, 2 + (3 * i) % 5, generator=generator) * torch.rand(3, 1, 1, generator=generator)
        grown = torch.nn.functional.interpolate(coarse[None], size[::-1], mode="bicubic").clamp(0, 1)[0]
        found.append(Image.fromarray((grown * 255).byte().permute(1, 2, 0).numpy(), "RGB"))
    return found
