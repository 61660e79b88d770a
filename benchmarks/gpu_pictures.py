"""Goals of pictures: Composite (G1 to G3), Switch (G4), rebuilding many weights (G9), the branch cache (G10)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from gpu import Report, Row, Setting, agree, implementations, kernels, times
from torch import nn

from multilora.attach import attached
from multilora.kernels import routed
from multilora.lora import Lora, LowRank
from multilora.pipelines.branch_cache import BranchCache
from multilora.remembered import remembering, text_projections
from multilora.stacked import stacking

K, RANK = 5, 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SMALL = {
    "sample_size": 8, "cross_attention_dim": 24, "attention_head_dim": 4, "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 8,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1,
}  # fmt: skip
# Attention linears of SDXL's U-Net: (out, in) -> how many. tests/test_gpu_dry.py counts them on the meta device.
SDXL = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}


def unet(setting: Setting) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with setting.device:
        return UNet2DConditionModel(**(SMALL if setting.small else SD15)).eval().to(setting.half)


def loras(setting: Setting, model: nn.Module) -> list[Lora]:
    layers = {n: m.weight.shape for n, m in model.named_modules() if n.endswith(TARGETS)}

    def one() -> Lora:
        return Lora({
            n: LowRank(setting.randn(RANK, wide) / wide**0.5, 0.05 * setting.randn(out, RANK))
            for n, (out, wide) in layers.items()
        })  # fmt: skip

    torch.manual_seed(1)
    return [one() for _ in range(K)]


def call_of(setting: Setting, model: nn.Module, samples: int) -> Callable[[], torch.Tensor]:
    """A forward of a guided pair's inputs, repeated to so many samples."""
    torch.manual_seed(2)
    size, wide = model.config.sample_size, model.config.cross_attention_dim
    x = setting.randn(2, 4, size, size).repeat(samples // 2, 1, 1, 1)
    text = setting.randn(2, 77, wide).repeat(samples // 2, 1, 1)
    t = torch.tensor(7, device=setting.device)
    return lambda: model(x, t, text, return_dict=False)[0]


def with_peft(model: nn.Module, sets: list[Lora]) -> tuple[nn.Module, list[str]]:
    """A copy with the LoRAs as diffusers loads them."""
    from peft import LoraConfig, set_peft_model_state_dict

    other, names = copy.deepcopy(model), [f"l{i}" for i in range(K)]
    for name, each in zip(names, sets, strict=True):
        other.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)), adapter_name=name)
        state = {f"{p}.lora_A.weight": part.down for p, part in each.items()}
        state |= {f"{p}.lora_B.weight": part.up for p, part in each.items()}
        set_peft_model_state_dict(other, state, adapter_name=name)
    return other.to(model.device, model.dtype).requires_grad_(False), names


def mixed_batch(stack: ExitStack, model: nn.Module, names: list[str]) -> None:
    """PEFT's mixed batch: each layer is told every sample's adapter, which diffusers' forward does not pass on."""
    from peft.tuners.lora import LoraLayer

    each = [name for name in names for _ in range(2)]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            told = module.register_forward_pre_hook(
                lambda m, args, kwargs: (args, {**kwargs, "adapter_names": each}), with_kwargs=True
            )
            stack.callback(told.remove)


def composite(setting: Setting, report: Report) -> None:
    base = unet(setting)
    sets = loras(setting, base)
    other, names = with_peft(base, sets)
    pair_of_other = call_of(setting, other, 2)
    pair, many = call_of(setting, base, 2), call_of(setting, base, 2 * K)
    rows = [[float(i == j) for i in range(K)] for j in range(K) for _ in range(2)]

    def reference() -> torch.Tensor:
        total = 0
        for name in names:
            other.set_adapters(name)
            total = total + pair_of_other()
        return total / K

    def mean(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: call().unflatten(0, (K, 2)).mean(0)

    graph = setting.graph(pair)
    ways: dict[str, Callable[[], Any]] = {
        "the reference, eager": reference,
        f"bare model, {2 * K} samples, graph": setting.graph(many),
        f"bare model, {K} times 2 samples, graph": lambda: [graph() for _ in range(K)],
    }
    want, ours = reference(), []
    with ExitStack() as stack:
        mixed = copy.deepcopy(other)
        mixed.set_adapters(names)
        mixed_batch(stack, mixed, names)
        ways["PEFT mixed batch, eager"] = mean(call_of(setting, mixed, 2 * K))
        for form, implementation in [("side", i) for i in implementations(setting, report, "G1")] + [
            ("bank", "torch")
        ]:
            model = copy.deepcopy(base)
            stack.enter_context(kernels(implementation))  # every way is warmed up before the next one's setting
            bank = stack.enter_context(attached(model, sets, form=form))
            stack.enter_context(stacking(bank))
            stack.enter_context(remembering(bank, text_projections(model, bank.paths)))
            bank.row = rows
            eager = mean(call_of(setting, model, 2 * K))
            agree(eager(), want, f"Composite, {form}, {implementation}")
            name = f"Composite, {form}, {implementation}"
            ours.append(name)
            if implementation == "torch":
                ways[f"{name}, eager"] = eager
            ways[f"{name}, graph"] = setting.graph(eager, bank)
        agree(ways["PEFT mixed batch, eager"](), want, "PEFT mixed batch")
        found = times(setting, ways, repeats=3)
    report.took("G1", found)
    first, wide, turns = (found[name] for name in list(ways)[:3])
    for name in ours:
        step = found[f"{name}, graph"]
        report.rows += [
            Row("G1", f"{name}, graph / the reference", step / first, 0.30, 0.15),
            Row("G2", f"{name}, graph / bare model of {2 * K} samples", step / wide, 1.08, 1.03),
            Row("G3", f"{name}, graph / {K} forwards in turn", step / turns, 0.92),
        ]
    report.rows.append(Row("G1", "the reference again (A/A)", found["A/A"] / first))


def switch(setting: Setting, report: Report) -> None:
    base = unet(setting)
    sets, model = loras(setting, base), copy.deepcopy(base)
    with attached(model, sets, form="rebuilt") as bank:
        turn = [0]

        def flip() -> None:
            turn[0] += 1
            bank.row = [float(i == turn[0] % K) for i in range(K)]

        def layers() -> None:
            with kernels("torch"):
                flip()

        flip()
        call = call_of(setting, model, 2)
        step = setting.graph(call, bank)
        flip()
        agree(step(), call(), "a graph after a switch")
        found = times(setting, {"bare model, graph": setting.graph(call_of(setting, base, 2)), "step, graph": step,
                                "one switch": flip, "one switch, a layer at a time": layers})  # fmt: skip
    if not all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters(), strict=True)):
        raise RuntimeError("switching changed the base weights")
    report.took("G4", found)
    bare, stepped, switched, slowly = (found[name] for name in list(found)[:4])
    report.rows += [
        Row("G4", "Switch, a step / bare model, both graphs", stepped / bare, 1.01),
        Row("G4", "one switch, rebuilt in one launch / a step", switched / bare, 0.05),
        Row("G4", "one switch, a layer at a time / a step", slowly / bare),
        Row("G4", "bare model again (A/A)", found["A/A"] / bare),
    ]


def rebuild(setting: Setting, report: Report) -> None:
    shapes = {(24, 16): 2, (16, 40): 1} if setting.small else SDXL
    bases = [setting.randn(*shape) for shape, count in shapes.items() for _ in range(count)]
    outs = [torch.empty_like(base) for base in bases]
    downs = [setting.randn(RANK, base.shape[1]) for base in bases]
    ups = [0.05 * setting.randn(base.shape[0], RANK) for base in bases]
    scales = [setting.randn(RANK) for _ in bases]
    ways = {}
    for name in implementations(setting, report, "G9"):
        ways[name] = lambda name=name: routed.rebuild_(outs, bases, downs, ups, scales, implementation=name)
        ways[name]()
        agree(outs[-1], bases[-1] + (ups[-1] * scales[-1]) @ downs[-1], f"rebuild_, {name}")
        again, scale = routed.rebuilder(outs, bases, downs, ups, implementation=name), torch.cat(scales)
        ways[f"{name}, prepared"] = lambda again=again, scale=scale: again(scale)
        outs[-1].zero_()
        again(scale)
        agree(outs[-1], bases[-1] + (ups[-1] * scales[-1]) @ downs[-1], f"rebuilder, {name}")
    found = times(setting, ways)
    report.took("G9", found)
    floor = sum(2 * base.numel() * base.element_size() for base in bases) / setting.bandwidth
    for name in ways:
        what = f"rebuild of {len(bases)} layers, {name} / the bytes at a copy's speed"
        report.rows.append(Row("G9", what, found[name] / floor, 1.5))


def branch_cache(setting: Setting, report: Report, every: int = 5) -> None:
    model = unet(setting)
    call, cache = call_of(setting, model, 2), BranchCache(model, 10**9)

    def whole() -> torch.Tensor:
        cache.drop("row")
        with cache.running("row"):
            return call()

    def short() -> torch.Tensor:
        with cache.running("row"):
            return call()

    first = whole()
    agree(short(), first, "a short call on the same input")
    # The feature that the captured whole call keeps is what the captured short one reads.
    graphs = [setting.graph(whole)]
    held = cache._kept["row"]  # noqa: F841
    graphs.append(setting.graph(short))
    plain = setting.graph(call)
    found = times(setting, {
        f"{every} whole calls, graph": lambda: [plain() for _ in range(every)],
        "with the cache, graphs": lambda: [graphs[i > 0]() for i in range(every)],
        f"{every} whole calls, eager": lambda: [call() for _ in range(every)],
        "with the cache, eager": lambda: [(short if i else whole)() for i in range(every)],
    })  # fmt: skip
    agree(graphs[1](), graphs[0](), "the short call's graph")
    report.took("G10", found)
    a, b, c, d = list(found.values())[:4]
    report.rows += [Row("G10", f"branch cache at every = {every}, speedup, graphs", a / b, 2.8, least=True),
                    Row("G10", f"branch cache at every = {every}, speedup, eager", c / d)]  # fmt: skip
