"""A renderer for tests of evaluations that takes milliseconds: a scene of the embedded world with some of its LoRAs.

Which ones are there depends on method and seed alone: Merge shows every second, Switch every fourth, others none.
"""

import random

from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.render import render
from multilora.lab.world.scene import sample_scene

EVERY = {"merge": 2, "switch": 4}


class StandIn:
    def __init__(self, *_):
        pass

    def __call__(self, recipe, cancel=None):
        rng = random.Random(f"{recipe.method} {recipe.seed}")
        shown = [use.name for use in recipe.loras if not rng.randrange(EVERY.get(recipe.method, 10**9))]
        scene = sample_scene(rng, designs={DESIGNS[name].category: name for name in shown})
        runs = float(len(recipe.loras)) if recipe.method == "composite" else 1.0
        return render(scene), recipe.model_copy(update={"extra": {"shown": shown, "runs_per_step": runs}})
