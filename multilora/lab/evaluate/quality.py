"""Picture quality on the embedded world: how far pictures are from real renders of the scenes that were asked for.

The kernel distance (KID, Binkowski et al., arXiv 1801.01401: unbiased MMD with k(x, y) = (x y / d + 1)^3) between
features of pictures and of renders, where the features are what the heads of recogniser B read. It sees what presence
cannot: smears, wrong colours around a right design, a picture that is a copy of the prototype. Unlike the Frechet
distance it has no bias at a hundred pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from multilora.lab.evaluate.evaluation import Results, Wanted
from multilora.lab.evaluate.statistics import FEW, Interval

SCALE = 1000  # KID is small; it is told in thousandths, as elsewhere
RENDERS = "real renders of other scenes"  # the floor: what the distance is of pictures that are perfect
OTHER = 500  # numbers of the scenes that the floor is of; evaluations use those from 0 on


def kernel_distance(x: np.ndarray, y: np.ndarray, resamples: int = 1000, seed: int = 0) -> Interval:
    """KID of features x [n, d] and y [m, d], times SCALE, with a 95% bootstrap interval over the rows of x and y.

    Raises ValueError with fewer than two rows on a side.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"kernel distance of {len(x)} and {len(y)} pictures: wanted two or more on each side")
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    np.fill_diagonal(xx, 0.0)
    np.fill_diagonal(yy, 0.0)

    def mmd(a: np.ndarray, b: np.ndarray) -> float:
        """Of counts a [n], b [m]: a row drawn twice is not compared with itself."""
        within = a @ xx @ a / (a.sum() ** 2 - (a**2).sum()) + b @ yy @ b / (b.sum() ** 2 - (b**2).sum())
        return within - 2 * (a @ xy @ b) / (a.sum() * b.sum())

    rng = np.random.default_rng(seed)
    with np.errstate(invalid="ignore"):  # a draw of one row alone has no pairs: nan, which is left out
        drawn = [
            mmd(rng.multinomial(len(x), np.full(len(x), 1 / len(x))).astype(float),
                rng.multinomial(len(y), np.full(len(y), 1 / len(y))).astype(float))
            for _ in range(resamples)
        ]  # fmt: skip
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return Interval(SCALE * mmd(np.ones(len(x)), np.ones(len(y))), SCALE * float(low), SCALE * float(high), len(x))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def quality(results: Results) -> list[dict[str, Any]]:
    """One row per method and k, and the floor; [] where there is no embedded world or too few pictures."""
    plan = results.plan
    if not plan.library.world or plan.settings.base != "embedded":
        return []
    from multilora.lab.score.presence import load_recogniser

    eyes, rows = load_recogniser("b"), []
    for k in plan.ks:
        here = results.of(None, k)
        places = list({s.wanted.place: s.wanted for s in here}.values())
        if len(places) < FEW:
            continue
        real = eyes.features([_render(wanted) for wanted in places])
        floor = kernel_distance(eyes.features([_render(wanted, OTHER) for wanted in places]), real)
        for arm in results.arms:
            shown = results.of(arm, k)
            if len(shown) >= FEW:
                rows.append(_row(arm, k, kernel_distance(eyes.features(_opened(shown)), real)))
        rows.append(_row(RENDERS, k, floor))
    return rows


def _row(arm: str, k: int, found: Interval) -> dict[str, Any]:
    return {"method": arm, "k": k, "value": found.value, "low": found.low, "high": found.high, "pictures": found.n}


def _render(wanted: Wanted, further: int = 0) -> Image.Image:
    """A real picture of the scene that a picture was asked to show; `further` of another scene with the same LoRAs."""
    from multilora.lab.world.render import render

    return render(scene_of([e.name for e in wanted.entries], wanted.index + further))


def scene_of(names: Sequence[str], index: int) -> Any:
    """Held-out scene `index` with these designs, which an evaluation's prompt describes."""
    from multilora.lab.world.designs import DESIGNS
    from multilora.lab.world.report import composed_scene

    return composed_scene(sorted(names, key=list(DESIGNS).index), index)  # as the world's own report forms its scenes


def _opened(shown: Sequence[Any]) -> list[Image.Image]:
    images = []
    for one in shown:
        with Image.open(one.path) as image:
            images.append(image.convert("RGB"))
    return images
