"""What the Weights page asks for and shows, without gradio: words for `multilora search`, its curve, its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from multilora.web import said as words
from multilora.web.background import searched
from multilora.web.evaluating import lora_words, within
from multilora.web.service import Refused, Service, Session

# name -> (what it is called here, largest budget)
METHODS = {"lorahub": ("without gradients (LoRAHub, CMA-ES)", 400), "learned": ("by gradient (learned)", 1000)}
SCORED = {"both": "CLIP and presence of each element", "presence": "presence of each element (recogniser A)",
          "clip": "CLIP"}  # fmt: skip


def search_words(
    service: Service, session: Session, references: Sequence[str], method: str, score: str, budget: int, prompts: str,
    pictures: int, steps: int,
) -> tuple[list[str], int]:  # fmt: skip
    """(words for `multilora search`, candidates). `prompts`: one a line. Raises Refused naming the wrong field."""
    if not references or len(references) < 2:
        raise Refused("LoRAs: choose two or more; a search weighs them against each other")
    if method not in METHODS:
        raise Refused(f"search {method!r}: wanted one of {', '.join(METHODS)}")
    if score not in SCORED:
        raise Refused(f"score {score!r}: wanted one of {', '.join(SCORED)}")
    within("budget", budget, METHODS[method][1])
    within("pictures per prompt", pictures, 8)
    within("steps", steps, service.limits.steps)
    asked = [line.strip() for line in (prompts or "").splitlines() if line.strip()]
    if len(asked) > 16 or any(len(line) > service.limits.prompt for line in asked):
        raise Refused(f"prompts: at most 16, one a line, of at most {service.limits.prompt} characters", "limit")
    if any("<lora:" in line for line in asked):
        raise Refused("prompts: LoRAs are chosen in the list, not written as <lora:...>")
    told = [f"--lora={lora}" for lora in lora_words(service, session, references)]
    told += ["--method", method, "--budget", str(int(budget)), "--steps", str(int(steps)), "--force"]
    told += ["--base", session.base or service.bases[0], *(f"--prompt={line}" for line in asked)]
    if method == "lorahub":
        return [*told, "--score", score, "--seeds", str(int(pictures))], int(budget)
    return [*told, "--option", "scope=global", "--option", "form=free"], int(budget) + 1


def curve(folder: Path | None, names: Sequence[str]) -> Image.Image | None:
    """The search so far as a chart; None before its first candidate."""
    from multilora.chosen import Trial
    from multilora.lab.search_chart import draw_search

    trials = [Trial(*row) for row in searched(folder)] if folder else []
    if not trials:
        return None
    names = names if len(names) == len(trials[0].weights) else [f"LoRA {i + 1}" for i in range(len(trials[0].weights))]
    return draw_search(names, trials, title="Weights tried", subtitle=f"candidates: {len(trials)}")


def best(folder: Path | None) -> list[float]:
    """The weights with the lowest loss so far, [] before the first candidate."""
    trials = searched(folder) if folder else []
    return list(min(trials, key=lambda row: row[1] + row[2])[0]) if trials else []


def table(names: Sequence[str], weights: Sequence[float]) -> str:
    """The best weights so far, as a table."""
    if not weights:
        return ""
    rows: Mapping[str, Any] = {name: f"{weight:.3f}" for name, weight in zip(names, weights, strict=False)}
    return words.facts(dict(rows), "Best weights so far")
