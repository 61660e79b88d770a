"""The report as one HTML page that needs no other file: tables, plots and pictures are in it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from multilora.lab.evaluate import plots, statistics
from multilora.lab.evaluate.evaluation import NONE, Results, Shown
from multilora.lab.evaluate.readings import told
from multilora.lab.evaluate.report import (
    MEASURES,
    QUALITY,
    against,
    findings,
    interval_of,
    judged_by,
    k_name,
    measured,
    number,
    span,
    value_of,
)

SIDE = 192  # pixels of an embedded picture's longer side, at most
PROMPTS = 4  # rows of a contact sheet
Row = Mapping[str, Any]
STYLE = """
:root { color-scheme: light dark; --paper: #faf9f6; --card: #fff; --ink: #1c1c22; --grey: #5f5f6b; --line: #dedcd6;
  --tint: 0, 114, 178; --c0: #0072b2; --c1: #d55e00; --c2: #007a5a; --c3: #b0468a; --c4: #8a6d00; --c5: #3f8fc4;
  --c6: #5a5a5a; --c7: #7a4fb5; }
@media (prefers-color-scheme: dark) { :root { --paper: #15161a; --card: #1e2026; --ink: #ecebe6; --grey: #a9a9b4;
  --line: #363943; --tint: 86, 180, 233; --c0: #56b4e9; --c1: #ff9345; --c2: #3fd0a4; --c3: #ef9ccb; --c4: #e6c84a;
  --c5: #9ccdf0; --c6: #b5b5b5; --c7: #bfa3ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 8px 0; } h2 { font-size: 1.25rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 20px 0 4px; } p { margin: 6px 0; max-width: 75ch; } .grey { color: var(--grey); }
.note { border-left: 4px solid var(--c1); padding: 4px 12px; background: var(--card); max-width: 75ch; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figcaption { font-size: .85rem; color: var(--grey); } figcaption b { color: var(--ink); font-size: .95rem; }
figure svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: var(--grey); }
.grid { stroke: var(--line); } .line { fill: none; stroke-width: 1.6; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 10px 0; font-size: .9rem; }
.swatch { width: 14px; height: 14px; vertical-align: -1px; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
tr:last-child td, tr:last-child th { border-bottom: 0; } thead th { color: var(--grey); font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); min-width: 7.5em; }
td span { display: block; color: var(--grey); font-size: .78rem; white-space: nowrap; }
td.best { font-weight: 700; } td.best span { font-weight: 400; } td.tint { border: 1px solid var(--card); }
.sheet { border-collapse: separate; border-spacing: 0; width: auto; } .sheet td { text-align: left; border: 0; }
.sheet .prompt { position: sticky; left: 10px; width: min(70ch, 82vw); font-size: .9rem; padding-top: 10px; }
.sheet img { width: 128px; height: auto; border-radius: 4px; display: block; }
.sheet td small { display: block; color: var(--grey); font-size: .78rem; width: 128px; }
.sheet td small b { color: var(--ink); } dt { font-weight: 600; } dd { margin: 0 0 8px; overflow-wrap: anywhere; }
details { margin: 8px 0; } summary { cursor: pointer; }
"""
COLOUR_RULES = "".join(f".s{i} {{ fill: var(--c{i}); stroke: var(--c{i}); }} " for i in range(plots.COLOURS))


def html(results: Results, made: Mapping[str, Sequence[Row]]) -> str:
    """The page. made: the tables of report.tables."""
    plan, arms = results.plan, results.arms
    title = f"{len(arms)} ways to combine LoRAs" if len(arms) > 1 else f"{arms[0]}: combining LoRAs"
    size = f", {plan.settings.width} x {plan.settings.height}" if plan.settings.width else ""
    about = (
        f"{len(results.shown)} pictures on base {plan.settings.base}, {len(plan.library.entries)} LoRAs of "
        f"{plan.library.source}, k = {', '.join(map(str, plan.ks))}; {plan.settings.steps} steps, guidance "
        f"{plan.settings.guidance:g}{size}. Methods drew each prompt from the same noise."
    )
    body = [f"<h1>{escape(title)}</h1>", f'<p class="grey">{escape(about)}</p>', *_state(results)]
    body += ["<h2>In short</h2>", *(f"<p>{escape(text)}</p>" for text in findings(results))]
    if "clip" in measured(results):
        body.append(
            '<p class="note">Do not choose by the CLIP score alone: in a published study with people (arXiv '
            "2402.16843, its human_eval figures) it did not follow their judgement of composition at all "
            "(correlation -0.01).</p>"
        )
    body += [_legend(arms), '<div class="plots">', *_plots(results, made), "</div>"]
    body += ["<h2>By method and number of LoRAs</h2>", *_by_k(results, made)]
    if made["categories"]:
        body += ["<h2>Elements seen, by category</h2>", _by_category(arms, made["categories"])]
    if len(arms) > 1 and made["wins"]:
        body += ["<h2>Who shows more, picture by picture</h2>", *_matrix(arms, made["wins"])]
        body += [f"<h2>Against {escape(against(results))}</h2>", *_against(results, made["differences"])]
    if made["quality"]:
        body += ["<h2>Quality</h2>", _quality(results, made["quality"])]
    body += ["<h2>Cost</h2>", _costs(results, made["costs"]), *_sheets(results), "<h2>How this was measured</h2>"]
    body.append(_how(results))
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{COLOUR_RULES}</style></head>"
    )
    return f"{head}<body><main>{''.join(body)}</main></body></html>\n"


def _state(results: Results) -> list[str]:
    wanted, done, failed = len(results.plan.wanted), len(results.shown), len(results.failed)
    said = []
    if done + failed < wanted:
        said.append(f"Not finished: {done} of {wanted} pictures. Methods and k have been drawn in turn, so the table "
                    "is balanced; run the same command to go on.")  # fmt: skip
    if failed:
        counts = {arm: sum(a == arm for a, _ in results.failed) for arm, _ in results.failed}
        told = ", ".join(f"{arm} {n}" for arm, n in counts.items())
        said.append(f"{failed} pictures could not be drawn ({told}). The first error: {results.failed[0][1]}")
    return [f'<p class="note">{escape(text)}</p>' for text in said]


def _name(arm: str, arms: Sequence[str]) -> str:
    return f"{plots.swatch(arms.index(arm))} {escape(arm.replace('_', ' '))}"


def _legend(arms: Sequence[str]) -> str:
    return f'<div class="legend">{"".join(f"<span>{_name(arm, arms)}</span>" for arm in arms)}</div>'


def _plots(results: Results, made: Mapping[str, Sequence[Row]]) -> list[str]:
    drawn = []
    for m in measured(results):
        title, unit, is_share = MEASURES[m]
        rows = [r for r in made["cells"] if r["measure"] == m]
        drawn.append(plots.over_k(title, unit, results.arms, list(results.plan.ks), rows, is_share))
    m = judged_by(results)
    if m:
        points = []
        for arm in results.arms:
            shown = results.of(arm)
            runs = sum(s.runs for s in shown) / len(shown) if shown else math.nan
            points.append((arm, runs, interval_of(shown, m).value))
        title, unit, is_share = MEASURES[m]
        drawn.append(plots.against_cost(f"{title}, against cost", unit, points, is_share))
    return drawn


def _grid(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls by itself where the screen is narrow; names and heads are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _by_k(results: Results, made: Mapping[str, Sequence[Row]]) -> list[str]:
    parts, ks = [], [*results.plan.ks, None]
    for m in measured(results):
        found = {(r["method"], r["k"]): r for r in made["cells"] if r["measure"] == m}
        best = {k: max((found[a, k]["value"] for a in results.arms if found[a, k]["pictures"]), default=None)
                for k in ks}  # fmt: skip
        rows = [
            (_name(arm, results.arms), [_cell(found[arm, k], m, found[arm, k]["value"] == best[k]) for k in ks])
            for arm in results.arms
        ]
        counts = sorted({found[a, k]["pictures"] for a in results.arms for k in results.plan.ks})
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        parts.append(f"<h3>{MEASURES[m][0]}</h3>")
        parts.append(
            f'<p class="grey">{MEASURES[m][1].capitalize()}; below it the 95% interval. {n} pictures a cell.</p>'
        )
        parts.append(_grid(["method", *(k_name(k) for k in ks)], rows))
    return parts


def _cell(row: Row, measure: str, best: bool = False) -> str:
    mark = ' class="best"' if best else ""
    return f"<td{mark}>{number(row['value'], measure)}<span>{span(row, measure)}</span></td>"


def _by_category(arms: Sequence[str], rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(r["category"] for r in rows))
    found = {(r["method"], r["category"]): r for r in rows}
    body = [(_name(a, arms), [_cell(found[a, c], "presence") for c in names]) for a in arms]
    return _grid(["method", *map(escape, names)], body)


def _matrix(arms: Sequence[str], rows: Sequence[Row]) -> list[str]:
    found = {(r["method"], r["other"]): r for r in rows}
    body = []
    for a in arms:
        cells = []
        for b in arms:
            if a == b:
                cells.append('<td class="tint">-</td>')
                continue
            r = found[a, b]
            n = r["won"] + r["tied"] + r["lost"]
            if not n:
                cells.append('<td class="tint">-</td>')
                continue
            shade = f"background: rgba(var(--tint), {0.55 * r['won'] / n:.2f})"
            told = f"{r['won']} won, {r['tied']} alike, {r['lost']} lost"
            cells.append(f'<td class="tint" style="{shade}" title="{told}">{100 * r["won"] / n:.0f}%'
                         f"<span>{100 * r['tied'] / n:.0f}% alike</span></td>")  # fmt: skip
        body.append((_name(a, arms), cells))
    what = "more of the requested elements" if rows[0]["measure"] == "presence" else "a higher CLIP score"
    told = (
        f'<p class="grey">How often the method of the row has {what} than the method of the column, of the pictures '
        "that both drew from the same prompt and noise.</p>"
    )
    return [told, _grid(["row against column", *(_name(a, arms) for a in arms)], body)]


def _against(results: Results, rows: Sequence[Row]) -> list[str]:
    first, ks = against(results), [*results.plan.ks, None]
    parts = [
        f'<p class="grey">Difference to {escape(first)} on the same prompts and noise, with the 95% interval of a '
        "paired bootstrap. In bold: 0 lies outside.</p>"
    ]
    for m in measured(results):
        body = []
        for arm in (a for a in results.arms if a != first):
            cells = []
            for k in ks:
                r = next(r for r in rows if (r["measure"], r["method"], r["k"]) == (m, arm, k))
                found = statistics.Interval(r["value"], r["low"], r["high"], r["pictures"])
                value = "-" if math.isnan(r["value"]) else f"{r['value'] * (100 if MEASURES[m][2] else 1):+.1f}"
                mark = ' class="best"' if found.apart else ""
                cells.append(f"<td{mark}>{value}<span>{span(r, m)}</span></td>")
            body.append((_name(arm, results.arms), cells))
        points = ", in percentage points" if MEASURES[m][2] else ""
        parts += [f"<h3>{MEASURES[m][0]}{points}</h3>", _grid(["method", *(k_name(k) for k in ks)], body)]
    return parts


def _quality(results: Results, rows: Sequence[Row]) -> str:
    found = {(r["method"], r["k"]): r for r in rows}
    names = list(dict.fromkeys(r["method"] for r in rows))
    ks = [k for k in results.plan.ks if any(r["k"] == k for r in rows)]
    body = []
    for arm in names:
        shown = [found.get((arm, k)) for k in ks]
        cells = [f"<td>{r['value']:.1f}<span>{r['low']:.1f} to {r['high']:.1f}</span></td>" if r else "<td>-</td>"
                 for r in shown]  # fmt: skip
        body.append((_name(arm, results.arms) if arm in results.arms else escape(arm), cells))
    told = (
        f'<p class="grey">{escape(QUALITY[0].upper() + QUALITY[1:])}. The last row is the floor: renders of other '
        "scenes with the same designs.</p>"
    )
    return told + _grid(["method", *(k_name(k) for k in ks)], body)


def _costs(results: Results, rows: Sequence[Row]) -> str:
    found = {(r["method"], r["k"]): r for r in rows}
    body = []
    for arm in results.arms:
        cells = []
        for k in results.plan.ks:
            r = found[arm, k]
            runs = "-" if math.isnan(r["runs_per_step"]) else f"{r['runs_per_step']:.1f}"
            seconds = "" if math.isnan(r["seconds"]) else f"{r['seconds']:.2f} s"
            cells.append(f"<td>{runs}<span>{seconds}</span></td>")
        body.append((_name(arm, results.arms), cells))
    told = (
        '<p class="grey">Model runs for each denoising step (a conditional and unconditional pair is one run), and '
        "below it the median time of a picture on the machine that drew them, with whatever else it was doing.</p>"
    )
    return told + _grid(["method", *(k_name(k) for k in results.plan.ks)], body)


# -- pictures --------------------------------------------------------------------------------------------------------


def _sheets(results: Results) -> list[str]:
    """Contact sheets, methods side by side: prompts that came out best and worst, and where methods differ most."""
    m = judged_by(results)
    if m is None:
        return []
    places: dict[Any, dict[str, Shown]] = {}
    for s in results.shown:
        places.setdefault(s.wanted.place, {})[s.arm] = s
    whole = [p for p in places.values() if len(p) == len(results.arms)] or list(places.values())

    def values(place: Mapping[str, Shown]) -> list[float]:
        return [v for arm, s in place.items() if arm != NONE and not math.isnan(v := value_of(s, m))] or [0.0]

    def middle(place: Mapping[str, Shown]) -> tuple[float, float]:
        clips = [s.reading.clip for s in place.values() if not math.isnan(s.reading.clip)]
        return sum(values(place)) / len(values(place)), sum(clips) / len(clips) if clips else 0.0

    ranked = sorted(whole, key=middle, reverse=True)
    best, worst = ranked[:PROMPTS], ranked[PROMPTS:][-PROMPTS:][::-1]
    apart = [p for p in ranked if p not in best and p not in worst]
    apart = sorted(apart, key=lambda p: min(values(p)) - max(values(p)))[:PROMPTS]
    parts = ["<h2>Pictures</h2>"]
    parts.append('<p class="grey">Under each picture: elements seen of those asked for, and the CLIP score.</p>')
    for title, chosen in (("Best prompts", best), ("Worst prompts", worst), ("Where methods differ most", apart)):
        if chosen:
            parts += [f"<h3>{title}</h3>", _sheet(chosen, results.arms)]
    return parts


def _sheet(places: Sequence[Mapping[str, Shown]], arms: Sequence[str]) -> str:
    rows = []
    for place in places:
        one = next(iter(place.values()))
        prompt = one.wanted.item.recipe.prompt
        rows.append(f'<tr><td colspan="{len(arms)}"><div class="prompt">{escape(prompt)}</div></td></tr>')
        cells = []
        for arm in arms:
            if arm not in place:
                cells.append("<td></td>")
                continue
            s = place[arm]
            alt = escape(f"{arm}: {prompt}", quote=True)
            cells.append(
                f'<td><img src="{embedded(s.path)}" alt="{alt}">'
                f"<small><b>{escape(arm.replace('_', ' '))}</b><br>{escape(told(s.reading))}</small></td>"
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide" tabindex="0"><table class="sheet">{"".join(rows)}</table></div>'


def embedded(path: Path) -> str:
    """A picture as a data URI: JPEG, its longer side at most SIDE pixels."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _how(results: Results) -> str:
    plan = results.plan
    arms = "; ".join(
        f"{a.name}: the prompt without LoRAs" if a.name == NONE
        else ", ".join([f"{a.name}: {a.method.record.name}", *(f"{k} {v}" for k, v in a.method.options.items()),
                        f"weight {a.weight}"])
        for a in plan.arms
    )  # fmt: skip
    shared = {k: v for k, v in plan.described().items() if k not in ("methods", "loras", "library") and v}
    facts = [
        ("Presence read by", results.read_by["presence"]),
        ("CLIP score by", results.read_by["CLIP score"]),
        ("Sets", "every set of k LoRAs with no category twice and one character, drawn from in turn (ComposLoRA, "
                 f"arXiv 2402.16843): {', '.join(f'{n} for k = {k}' for k, n in _sets(results).items())} in here"),
        ("Noise", "a picture's seed comes from its prompt, its LoRAs and its number, never from method or weights"),
        ("Intervals", f"95%; means by {statistics.RESAMPLES} bootstrap resamples of the pictures, shares by Wilson. "
                      "They speak of other noise and prompts with these LoRAs, not of other LoRAs"),
        ("Methods", arms),
        ("Settings", ", ".join(f"{k} {v}" for k, v in shared.items())),
        ("LoRAs", ", ".join(e.name for e in plan.library.entries)),
        ("Numbers", "in tables/ beside this page, as CSV and Parquet; pictures/ has the PNGs with their recipes"),
    ]  # fmt: skip
    return f"<dl>{''.join(f'<dt>{escape(a)}</dt><dd>{escape(b)}</dd>' for a, b in facts)}</dl>"


def _sets(results: Results) -> dict[int, int]:
    return {k: len({s.wanted.place[1] for s in results.of(k=k)}) for k in results.plan.ks}
