"""Tables and figures in README.md and docs/ideas, from the records and from stored results: python docs/make_pages.py

    python docs/make_pages.py --evaluation FOLDER    # first keep the tables of a finished `multilora eval`

What lies between `<!-- NAME: start -->` and `<!-- NAME: end -->` is made here; tests/test_docs_made.py compares.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from multilora.lab.evaluate.statistics import wilson
from multilora.lab.world.tables import share
from multilora.method import methods

ROOT = Path(__file__).resolve().parents[1]
README, IDEAS = ROOT / "README.md", ROOT / "docs" / "ideas"
KEPT = ROOT / "docs" / "world" / "evaluation"  # cells.csv, costs.csv and evaluation.json of the evaluation shown
KS = (2, 3, 4, 5)
# method -> when to use it; a method that is not here is found by `multilora methods`
WHEN = {
    "merge": "always first; also the fastest",
    "guided_merge": "three LoRAs and more with guidance, at weights below 1",
    "auto": "you would rather not choose; the default of the command and the app",
    "sum_of_differences": "the LoRAs spoil each other in a Merge and the time is there",
    "stale_sum": "as the sum of differences, where k + 1 runs a step are too many",
    "switch": "Merge smears two subjects into one, and the LoRAs are strong: raise their weights",
    "composite": "a clean blend matters more than strength: raise the weights",
    "stale_composite": "as Composite, likewise",
    "weighted_switch": "as Switch, where the prompt says much of one LoRA and little of another",
    "weighted_composite": "as Composite, likewise",
    "composite_then_merge": "Composite has the right layout and too little of each LoRA",
    "loratorio": "the LoRAs belong to different places of the picture, and the time is there",
    "mole": "one set of LoRAs is used again and again, so that training a gate pays",
    "arrow": "many LoRAs and nothing known about which fits where",
    "token_switch": "language models: one route for all layers of a token",
    "loramoe": "language models: experts trained together on new data; here they did not forget less than one LoRA",
}


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("--evaluation", type=Path, help="folder of a finished `multilora eval`")
    given = reader.parse_args()
    if given.evaluation is not None:
        keep(given.evaluation)
    for path in pages():
        path.write_text(made(path), encoding="utf-8")
        print(path)


def keep(folder: Path) -> None:
    """Copy an evaluation's plan, cells and costs. Raises ValueError when it has no tables yet."""
    tables = folder / "tables"
    if not (tables / "cells.csv").is_file():
        raise ValueError(f"{folder}: no tables/cells.csv in it; let `multilora eval --out {folder}` end first")
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in ("cells.csv", "costs.csv"):
        shutil.copyfile(tables / name, KEPT / name)
    shutil.copyfile(folder / "evaluation.json", KEPT / "evaluation.json")


def pages() -> list[Path]:
    return [README, *sorted(IDEAS.glob("*.md"))]


def made(path: Path) -> str:
    """A page's text with its blocks made anew. Raises ValueError for a block without an end, or that nothing makes."""
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"^<!-- (\w+): start -->$", text, re.M):
        start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
        head, _, rest = text.partition(start)
        _, ended, tail = rest.partition(end)
        if not ended or name not in BLOCKS:
            raise ValueError(f"{path}: {start}: wanted the line {end}, and one of {', '.join(BLOCKS)}")
        text = f"{head}{start}\n{BLOCKS[name]()}\n{end}{tail}"
    return text


def methods_table() -> str:
    rows = ["| method | what it does | model runs per step | use it when |", "|---|---|---|---|"]
    records = methods("route")
    for name, when in WHEN.items():
        record = records[name]
        label = f"[`{name}`]({record.paper})" if "://" in record.paper else f"`{name}`"
        rows.append(f"| {label} | {record.title} | {record.cost} | {when} |")
    return "\n".join(rows)


def alone() -> str:
    """How often each embedded LoRA shows its element, and the same prompts without it."""
    found = [e for e in report() if e["key"].startswith("alone/")]
    told = []
    for on in (True, False):
        mine = [e for e in found if e["on"] == on]
        told.append(share(sum(e["found"] for e in mine), sum(e["asked"] for e in mine)))
    count = len({e["name"] for e in found})
    return (
        f"{count} LoRAs, each alone at weight 1: its element is there in {told[0]} pictures; the same prompts without "
        f"it: {told[1]}."
    )


def verdicts(*names: str) -> str:
    """What docs/text.md says of experiments, one after the other: the claim, and whether it held."""
    from multilora.lab.reproduce.page import experiment

    page = (ROOT / "docs" / "text.md").read_text(encoding="utf-8")
    told = []
    for name in names:
        one = experiment(name)
        section = re.search(rf"^## {re.escape(one.title)}$(.*?)(?=^## |\Z)", page, re.M | re.S)
        if section is None:
            told.append(f"{one.title}: not measured yet; `multilora reproduce {name}` does.")
            continue
        anchor = re.sub(r"[^\w -]", "", one.title.lower()).replace(" ", "-")
        (verdict,) = re.findall(r"^\*\*.*$", section[1], re.M)
        told.append(f"[{one.title}](../text.md#{anchor}). The claim: {one.claim}.\n\n{verdict}")
    return "\n\n".join(told)


def verdict_on_pictures(name: str, anchor: str) -> str:
    """As `verdicts` of an experiment whose section is in docs/reproduction.md."""
    from multilora.lab.journal import Journal
    from multilora.lab.reproduce.page import experiment, verdict_line

    one, journal = experiment(name), Journal(ROOT / "docs" / "text" / "report.jsonl")
    where = f"../reproduction.md#{anchor}"
    return f"[{one.title}]({where}). The claim: {one.claim}.\n\n{verdict_line(one, journal)}"


def leaderboard() -> str:
    """Elements seen and complete pictures by method and k, best first."""
    found = evaluated() if (KEPT / "cells.csv").is_file() else reported()
    order = sorted(found, key=lambda name: -sum(cell[0] for cell in found[name].values()) / len(found[name]))
    rows = [f"| method | {' | '.join(f'k = {k}' for k in KS)} |", f"|---|{'---|' * len(KS)}"]
    rows += [f"| {name} | {' | '.join(_said(found[name][k]) for k in KS)} |" for name in order]
    if (KEPT / "evaluation.json").is_file():
        plan = json.loads((KEPT / "evaluation.json").read_text(encoding="utf-8"))
        weights = sorted({f"{arm['weight']:g}" if isinstance(arm["weight"], float) else arm["weight"]
                          for arm in plan["methods"].values()})  # fmt: skip
        told = f"{plan['steps']} steps, guidance {plan['guidance']:g}, every LoRA at weight {' or '.join(weights)}"
        rows += ["", f"{told}, the same noise for all; what a picture costs: `docs/world/evaluation/costs.csv`."]
    if (KEPT / "blind.json").is_file():
        rows += ["", reviewed(json.loads((KEPT / "blind.json").read_text(encoding="utf-8")))]
    return "\n".join(rows)


def reviewed(found: dict) -> str:
    """What a blind review (multilora.lab.evaluate.blind) says of the recogniser, in a few sentences."""
    value, low, high = found["agreement"]
    tau, least, most = found["tau"]
    both, mine, its, _ = (sum(column) for column in zip(*found["categories"].values(), strict=True))
    alone = ", ".join(f"{c} {t[2]} and {t[1]}" for c, t in sorted(found["categories"].items(), key=lambda x: -x[1][2]))
    order = sorted(found["methods"].items(), key=lambda x: -x[1][1] / x[1][0])
    best = ", ".join(f"{name} {seen / asked:.2f}" for name, (asked, seen, _) in order[:3])
    return (
        f"Reviewers (language models that see, given neither prompts nor methods) labelled {found['pictures']} of "
        f"these pictures. Recogniser B agrees with them on {value:.2f} ({low:.2f} to {high:.2f}) of "
        f"{found['elements']} elements, kappa {found['kappa']:.2f}, and is the milder one: it sees "
        f"{(both + its) / found['elements']:.2f}, they {(both + mine) / found['elements']:.2f} (B alone and they "
        f"alone: {alone}). The order of the methods is much the same, Kendall's tau {tau:.2f} ({least:.2f} to "
        f"{most:.2f}); theirs begins {best}."
    )


def weights_of_pictures() -> str:
    """The table of benchmarks/weigh_pictures.md, with its heading's words."""
    whole = (ROOT / "benchmarks" / "weigh_pictures.md").read_text(encoding="utf-8")
    return f"On pictures: {whole.partition('weigh_pictures.py`.')[2].strip()}".replace("\n## ", "\n### ")


MOST = 6  # rows of each leaderboard that a page shows


def guided() -> str:
    """The first rows of benchmarks/leaderboard.md for each k and all that reviewers saw, with its heading's words."""
    whole = (ROOT / "benchmarks" / "leaderboard.md").read_text(encoding="utf-8")
    head, *parts = re.split(r"^## ", whole, flags=re.M)
    told = [head.partition("leaderboard.py`.")[2].strip()]
    for part in parts:
        lines = part.splitlines()
        rows = [i for i, line in enumerate(lines) if line.startswith("|")]
        told.append("### " + "\n".join(lines[: rows[0] + 2 + MOST] if part.startswith("k = ") else lines).strip())
    told.append("All of them: [benchmarks/leaderboard.md](../../benchmarks/leaderboard.md).")
    return "\n\n".join(told)


def board() -> str:
    """The leaderboard with a row a method, and what its reader must know."""
    from benchmarks import leaderboard
    from multilora.lab.journal import Journal

    told = (
        "25 steps, guidance 3, the same prompts and noise for all. Weight "
        "and options of a method for each k are those that showed most on the train split by another recogniser; "
        "Auto's are by reviewers; a gate, ZipLoRA and LoRAHub see the set of LoRAs beforehand. CLIP score, quality, "
        "seconds, paired intervals and what reviewers see: "
        "[benchmarks/leaderboard.md](benchmarks/leaderboard.md)."
    )
    return f"{leaderboard.compact(Journal(ROOT / 'docs' / 'world' / 'leaderboard.jsonl'))}\n\n{told}"


Cell = tuple[float, float, float, float, int]  # share seen, its interval, share of complete pictures, pictures


def _said(cell: Cell) -> str:
    seen, low, high, complete, n = cell
    return f"{seen:.2f} ({low:.2f} to {high:.2f}), {complete:.2f}, n {n}"


def evaluated() -> dict[str, dict[int, Cell]]:
    """From the kept tables of `multilora eval`."""
    rows = list(csv.DictReader((KEPT / "cells.csv").read_text(encoding="utf-8").splitlines()))
    by = {(row["measure"], row["method"], row["k"]): row for row in rows}
    found: dict[str, dict[int, Cell]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        for k in KS:
            seen, whole = by["presence", method, str(k)], by["complete", method, str(k)]
            numbers = (float(seen["value"]), float(seen["low"]), float(seen["high"]), float(whole["value"]))
            found.setdefault(method, {})[k] = (*numbers, int(seen["pictures"]))
    return found


def reported() -> dict[str, dict[int, Cell]]:
    """From docs/world/report.jsonl, as assets/README.md has it."""
    entries = [e for e in report() if e["key"].startswith("composition/")]
    found: dict[str, dict[int, Cell]] = {}
    for name in dict.fromkeys(e["cell"] for e in entries):
        for k in KS:
            mine = [e for e in entries if (e["cell"], e["k"]) == (name, k)]
            seen, asked, whole, n = (sum(e[key] for e in mine) for key in ("found", "asked", "complete", "pictures"))
            found.setdefault(name, {})[k] = (seen / asked, *wilson(seen, asked), whole / n, n)
    return found


def report() -> list[dict[str, Any]]:
    """The lines of the embedded world's own report."""
    lines = (ROOT / "docs" / "world" / "report.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# name of a block -> what makes it
BLOCKS = {
    "methods": methods_table,
    "leaderboard": leaderboard,
    "alone": alone,
    "against_full": partial(verdicts, "lora"),
    "pem": partial(verdicts, "addition", "negation", "analogy"),
    "few_shot": partial(verdicts, "few_shot"),
    "lorahub": partial(verdicts, "lorahub_text"),
    "lorahub_pictures": weights_of_pictures,
    "guided": guided,
    "board": board,
    "mole": partial(verdict_on_pictures, "mole", "7-mole"),
    "loramoe": partial(verdicts, "loramoe"),
    "lora_switch": partial(verdicts, "token_switch"),
    "fisher": partial(verdicts, "fisher_text"),
}

if __name__ == "__main__":
    main()
