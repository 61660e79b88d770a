"""Low-rank merges beside PEFT's and dense linear algebra: svd, resize, and a convolution's merge and unmerge.

    OMP_NUM_THREADS=1 python benchmarks/merge.py [svd resize conv]     # prints, and writes benchmarks/merge.md

Times are CPU seconds of one thread, both sides in turn (A B A B ...), as minima; a ratio is of two times of one run.
svd: three random LoRAs of rank 16 over the 128 attention linears of SD 1.5, cut to rank 16 again. PEFT's side is one
layer per shape times the number of layers of that shape: "operator" is its svd function alone, "end to end" all of
add_weighted_adapter on a model of that layer alone. Ours is, as operator, sum and cut of the same layers times the
same numbers; end to end, `multilora.merge` on the whole set, all 128 layers for real. Errors are those of the rank-16
product, relative in Frobenius norm, against a float64 svd of the multiplied-out float64 sum.
conv: one layer per shape, the total is over the convolutions of SD 1.5's U-Net that LoRA files adapt (resnets,
samplers, projections: all but the first and the last, which stand apart below), each shape times its number.
"""

import sys
from collections import Counter
from pathlib import Path

import torch
from merge_elementwise import RANK, SD15, TARGETS, WEIGHTS, Theirs, lora, shapes, timed

import multilora as ml
from multilora.attach import attached
from multilora.lab.machine import processor
from multilora.lora import Lora, LowRank


def alternated(calls, rounds):
    """The least CPU seconds of each call, in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            best[i] = min(best[i], timed(call)[0])
    return best


def cut(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@torch.no_grad()
def svd(rounds=3):
    layers = shapes(SD15, lambda n, m: n.endswith(TARGETS))
    counts = Counter(layers.values())
    totals, rows = [0.0] * 3, []
    for shape, count in counts.items():
        loras = [lora({"x": shape}, seed) for seed in range(3)]
        theirs = Theirs(loras, shape)

        def end_to_end(theirs=theirs):
            theirs.merge("svd", None)
            theirs.model.delete_adapter("merged")

        def operator(theirs=theirs):
            layer = theirs.layer
            return theirs.model.base_model._svd_generalized_task_arithmetic_weighted_adapter(
                "svd", theirs.names, WEIGHTS, RANK, layer, None, None, None, "total", None
            )

        def ours(loras=loras):
            a, b, c = (one["x"] * w for one, w in zip(loras, WEIGHTS, strict=True))
            return (a + b + c).truncated(RANK)[0]

        exact = cut(sum(w * one["x"].delta(torch.float64) for one, w in zip(loras, WEIGHTS, strict=True)), RANK)
        down, up = operator()
        products = up.double() @ down.double(), ours().delta(torch.float64)
        far = [float((x - exact).norm() / exact.norm()) for x in products]
        best = alternated([operator, end_to_end, ours], rounds)
        best[2] = min(best[2], *alternated([ours], 20))
        totals = [t + count * b for t, b in zip(totals, best, strict=True)]
        rows.append(f"| {shape[0]} x {shape[1]} | {count} | {1e3 * best[0]:.1f} | {1e3 * best[1]:.1f} | "
                    f"{1e3 * best[2]:.2f} | 1/{best[0] / best[2]:.0f} | {far[0]:.1e} | {far[1]:.1e} |")  # fmt: skip
    whole = [lora(layers, seed) for seed in range(3)]
    merged = min(timed(lambda: ml.merge(whole, WEIGHTS, method="svd", rank=RANK))[0] for _ in range(2 * rounds))
    return [
        f"## svd: {sum(counts.values())} attention linears of SD 1.5, 3 LoRAs of rank {RANK}, cut to rank {RANK}\n",
        "| | PEFT, CPU s | ours, CPU s | ours / PEFT | bar |", "|---|---|---|---|---|",
        f"| operator | {totals[0]:.1f} | {totals[2]:.3f} | 1/{totals[0] / totals[2]:.0f} | 1/100 |",
        f"| end to end | {totals[1]:.1f} | {merged:.3f} | 1/{totals[1] / merged:.0f} | 1/50 |\n",
        "| layer | layers | PEFT operator, ms | end to end, ms | ours, ms | ratio | PEFT's error | our error |",
        "|---|---|---|---|---|---|---|---|", *rows,
    ]  # fmt: skip


@torch.no_grad()
def resize(rounds=3):
    out = [
        "\n## Resize: one LoRA of rank r cut to half its rank, beside a dense svd of its product (bar at 1280, "
        "r = 128: 1/40)\n",
        "| layer | r | dense svd, ms | ours, ms | ours / dense | our error against float64 |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for d, ranks in ((1280, (16, 32, 64, 128)), (640, (64, 128)), (320, (64, 128))):
        for r in ranks:
            part = lora({"x": (d, d)}, 0, r)["x"]
            whole = part.delta()
            small = lambda p=part, r=r: p.truncated(r // 2)  # noqa: E731
            dense, ours = alternated([lambda w=whole: torch.linalg.svd(w, full_matrices=False), small], rounds)
            ours = min(ours, *alternated([small], 10))
            exact = cut(part.delta(torch.float64), r // 2)
            far = float((small()[0].delta(torch.float64) - exact).norm() / exact.norm())
            times = f"{1e3 * dense:.0f} | {1e3 * ours:.2f} | 1/{dense / ours:.0f}"
            out.append(f"| {d} x {d} | {r} | {times} | {far:.1e} |")
    return out


@torch.no_grad()
def conv(rounds=8):
    layers = shapes(SD15, lambda n, m: isinstance(m, torch.nn.Conv2d))
    ends = {layers.pop(name) for name in ("conv_in", "conv_out")}
    counts = Counter(layers.values())
    totals, rows = [0.0, 0.0], []
    unlike = drift = ours_drift = 0
    shown = [*sorted(counts.items(), key=lambda item: -item[0][0] * item[0][1] * item[0][2]), *((e, 1) for e in ends)]
    for shape, count in shown:
        seconds, found = _one_conv(shape, rounds)
        if shape not in ends:
            totals = [t + count * s for t, s in zip(totals, seconds, strict=True)]
            sums = zip((unlike, drift, ours_drift), found, strict=True)
            unlike, drift, ours_drift = (total + count * more for total, more in sums)
        rows.append(f"| {' x '.join(map(str, shape))} | {count} | {1e3 * seconds[0]:.2f} | {1e3 * seconds[1]:.2f} | "
                    f"1/{seconds[0] / seconds[1]:.1f} | {found[0]} |")  # fmt: skip
    return [
        "\n## Merge and unmerge of one LoRA of rank 16 in convolutions (PEFT: `merge`, `unmerge`; ours: a row set and "
        "set back, form rebuilt; bar 1/8)\n",
        "| layer | layers | PEFT, ms | ours, ms | ours / PEFT | merged weights of one layer unlike PEFT's |",
        "|---|---|---|---|---|---|",
        f"| all that LoRA files adapt | {sum(counts.values())} | {1e3 * totals[0]:.0f} | {1e3 * totals[1]:.0f} | "
        f"1/{totals[0] / totals[1]:.1f} | |", *rows,
        f"\nOf these layers' {sum(n * torch.Size(s).numel() for s, n in counts.items())} weights, {unlike} differ in "
        f"any bit from PEFT's when merged; {drift} are not what they were after PEFT's unmerge, {ours_drift} after "
        "ours.",
    ]  # fmt: skip


def _one_conv(shape, rounds):
    """(seconds of PEFT and of us, (merged weights unlike PEFT's, weights changed after PEFT's unmerge, and ours))."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net, own = (torch.nn.Sequential(torch.nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)) for _ in range(2))
    pristine = net[0].weight.detach().clone()
    own[0].weight.data.copy_(pristine)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
    layer = get_peft_model(net, config, "one").base_model.model[0]
    down, up = (m["one"].weight.detach().clone() for m in (layer.lora_A, layer.lora_B))
    with attached(own, [Lora({"0": LowRank.from_factors(down, up)})], form="rebuilt") as bank:

        def ours():
            bank.row = [1.0]
            bank.row = [0.0]

        def theirs():
            layer.merge()
            layer.unmerge()

        layer.merge()
        bank.row = [1.0]
        unlike = int((layer.base_layer.weight != own[0].weight).sum())
        layer.unmerge()
        bank.row = [0.0]
        drift = [int((w != pristine).sum()) for w in (layer.base_layer.weight, own[0].weight)]
        return alternated([theirs, ours], rounds), (unlike, *drift)


def main():
    wanted = [f for f in (svd, resize, conv) if f.__name__ in sys.argv[1:] or not sys.argv[1:]]
    lines = [f"Machine: {processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}. Made by "
             "benchmarks/merge.py, which says how.\n"]  # fmt: skip
    for table in wanted:
        lines += table()
    text = "\n".join(lines) + "\n"
    if len(wanted) == 3:
        Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
