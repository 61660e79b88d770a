"""Flipping to another LoRA, and the operations of one batched Composite step, on the SD 1.5 topology at width 0.1.

    OMP_NUM_THREADS=1 python benchmarks/flip.py > benchmarks/flip.md

Times are CPU milliseconds of one thread, the contenders in turn (A B A B ...), as medians. Operations are dispatched
aten operations without views (which launch nothing); they depend on no machine. The side form folds a new row in the
call after the flip: its cost is in the rows named "first call".
"""

import statistics
import time

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from multilora.attach import attached
from multilora.lab.machine import processor
from multilora.lora import Lora, LowRank

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
VIEWS = frozenset(
    ["view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select", "split",
     "chunk", "alias", "detach", "as_strided", "unbind", "_reshape_alias", "split_with_sizes", "lift_fresh"]
)  # fmt: skip


class Leaves(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def unet():
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 77, "norm_num_groups": 8}
    return UNet2DConditionModel(sample_size=8, **sizes).eval()


def lora(model, seed):
    g = torch.Generator().manual_seed(seed)
    linears = {n: m for n, m in model.named_modules() if n.endswith(TARGETS)}
    return Lora({
        n: LowRank.from_factors(
            torch.randn(16, m.in_features, generator=g), 0.05 * torch.randn(m.out_features, 16, generator=g)
        )
        for n, m in linears.items()
    })  # fmt: skip


def timed(call):
    start = time.process_time()
    call()
    return 1000 * (time.process_time() - start)


@torch.no_grad()
def main(rounds: int = 30) -> None:
    model, other = unet(), unet()
    names = [f"l{i}" for i in range(5)]
    for name in names:
        other.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=list(TARGETS)), adapter_name=name)
    loras = [lora(model, seed) for seed in range(5)]
    rows = [[float(i == j) for i in range(5)] for j in range(5)]
    print(f"Machine: {processor()}, {torch.get_num_threads()} thread(s), "
          f"torch {torch.__version__}; {rounds} rounds.\n")  # fmt: skip
    print("| one flip to another LoRA (5 LoRAs, rank 16, 128 linears) | ms | share of set_adapters |")
    print("|---|---|---|")
    for form in ("side", "bank", "rebuilt"):
        flips, sets, first = [], [], []
        with attached(model, loras, form=form) as bank:
            x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 77)
            for row in rows:
                first.append(timed(lambda row=row: setattr(bank, "row", row)))
                model(x, 7, text)
            for i in range(rounds):
                sets.append(timed(lambda i=i: other.set_adapters(names[i % 5])))
                flips.append(timed(lambda i=i: setattr(bank, "row", rows[i % 5])))
        a, b = statistics.median(sets), statistics.median(flips)
        if form == "side":
            print(f"| diffusers `unet.set_adapters` | {a:.2f} | 1 |")
        print(f"| {form} | {b:.4f} | 1/{a / b:.0f} |")
        if form == "bank":
            b = statistics.median(first)
            print(f"| bank, first time a LoRA is asked for | {b:.2f} | 1/{a / b:.1f} |")
    x, text = torch.randn(10, 4, 8, 8), torch.randn(10, 77, 77)
    with Leaves() as base:
        model(x, 7, text)
    print("\n| operations of one forward at batch 10 (5 passes with guidance) | count | of base |")
    print(f"|---|---|---|\n| base | {base.count} | 1 |")
    composite = [[0.8 * v for v in row] for row in rows for _ in range(2)]
    weighted = [[(0.5 + 0.1 * i) * v for i, v in enumerate(row)] for row in composite]
    with attached(model, loras, form="side") as bank:
        for name, row in (("first call of a set", composite), ("one weight for all", composite),
                          ("first call of new weights", weighted), ("a weight for each", weighted)):  # fmt: skip
            bank.row = row
            with Leaves() as leaves:
                model(x, 7, text)
            print(f"| Composite, {name} | {leaves.count} | {leaves.count / base.count:.3f} |")
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 77)
    with Leaves() as base:
        model(x, 7, text)
    for form in ("side", "rebuilt"):
        with attached(model, loras, form=form) as bank:
            bank.row = [0.1, 0.2, 0.3, 0.4, 0.5]
            model(x, 7, text)
            with Leaves() as leaves:
                model(x, 7, text)
            print(f"| Merge of 5, {form} (batch 2) | {leaves.count} | {leaves.count / base.count:.3f} |")


if __name__ == "__main__":
    main()
