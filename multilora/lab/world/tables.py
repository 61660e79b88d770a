"""The journal of a report as tables for assets/README.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from multilora.lab.evaluate.statistics import wilson
from multilora.lab.journal import Journal
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.report import METHODS, STUDY, categories_in_order

START, END = "<!-- report: start -->", "<!-- report: end -->"


def share(found: int, asked: int) -> str:
    """Such as "0.93 (0.91 to 0.95), 465 of 500"."""
    if not asked:
        return "not measured"
    low, high = wilson(found, asked)
    return f"{found / asked:.2f} ({low:.2f} to {high:.2f}), {found} of {asked}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(head), " | ".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _sum(entries: list[dict[str, Any]], head: str) -> tuple[int, int]:
    pairs = [e["heads"][head] for e in entries if head in e["heads"]]
    return sum(p[0] for p in pairs), sum(p[1] for p in pairs)


def eyes_table(journal: Journal) -> str:
    found = {e["recogniser"]: e["heads"] for e in journal.of("eyes")}
    rows = [
        [head.replace("_", " "), *(share(*found[n][head]) if n in found else "not measured" for n in ("a", "b"))]
        for head in categories_in_order()
    ]
    text = table(["head", "recogniser A", "recogniser B"], rows)
    if "clip" in found:
        text += f"\n\nCLIP picks a picture's own caption among 32: {share(*found['clip']['top-1 of 32'])}."
    return text


def base_table(journal: Journal) -> str:
    entries = journal.of("base")
    rows = [[head.replace("_", " "), share(*_sum(entries, head))] for head in categories_in_order()]
    pairs = [_sum(entries, head) for head in categories_in_order()]
    rows.append(["all", share(sum(p[0] for p in pairs), sum(p[1] for p in pairs))])
    return table(["element named in the prompt", "seen by recogniser B"], rows)


def alone_table(journal: Journal) -> str:
    rows = []
    for design in DESIGNS.values():
        entries = [e for e in journal.of("alone") if e["name"] == design.name]
        sums = {
            # of several counts the largest: the smaller ones are its first pictures
            on: max(((e["found"], e["asked"]) for e in entries if e["on"] == on), key=lambda c: c[1], default=(0, 0))
            for on in (True, False)
        }
        rows.append([design.trigger, design.category, design.split, share(*sums[True]), share(*sums[False])])
    told = table(["LoRA", "category", "split", "with it, weight 1", "same prompts without it"], rows)
    for one in journal.of("looked"):  # labels: [with the LoRA, whether a reviewer sees its element] by picture
        seen = {on: [there for with_it, there in one["labels"] if with_it == on] for on in (False, True)}
        without, given = (share(sum(labels), len(labels)) for labels in seen.values())
        told += (
            f"\n\nThe pictures without {DESIGNS[one['name']].trigger} in which B saw it before it was calibrated, "
            f"among as many with it and without words: a reviewer finds it in {without}; with it in {given}."
        )
    return told


def held_back_text(journal: Journal) -> str:
    """A sentence on false alarms of recogniser B before its logits were lowered (multilora.lab.world.calibrate)."""
    designs = (journal.lines.get("held_back/b") or {"designs": {}})["designs"]
    told = [
        f"{name} in {one['alarms']} of {one['pictures']} (its logit is {one['lower']:g} lower now)"
        for name, one in designs.items()
        if one["lower"]
    ]
    if not told:
        return "No design was held back."
    most = max((one["alarms"] for one in designs.values() if not one["lower"]), default=0)
    text = (
        "Before it was calibrated on pictures without LoRAs, of prompts that no table uses, B saw "
        f"{', '.join(told)}; every other design in at most {most}."
    )
    again = journal.lines.get("read_again/b")
    if again is None:
        return text
    before, after, asked, cells = (again[name] for name in ("before", "after", "asked", "cells"))
    return (
        f"{text} Tables of pictures drawn before that are as B read them then: of {asked} elements in {cells} cells "
        f"of benchmarks/leaderboard.md it saw {before} then and sees {after} now, in no cell more than "
        f"{again['most']:.1%} of them more or fewer."
    )


def review_table(journal: Journal) -> str:
    entries = journal.of("review")
    if not entries:
        return "not measured"
    last = entries[-1]
    heads = categories_in_order()
    rows = [[head.replace("_", " "), *(share(*last[kind][head]) for kind in ("named", "heads"))] for head in heads]
    sums = [[sum(last[kind][head][i] for head in heads) for i in (0, 1)] for kind in ("named", "heads")]
    rows.append(["all", *(share(*pair) for pair in sums)])
    return f"{last['pictures']} pictures.\n\n" + table(["element", "as the prompt says", "as recogniser B says"], rows)


def _cell(entries: list[dict[str, Any]]) -> str:
    asked, count = sum(e["asked"] for e in entries), sum(e["pictures"] for e in entries)
    if not asked:
        return "not measured"
    found, complete = sum(e["found"] for e in entries), sum(e["complete"] for e in entries)
    low, high = wilson(found, asked)
    score = statistics.fmean(s for e in entries for s in e["clip"])
    return f"{found / asked:.2f} ({low:.2f} to {high:.2f}), all {complete / count:.2f}, CLIP {score:.1f}, n {count}"


def composition_table(journal: Journal) -> str:
    entries = journal.of("composition")
    rows = [
        [cell.name, *(_cell([e for e in entries if e["cell"] == cell.name and e["k"] == k]) for k in (2, 3, 4, 5))]
        for cell in METHODS
    ]
    return table(["method", "k = 2", "k = 3", "k = 4", "k = 5"], rows)


def study_table(journal: Journal) -> str:
    entries = journal.of("study")
    rows = []
    for cell in STUDY:
        mine = [e for e in entries if e["cell"] == cell.name]
        if mine:
            rows.append([cell.name, _cell(mine)])
    return table(["drawn by", "presence, complete pictures, CLIP score"], rows)


def speed_table(journal: Journal) -> str:
    entries = journal.of("speed")
    if not entries:
        return "not measured"
    first = entries[0]["seconds"]
    rows = [[e["name"], f"{e['seconds']:.2f} s", f"{e['seconds'] / first:.2f}", str(e["threads"])] for e in entries]
    return table(["four LoRAs by", "a picture", "times no LoRA", "threads"], rows)


def text(journal: Journal) -> str:
    """All tables with what they mean."""
    return "\n\n".join(
        (
            "## Figures",
            "All on held-out seeds. A share stands with its 95% Wilson interval and its counts. Recogniser B reads "
            "generated pictures; it was used for nothing else.",
            "### Recognisers and CLIP on held-out renders",
            eyes_table(journal),
            "### The base alone: elements that the prompt names",
            base_table(journal),
            "### Each LoRA alone",
            alone_table(journal),
            held_back_text(journal),
            "### What a reviewer sees who has not seen the prompts",
            "Generated pictures of the base and of each LoRA alone, shown without words (`multilora world review`). "
            "Left: the reviewer's word is the prompt's, where the prompt names the element. Right: recogniser B's "
            "class is the reviewer's.",
            review_table(journal),
            "### Composition on the test split",
            "Sets of k test designs with one character and no category twice; prompts name the triggers and generic "
            "elements for the rest. The noise of a picture is the same in every row. Each cell: share of requested "
            "designs seen (95% interval, designs taken as independent), share of pictures with all of them, CLIP "
            "score of picture and prompt by the embedded scorer, pictures. 25 steps, guidance 3, switch every 5.",
            composition_table(journal),
            "### What decides it: sets of three train designs",
            study_table(journal),
            "### Speed: 25 steps, guidance, one picture",
            speed_table(journal),
        )
    )


def write(journal: Journal, readme: Path) -> Path:
    """Put the tables between the markers of assets/README.md, at its end where it has none."""
    old = readme.read_text() if readme.is_file() else "# The embedded world\n"
    block = f"{START}\n{text(journal)}\n{END}"
    if START in old and END in old:
        new = old[: old.index(START)] + block + old[old.index(END) + len(END) :]
    else:
        new = old.rstrip() + "\n\n" + block + "\n"
    readme.parent.mkdir(parents=True, exist_ok=True)
    readme.write_text(new)
    return readme
