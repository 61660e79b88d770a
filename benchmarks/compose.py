"""Seconds of one picture on the embedded base: no LoRA, and four LoRAs by every method, side by side in turn.

    python benchmarks/compose.py [rounds] > benchmarks/compose.md
"""

import statistics
import sys
import time

import torch

from multilora.lab.machine import processor
from multilora.method import methods
from multilora.pipelines.image import Composer
from multilora.pipelines.load import library

PROMPT = "a red fox in a blue robe with a yellow balloon, in a forest"
SETTINGS = {"25 steps, guidance": {"num_inference_steps": 25}, "30 steps, guidance": {"num_inference_steps": 30}}


def four() -> list[str]:
    """One LoRA of each of four categories."""
    first = {}
    for entry in library().values():
        first.setdefault(entry["category"], entry["name"])
    return [first[c] for c in ("character", "garment", "object", "background")]


def main(rounds: int = 5) -> None:
    composer = Composer.from_pretrained("embedded", device="cpu")
    members = [composer.add(name) for name in four()]
    cases = ["base", *methods("route")]
    print("# Seconds per picture on the embedded base\n\nMade by `python benchmarks/compose.py`.\n")
    print(
        f"Machine: {processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; one picture of "
        f"128 x 128, float32, LoRAs: {', '.join(m.name for m in members)}; median of {rounds} rounds in turn.\n"
    )
    print("| setting | method | seconds | of base |\n|---|---|---|---|")
    for title, settings in SETTINGS.items():
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for i in range(rounds + 1):
            for case in cases:
                composer.loras.clear()
                for member in members if case != "base" else ():
                    composer.add(member)
                began = time.perf_counter()
                composer(PROMPT, method="merge" if case == "base" else case, seed=i, **settings)
                if i:  # the first round warms up
                    seconds[case].append(time.perf_counter() - began)
        base = statistics.median(seconds["base"])
        for case in cases:
            middle = statistics.median(seconds[case])
            print(f"| {title} | {case} | {middle:.2f} | {middle / base:.2f} |", flush=True)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
