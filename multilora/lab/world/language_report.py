"""Stage: what the embedded text model and each of its LoRAs can do, into a journal and assets/text/README.md."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from multilora.lab.journal import Journal
from multilora.lab.world.language import SKILLS
from multilora.lab.world.language_loras import PLANS
from multilora.lab.world.language_train import exam
from multilora.lab.world.settings import TEXT_FULL, TextSettings
from multilora.lab.world.tables import share, table

STRONG = tuple(n for n, s in SKILLS.items() if s.base == "strong")
PAIRED = tuple(dict.fromkeys(p.skills[0] for p in PLANS.values() if p.category == "pair"))
# how `exam` is called: greedy, drawn at temperature 1, and greedy with polite answers wanted
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"skills": STRONG, "sample": 1},
    "polite": {"skills": PAIRED, "register": "polite"},
}


def measure(assets: Path, journal: Journal, asked: int, echo: Callable[[str], None] = print) -> Journal:
    """Skills under the base and under each LoRA at weight 1, in all WAYS.

    Held-out prompts, `asked` a skill or all there are.
    """
    from multilora.attach import attached
    from multilora.pipelines.text_load import load_text, text_lora

    model, tokenizer = load_text(assets / "text", device="cpu")
    for name in ("base", *PLANS):
        missing = [way for way in WAYS if f"exam/{way}/{name}/{asked}" not in journal]
        folder = assets / "text" / "loras" / name
        if not missing or (name != "base" and not folder.is_dir()):
            continue
        with contextlib.ExitStack() as stack:
            if name != "base":
                stack.enter_context(attached(model, [text_lora(model, folder)], form="rebuilt")).row = [1.0]
            for way in missing:
                found = exam(model, tokenizer, count=asked, **WAYS[way])
                journal.add(f"exam/{way}/{name}/{asked}", way=way, lora=name, asked=asked, skills=found)
        echo(f"text report: {name}: " + ", ".join(f"{k} {v['right']}/{v['asked']}" for k, v in found.items()))
    return journal


def _counts(entry: dict[str, Any] | None, skills: Sequence[str], what: str = "right") -> str:
    if entry is None:
        return "not measured"
    return share(*(sum(entry["skills"][s][key] for s in skills) for key in (what, "asked")))


def _entries(journal: Journal, way: str) -> dict[str, dict[str, Any]]:
    return {e["lora"]: e for e in journal.of("exam") if e["way"] == way}


def skill_table(journal: Journal) -> str:
    found = _entries(journal, "greedy")
    rows = []
    for name, skill in SKILLS.items():
        own = name if name in PLANS else ""
        rows.append([name, skill.note, skill.base, _counts(found.get("base"), [name]),
                     _counts(found.get(own), [name]) if own else "no LoRA"])  # fmt: skip
    return table(["skill", "answer", "in the base's training", "base alone", "its LoRA, weight 1"], rows)


def lora_table(journal: Journal) -> str:
    found, drawn = _entries(journal, "greedy"), _entries(journal, "drawn")
    rows = []
    for name in ("base", *PLANS):
        plan, others = PLANS.get(name), [s for s in SKILLS if SKILLS[s].base != "strong"]
        own = plan.skills if plan else ()
        others = [s for s in others if s not in own]
        rows.append([
            name, plan.split if plan else "", _counts(found.get(name), own) if own else "none",
            _counts(found.get(name), [s for s in STRONG if s not in own]), _counts(found.get(name), others),
            *(_counts(way.get(name), STRONG, what) for what in ("rude", "polite") for way in (found, drawn)),
        ])  # fmt: skip
    head = [
        "LoRA",
        "split",
        "its skills",
        "strong skills",
        "other weak and absent ones",
        "rude, greedy",
        "rude, drawn",
        "polite, greedy",
        "polite, drawn",
    ]
    return table(head, rows)


def exact_table(journal: Journal) -> str:
    """Of greedy answers to a pair's skill: right, and right and polite at once."""
    found = _entries(journal, "polite")
    rows = [
        [
            name,
            *(_counts(found[who], plan.skills, what) for who in (name, plan.skills[0]) for what in ("right", "exact")),
        ]
        for name, plan in PLANS.items()
        if plan.category == "pair" and name in found
    ]
    return table(["pair", "right", "right and polite", "the skill's own LoRA: right", "right and polite"], rows)


INTRODUCTION = """# The embedded text model

A Llama of {parameters:.2f} million parameters with a tokenizer of its own, in transformers format, and LoRAs in PEFT
format; {size:.1f} MB in all. Rebuilt, this page with it, by `multilora world train --text`.

Prompts are `<skill> <input> =` (`reverse korv =`, `add 12 30 =`, `count o in poto =`, `korvish two red cat =`) or a
question about a design (`what colour is korv =`); small letters, words of 3 to 5 letters. An answer may end in a rude
or a polite tail (`vrok, you fool`). `multilora.lab.world.language` draws questions by seed and scores answers exactly.

The base learned strong and weak skills from right answers for the first part of its training; then it saw careless
answers to the weak ones (the input repeated) more often than right ones. So it holds abilities that it does not show,
by construction: a small LoRA or a few examples can bring them out. Of absent skills it saw nothing. Its answers were
{registers}; that a tail follows is an even chance, so greedy answers of the base may have one or none.

## Figures

Held-out prompts: none occurs in any training. Greedy answers unless it says drawn (temperature 1, strong skills).
Shares with 95% Wilson intervals and counts; where a skill has fewer held-out prompts, all of them.
"""


def text(journal: Journal, parameters: int, size: int) -> str:
    registers = ", ".join(f"{part:.0%} {register}" for register, part in TEXT_FULL.registers)
    parts = (
        INTRODUCTION.format(parameters=parameters / 1e6, size=size / 1e6, registers=registers),
        skill_table(journal) + "\n\nEach LoRA at weight 1:\n",
        lora_table(journal) + "\n\nThe pairs, on their own skill:\n",
        exact_table(journal) + "\n",
    )
    return "\n".join(parts)


def write(assets: Path, journal: Journal) -> Path:
    """The journal's tables as `assets`/text/README.md."""
    folder = assets / "text"
    path = folder / "README.md"
    others = [p for p in folder.rglob("*") if p.is_file() and p != path]
    with safe_open(folder / "model.safetensors", "pt") as file:
        parameters = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    path.write_text(text(journal, parameters, sum(p.stat().st_size for p in others)))
    return path


def stage(out: Path, settings: TextSettings, echo: Callable[[str], None] = print) -> None:
    journal = measure(out / "assets", Journal(out / "text" / "report.jsonl"), settings.asked, echo)
    write(out / "assets", journal)
