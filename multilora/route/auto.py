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

from multilora.method import Opt, method, methods, resolve
from multilora.plan import Moment, Pass, explained_before
from multilora.route.merge import merge

WEIGHTS = "weights x "


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
    `plan.explains()` says in a line what was chosen and what for; a recipe that keeps the line is made again with what
    it says, whatever would be chosen now.
    """
    k = len(loras)
    before = read(explained_before())
    said = explained_before() if before else ""
    found = before or choice(k, budget)
    plain = merge(loras)
    if found is None or (before and (before["method"], before["weight"]) == ("merge", 1.0)):
        said = said or f"merge: there is nothing to choose for {k} LoRA{'s' * (k != 1)}"
        return explained(plain, lambda: said)
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
    return explained(
        plan, lambda: said or (says(found, k) if guided[:1] != [False] else "merge: there is no guidance")
    )


def explained(plan: Any, line: Any) -> Any:
    plan.explains = line
    return plan


def weighed(moment: Moment, factor: float) -> Moment:
    return dataclasses.replace(moment, weights=tuple(w * factor for w in moment.weights))


def choice(k: int, budget: float) -> dict[str, Any] | None:
    """The setting for k LoRAs that showed most at `budget` runs a step; None for one LoRA.

    Keys: method, weight, options, rows, shown, merge and merge_weight (what Merge showed at the best of its weights),
    pictures, k. More LoRAs than were measured have those of the most that were. A budget below the cheapest takes the
    cheapest.
    """
    known = table()
    if k < 2:
        return None
    measured = min(k, max(known))
    payable = [c for c in known[measured] if c["rows"] <= budget + 0.05] or known[measured][:1]
    return {**payable[-1], "k": measured}  # each showed more than those before it


def says(found: dict[str, Any], k: int) -> str:
    """Such as "arrow, weights x 1.5: in 20 pictures .. reviewers saw 70% of 4 LoRAs, with merge, weights x 1, 47%"."""
    options = "".join(f", {name}={value}" for name, value in found["options"].items())
    weight = "" if found["weight"] == 1.0 else f", {WEIGHTS}{found['weight']:g}"
    of = f"{found['k']}" if k == found["k"] else f"{found['k']} (the most that were measured)"
    seen, merged = f"{found['shown']:.0%}", f"{found['merge']:.0%}"
    return (
        f"{found['method']}{options}{weight}: in {found['pictures']} pictures of the embedded world's train split "
        f"reviewers saw {seen} of {of} LoRAs, with merge, weights x {found['merge_weight']:g}, {merged}"
    )


def read(line: str) -> dict[str, Any] | None:
    """method, weight, options and rows (1, or 2 for any more) of a line of `says`; None where it is none."""
    name, *parts = line.partition(":")[0].split(", ")
    if name not in methods("route") or name == "auto":
        return None
    weight, options = 1.0, {}
    try:
        for part in parts:
            if part.startswith(WEIGHTS):
                weight = float(part.removeprefix(WEIGHTS))
            else:
                option, _, value = part.partition("=")
                options[option] = value
        bound = resolve("route", name, **options)
    except ValueError:  # written by somebody else: Composer says that the picture is another one
        return None
    rows = 1.0 if bound.record.cost == "1" else 2.0
    return {"method": name, "weight": weight, "options": options, "rows": rows}


@functools.cache
def table() -> dict[int, list[dict[str, Any]]]:
    """Number of LoRAs -> settings, from cheap to dear."""
    import multilora.assets

    path = Path(next(iter(multilora.assets.__path__))) / "auto.json"
    return {int(k): rows for k, rows in json.loads(path.read_text(encoding="utf-8"))["choices"].items()}
