"""Stage: gates of the embedded text LoRAs, trained by the public trainers, with what they bring in their cards.

A gate learns from training prompts of its LoRAs' skills, without being told which skill a prompt is of. Its card's
recipe has "held_out": way -> skill -> [right, asked] on held-out prompts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from multilora.gates import Gate, read_gate, write_gate
from multilora.lab.world.language import examples, score
from multilora.lab.world.language_loras import as_texts
from multilora.lab.world.language_train import answer
from multilora.lab.world.settings import TextSettings
from multilora.lab.world.tables import share, table
from multilora.lora import Lora

GATE_SEED = 80_000  # streams of the gates' examples; LoRAs and base have others
EACH = 150  # examples of a skill
SKILLS = ("reverse", "sort", "next", "double")
OWN, EVEN, GATED = "each skill's own LoRA", "equal shares", "the gate"
# name: (kind, module of the trainer, its settings)
GATES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "text_mole": ("mole", "gates", {"lr": 1e-2, "balance": 0.0}),
    "text_token_switch": ("token_switch", "token_switch", {"lr": 1e-2, "head": "model.layers.1.self_attn.q_proj"}),
}
STEPS, BATCH = 150, 16


def training_texts(count: int = EACH, seed: int = 0) -> list[dict[str, str]]:
    """What a gate learns from: training prompts of every skill."""
    return as_texts([e for skill in SKILLS for e in examples(skill, count, GATE_SEED + seed)])


def right(
    base: Any, loras: Sequence[Lora], method: str, asked: int, skills: Sequence[str] = SKILLS, **options: Any
) -> dict[str, list[int]]:
    """Skill -> [right, asked] on held-out prompts, of `base`, (model, tokenizer), under a route method."""
    from multilora.pipelines.text import composing_text

    found, (model, tokenizer) = {}, base
    with composing_text(model, list(loras), method, **options):
        for skill in skills:
            wanted = examples(skill, asked, split="held_out")
            counts = score(wanted, answer(model, tokenizer, [e.prompt for e in wanted]))
            found[skill] = [counts["right"], counts["asked"]]
    return found


def make_one(name: str, base: Any, loras: Sequence[Lora], folder: Path, settings: TextSettings) -> Gate:
    """Train one gate of `base`, (model, tokenizer), into `folder` and measure it. A finished one stays."""
    path = folder / f"{name}.safetensors"
    kind, module, own = GATES[name]
    if not path.is_file() or "held_out" not in read_gate(path).recipe:
        train = importlib.import_module(f"multilora.lab.train.{module}").train
        train(
            loras, base[0], path, data=training_texts(), tokenizer=base[1], steps=min(STEPS, settings.lora_steps),
            batch=min(BATCH, settings.lora_batch), length=settings.positions, checkpoint_every=0, **own,
        )  # fmt: skip
        alone = [right(base, [lora], "merge", settings.asked, [s]) for s, lora in zip(SKILLS, loras, strict=True)]
        held_out = {OWN: {skill: pair for one in alone for skill, pair in one.items()},
                    EVEN: right(base, loras, kind, settings.asked),
                    GATED: right(base, loras, kind, settings.asked, gate=str(path))}  # fmt: skip
        gate = read_gate(path)
        recipe = {**gate.recipe, "base": "embedded", "held_out": held_out}
        write_gate(replace(gate, recipe=recipe), path)
    return read_gate(path)


def page(folder: Path) -> str:
    """README.md of a folder of gates, from their cards."""
    gates = {path.stem: read_gate(path) for path in sorted(folder.glob("*.safetensors"))}
    rows = [
        [name, gate.kind, ", ".join(gate.names), gate.recipe["learned_from"], str(gate.recipe["settings"]["steps"])]
        for name, gate in gates.items()
    ]
    parts = [
        "# Gates",
        "Trained for embedded LoRAs. Of pictures: `multilora compose --method KIND --gate NAME`, the Compose page; "
        "of texts, `text_...`: the Text page. `multilora gates show NAME` draws what one does. A gate's card, in its "
        "file's header, has its LoRAs by sha256 and all settings: `multilora gates list --json`.",
        table(["gate", "kind", "LoRAs", "learned from", "steps"], rows),
    ]
    for name, gate in gates.items():
        found = gate.recipe.get("held_out")
        if found:
            lines = [[way, *(share(*pair) for pair in counts.values()), share(*_all(counts))]
                     for way, counts in found.items()]  # fmt: skip
            parts += [f"## {name}", "Right answers to held-out prompts; the gate is not told which skill is asked.",
                      table(["way", *found[GATED], "all"], lines)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _all(counts: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    return sum(pair[0] for pair in counts.values()), sum(pair[1] for pair in counts.values())


def stage(out: Path, settings: TextSettings, echo: Callable[[str], None] = print) -> None:
    """As multilora.lab.world.stages calls it: every gate in turn, then the page about them."""
    from multilora.pipelines.text_load import load_text, text_lora

    assets, folder = out / "assets", out / "assets" / "gates"
    folder.mkdir(parents=True, exist_ok=True)
    base = load_text(assets / "text", device="cpu")
    loras = [text_lora(base[0], assets / "text" / "loras" / name, name) for name in SKILLS]
    for name in GATES:
        echo(f"text gate {name}: {make_one(name, base, loras, folder, settings).recipe['held_out'][GATED]}")
    (folder / "README.md").write_text(page(folder), encoding="utf-8")
