"""The tables of an evaluation, each a list of flat rows: for CSV and Parquet, the HTML page, and the terminal."""

from __future__ import annotations

import csv
import math
import statistics as medians
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multilora.lab.evaluate import statistics
from multilora.lab.evaluate.evaluation import NONE, Results, Shown
from multilora.lab.evaluate.quality import quality
from multilora.lab.evaluate.statistics import Interval

Row = dict[str, Any]
QUALITY = "kernel distance (KID x 1000) to real renders of the same scenes, lower is better"
# measure -> (title, what a number means, whether it is a share)
MEASURES = {
    "presence": ("Elements seen", "share of the requested elements that are in the picture", True),
    "complete": ("Complete pictures", "share of pictures with every requested element", True),
    "clip": ("CLIP score", "100 times the cosine of picture and prompt", False),
}


def value_of(shown: Shown, measure: str) -> float:
    """One picture's number; nan where it was not measured."""
    return {"presence": shown.reading.presence, "complete": shown.reading.complete, "clip": shown.reading.clip}[
        measure
    ]


def measured(results: Results) -> list[str]:
    """The measures that this evaluation has numbers for."""
    return [m for m in MEASURES if any(not math.isnan(value_of(s, m)) for s in results.shown)]


def judged_by(results: Results) -> str | None:
    """The measure that picks best and worst: presence, else CLIP score, else None."""
    return next((m for m in ("presence", "clip") if m in measured(results)), None)


def _flat(found: Interval) -> Row:
    return {"value": found.value, "low": found.low, "high": found.high, "pictures": found.n}


def interval_of(shown: Sequence[Shown], measure: str) -> Interval:
    """A measure's mean over pictures: Wilson's interval for complete pictures, else the bootstrap's."""
    values = [v for s in shown if not math.isnan(v := value_of(s, measure))]
    if measure == "complete":
        return statistics.share(round(sum(values)), len(values))
    return statistics.mean(values)


def cells(results: Results) -> list[Row]:
    """One row per measure, method and k; k is None for all together."""
    return [
        {"measure": m, "method": arm, "k": k, **_flat(interval_of(results.of(arm, k), m))}
        for m in measured(results)
        for arm in results.arms
        for k in (*results.plan.ks, None)
    ]


def categories(results: Results) -> list[Row]:
    """One row per method and category of element: how often it was seen, over all k."""
    names = list(dict.fromkeys(c for s in results.shown for c in s.reading.seen))
    rows = []
    for arm in results.arms:
        for category in names:
            seen = [s.reading.seen[category] for s in results.of(arm) if category in s.reading.seen]
            rows.append({"method": arm, "category": category, **_flat(statistics.share(sum(seen), len(seen)))})
    return rows


def against(results: Results) -> str:
    """The method that others are compared with: the first one with LoRAs."""
    return next((arm for arm in results.arms if arm != NONE), results.arms[0])


def differences(results: Results) -> list[Row]:
    """One row per measure, other method and k: its paired difference to the method of `against`."""
    first, rows = against(results), []
    for m in measured(results):
        for arm in (a for a in results.arms if a != first):
            for k in (*results.plan.ks, None):
                pairs = [(value_of(a, m), value_of(b, m)) for a, b in results.paired(arm, first, k)]
                known = [(a, b) for a, b in pairs if not (math.isnan(a) or math.isnan(b))]
                found = statistics.difference([a for a, _ in known], [b for _, b in known])
                rows.append({"measure": m, "method": arm, "against": first, "k": k, **_flat(found)})
    return rows


def wins(results: Results) -> list[Row]:
    """One row per ordered pair of methods: on how many shared pictures it shows more, equal, fewer elements.

    Where presence was not measured, the CLIP score decides.
    """
    m = judged_by(results)
    rows = []
    for a in results.arms if m else ():
        for b in (x for x in results.arms if x != a):
            pairs = results.paired(a, b)
            won, tied, lost = statistics.wins([value_of(x, m) for x, _ in pairs], [value_of(y, m) for _, y in pairs])
            rows.append({"measure": m, "method": a, "other": b, "won": won, "tied": tied, "lost": lost})
    return rows


def costs(results: Results) -> list[Row]:
    """One row per method and k: model runs in a step (mean), seconds of drawing a picture (median)."""
    rows = []
    for arm in results.arms:
        for k in results.plan.ks:
            shown = results.of(arm, k)
            seconds = [s.seconds for s in shown if not math.isnan(s.seconds)]
            rows.append({
                "method": arm, "k": k, "pictures": len(shown),
                "runs_per_step": medians.fmean(s.runs for s in shown) if shown else math.nan,
                "seconds": medians.median(seconds) if seconds else math.nan,
            })  # fmt: skip
    return rows


def pictures(results: Results) -> list[Row]:
    """One row per picture, with the readings of every category that some picture asks for."""
    names = list(dict.fromkeys(c for s in results.shown for c in s.reading.seen))
    return [
        {
            "method": s.arm, "k": s.k, "loras": " ".join(e.name for e in s.wanted.entries), "index": s.wanted.index,
            "seed": s.wanted.item.recipe.seed, "prompt": s.wanted.item.recipe.prompt,
            "presence": s.reading.presence, "complete": s.reading.complete, "clip": s.reading.clip,
            **{f"seen_{c}": s.reading.seen.get(c) for c in names},
            "runs_per_step": s.runs, "seconds": s.seconds, "picture": f"pictures/{s.path.name}",
        }
        for s in results.shown
    ]  # fmt: skip


def tables(results: Results) -> dict[str, list[Row]]:
    """Every table by the name of its file."""
    return {
        "pictures": pictures(results), "cells": cells(results), "categories": categories(results),
        "differences": differences(results), "wins": wins(results), "quality": quality(results),
        "costs": costs(results),
    }  # fmt: skip


def write(results: Results, folder: str | Path) -> list[Path]:
    """Write report.html, summary.md, and every table as tables/NAME.csv and .parquet into the folder.

    Raises ValueError when there is no picture yet. Without pyarrow there is no .parquet.
    """
    from multilora.lab.evaluate.page import html

    if not results.shown:
        raise ValueError(f"{folder}: no picture is done yet, so there is nothing to report")
    folder = Path(folder)
    made = tables(results)
    paths = [_written(folder / "report.html", html(results, made)), _written(folder / "summary.md", markdown(made))]
    (folder / "tables").mkdir(exist_ok=True)
    for name, rows in made.items():
        if rows:
            paths += [_csv(rows, folder / "tables" / f"{name}.csv"), *_parquet(rows, folder / "tables" / name)]
    return paths


def _written(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)


def _csv(rows: Sequence[Row], path: Path) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({k: "" if v is None or v != v else v for k, v in row.items()} for row in rows)
    return path


def _parquet(rows: Sequence[Row], stem: Path) -> list[Path]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return []
    path = stem.with_suffix(".parquet")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    # A column of nothing has no type of its own, and seeds are whole numbers of 63 bits.
    columns = {name: pyarrow.array(v, pyarrow.float64() if not any(x is not None for x in v) else None)
               for name, v in columns.items()}  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return [path]


# -- words -----------------------------------------------------------------------------------------------------------


def number(value: float, measure: str = "presence") -> str:
    """A share as per cent, any other number with one decimal; "-" for none."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.0f}%" if MEASURES[measure][2] else f"{value:.1f}"


def span(row: Mapping[str, Any], measure: str) -> str:
    """The ends of a row's interval: "44 to 57"."""
    if math.isnan(row["low"]):
        return ""
    by, digits = (100, 0) if MEASURES[measure][2] else (1, 1)
    return f"{by * row['low']:.{digits}f} to {by * row['high']:.{digits}f}"


def distance(row: Mapping[str, Any] | None) -> str:
    """A row of the table of quality: "13.2 (11.0 to 15.8)"; "-" for none."""
    return "-" if row is None else f"{row['value']:.1f} ({row['low']:.1f} to {row['high']:.1f})"


def k_name(k: int | None) -> str:
    return "all" if k is None else f"k = {k}"


def findings(results: Results) -> list[str]:
    """What the tables say, in sentences: who leads for each k, and whether that is more than chance."""
    m = judged_by(results)
    if m is None:
        return ["Nothing was measured: no recogniser knows these LoRAs, and no CLIP scorer was given."]
    said = []
    for k in results.plan.ks:
        means = {arm: interval_of(results.of(arm, k), m) for arm in results.arms if arm != NONE}
        ranked = sorted((a for a in means if means[a].n), key=lambda a: -means[a].value)
        if not ranked:
            continue
        best, name = ranked[0], {a: a.replace("_", " ") for a in ranked}
        what = "of the elements seen" if m == "presence" else "CLIP score"
        text = f"{k} LoRAs: {name[best]} leads, {number(means[best].value, m)} {what}"
        if len(ranked) > 1:
            second = ranked[1]
            pairs = results.paired(best, second, k)
            apart = statistics.difference([value_of(a, m) for a, _ in pairs], [value_of(b, m) for _, b in pairs])
            sure = "more than chance" if apart.apart else "within chance"
            text += f"; {name[second]} has {number(means[second].value, m)}, and the difference is {sure}"
        said.append(text + ".")
    return said


def markdown(made: Mapping[str, Sequence[Row]]) -> str:
    """The tables by method and k, with intervals, and the cost, as Markdown for a terminal."""
    parts = []
    for m in dict.fromkeys(row["measure"] for row in made["cells"]):
        rows = [row for row in made["cells"] if row["measure"] == m]
        ks = list(dict.fromkeys(row["k"] for row in rows))
        lines = [["method", *(k_name(k) for k in ks)]]
        for arm in dict.fromkeys(row["method"] for row in rows):
            mine = {row["k"]: row for row in rows if row["method"] == arm}
            lines.append([arm, *(f"{number(mine[k]['value'], m)} ({span(mine[k], m)})" for k in ks)])
        parts += [f"**{MEASURES[m][0]}**: {MEASURES[m][1]} (95% interval)", _table(lines)]
    if made["quality"]:
        ks = list(dict.fromkeys(row["k"] for row in made["quality"]))
        lines = [["method", *(k_name(k) for k in ks)]]
        for arm in dict.fromkeys(row["method"] for row in made["quality"]):
            mine = {row["k"]: row for row in made["quality"] if row["method"] == arm}
            lines.append([arm, *(distance(mine.get(k)) for k in ks)])
        parts += [f"**Quality**: {QUALITY} (95% interval)", _table(lines)]
    lines = [["method", "k", "pictures", "model runs a step", "seconds a picture"]]
    lines += [
        [r["method"], str(r["k"]), str(r["pictures"]), f"{r['runs_per_step']:.1f}", f"{r['seconds']:.2f}"]
        for r in made["costs"]
    ]
    return "\n\n".join([*parts, "**Cost**", _table(lines)]) + "\n"


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * w for w in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in (lines[0], rule, *lines[1:])
    )
