"""A renderer for the tests of batches that takes milliseconds, and a driver process to kill.

    python tests/batch_standin.py RECIPES OUT LOG SECONDS [WORKERS [ADDRESS [real]]]

With `real` the embedded base draws, with one thread. Every picture that is begun is a line in LOG: process, prompt and
seed, so that work done twice can be counted. Some prompts are special: "raises", "crashes" (a segmentation fault),
"killed" (SIGKILL, as the OOM killer sends it).
"""

import ctypes
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image

from multilora.lab.evaluate.batch import run_batch
from multilora.lab.evaluate.items import read_items
from multilora.lab.evaluate.workers import Unusable


class StandIn:
    """Noise that depends on the recipe alone."""

    def __init__(self, log: str | None = None, seconds: float = 0.0) -> None:
        self.log, self.seconds = log, seconds

    def begin(self, recipe):
        if self.log:
            handle = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, f"{os.getpid()} {recipe.prompt} {recipe.seed}\n".encode())
            os.close(handle)

    def __call__(self, recipe, cancel=None):
        self.begin(recipe)
        if recipe.prompt == "raises":
            raise ArithmeticError("this one always fails")
        if recipe.prompt == "crashes":
            ctypes.string_at(0)
        if recipe.prompt == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        noise = random.Random(f"{recipe.prompt} {recipe.method} {recipe.seed}")
        return Image.frombytes("RGB", (24, 16), noise.randbytes(24 * 16 * 3)), recipe.model_copy()


class Real(StandIn):
    """The embedded base with one thread, and the stand-in's log."""

    def __call__(self, recipe, cancel=None):
        if not hasattr(self, "draw"):
            from multilora.lab.evaluate.workers import ComposerRenderer

            self.draw = ComposerRenderer("cpu", 1)
            self.draw._composer_for(recipe)
        self.begin(recipe)
        return self.draw(recipe, cancel)


class Blind:
    """It can draw nothing at all."""

    def __call__(self, recipe, cancel=None):
        raise Unusable("no such base")


class Broken:
    """It cannot even be made."""

    def __init__(self):
        raise OSError("this machine has no disk")


def lines(count, **fields):
    """Recipes of `count` pictures; the prompts are different."""
    plain = {"base": "embedded", "steps": 2, "guidance_scale": 3.0, "width": 24, "height": 16}
    return [{**plain, "prompt": f"picture {i}", **fields} for i in range(count)]


def driver(recipes, out, log, seconds, workers="0", address="", kind=""):
    from multilora.cli.batch import stopped_by_signals

    team = None
    if int(workers):
        from multilora.lab.evaluate.ray_workers import RayWorkers

        team = partial(RayWorkers, workers=int(workers), address=address or None)
    make = partial(Real if kind else StandIn, log, float(seconds))
    with stopped_by_signals() as stop:
        summary = run_batch(read_items(recipes), out, make, workers=team, stop=stop)
    sys.exit(130 if summary.stopped else int(summary.failed > 0))


if __name__ == "__main__":
    driver(*sys.argv[1:])
