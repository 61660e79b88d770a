"""All experiments: run, and written as docs/text.md (those on texts) and docs/reproduction.md, a figure each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from multilora.lab.journal import Journal, ran
from multilora.lab.reproduce.bench import FULL, Bench, Experiment, Size
from multilora.lab.reproduce.jobs import measure, read, side_by_side
from multilora.lab.reproduce.systems import html_page, summary
from multilora.method import unknown
from multilora.recipe import save_png

# name -> first parts of its keys in its journal; with lines of the first one it counts as measured
NAMES = {"lora": ("lora",), "addition": ("addition",), "negation": ("negation",), "analogy": ("analogy",),
         "arithmetic_pictures": ("negation", "analogy"), "few_shot": ("few_shot",), "lorahub_text": ("lorahub",),
         "loramoe": ("loramoe",), "token_switch": ("token_switch",), "mole": ("picture",), "fisher_text": ("fisher",),
         "composition": ("composition", "ablation")}  # fmt: skip
COMMAND = "command"  # first part of the keys of what one `multilora reproduce` took
LONGEST = ("mole", "composition")  # begun first where several run at once
HEAD = """# Weights on language: what the papers claim, on the embedded text model

Measured by `multilora reproduce`, which also wrote this page; `docs/text/report.jsonl` holds every count. The model is
the embedded one (`assets/text/README.md`): a Llama of 0.9 million parameters that was trained here on generated
questions. What holds on it need not hold on a large model, and the other way round.

Prompts of all figures are held out: no training, search or choice of a number saw them. Numbers that a method leaves
open (a weight, a strength, λ) are chosen on training prompts. An interval after counts is Wilson's, after n it is
bootstrapped; both 95%.

"Holds" is decided by a rule written before the figures were there, in the function `verdict` of each file in
`multilora/lab/reproduce/`.
"""


def experiment(name: str) -> Experiment:
    """Raises UnknownName."""
    if name not in NAMES:
        raise unknown("experiment", name, NAMES)
    return read(name)


def reproduce(
    names: Sequence[str] = (), docs: str | Path = "docs", *, work: str | Path | None = None, size: Size = FULL,
    jobs: int = 1, echo: Callable[[str], None] = print,
) -> Path:  # fmt: skip
    """Measure experiments (all by default), then write the page of all that was measured; the page's path.

    docs  folder of text.md and text/, which holds report.jsonl (run again to go on from it) and the figures
    work  folder for what is trained on the way, `docs`/text/work by default; not needed afterwards
    jobs  processes that measure side by side, each with its share of the threads. With more than one, call this under
          `if __name__ == "__main__":` and give as `echo` a function of a module

    Raises UnknownName for another experiment before anything runs, ValueError for fewer than one job, and
    ChildProcessError where a process ended by itself. An error or Ctrl-C ends all processes; finished lines stay in
    the journals.
    """
    found = [experiment(name) for name in dict.fromkeys(names or NAMES)]
    if jobs < 1:
        raise ValueError(f"jobs: wanted 1 or more, got {jobs}")
    folder = Path(docs) / "text"
    report, work = folder / "report.jsonl", folder / "work" if work is None else Path(work)
    began, before = time.perf_counter(), _count(found, Journal(report))
    longest_first = sorted(found, key=lambda one: one.name not in LONGEST)
    pieces = [(one.name, part) for one in longest_first for part in one.parts or ("",)]
    jobs = min(jobs, len(pieces))
    if jobs > 1:
        side_by_side(jobs, pieces, report, work, size, echo)
    else:
        bench = Bench.embedded(report, work, size, echo)
        for one in found:
            measure(one, "", bench)
    journal = Journal(report)
    took, new = time.perf_counter() - began, _count(found, journal) - before
    if new:
        journal.add(f"{COMMAND}/{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}", experiments=[one.name for one in found],
                    jobs=jobs, before=before, lines=new, wall=round(took, 1))  # fmt: skip
    return write(journal, Path(docs))


def _count(found: Sequence[Experiment], journal: Journal) -> int:
    return sum(len(lines(one, journal)) for one in found)


def lines(one: Experiment, journal: Journal) -> list[dict[str, Any]]:
    """An experiment's lines, in the journal of texts or beside it."""
    own = one.where(journal)
    return [line for part in NAMES[one.name] for line in own.of(part)]


def measured(journal: Journal) -> list[Experiment]:
    """The experiments that have results, but for those that were stopped before there is a verdict."""
    begun = [one for one in map(experiment, NAMES) if one.where(journal).of(NAMES[one.name][0])]
    return [one for one in begun if _whole(one, one.where(journal))]


def _whole(one: Experiment, journal: Journal) -> bool:
    try:
        one.verdict(journal), one.tables(journal), one.figure(journal)
    except (ArithmeticError, LookupError, StopIteration, ValueError):  # lines that they need are not there yet
        return False
    return True


def times(journal: Journal) -> list[tuple[str, ...]]:
    """Rows of systems.RAN: when, on what and how long each experiment was measured, all together, and as one command
    that began with nothing."""
    each = [(one.title, lines(one, journal)) for one in measured(journal)]
    rows = [(title, *ran(found)) for title, found in [*each, ("all", [line for _, own in each for line in own])]]
    for one in journal.of(COMMAND):
        if not one["before"] and set(one["experiments"]) == set(NAMES):
            title = f"`multilora reproduce` from nothing to its end, {one['jobs']} processes"
            on, machine, *_ = ran([one])
            rows.append((title, on, machine, f"{one['wall'] / 60:.1f}", "", str(one["lines"])))
    return rows


def on_texts(journal: Journal) -> list[Experiment]:
    return [one for one in measured(journal) if one.where(journal) is journal]


def verdict_line(one: Experiment, journal: Journal) -> str:
    holds, why = one.verdict(one.where(journal))
    return f"**{'Holds' if holds else 'Does not hold'} here.** {why[:1].upper()}{why[1:]}."


def text(journal: Journal) -> str:
    """The page of the text model. Raises ValueError when nothing was measured."""
    found = on_texts(journal)
    if not found:
        raise ValueError(f"{journal.path}: nothing was measured; run `multilora reproduce`")
    parts = [HEAD]
    for one in found:
        parts.append(
            f"## {one.title}\n\nClaim ({one.paper}): {one.claim}.\n\n{verdict_line(one, journal)}\n\n"
            f"![{one.title}](text/{one.name}.png)\n\n{one.tables(journal)}\n"
        )
    return "\n".join(parts)


def write(journal: Journal, docs: Path) -> Path:
    """Out of a journal: docs/text.md, docs/reproduction.md and .html, docs/text/<name>.png; the path of the second."""
    found = measured(journal)
    for one in found:
        save_png(one.figure(one.where(journal)), docs / "text" / f"{one.name}.png")
    if on_texts(journal):
        (docs / "text.md").write_text(text(journal))
    path = docs / "reproduction.md"
    runs = times(journal)
    path.write_text(summary(found, journal, runs))
    path.with_suffix(".html").write_text(html_page(found, journal, runs, docs))
    return path
