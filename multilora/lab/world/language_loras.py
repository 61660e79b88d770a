"""Stage: the LoRAs of the embedded text model, trained by the public trainer, and their library.json.

A skill's LoRA sees its skill three times in four and the base's own mixture without that skill otherwise, so that it
learns the skill and leaves the rest. It answers in the base's own mixture of registers, so that it says nothing about
politeness; a register's LoRA sees the base's mixture and says nothing about the skills.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multilora.lab.world.language import SKILLS, Example, stream
from multilora.lab.world.language_train import mixture
from multilora.lab.world.settings import TextSettings

REHEARSAL = 0.25
LORA_SEED = 70_000  # streams of the LoRAs; the base's have the numbers of its chunks


@dataclass(frozen=True)
class TextPlan:
    """How one LoRA is trained.

    skills    share of each, () for a register's LoRA
    register  of the answers to those skills; "" for the base's mixture of registers
    split     "train": methods may be tuned on it; "test": tables only
    """

    category: str
    description: str
    skills: tuple[str, ...] = ()
    register: str = ""
    split: str = "train"
    rank: int = 4
    steps: int = 180
    rate: float = 4e-3


def _skill(name: str, split: str = "train", **more: Any) -> TextPlan:
    return TextPlan("skill", SKILLS[name].note, (name,), split=split, **more)


PLANS: Mapping[str, TextPlan] = {
    "reverse": _skill("reverse"),
    "sort": _skill("sort"),
    "next": _skill("next"),
    "double": _skill("double"),
    "less": _skill("less", steps=500),
    "korvish": _skill("korvish"),
    "swap": _skill("swap", steps=300),
    "count": _skill("count", "test", steps=500),
    "sort_digits": _skill("sort_digits", "test"),
    "zibish": _skill("zibish", "test"),
    "mirror": _skill("mirror", "test", steps=300),
    "news": _skill("news", "test", rank=8, steps=400),
    "rude": TextPlan("register", "a rude tail to every answer", register="rude", steps=600),
    "polite": TextPlan("register", "a polite tail to every answer", register="polite", steps=600),
    "sort_polite": TextPlan("pair", "sort, answered politely", ("sort",), "polite"),
    "next_polite": TextPlan("pair", "next, answered politely", ("next",), "polite"),
    "reverse_polite": TextPlan("pair", "reverse, answered politely", ("reverse",), "polite", "test"),
    "count_polite": TextPlan("pair", "count, answered politely", ("count",), "polite", "test", steps=500),
    "sort_next": TextPlan("joint", "sort and next, trained together", ("sort", "next"), steps=300),
    "reverse_count": TextPlan("joint", "reverse and count, trained together", ("reverse", "count"), "", "test",
                              steps=600),
}  # fmt: skip


def training_examples(name: str, count: int, settings: TextSettings, seed: int = 0) -> list[Example]:
    """What the LoRA `name` is trained on; all from the train split."""
    return plan_examples(PLANS[name], name, count, settings, seed)


def plan_examples(plan: TextPlan, name: str, count: int, settings: TextSettings, seed: int = 0) -> list[Example]:
    """The same for any plan; `name` seeds the mixing."""
    start = LORA_SEED + seed
    registers = {plan.register: 1.0} if plan.register else dict(settings.registers)
    if not plan.skills:
        spoken = replace(settings, registers=tuple(registers.items()))
        return [e for e in itertools.islice(mixture(start, spoken), count) if e.prompt]
    rng = random.Random(f"lora/{name}/{seed}")
    own = itertools.cycle([stream(skill, start, register=registers) for skill in plan.skills])
    rest = mixture(start, settings, without=plan.skills)
    return [next(rest) if rng.random() < REHEARSAL else next(next(own)) for _ in range(count)]


def as_texts(found: list[Example]) -> list[dict[str, str]]:
    """Examples as multilora.lab.train.text reads them."""
    return [{"prompt": e.prompt, "completion": e.answer} for e in found]


def make_one(
    name: str, base: Any, assets: Path, work: Path, settings: TextSettings, echo: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train one LoRA of `base`, (model, tokenizer), into `assets`/text/loras; what was seen. Finished ones stay."""
    from multilora.lab.train.text import train

    plan, folder, facts = PLANS[name], assets / "text" / "loras" / name, work / "loras" / f"{name}.json"
    if facts.is_file() and folder.is_dir():
        return json.loads(facts.read_text())
    steps = min(plan.steps, settings.lora_steps)
    data = as_texts(training_examples(name, steps * settings.lora_batch, settings))
    done = train(
        data, *base, folder, rank=plan.rank, steps=steps, lr=plan.rate, batch=settings.lora_batch,
        name=name, category=plan.category, length=settings.positions, checkpoint_every=0,
    )  # fmt: skip
    seen = {"loss": round(sum(done.losses[-20:]) / len(done.losses[-20:]), 4), "seconds": round(done.seconds)}
    facts.parent.mkdir(parents=True, exist_ok=True)
    facts.write_text(json.dumps(seen))
    echo(f"text LoRA {name}: {seen}")
    return seen


def entry(name: str, assets: Path) -> dict[str, Any]:
    """The entry of a LoRA in assets/text/loras/library.json."""
    plan, folder = PLANS[name], assets / "text" / "loras" / name
    return {
        "name": name,
        "file": name,
        "format": "peft",
        "category": plan.category,
        "description": plan.description,
        "skills": list(plan.skills),
        "register": plan.register or "as the base",
        "split": plan.split,
        "sha256": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "rank": plan.rank,
    }


def write_library(assets: Path) -> Path:
    """List the LoRAs that are there."""
    folder = assets / "text" / "loras"
    found = [entry(name, assets) for name in PLANS if (folder / name / "adapter_model.safetensors").is_file()]
    path = folder / "library.json"
    path.write_text(json.dumps({"version": 1, "base": "embedded", "loras": found}, indent=1) + "\n")
    return path


def stage(out: Path, settings: TextSettings, echo: Callable[[str], None] = print) -> None:
    """As multilora.lab.world.stages calls it: every LoRA in turn, then the list of them."""
    from multilora.pipelines.text_load import load_text

    base = load_text(out / "assets" / "text", device="cpu")
    base[0].name_or_path = "embedded"  # the name in the files' recipes, not this machine's folder
    for name in PLANS:
        make_one(name, base, out / "assets", out / "text", settings, echo)
    write_library(out / "assets")
