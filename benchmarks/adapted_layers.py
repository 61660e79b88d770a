"""The adapted layer's table for the CPU: operations of a step, times of Composite, Switch and routed decoding.

    OMP_NUM_THREADS=1 python benchmarks/adapted_layers.py [rounds] > benchmarks/adapted_layers.md

Operations are dispatched aten operations without views, on the topology of Stable Diffusion 1.5 at width 0.1; they
depend on no machine. Times are CPU seconds of one thread, the contenders in turn, as medians; A/A is the spread of one
contender against itself, below which nothing is told apart. The models are so small that calling the operations is
what takes the time, as on a GPU without graphs. "The reference way" is diffusers with PEFT: set_adapters and a forward
for each LoRA.
"""

import statistics
import sys
import time

import torch
from diffusers import UNet2DConditionModel
from flip import Leaves, _cpu
from peft import LoraConfig, set_peft_model_state_dict
from torch import nn

from multilora.attach import attached
from multilora.kernels import routed as kernels
from multilora.lora import Lora, LowRank
from multilora.remembered import remembering, text_projections
from multilora.stacked import stacking

K, RANK = 5, 16
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SETS = {"attention": ATTENTION, "all linears in the blocks": (*ATTENTION, "proj", "net.2"), "and convolutions": None}


def unet() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 77, "norm_num_groups": 8}
    return UNet2DConditionModel(sample_size=8, **sizes).eval()


def lora(model: nn.Module, seed: int, ends: tuple[str, ...] | None = ATTENTION) -> Lora:
    g, parts = torch.Generator().manual_seed(seed), {}
    for name, m in model.named_modules():
        inside = isinstance(m, (nn.Linear, nn.Conv2d)) and ".".join(name.split(".")[:1]) not in ("conv_in", "conv_out")
        if not inside or name.startswith("time_embedding") or not (ends is None or name.endswith(ends)):
            continue
        if ends is not None and "transformer_blocks" not in name:
            continue
        down = torch.randn(RANK, *m.weight.shape[1:], generator=g) / m.weight[0].numel() ** 0.5
        up = 0.05 * torch.randn(m.weight.shape[0], RANK, *[1] * (m.weight.ndim - 2), generator=g)
        parts[name] = LowRank.from_factors(down, up)
    return Lora(parts)


def timed(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def interleaved(contenders: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each; the first is run twice in a round, as "again"."""
    first = next(iter(contenders))
    turns = {**contenders, "again": contenders[first]}
    found = {name: [] for name in turns}
    for call in turns.values():
        call()
    for _ in range(rounds):
        for name, call in turns.items():
            found[name].append(timed(call))
    return {name: statistics.median(times) for name, times in found.items()}


def counts(model: nn.Module) -> None:
    x, text = torch.randn(2 * K, 4, 8, 8), torch.randn(2 * K, 77, 77)
    rows = [[0.8 * (i == j) for i in range(K)] for j in range(K) for _ in range(2)]
    with Leaves() as base:
        model(x, 7, text)
    print(f"\n| operations of a step at batch {2 * K}, bare model: {base.count} | layers | count | of base |")
    print("|---|---|---|---|")
    for title, ends in SETS.items():
        loras = [lora(model, seed, ends) for seed in range(K)]
        for form in ("side", "bank"):
            with attached(model, loras, form=form) as bank, stacking(bank):
                for kept, paths in (("", []), (", text once", text_projections(model, bank.paths))):
                    with remembering(bank, paths):
                        bank.row = rows
                        model(x, 7, text)
                        with Leaves() as leaves:
                            model(x, 7, text)
                    print(f"| Composite of {K}, {form}{kept}; {title} | {len(bank.paths)} | {leaves.count} | "
                          f"{leaves.count / base.count:.3f} |")  # fmt: skip


def composite(model: nn.Module, rounds: int) -> None:
    loras = [lora(model, seed) for seed in range(K)]
    other, names = unet(), [f"l{i}" for i in range(K)]
    for name, each in zip(names, loras, strict=True):
        other.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION)), adapter_name=name)
        state = {
            f"{p}.lora_{ab}.weight": t for p, part in each.items() for ab, t in (("A", part.down), ("B", part.up))
        }
        set_peft_model_state_dict(other, state, adapter_name=name)
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 77), 7
    many, texts = x.repeat(K, 1, 1, 1), text.repeat(K, 1, 1)
    rows = [[float(i == j) for i in range(K)] for j in range(K)]

    def the_reference_way():
        outputs = []
        for name in names:
            other.set_adapters(name)
            outputs.append(other(x, t, text).sample)
        return sum(outputs) / K

    with attached(model, loras, form="side") as bank, remembering(bank, text_projections(model, bank.paths)):

        def in_turn():
            outputs = []
            for row in rows:
                bank.row = row
                outputs.append(model(x, t, text).sample)
            return sum(outputs) / K

        def batched():
            bank.row = [row for row in rows for _ in range(2)]
            return model(many, t, texts).sample.view(K, *x.shape).mean(0)

        want = the_reference_way()
        for call in (in_turn, batched):
            off = ((call() - want).abs().max() / want.abs().max()).item()
            assert off < 1e-3, off
        found = interleaved({"the reference way": the_reference_way, "in turn": in_turn, "batched": batched}, rounds)
    reference = found.pop("the reference way")
    print(f"\n| one Composite step of {K}, time | of the reference way |\n|---|---|")
    for name, seconds in found.items():
        print(f"| {'A/A' if name == 'again' else name} | {seconds / reference:.3f} |")


def switch(model: nn.Module, rounds: int) -> None:
    loras = [lora(model, seed) for seed in range(K)]
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 77), 7
    print("\n| one switch and 5 steps, time | of 5 steps of the bare model |\n|---|---|")
    for form in ("rebuilt", "bank"):
        turn = iter(range(10**9))
        before = {n: p.clone() for n, p in model.named_parameters()}
        with attached(model, loras, form=form) as bank:

            def switched(bank=bank, turn=turn):
                n = next(turn) % K
                bank.row = [float(i == n) for i in range(K)]
                for _ in range(5):
                    model(x, t, text)

            def bare(bank=bank):
                bank.row = [0.0] * K
                for _ in range(5):
                    model(x, t, text)

            for _ in range(K):
                switched()
            found = interleaved({"bare": bare, "switched": switched}, rounds)
        same = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        print(f"| {form} (A/A {found['again'] / found['bare']:.3f}) | {found['switched'] / found['bare']:.3f} |")
        print(f"| {form}: base weights afterwards | {'bit-equal' if same else 'changed'} |")


def decoding(rounds: int, layers: int = 8, d: int = 256, ff: int = 704, experts: int = 8) -> None:
    """A token through linears as a small Llama has them, two of eight experts for all layers."""
    shapes = [(d, d)] * 4 + [(ff, d)] * 2 + [(d, ff)]
    stack = [(torch.randn(o, i) / i**0.5, torch.randn(experts, RANK, i) / i**0.5, torch.randn(experts, RANK, o).mT / 4)
             for _ in range(layers) for o, i in shapes]  # fmt: skip
    x = {d: torch.randn(1, d), ff: torch.randn(1, ff)}
    index, weight = torch.tensor([2, 5]), torch.tensor([0.7, 0.3])
    dense = torch.zeros(experts).index_copy(0, index, weight)

    def base():
        for w, down, _ in stack:
            x[down.shape[2]] @ w.T

    def routed():
        for w, down, up in stack:
            kernels.add_by_index_(x[down.shape[2]] @ w.T, x[down.shape[2]], down, up, index, weight)

    def loop():
        for w, down, up in stack:
            one = x[down.shape[2]]
            y = one @ w.T
            for e in range(experts):
                y = y + dense[e] * ((one @ down[e].T) @ up[e].T)

    found = interleaved({"base": base, "routed by index": routed, "loop over all experts": loop}, rounds)
    print(f"\n| a token, {layers} layers of width {d}, 2 of {experts} experts, time | of base | of the loop |")
    print("|---|---|---|")
    for name, seconds in found.items():
        title = "A/A" if name == "again" else name
        print(f"| {title} | {seconds / found['base']:.3f} | {seconds / found['loop over all experts']:.3f} |")


@torch.no_grad()
def main(rounds: int = 7) -> None:
    print("# The adapted layer on the CPU\n\nMade by `python benchmarks/adapted_layers.py`.\n")
    print(f"Machine: {_cpu()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}; {rounds} rounds.")
    model = unet()
    counts(model)
    if rounds:
        composite(model, rounds)
        switch(model, rounds)
        decoding(rounds)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
