"""The nine systems in one table: what the papers claim, their numbers, ours, and whether the claim held here."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from multilora.lab.journal import Journal
from multilora.lab.reproduce.bench import Experiment
from multilora.lab.world.tables import table


@dataclass(frozen=True)
class System:
    """One of the nine.

    experiments  name -> the paper's number for that claim, as read in the sources of docs/ideas; "" where we have none
    """

    title: str
    experiments: dict[str, str]


NO_TABLE = "no number at hand"
SYSTEMS = (
    System("LoRA", {"lora": "GLUE average 86.40 fine-tuned, 87.24 LoRA with 0.8 M parameters (RoBERTa base)"}),
    System("PEM arithmetic", {"addition": NO_TABLE, "negation": NO_TABLE, "analogy": NO_TABLE,
                              "arithmetic_pictures": "none: the paper has no pictures"}),
    System("Uniform and learned combination", {"few_shot": NO_TABLE}),
    System("LoRAHub", {"lorahub_text": "BBH 34.7 (mean of 5 seeds), zero-shot 27.0, LoRA tuning 37.7"}),
    System("LoRAMoE", {"loramoe": NO_TABLE}),
    System("LoRA-Switch", {"token_switch": "decoding 2.4 ms a token base, 3.1 ours, 8.6 per-layer routing (MoRAL); "
                                           "general average 60.12 against 60.45"}),
    System("MoLE", {"mole": "three concepts, CLIP text alignment: .678 normalised sum, .728 SVDiff, .759 MoLE"}),
    System("Fisher-weighted averaging", {"fisher_text": NO_TABLE}),
    System("Multi-LoRA composition", {"composition": "GPT-4V prefers Switch to Merge in 69%, Composite in 55% (k = 5, "
                                                     "composition)"}),
)  # fmt: skip
# name of an experiment -> why its claim fails here, as far as its figures and tables show; not said where it holds.
REASONS = {
    "addition": (
        "the mean of two pairs of factors leaves each LoRA's update a quarter of its size, beside cross "
        "products of factors that were trained apart; the sum of the updates has neither"
    ),
    "analogy": (
        "what the difference of two LoRAs holds depends on the skill that it is taken from: from some it "
        "carries over nearly whole, from others not at all"
    ),
    "arithmetic_pictures": (
        "a LoRA teaches a design, not its class, which the base knows from all of its training: subtracted, "
        "it takes no class away"
    ),
    "few_shot": (
        "weights help where a LoRA of the pool knows the task, and not where none does; and a model this "
        "small is fine-tuned well by few examples"
    ),
    "lorahub_text": (
        "the search does better than zero-shot, but a model this small learns more from training on the same "
        "few examples"
    ),
    "loramoe": (
        "the learning rate at which its experts learn the tasks, chosen on training prompts, is larger than "
        "LoRA's, and more is forgotten at it; the constraint does part the experts by type of sample, and "
        "what that does for recall is within the noise"
    ),
    "token_switch": (
        "perhaps since what the first adapted layer sees of a token is its embedding, which does not know "
        "what is asked: a route by the second block's input makes up for it on one pool of LoRAs, and on the "
        "other misses a skill that the first layer's route finds"
    ),
    "mole": (
        "rows that sum to 1 leave k LoRAs about 1/k of their strength each, and these need all of it: rows "
        "that sum to k are above the best Merge; and weight 1 does not damage this base"
    ),
    "fisher_text": (
        "the weighted mean comes out nearly as the plain one, perhaps since checkpoints of one base depend on"
        " much the same weights; and on a model this small a Fisher is no small fraction of training on"
    ),
    "composition": (
        "Switch and Composite leave each LoRA 1/k of its effect, and three or more of these LoRAs need all of"
        " it: Merge at weight 1/k loses most of its lead from k = 3 on"
    ),
}
HEAD = """# The nine systems, reproduced in miniature

Written by `multilora reproduce` from the journals beside it (`text/report.jsonl`, `world/report.jsonl`): no figure on
this page was typed in. The models are the embedded ones, a Stable Diffusion and a Llama small enough for a laptop.
What holds on them need not hold on large ones, and the other way round. A verdict follows a rule that was written
before the figures were there, in the function `verdict` of the experiment's file in `multilora/lab/reproduce/`.
Intervals are 95%. Where a claim fails, a line of ours says why, as far as the tables let us see.
"""


def rows(experiments: Sequence[Experiment], journal: Journal) -> list[tuple[str, str, str, str, str]]:
    """(system, claim, paper's number, ours, verdict), one row a claim, all nine systems."""
    known, lines = {one.name: one for one in experiments}, []
    for i, system in enumerate(SYSTEMS, 1):
        title = f"{i}. {system.title}"
        for name, number in system.experiments.items():
            if name not in known:
                said = f"not measured to its end: `multilora reproduce {name}`"
                lines.append((title, name.replace("_", " "), number, "", said))
                continue
            holds, found = known[name].verdict(known[name].where(journal))
            why = f": {REASONS[name]}" if name in REASONS else ""
            lines.append((title, known[name].claim, number, found, "holds" if holds else f"does not hold here{why}"))
    return lines


RAN = ("experiment", "measured on", "machine", "minutes of all processes", "CPU minutes", "lines in the journal")


def summary(found: Sequence[Experiment], journal: Journal, runs: Sequence[Sequence[str]]) -> str:
    """docs/reproduction.md; runs: rows of RAN"""
    head = ["system", "claim", "the paper's number", "ours", "verdict"]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows(found, journal)]
    parts = [HEAD, table(head, cells)]
    known = {one.name: one for one in found}
    for i, system in enumerate(SYSTEMS, 1):
        here = [known[name] for name in system.experiments if name in known]
        if not here:
            continue
        parts.append(f"## {i}. {system.title}")
        for one in here:
            parts.append(f"![{one.title}](text/{one.name}.png)")
            own = one.where(journal)
            parts.append(f"Tables: [text.md](text.md), {one.title!r}." if own is journal else one.tables(own))
    parts += ["## When, on what, how long", table(list(RAN), [list(row) for row in runs])]
    return "\n\n".join(part.strip() for part in parts) + "\n"


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1f2933}
table{border-collapse:collapse;width:100%}td,th{border:1px solid #d5dae1;padding:.4rem .6rem;text-align:left;
vertical-align:top;overflow-wrap:anywhere}img{max-width:100%;height:auto}.wide{overflow-x:auto}
td:first-child,th:first-child{min-width:8rem}.yes{color:#0b6e4f;font-weight:600}.no{color:#9b2c2c;font-weight:600}
@media(max-width:40rem){th,td{min-width:9rem}}
@media(prefers-color-scheme:dark){body{background:#14181d;color:#dde3ea}td,th{border-color:#3a434e}
.yes{color:#5ad1a4}.no{color:#f29a9a}img{background:#fff}}"""


def html_page(found: Sequence[Experiment], journal: Journal, runs: Sequence[Sequence[str]], docs: Path) -> str:
    """The same as one page that needs nothing beside it; the figures are those in docs/text/."""
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[:4])
        + f"<td>{_verdict(row[4])}</td></tr>"
        for row in rows(found, journal)
    )  # fmt: skip
    heads = "".join(f"<th>{name}</th>" for name in ("system", "claim", "the paper's number", "ours", "verdict"))
    times = "".join(
        "<tr>" + "".join(f"<{tag}>{_code(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in (("th", RAN), *(("td", row) for row in runs))
    )
    figures = "".join(
        f"<h2>{html.escape(one.title)}</h2><p>{html.escape(one.claim)}.</p>"
        f'<img alt="{html.escape(one.title)}" src="{_encoded(docs / "text" / f"{one.name}.png")}">'
        for one in found
    )
    title, _, words = HEAD.partition("\n\n")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title[2:]}</title><style>{STYLE}</style><h1>{title[2:]}</h1><p>{_code(words)}</p>"
        f'<div class="wide"><table><tr>{heads}</tr>{lines}</table></div>{figures}<h2>When, on what, how long</h2>'
        f'<div class="wide"><table>{times}</table></div></html>\n'
    )


def _verdict(said: str) -> str:
    """The verdict in its colour, and why."""
    held, colon, why = said.partition(":")
    kind = {"holds": "yes", "does not hold here": "no"}.get(held, "")
    return f'<span class="{kind}">{html.escape(held)}</span>{colon}{_code(why)}'


def _code(words: str) -> str:
    """What Markdown has between backticks, as HTML."""
    parts = html.escape(words).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _encoded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
