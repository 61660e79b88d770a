"""Elementwise merges beside PEFT's on the SD 1.5 attention set, and the peak memory of a TIES merge of SDXL's size.

    OMP_NUM_THREADS=1 python benchmarks/merge_elementwise.py      # prints, and writes the .md beside it

Three random LoRAs of rank 16, cut to rank 16 again. Times are CPU seconds of one thread, both sides in turn (A B A B
...), as minima. PEFT's side, and ours beside it, is one layer per shape times the number of layers of that shape,
PEFT's through add_weighted_adapter on a model of that layer alone; our whole set is also merged for real. Memory is
the high-water mark of the resident set of a process of its own, from when the three LoRAs are in memory.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import multilora as ml
from multilora.lab.machine import processor
from multilora.lora import Lora, LowRank
from multilora.method import resolve

RANK, WEIGHTS, TARGETS = 16, [0.8, 1.0, 0.6], ("to_q", "to_k", "to_v", "to_out.0")
METHODS = {  # ours -> PEFT's, at the same density
    "ties": ("ties_svd", {"density": 0.2}),
    "magnitude_prune": ("magnitude_prune_svd", {"density": 0.5}),
    "dare": ("dare_linear_svd", {"density": 0.5}),
    "dare, consensus ties": ("dare_ties_svd", {"density": 0.5, "consensus": "ties"}),
}
# stable-diffusion-xl-base-1.0's unet/config.json, what differs from diffusers' defaults
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}


def shapes(config, wanted):
    """{path: weight shape} of a U-Net's modules, without its weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    return {n: tuple(m.weight.shape) for n, m in unet.named_modules() if wanted(n, m)}


def lora(layers, seed, rank=RANK):
    g = torch.Generator().manual_seed(seed)

    def part(shape):
        down = torch.randn(rank, *shape[1:], generator=g)
        return LowRank.from_factors(down, 0.05 * torch.randn(shape[0], rank, generator=g), alpha=rank / 2)

    return Lora({path: part(tuple(shape)) for path, shape in layers.items()})


def timed(call, *args):
    start = time.process_time()
    out = call(*args)
    return time.process_time() - start, out


class Theirs:
    """PEFT with the same three adapters on one linear."""

    def __init__(self, loras, shape):
        from peft import LoraConfig, get_peft_model

        layer = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
        self.model = get_peft_model(layer, config, adapter_name="one")
        self.names = ["one", "two", "three"]
        for name in self.names[1:]:
            self.model.add_adapter(name, config)
        for name, source in zip(self.names, loras, strict=True):
            self.layer.lora_A[name].weight.data = source["x"].down.clone()
            self.layer.lora_B[name].weight.data = source["x"].up.clone()

    @property
    def layer(self):
        return self.model.base_model.model[0]

    def merge(self, kind, density):
        self.model.add_weighted_adapter(
            self.names, WEIGHTS, "merged", combination_type=kind, svd_rank=RANK, density=density
        )

    def take(self):
        delta = self.layer.get_delta_weight("merged").detach().clone()
        self.model.delete_adapter("merged")
        return delta


@torch.no_grad()
def speed(rounds=2):
    """Rows (name, PEFT seconds, our seconds), and {shape: (best residual, ours, PEFT's)} of ties."""
    layers = shapes(SD15, lambda n, m: n.endswith(TARGETS))
    counts = Counter(layers.values())
    total = {name: [0.0, 0.0] for name in METHODS}
    residuals = {}
    for shape, count in counts.items():
        loras = [lora({"x": shape}, seed) for seed in range(3)]
        theirs = Theirs(loras, shape)
        for name, (kind, options) in METHODS.items():
            best = [float("inf")] * 2
            ours = resolve("merge", name.split(",")[0], rank=RANK, **options)
            for _ in range(rounds):
                best[0] = min(best[0], timed(theirs.merge, kind, options["density"])[0])
                delta = theirs.take()
                seconds, merged = timed(ours, loras, WEIGHTS)
                best[1] = min(best[1], seconds)
            total[name] = [t + count * b for t, b in zip(total[name], best, strict=True)]
            if name == "ties":
                whole = ml.merge(loras, WEIGHTS, method="ties", dense=True, **options)["x"].weight.double()
                ideal = float(torch.linalg.svdvals(whole)[RANK:].norm())
                found = [float((whole - d.double()).norm()) for d in (merged["x"].delta(), delta)]
                residuals[shape] = (ideal / float(whole.norm()), found[0] / ideal, found[1] / ideal)
    whole = {}
    loras = [lora(layers, seed) for seed in range(3)]
    for rank in (RANK, None):
        whole[rank], merged = timed(resolve("merge", "ties", rank=rank), loras, WEIGHTS)
    return counts, total, residuals, whole


def memory():
    """In a process of its own: stdin has the layers; prints the resident MiB with the inputs, and the peak above."""
    layers = json.load(sys.stdin)
    loras = [lora(layers, seed) for seed in range(3)]
    ml.merge([lora({"x": (64, 64)}, 0)], [1.0], method="ties")  # what the first call loads is not the merge's
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024

    before = status("VmRSS")
    seconds, merged = timed(resolve("merge", "ties"), loras, WEIGHTS)
    out = sum(t.numel() * 4 for p in merged.values() for t in (p.down, p.up)) / 2**20
    lost = merged.card.provenance["merge"]["energy_lost"]
    print(json.dumps([before, status("VmHWM") - before, out, seconds, lost]))


def remembered(layers):
    run = subprocess.run(
        [sys.executable, __file__, "--memory"], input=json.dumps(layers), capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def main():
    lines = [
        f"Machine: {processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}. Made by "
        "benchmarks/merge_elementwise.py, which says how.\n",
    ]
    counts, total, residuals, whole = speed()
    lines += [
        f"## {sum(counts.values())} attention linears of SD 1.5, 3 LoRAs of rank {RANK}, cut to rank {RANK}\n",
        "| method | PEFT, CPU s | ours, CPU s | ours / PEFT |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, (theirs, ours) in total.items():
        lines.append(f"| {name} (PEFT: {METHODS[name][0]}) | {theirs:.1f} | {ours:.2f} | 1/{theirs / ours:.1f} |")
    lines += [
        f"\nThe whole set merged for real by ties: {whole[RANK]:.2f} s to rank {RANK}, {whole[None]:.2f} s to the "
        f"default rank {3 * RANK}.\n",
        "| ties, layer | layers | norm that the best cut leaves out | residual, ours / best | PEFT's / best |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for shape, (share, ours, theirs) in residuals.items():
        lines.append(f"| {shape[0]} x {shape[1]} | {counts[shape]} | {share:.3f} | {ours:.6f} | {theirs:.6f} |")
    attention = shapes(SDXL, lambda n, m: n.endswith(TARGETS))
    largest = {
        "SDXL's largest linear": max(
            shapes(SDXL, lambda n, m: isinstance(m, torch.nn.Linear)).values(), key=lambda s: s[0] * s[1]
        ),
        "SDXL's largest convolution": max(
            shapes(SDXL, lambda n, m: isinstance(m, torch.nn.Conv2d)).values(), key=lambda s: s[0] * s[1] * s[-1] ** 2
        ),
    }
    lines += [
        f"\n## Peak memory of a TIES merge of 3 LoRAs of rank {RANK}, above what the inputs take\n",
        "| layers | resident with the inputs, MiB | peak above, MiB | of it the result, MiB | CPU s |",
        "|---|---|---|---|---|",
    ]
    for what, layers in [
        (f"SDXL, {len(attention)} attention linears", attention),
        *((f"{n}, {' x '.join(map(str, s))}", {"x": s}) for n, s in largest.items()),
    ]:
        before, above, out, seconds, _ = remembered(layers)
        lines.append(f"| {what} | {before:.0f} | {above:.0f} | {out:.0f} | {seconds:.1f} |")
    text = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    memory() if "--memory" in sys.argv else main()
