"""The adapted layer's goals on the CPU: operations of a step, times of Composite, Switch and gated LoRAs.

    OMP_NUM_THREADS=1 python benchmarks/adapted_layers.py [rounds]      0 rounds: counts alone, which need no machine

Operations are dispatched aten operations without views, on the topology of Stable Diffusion 1.5 at width 0.1. Times
are CPU seconds of one thread, the ways in turn, as medians. At that width calling the operations is what takes the
time, as on a GPU without graphs ("host-bound"); half of the true width at 32 x 32 is compute-bound. "The reference
way" is diffusers with PEFT: set_adapters and a forward for each LoRA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from flip import unet
from full_size import ATTENTION, RANK, SETS, K, adapted, cost, lora
from goals import HEAD, Row, in_turn, machine
from peft import LoraConfig, set_peft_model_state_dict
from torch import Tensor, nn

from multilora.attach import attached
from multilora.remembered import remembering, text_projections
from multilora.reserved import reserved
from multilora.stacked import stacking

ONE_HOT = [[float(i == j) for i in range(K)] for j in range(K)]
MANY = [row for row in ONE_HOT for _ in range(2)]


def sets_of(model: nn.Module, name: str = "attention") -> list:
    return [lora(adapted(model, SETS[name]), seed) for seed in range(K)]


def call_of(model: nn.Module, samples: int, size: int = 8) -> Callable[[], Tensor]:
    """A forward of a guided pair's inputs, repeated to so many samples."""
    g = torch.Generator().manual_seed(5)
    dtype, wide = model.dtype, model.config.cross_attention_dim
    x = torch.randn(2, 4, size, size, generator=g).to(dtype).repeat(samples // 2, 1, 1, 1)
    text = torch.randn(2, 77, wide, generator=g).to(dtype).repeat(samples // 2, 1, 1)
    return lambda: model(x, 7, text).sample


def counts() -> Iterator[Row]:
    model = unet()
    many, pair = call_of(model, 2 * K), call_of(model, 2)
    wide, base = cost(many).operations, cost(pair).operations
    for name in SETS:
        for form in ("side", "bank"):
            with attached(model, sets_of(model, name), form=form) as bank, stacking(bank):
                for kept, paths in (("", []), (", texts once", text_projections(model, bank.paths))):
                    with remembering(bank, paths):
                        bank.row = [[0.8 * v for v in row] for row in MANY]
                        many()
                        bound = (
                            {"side, texts once": 1.22, "bank": 1.0}.get(form + kept) if name == "attention" else None
                        )
                        what = f"operations of Composite, {form}{kept}; {name}, {len(bank.paths)} layers / bare"
                        yield Row("C1", what, cost(many).operations / wide, bound)
    with attached(model, sets_of(model), form="rebuilt") as bank:
        bank.row = ONE_HOT[0]
        pair()
        yield Row("C6", "operations of a Switch step / bare", cost(pair).operations / base, 1.0)
    for title, way in gated(model, pair).items():
        yield Row("C10", f"operations of {K} LoRAs in one sample, {title} / bare", way(cost).operations / base, 1.55)


def gated(model: nn.Module, call: Callable) -> dict[str, Callable]:
    """Ways to run all LoRAs in every sample: title -> function that calls its argument with the call, ready."""
    row = [0.1 * (i + 1) for i in range(K)]

    def folded(use: Callable):
        with attached(model, sets_of(model), form="side") as bank:
            bank.row = row
            call()
            return use(call)

    def vector(use: Callable):
        with reserved(model, list(adapted(model, ATTENTION)), max_loras=K, max_rank=RANK) as room:
            room.load(sets_of(model))
            room.row = row
            return use(call)

    return {"row folded": folded, "a gate vector": vector}


def with_peft(model: nn.Module, sets: list) -> list[str]:
    names = [f"l{i}" for i in range(K)]
    for name, each in zip(names, sets, strict=True):
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION)), adapter_name=name)
        state = {f"{p}.lora_A.weight": part.down for p, part in each.items()}
        state |= {f"{p}.lora_B.weight": part.up for p, part in each.items()}
        set_peft_model_state_dict(model, state, adapter_name=name)
    return names


def off(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def accuracy() -> Iterator[Row]:
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = unet().to(dtype)
        sets = sets_of(model)
        pair, many = call_of(model, 2), call_of(model, 2 * K)
        with attached(model, sets, form="side") as bank:
            outputs = []
            for row in ONE_HOT:
                bank.row = row
                outputs.append(pair())
        for form in ("side", "bank"):
            with attached(model, sets, form=form) as bank, stacking(bank):
                bank.row = MANY
                got = many().view(K, *outputs[0].shape).mean(0)
            name = str(dtype).removeprefix("torch.")
            yield Row("C4", f"Composite, {form}, off from one by one, {name}", off(got, sum(outputs) / K), bound)


def composite(rounds: int) -> Iterator[Row]:
    """C3: host-bound, against the reference way."""
    model, other = unet(), unet()
    sets = sets_of(model)
    names = with_peft(other, sets)
    theirs, many, pair = call_of(other, 2), call_of(model, 2 * K), call_of(model, 2)

    def the_reference_way() -> Tensor:
        outputs = []
        for name in names:
            other.set_adapters(name)
            outputs.append(theirs())
        return sum(outputs) / K

    with attached(model, sets, form="side") as bank, remembering(bank, text_projections(model, bank.paths)):

        def one_by_one() -> Tensor:
            outputs = []
            for row in ONE_HOT:
                bank.row = row
                outputs.append(pair())
            return sum(outputs) / K

        def batched() -> Tensor:
            bank.row = MANY
            return many().view(K, 2, 4, 8, 8).mean(0)

        want = the_reference_way()
        for call in (one_by_one, batched):
            if not off(call(), want) < 1e-4:
                raise RuntimeError(f"{call.__name__} is off by {off(call(), want):.1e}")
        found = in_turn({"reference": the_reference_way, "one by one": one_by_one, "batched": batched}, rounds)
    what = "time of a Composite step, {} / the reference way, host-bound"
    yield Row("C3", what.format("batched"), found.over("batched", "reference"), 0.40, 0.23, found.spread)
    yield Row("C3", what.format("one by one"), found.over("one by one", "reference"), spread=found.spread)


def compute_bound(rounds: int) -> Iterator[Row]:
    """C2: half of SD 1.5's widths at 32 x 32."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=32, block_out_channels=(160, 320, 640, 640), cross_attention_dim=768, attention_head_dim=8
    ).eval()
    pair, many = call_of(model, 2, 32), call_of(model, 2 * K, 32)
    with attached(model, sets_of(model), form="side") as bank, remembering(bank, text_projections(model, bank.paths)):

        def one_by_one() -> None:
            for row in ONE_HOT:
                bank.row = row
                pair()

        def batched() -> None:
            bank.row = MANY
            many()

        found = in_turn({"one by one": one_by_one, "batched": batched}, rounds)
    what = "time of a Composite step, batched / one by one, compute-bound"
    yield Row("C2", what, found.over("batched", "one by one"), 0.93, None, found.spread)


def switch(rounds: int) -> Iterator[Row]:
    """C6 and C7."""
    model, bare_model = unet(), unet()
    call, bare_call = call_of(model, 2), call_of(bare_model, 2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for form in ("rebuilt", "bank"):
        turn = iter(range(10**9))
        with attached(model, sets_of(model), form=form, dozing=True) as bank:  # as a composer does

            def switched(bank=bank, turn=turn) -> None:
                bank.row = ONE_HOT[next(turn) % K]
                for _ in range(5):
                    call()

            for _ in range(K):
                switched()
            found = in_turn({"bare": lambda: [bare_call() for _ in range(5)], "switched": switched}, 3 * rounds)
        what = f"time of one switch and 5 steps, {form} / 5 bare steps"
        yield Row("C6", what, found.over("switched", "bare"), 1.03, None, found.spread)
    half = unet().to(torch.bfloat16)
    halves = {n: p.clone() for n, p in half.named_parameters()}
    for title, changed, copy in (("float32", model, before), ("bfloat16", half, halves)):
        with attached(changed, [each.to(changed.dtype) for each in sets_of(changed)], form="rebuilt") as bank:
            for i in range(100):
                bank.row = ONE_HOT[i % K]
        bits = sum(
            int((p.view(torch.uint8) != copy[n].view(torch.uint8)).sum()) for n, p in changed.named_parameters()
        )
        yield Row("C7", f"bytes of the base changed by 100 switches, {title}", bits, 0)


def all_in_one_sample(rounds: int) -> Iterator[Row]:
    """C10: five LoRAs side by side."""
    for title in ("row folded", "a gate vector"):
        model, bare_model = unet(), unet()
        bare = call_of(bare_model, 2)
        way = gated(model, call_of(model, 2))[title]
        found = way(lambda call, bare=bare: in_turn({"bare": bare, "all": call}, 3 * rounds))
        what = f"time of {K} LoRAs in one sample, {title} / bare, host-bound"
        yield Row("C10", what, found.over("all", "bare"), 1.45, None, found.spread)


@torch.no_grad()
def rows(rounds: int = 7) -> Iterator[Row]:
    yield from counts()
    yield from accuracy()
    if rounds:
        for part in (composite, switch, all_in_one_sample, compute_bound):
            yield from part(rounds)


if __name__ == "__main__":
    print(f"{machine()}\n\n{HEAD}")
    for row in rows(*(int(a) for a in sys.argv[1:])):
        print(row, flush=True)
