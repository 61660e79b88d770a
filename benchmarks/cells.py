"""The table of families and tasks: multilora against dense W + delta weights in the pipeline's own loop, call by call.

    python -m benchmarks.cells [WORD ...]      rows whose name has one of the words; all of them without
    python -m benchmarks.cells --write         all rows, into docs/families/table.md

The cells are those of tests/cells.py, which tests/test_cells.py asserts one by one; the models are small and random.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import cells

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "families" / "table.md"
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX.1", "qwen": "Qwen-Image", "z": "Z-Image"}
HEADER = (
    "| family | task | with | merge | switch | composite | effect | apart | latents |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
INTRO = """# Families, tasks and methods

Rows as `python -m benchmarks.cells` prints them; the same cells are asserted by tests/test_cells.py (text-to-image:
tests/test_families.py). Models of the families' own classes in diffusers, small and with random weights, on the CPU in
float32; two LoRAs of different weights, two pictures per prompt, guidance where the pipeline has it. The reference
(tests/dense.py) runs deep copies of the denoiser with weights W + Σ w_i up_i down_i, one after the other, in the
pipeline's own loop, each on the prompt as text encoders with such weights encode it.

- merge, switch, composite: largest relative difference of a denoiser call to the reference's, over all calls of the
  run; every one must stay below 1e-5. A dash: the method has no such run (Switch wants a step for each LoRA).
- effect: how far the reference is from the base model's prediction, at the call and the method where it is nearest.
- apart: how far it is from another method's, at least. A no-op or another method's work would show as such numbers.
- latents: where guidance is not linear in the predictions, or reads more than them, the largest relative difference of
  the finished latents, which errors of all steps add up in (below 1e-4): guidance acts on the averages (DESIGN 1).
"""


def name(cell: cells.Cell) -> str:
    """The row's first three columns."""
    return f"| {NAMES[cell.family]} | {cell.task} | {cell.what} |"


def line(cell: cells.Cell) -> str:
    """A row of the table, measured now."""
    setting = cell.make()
    found = cells.results(setting)
    for result in found.values():
        result.check(setting)
    worst = [f"{found[m].calls.worst:.1e}" if m in found else "-" for m in cells.METHODS]
    effect = min(r.calls.effect for r in found.values())
    apart = min(r.calls.apart for r in found.values())
    final = max((r.final for r in found.values() if r.final is not None), default=None)
    last = "" if final is None else f"{final:.1e}"
    return f"{name(cell)} {' | '.join(worst)} | {effect:.3f} | {apart:.3f} | {last} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", action="store_true", help=f"into {TABLE.relative_to(ROOT)}")
    asked = parser.parse_args()
    if asked.write and asked.words:
        parser.error("--write is for the whole table")
    began, lines = time.perf_counter(), []
    print(HEADER)
    for cell in cells.CELLS:
        if not asked.words or any(word in cell.id for word in asked.words):
            lines.append(line(cell))
            print(lines[-1], flush=True)
    print(f"\n{len(lines)} rows in {time.perf_counter() - began:.0f} s")
    if asked.write:
        TABLE.write_text("\n".join([INTRO, HEADER, *lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
