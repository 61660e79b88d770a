"""Ways to compose on the TRAIN split of the embedded world, read by recogniser A: where settings are looked for.

    python benchmarks/better.py [--k 2 3 4 5] [--sets 12] [--pictures 12] [ARM ...]
    python benchmarks/better.py --part 1 --parts 2 [--device cuda --batch 20] --journal FILE      # one of two jobs
    python benchmarks/better.py --table                                 # of what the journal holds
    python benchmarks/better.py --auto                                  # assets/auto.json, which Auto reads

Auto's choices are by the eyes of blind reviewers (docs/world/review_train.json: pictures of the train split that
`multilora eval` drew, labelled as multilora.lab.evaluate.blind has it): recognisers forgive guided_merge and others
overdone colours that reviewers do not.

An arm is METHOD@WEIGHT or METHOD@WEIGHT:option=value,option=value; without arms, those of ARMS. All arms have the same
sets, prompts and noise. `mole` has a gate for each set (gate=sample or gate=token, rows that sum to k), whose training
takes a minute: only where it is asked for. What is in the journal is not drawn again; the table of all that is there
is written to benchmarks/better.md. Nothing here may choose by the test split or by recogniser B.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from multilora.lab.evaluate.statistics import wilson
from multilora.lab.journal import Journal
from multilora.lab.reproduce.mole import CHUNK, STEPS, Bench, shared_out
from multilora.lab.world.report import GUIDANCE
from multilora.method import resolve

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "better.md"
REVIEW = ROOT / "docs" / "world" / "review_train.json"
AUTO = ROOT / "assets" / "auto.json"
GATED = {"sample": "row sums to k", "token": "row sums to k per token"}
ARMS = (
    *(f"merge@{w}" for w in (0.6, 0.8, 1, 1.2)),
    *(f"guided_merge@{w}:boost={b}" for b in (0.6, 1.25, 2, 3) for w in (0.8, 1, 1.2)),
    *(f"arrow@{w}" for w in (1, 1.5, 2, 2.5)),
    *(f"switch@{w}:every=1" for w in (1, 1.5, 2)),
    *(f"boosted_merge@{w}" for w in (0.6, 0.8, 1)),
    *(f"composite_then_merge@{w}:crossover=0.2" for w in (0.8, 1, 1.2)),
    *(f"k_lora@{w}" for w in (1, 1.4)),
    *(f"{m}@{w}" for m in ("composite", "cmlora") for w in (1, 2)),
    *(f"stale_sum@{w}" for w in (0.8, 1)),
    *(f"{m}@{w}" for m in ("loratorio", "sum_of_differences", "frequency_split") for w in (0.8, 1, 1.2)),
)


def read(arm: str) -> tuple[str, float, dict[str, str]]:
    """(method, weight, options) of an arm; ValueError where the method knows no such option."""
    head, _, tail = arm.partition(":")
    name, _, weight = head.partition("@")
    options = dict(part.split("=", 1) for part in tail.split(",") if part)
    resolve("route", name, **options)
    return name, float(weight or 1), options


def drawn_with(bench: Bench, arm: str, chosen: tuple[str, ...]) -> tuple[str, float, dict[str, str]]:
    """`read`, with the set's gate for mole in a way of GATED, trained now where the work folder has none."""
    name, weight, options = read(arm)
    if "gate" in options:
        options["gate"] = str(bench.gate(chosen, GATED[options["gate"]]))
    return name, weight, options


def measure(bench: Bench, chosen: tuple[str, ...], count: int, arms: Iterable[str]) -> None:
    loras = [bench.lora(name) for name in chosen]
    for arm in arms:
        if bench.left(arm, chosen, count):
            name, weight, options = drawn_with(bench, arm, chosen)
            bench.cell(arm, chosen, count, loras, [weight] * len(chosen), resolve("route", name, **options))
    print(f"{'+'.join(chosen)}: done", flush=True)


def cells(journal: Journal) -> dict[int, dict[str, dict[str, float]]]:
    """k -> arm -> its counts."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for e in journal.of("picture"):
        total = found.setdefault(e["k"], {}).setdefault(e["cell"], {})
        for name in ("found", "asked", "complete", "pictures"):
            total[name] = total.get(name, 0) + e[name]
        total["rows"] = total.get("rows", 0) + e["rows"] * e["pictures"]
    return dict(sorted(found.items()))


def page(journal: Journal) -> str:
    lines = [
        "# Looking for better settings: train split, recogniser A\n",
        f"Written by `python benchmarks/better.py`. {STEPS} steps, guidance {GUIDANCE:g}; presence of the "
        "requested designs with its 95% Wilson interval (designs taken as independent), pictures with all of them, "
        "model runs a step. Intervals that overlap order little.\n",
        "| k | arm | presence | all of them | runs a step | pictures |",
        "|---|---|---|---|---|---|",
    ]
    for k, arms in cells(journal).items():
        for arm, c in sorted(arms.items(), key=lambda item: -item[1]["found"] / item[1]["asked"]):
            low, high = wilson(int(c["found"]), int(c["asked"]))
            lines.append(
                f"| {k} | {arm} | {c['found'] / c['asked']:.2f} ({low:.2f} to {high:.2f}) | "
                f"{c['complete'] / c['pictures']:.2f} | {c['rows'] / c['pictures']:.2f} | {c['pictures']:.0f} |"
            )
    return "\n".join([*lines, "", *told_by_reviewers(json.loads(REVIEW.read_text(encoding="utf-8"))), ""])


def told_by_reviewers(review: dict[str, dict[str, list[int]]]) -> list[str]:
    """The review by which Auto's choices are made, as a table."""
    arms = {arm: [review[k][arm] for k in review if arm in review[k]] for by in review.values() for arm in by}

    def seen(cells: list[list[int]]) -> float:
        return sum(c[1] for c in cells) / sum(c[0] for c in cells)

    lines = [
        "## What blind reviewers see\n",
        "Other scenes of the train split's LoRAs, the same for all arms; the share of the designs asked for that "
        "language models see which know neither prompts nor arms. Auto chooses by it.\n",
        f"| arm | pictures | all, 95% | {' | '.join(f'k = {k}' for k in review)} |",
        "|---" * (len(review) + 3) + "|",
    ]
    for arm, cells_ in sorted(arms.items(), key=lambda item: -seen(item[1])):
        low, high = wilson(sum(c[1] for c in cells_), sum(c[0] for c in cells_))
        each = " | ".join(f"{seen([review[k][arm]]):.2f}" if arm in review[k] else "" for k in review)
        pictures = sum(c[3] for c in cells_)
        lines.append(f"| {arm} | {pictures} | {seen(cells_):.2f} ({low:.2f} to {high:.2f}) | {each} |")
    return lines


def plain(name: str, weight: float, options: dict[str, Any]) -> str:
    """An arm without the options that are the method's defaults."""
    bound, usual = resolve("route", name, **options).options, resolve("route", name).options
    told = ",".join(f"{n}={v}" for n, v in bound.items() if v != usual[n])
    return f"{name}@{weight:g}" + (f":{told}" if told else "")


def reviewed(evaluation: Path, sealed: Path, answers: Path) -> dict[str, dict[str, list[int]]]:
    """k -> arm -> [elements asked for, seen by the reviewers, seen by recogniser B, pictures] of a blind review.

    evaluation       the folder of `multilora eval`, for the weights of arms that are told by their method alone
    sealed, answers  as multilora.lab.evaluate.blind has them
    """
    paths = (evaluation / "evaluation.json", sealed, answers)
    plan, asked, told = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    usual = {arm["method"]: arm["weight"] for arm in plan["methods"].values()}
    found: dict[str, dict[str, list[int]]] = {}
    for number, one in asked.items():
        name, _, rest = one["method"].partition(" ")
        options, _, weight = rest.rpartition(" ")
        arm = plain(name, float(weight or usual[name]), json.loads(options or "{}"))
        counts = found.setdefault(str(len(one["asked"])), {}).setdefault(arm, [0, 0, 0, 0])
        for category, wanted in one["asked"].items():
            for i, plus in enumerate((1, told[number][category] == wanted, one["b"][category])):
                counts[i] += plus
        counts[3] += 1
    return dict(sorted(found.items()))


def choices(journal: Journal, review: dict[str, dict[str, list[int]]]) -> dict[str, list[dict[str, Any]]]:
    """k -> the reviewed arms of which each showed more than every one that costs no more, from cheap to dear.

    By the reviewers' eyes, over the pictures of k LoRAs and of one more and one fewer (where all arms of k were
    reviewed), since a few pictures of one k order little; of equals at one price the one that showed more at k itself,
    then the one with weights nearer the user's.
    """
    rows = {
        (str(k), _unweighed(arm)): c["rows"] / c["pictures"]
        for k, arms in cells(journal).items()
        for arm, c in arms.items()
        if "gate=" not in arm
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for k, arms in review.items():
        near = [n for n in (str(int(k) - 1), k, str(int(k) + 1)) if n in review and arms.keys() <= review[n].keys()]

        def shown(arm: str, near: list = near) -> float:
            seen = [review[n][arm] for n in near]
            return sum(c[1] for c in seen) / sum(c[0] for c in seen)

        def order(arm: str, own: dict = arms, shown: Any = shown) -> tuple[float, float, float]:
            return shown(arm), own[arm][1] / own[arm][0], -abs(read(arm)[1] - 1)

        merge = max((arm for arm in arms if arm.startswith("merge@")), key=order)
        cost = {arm: round(rows[k, _unweighed(arm)], 2) for arm in arms}
        kept: list[dict[str, Any]] = []
        most = -1.0
        for arm in sorted(arms, key=lambda a: (cost[a], *(-v for v in order(a)))):
            if shown(arm) > most:
                most = shown(arm)
                name, weight, options = read(arm)
                bound = resolve("route", name, **options)
                kept.append({"method": name, "weight": weight, "options": {n: bound.options[n] for n in options},
                             "rows": cost[arm], "shown": round(most, 3), "merge": round(shown(merge), 3),
                             "merge_weight": read(merge)[1], "ks": [int(n) for n in near],
                             "pictures": sum(review[n][arm][3] for n in near)})  # fmt: skip
        found[k] = kept
    return found


def earlier(old: dict[str, Any], new: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What Auto once chose and does not choose any more, so that recipes of then can be made again."""

    def bare(one: dict[str, Any]) -> dict[str, Any]:
        return {name: one[name] for name in ("method", "weight", "options", "rows")}

    now = [bare(one) for own in new.values() for one in own]
    gone = [*old["earlier"], *(bare(one) for own in old["choices"].values() for one in own)]
    return [one for i, one in enumerate(gone) if one not in now and one not in gone[:i]]


def _unweighed(arm: str) -> str:
    name, _, options = read(arm)
    return plain(name, 1, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=list(ARMS))
    parser.add_argument("--k", type=int, nargs="+", default=[2, 3, 4, 5])
    parser.add_argument("--journal", type=Path, default=ROOT / "docs" / "world" / "better.jsonl")
    parser.add_argument("--review", type=Path, nargs=3, help="with --auto: EVALUATION SEALED ANSWERS")
    parser.add_argument("--auto", action="store_true", help=f"write {AUTO.relative_to(ROOT)}, measure nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="write what the journal holds, measure nothing")
    for name, default in (("pictures", 12), ("sets", 12), ("batch", CHUNK), ("part", 1), ("parts", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    for arm in asked.arms:
        read(arm)
    if asked.auto:
        if asked.review:
            REVIEW.write_text(json.dumps(reviewed(*asked.review), indent=1) + "\n")
        review = json.loads(REVIEW.read_text(encoding="utf-8"))
        new = choices(Journal(asked.journal), review)
        gone = earlier(json.loads(AUTO.read_text(encoding="utf-8")), new)
        told = {"made by": "python benchmarks/better.py --auto", "choices": new, "earlier": gone}
        AUTO.write_text(json.dumps(told, indent=1) + "\n")
        return
    if not asked.table:
        bench = Bench(asked.journal, ROOT / "out" / "better", device=asked.device, batch=asked.batch, recogniser="a")
        for chosen, count in shared_out(asked.k, asked, "train"):
            measure(bench, chosen, count, asked.arms)
    TABLE.write_text(page(Journal(asked.journal)))


if __name__ == "__main__":
    main()
