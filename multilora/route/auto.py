"""Auto: for this many LoRAs and this many runs a step, what showed most of them where it was measured; our own.

assets/auto.json has for every number of LoRAs the settings of which none shows less and costs more than another, by
the eyes of reviewers who knew neither prompts nor methods, on the train split of the embedded world; `python
benchmarks/better.py --auto` writes it.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any

from multilora.method import Opt, method, resolve
from multilora.plan import Moment, Pass, explained_before
from multilora.route.merge import merge


@method(
    title="Picks method and weights by the number of LoRAs: what reviewers saw most of them with",
    paper="multilora",
    cost="at most budget",
    laws=("single", "zero", "gauge", "permutation"),
)
def auto(
    loras,
    *,
    budget: Annotated[float, Opt("runs of the model a step at most; 1 is the price of Merge", minimum=1.0)] = 1.0,
):
    """The plan of the chosen method, with the users' weights times the chosen one.

    Where one LoRA acts, and in pictures without guidance, which the choices were measured with, merge at the users'
    weights. A larger budget changes something only where the table has a setting that showed more for it.
    `plan.explains()` says in a line what was chosen and what for; a recipe that keeps the line is made again with the
    setting that it names, whatever would be chosen now.
    """
    k = len(loras)
    now, plain = choice(k, budget), merge(loras)
    if now is None:
        said = f"merge: there is nothing to choose for {k} LoRA{'s' * (k != 1)}"
        return explained(plain, lambda: said)
    found = chosen_before(explained_before()) or now
    chosen = resolve("route", found["method"], **found["options"])(loras)
    guided: list[bool] = []  # decided by the first call of a picture

    def plan(moment: Moment) -> list[Pass]:
        if not guided:
            guided.append(moment.guidance is None or moment.guidance > 1.0 or found["rows"] > 1.0)
        alone = sum(w != 0.0 for w in moment.weights) < 2
        return plain(moment) if alone or not guided[0] else chosen(weighed(moment, found["weight"]))

    def combine(outputs, moment: Moment):
        if len(outputs) == 1:
            return outputs[0]
        return chosen.combine(outputs, weighed(moment, found["weight"]))

    if getattr(chosen, "combine", None) is not None:
        plan.combine = combine
    line = says(now, k) if named(found) == named(now) else f"{named(found)}: as when this recipe was made"
    return explained(plan, lambda: line if guided[:1] != [False] else "merge: there is no guidance")


def explained(plan: Any, line: Any) -> Any:
    plan.explains = line
    return plan


def weighed(moment: Moment, factor: float) -> Moment:
    return dataclasses.replace(moment, weights=tuple(w * factor for w in moment.weights))


def choice(k: int, budget: float) -> dict[str, Any] | None:
    """The setting for k LoRAs that showed most at `budget` runs a step; None for one LoRA.

    Keys: method, weight, options, rows; shown, over `pictures` pictures of `ks` LoRAs; merge and merge_weight, what
    Merge showed in as many at the best of its weights; k. More LoRAs than were measured have those of the most that
    were. A budget below the cheapest takes the cheapest.
    """
    known = table()
    if k < 2:
        return None
    measured = min(k, max(known))
    payable = [c for c in known[measured] if c["rows"] <= budget + 0.05] or known[measured][:1]
    return {**payable[-1], "k": measured}  # each showed more than those before it


def named(found: dict[str, Any]) -> str:
    """A setting in words, such as "arrow, top_k=2, weights x 1.5": a line of `says` up to its colon."""
    options = "".join(f", {name}={value}" for name, value in found["options"].items())
    return f"{found['method']}{options}" + ("" if found["weight"] == 1.0 else f", weights x {found['weight']:g}")


def says(found: dict[str, Any], k: int) -> str:
    """Such as "arrow, weights x 1.5: in 60 pictures of 3 to 5 LoRAs .. reviewers saw 70% of them, with merge 47%"."""
    of = f"{found['ks'][0]} to {found['ks'][-1]} LoRAs" + f" ({k} were not measured)" * (k != found["k"])
    return (
        f"{named(found)}: in {found['pictures']} pictures of {of}, train split of the embedded world, reviewers saw "
        f"{found['shown']:.0%} of them, with merge, weights x {found['merge_weight']:g}, {found['merge']:.0%}"
    )


def chosen_before(line: str) -> dict[str, Any] | None:
    """The setting that a line of `says` names, of those that are or ever were in the table; None for any other line.

    A recipe may come from anybody: its words choose among known settings and set nothing themselves.
    """
    told = line.partition(":")[0]
    return next(
        (one for one in [*earlier(), *(c for own in table().values() for c in own)] if named(one) == told), None
    )


def table() -> dict[int, list[dict[str, Any]]]:
    """Number of LoRAs -> settings, from cheap to dear."""
    return {int(k): rows for k, rows in _file()["choices"].items()}


def earlier() -> list[dict[str, Any]]:
    """Settings (method, weight, options, rows) that were in the table once and are not now."""
    return _file()["earlier"]


@functools.cache
def _file() -> dict[str, Any]:
    import multilora.assets

    path = Path(next(iter(multilora.assets.__path__))) / "auto.json"
    return json.loads(path.read_text(encoding="utf-8"))
