"""What LoRAs cost at full size: shapes, arithmetic and bytes of SD 1.5, SDXL and a 7B Llama, on the meta device.

    python benchmarks/full_size.py > benchmarks/full_size.md

Nothing is computed, so the numbers belong to no machine. Arithmetic is what torch's FlopCounterMode counts of matmuls,
convolutions and attention; operations are dispatched aten operations without views, attention as one matmul after the
other (the meta device has no fused one). tests/test_full_size.py holds both to those of a real run at small size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flip import Leaves
from merge_elementwise import SD15, SDXL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from multilora.attach import attached
from multilora.lora import Lora, LowRank
from multilora.pipelines.branch_cache import BranchCache
from multilora.remembered import remembering, text_projections

K, RANK = 5, 16
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCKS = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
SETS = {"attention": ATTENTION, "all of the transformers": BLOCKS, "and of the resnets": None}
OUTSIDE = ("conv_in", "conv_out", "time_embedding", "add_embedding")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BYTES = 2  # of a float16 or bfloat16


@dataclass(frozen=True)
class Cost:
    operations: int
    flops: int


def _in_place(y: torch.Size, a: torch.Size, b: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of y += a @ b, which FlopCounterMode counts only where it is not in place."""
    return 2 * a.numel() * b[-1]


IN_PLACE = {torch.ops.aten.addmm_: _in_place, torch.ops.aten.baddbmm_: _in_place}


def cost(call: Callable[[], Any]) -> Cost:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as flops, Leaves() as leaves:
        call()
    return Cost(leaves.count, flops.get_total_flops())


def adapted(model: nn.Module, ends: Sequence[str] | None) -> dict[str, nn.Module]:
    """The linears and convolutions whose names end so; None: all but the model's first, last and embedding layers."""
    found = {}
    for name, module in model.named_modules():
        wanted = not name.startswith(OUTSIDE) if ends is None else name.endswith(tuple(ends))
        if wanted and isinstance(module, (nn.Linear, nn.Conv2d)):
            found[name] = module
    return found


def lora(layers: dict[str, nn.Module], seed: int = 0, rank: int = RANK) -> Lora:
    """Random factors, on the layers' device; on the meta device none."""
    torch.manual_seed(seed)
    parts = {}
    for name, module in layers.items():
        w = module.weight
        down = torch.randn(rank, *w.shape[1:], device=w.device, dtype=w.dtype) / w[0].numel() ** 0.5
        up = 0.05 * torch.randn(w.shape[0], rank, device=w.device, dtype=w.dtype)
        parts[name] = LowRank(down, up, kind="conv" if w.ndim > 2 else "linear")
    return Lora(parts)


def composite(model: nn.Module, call: Callable[[], Any], layers: dict[str, nn.Module], k: int = K) -> Cost:
    """One call of 2 k samples, the k LoRAs for two each, after the one that fills in the texts' keys and values."""
    rows = [[0.8 * (i == j) for i in range(k)] for j in range(k) for _ in range(2)]
    loras = [lora(layers, seed) for seed in range(k)]
    with attached(model, loras, form="side") as bank, remembering(bank, text_projections(model, bank.paths)):
        bank.row = rows
        call()
        return cost(call)


def all_active(model: nn.Module, call: Callable[[], Any], layers: dict[str, nn.Module], k: int) -> Cost:
    """One call of one sample or a pair, k LoRAs side by side."""
    with attached(model, [lora(layers, seed) for seed in range(k)], form="side") as bank:
        bank.row = [0.1 * (i + 1) for i in range(k)]
        call()
        return cost(call)


def cached(unet: nn.Module, call: Callable[[], Any], every: int = 5) -> list[int]:
    """FLOPs of `every` calls of the U-Net with the branch cache: a whole one, and short ones."""
    cache, flops = BranchCache(unet, every), []
    for _ in range(every):
        with cache.running("row"):
            flops.append(cost(call).flops)
    return flops


def unet_call(unet: nn.Module, samples: int) -> Callable[[], Any]:
    """A forward with guidance at the model's own size."""
    config, device, dtype = unet.config, unet.device, unet.dtype
    size, wide = config.sample_size, config.cross_attention_dim
    x = torch.ones(samples, config.in_channels, size, size, device=device, dtype=dtype)
    text, t = torch.ones(samples, 77, wide, device=device, dtype=dtype), torch.tensor(7, device=device)
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        ones = {"text_embeds": (samples, pooled), "time_ids": (samples, 6)}
        added = {name: torch.ones(*shape, device=device, dtype=dtype) for name, shape in ones.items()}
    return lambda: unet(x, t, text, added_cond_kwargs=added)


def numbers(layers: dict[str, nn.Module]) -> int:
    return sum(m.weight.numel() for m in layers.values())


def shapes(layers: dict[str, nn.Module]) -> str:
    each = Counter(tuple(m.weight.shape) for m in layers.values())
    return "; ".join(f"{n} of {' x '.join(map(str, shape))}" for shape, n in sorted(each.items()))


def unet_table(title: str, config: dict) -> list[str]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).eval()
    pair, many = unet_call(unet, 2), unet_call(unet, 2 * K)
    base, wide = cost(pair), cost(many)
    flops = cached(unet, pair)
    weights = sum(p.numel() for p in unet.parameters())
    lines = [
        f"\n## {title}\n",
        f"{weights / 1e6:.1f} M parameters, {BYTES * weights / 1e9:.2f} GB in 16 bits. A forward of 2 samples at "
        f"{8 * unet.config.sample_size} x {8 * unet.config.sample_size}: {base.flops / 1e12:.3f} TFLOP in "
        f"{base.operations} operations; of {2 * K}: {wide.flops / 1e12:.3f} TFLOP in {wide.operations}.\n",
        f"Branch cache: a short call takes {flops[1] / flops[0]:.3f} of a whole one's arithmetic, "
        f"{sum(flops) / len(flops) / flops[0]:.3f} on average at every = {len(flops)}.\n",
        "| adapted | layers | numbers a LoRA | MB a LoRA | TFLOP of Composite | of bare | operations of bare | "
        f"bank of {K}, GB | one rebuild moves, GB | {K} in one sample, of bare |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, ends in SETS.items():
        layers = adapted(unet, ends)
        size = sum(p.down.numel() + p.up.numel() for p in lora(layers).values())
        together, one = composite(unet, many, layers), all_active(unet, pair, layers, K)
        lines.append(
            f"| {name} | {len(layers)} | {size / 1e6:.2f} M | {BYTES * size / 1e6:.1f} | "
            f"{together.flops / 1e12:.3f} | {together.flops / wide.flops:.4f} | "
            f"{together.operations / wide.operations:.3f} | "
            f"{K * BYTES * numbers(layers) / 1e9:.2f} | {2 * BYTES * numbers(layers) / 1e9:.2f} | "
            f"{one.flops / base.flops:.4f} |"
        )
    lines.append(f"\nAdapted by attention sets: {shapes(adapted(unet, ATTENTION))}.")
    return lines


def llama_call(model: nn.Module, tokens: int = 1) -> Callable[[], Any]:
    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    # With a mask of four dimensions transformers does not look into the tensors, which the meta device does not have.
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=model.device).tril()
    return lambda: model(input_ids=ids, attention_mask=mask, use_cache=False)


def decoding_bytes(read: int, layers: dict[str, nn.Module], experts: int, top: int, rank: int) -> dict[str, float]:
    """Numbers that a token moves, of those that the bare model reads (`read`), by how the experts are used.

    Merging reads the pristine weights and the experts and writes what the matmul then reads.
    """
    one = sum(rank * sum(m.weight.shape) for m in layers.values())
    ways = {
        f"{top} of {experts} experts, read where they lie": top * one,
        f"{top} of {experts}, copied together first": 3 * top * one,
        f"all {experts} experts": experts * one,
        f"{top} of {experts}, merged into the weights": 2 * numbers(layers) + top * one,
    }
    return {name: (read + more) / read for name, more in ways.items()}


def llama_table(experts: int = 8, top: int = 2) -> list[str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):  # transformers' defaults are Llama 7B
        model = LlamaForCausalLM(LlamaConfig()).eval()
    layers, call = adapted(model, LLAMA), llama_call(model)
    base, read = cost(call), numbers(layers) + model.lm_head.weight.numel()
    lines = [
        "\n## Llama 7B, a token of one sequence\n",
        f"{len(layers)} linears ({shapes(layers)}) and the head: {BYTES * read / 1e9:.2f} GB of weights in 16 bits, "
        f"{base.flops / 1e9:.2f} GFLOP in {base.operations} operations.\n",
        "| LoRAs side by side, rank 16 | GFLOP | of bare | operations of bare |", "|---|---|---|---|",
    ]  # fmt: skip
    for k in (1, top, experts):
        one = all_active(model, call, layers, k)
        lines.append(f"| {k} | {one.flops / 1e9:.2f} | {one.flops / base.flops:.4f} | "
                     f"{one.operations / base.operations:.3f} |")  # fmt: skip
    lines += ["\n| weights and factors that a token moves, of the bare model's | rank 16 | rank 64 |", "|---|---|---|"]
    sixteen, wider = (decoding_bytes(read, layers, experts, top, rank) for rank in (16, 64))
    return [*lines, *(f"| {name} | {sixteen[name]:.3f} | {wider[name]:.3f} |" for name in sixteen)]


@torch.no_grad()
def tables() -> Iterator[list[str]]:
    yield [
        "# LoRAs at full size\n\nMade by `python benchmarks/full_size.py` on the meta device, which says how.",
        f"Composite is of {K} LoRAs of rank {RANK} in one call of {2 * K} samples on the side, the texts' keys and "
        "values computed before.",
    ]  # fmt: skip
    yield unet_table("Stable Diffusion 1.5", {"sample_size": 64, **SD15})
    yield unet_table("Stable Diffusion XL", SDXL)
    yield llama_table()


if __name__ == "__main__":
    for table in tables():
        print("\n".join(table), flush=True)
