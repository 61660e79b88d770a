"""A method of your own without touching the package: Fade, beside Merge and Switch on one noise.

    python examples/custom_method.py --out fade.png

A method that should be on the command line and in the app is a file in multilora/route/: see CONTRIBUTING.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated

from multilora.lab.sheet import Cell, contact_sheet
from multilora.method import Method, Opt, options_of
from multilora.pipelines.image import Composer
from multilora.plan import Moment, Pass
from multilora.recipe import save_png


def fade(loras, *, overlap: Annotated[float, Opt("share of a turn in which two LoRAs are on", 0.0, 1.0)] = 0.5):
    """One LoRA gives way to the next without a jump: turns as in a Switch with one turn each, with slopes."""
    k = len(loras)

    def plan(moment: Moment) -> list[Pass]:
        place = (moment.step + 0.5) / moment.steps * k - 0.5  # 0 in the middle of the first turn
        reach = 0.5 + overlap / 2
        shares = [min(1.0, max(0.0, (reach - abs(place - i)) / max(overlap, 1e-9))) for i in range(k)]
        shares[0] = 1.0 if place < 0 else shares[0]
        shares[-1] = 1.0 if place > k - 1 else shares[-1]
        return [Pass([w * share for w, share in zip(moment.weights, shares, strict=True)])]

    return plan


FADE = Method(
    "fade", "route", "One LoRA after the other, without a jump", "this example", "1", (), options_of(fade), fade
)


def draw(steps: int | None = None, seed: int = 7):
    """A sheet of one scene by Merge, Switch and Fade."""
    composer = Composer.from_pretrained("embedded")
    for name in ("korv", "dotta", "palma"):
        composer.add(name, weight=1.2)
    prompt, cells = "a korv fox in a dotta poncho on a palma beach", []
    for method in ("merge", "switch", FADE, FADE(overlap=1.0)):
        out = composer(prompt, method=method, seed=seed, num_inference_steps=steps)
        options = ", ".join(f"{key} {value}" for key, value in out.recipe.options.items())
        cells.append(Cell(out.images[0], out.recipe.method, options))
    return contact_sheet([cells], title=prompt, subtitle=f"seed {seed}")


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("--out", type=Path, default=Path("fade.png"))
    reader.add_argument("--steps", type=int)
    given = reader.parse_args()
    print(save_png(draw(given.steps), given.out))
