"""What the branch cache saves and costs on the embedded world: sets of three LoRAs of the test split (all eight).

    OMP_NUM_THREADS=1 python benchmarks/branch_cache.py [seeds [sets]] > benchmarks/branch_cache.md

Each picture is drawn with and without the cache from the same noise. The difference is that of the final latents,
relative, as a mean over pictures. Presence: the share of a picture's three elements that recogniser B names, as a mean
over pictures with its standard error.
"""

import itertools
import statistics
import sys
import time

import torch

from multilora.lab.score.presence import presence
from multilora.pipelines.composing import composing, member
from multilora.pipelines.image import Composer
from multilora.pipelines.load import library

EVERY = (1, 2, 3, 5)
METHODS = {"merge": {}, "switch": {"every": 5}, "composite": {}}
STEPS, GUIDANCE = 25, 3.0
WORDS = "{character} in {garment} {last}, flat style"


def sets() -> list[tuple[str, list[str]]]:
    """(prompt, names) of every character and garment of the test split with its object or its background."""
    of: dict[str, list[dict]] = {}
    for entry in library().values():
        if entry["split"] == "test":
            of.setdefault(entry["category"], []).append(entry)
    found = []
    for character, garment in itertools.product(of["character"], of["garment"]):
        for last, text in (
            (of["object"][0], "holding a {}, on a plain background"),
            (of["background"][0], "holding nothing, in a {}"),
        ):
            words = {"character": f"a {character['trigger']}", "garment": f"a {garment['trigger']}"}
            prompt = WORDS.format(**words, last=text.format(last["trigger"]))
            found.append((prompt, [character["name"], garment["name"], last["name"]]))
    return found


@torch.no_grad()
def drawn(pipe, members, prompt, seeds, method, every):
    """(latents [n, ...], pictures, CPU seconds, calls whole, calls in all)"""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    began = time.process_time()
    with composing(pipe, members, method, cache=every, **METHODS[method]) as conductor:
        latents = pipe(
            prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, num_images_per_prompt=len(seeds),
            generator=generators, output_type="latent",
        ).images  # fmt: skip
        branch = conductor.caches.branch
        whole, calls = branch.full, branch.full + branch.short
    seconds = time.process_time() - began
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents, pipe.image_processor.postprocess(decoded, output_type="pil"), seconds, whole, calls


def main(seeds: int = 4, most: int = 8) -> None:
    pipe = Composer.from_pretrained("embedded", device="cpu").pipe
    pipe.set_progress_bar_config(disable=True)
    entries = library()
    rows = {(m, n): {"difference": [], "there": [], "seconds": 0.0, "whole": 0, "calls": 0}
            for m in METHODS for n in EVERY}  # fmt: skip
    for number, (prompt, names) in enumerate(sets()[:most]):
        members = [member(pipe, name) for name in names]
        wanted = {entries[name]["category"]: entries[name]["trigger"] for name in names}
        chosen = [100 * number + i for i in range(seeds)]
        for method in METHODS:
            plain = None
            for every in EVERY:
                latents, pictures, seconds, whole, calls = drawn(pipe, members, prompt, chosen, method, every)
                plain = latents if plain is None else plain
                row = rows[method, every]
                off = (latents - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
                row["difference"] += off.tolist()
                found = presence(pictures, wanted, "b")
                row["there"] += [sum(each) / len(found) for each in zip(*found.values(), strict=True)]
                row["seconds"] += seconds
                row["whole"] += whole
                row["calls"] += calls
        print(f"{number + 1} of {most}", file=sys.stderr, flush=True)
    count = len(rows["merge", 1]["there"])
    print("# The branch cache on the embedded world\n\nMade by `python benchmarks/branch_cache.py`.\n")
    print(f"{count} pictures a row ({most} sets of three LoRAs of the test split, {seeds} seeds), {STEPS} steps, "
          f"guidance {GUIDANCE:g}, weights 1; torch {torch.__version__}, {torch.get_num_threads()} "
          "thread(s), CPU seconds of the denoising relative to every = 1.\n")  # fmt: skip
    print("| method | every | calls whole | time | difference of latents | presence, B |\n|---|---|---|---|---|---|")
    for (method, every), row in rows.items():
        there, base = row["there"], rows[method, 1]
        error = statistics.stdev(there) / len(there) ** 0.5
        print(f"| {method} | {every} | {row['whole'] / row['calls']:.2f} | {row['seconds'] / base['seconds']:.2f} | "
              f"{statistics.mean(row['difference']):.3f} | {statistics.mean(there):.3f} ± {error:.3f} |")  # fmt: skip


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
