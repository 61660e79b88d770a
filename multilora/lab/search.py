"""A search for weights by names: base, LoRAs and score as texts -> what a weigh method is given.

found = prepared("embedded", ["pandu", "heto"], score="presence")
weights = multilora.method.resolve("weigh", "lorahub")(found.loras, found.objective)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multilora import files
from multilora.lab.train.text_data import holds_texts
from multilora.lora import Lora
from multilora.method import unknown
from multilora.pipelines.load import find_lora, load_pipeline

SCORES = ("clip", "presence", "both")


@dataclass(frozen=True)
class Prepared:
    """Loras, their names, an objective for them, and what a record of the search should say (JSON-able)."""

    loras: list[Lora]
    names: list[str]
    objective: Any
    facts: dict[str, Any] = field(default_factory=dict)


def prepared(
    base: str,
    sources: Sequence[str],
    *,
    method: str = "lorahub",
    score: str | None = None,
    names: Sequence[str | None] | None = None,
    data: str | Path | None = None,
    prompts: Sequence[str] = (),
    seed: int = 0,
    seeds: int = 2,
    draws: int = 4,
    steps: int = 12,
    cancel: Any = None,
) -> Prepared:
    """What a method of `multilora.weigh` needs, for a pipeline or, where base or data are of texts, a language model.

    score    of pictures: "clip", "presence" (recogniser A; LoRAs of the embedded library), "both", file.py:function
             with (pictures, prompts) -> numbers, higher is better. Of texts: none, the loss of the examples, or
             file.py:function with (answers, prompts, completions). For "learned" none: a loss with gradients
    data     .jsonl examples for texts; for "learned" on pictures a folder of reference pictures with captions, none:
             each LoRA's own predictions
    prompts  of the pictures; by default scenes of the embedded world that show all LoRAs
    seeds    pictures per prompt, from `seed` on; draws: noise levels per case of "learned"
    steps    of the denoiser in a picture

    Raises ValueError naming what is missing or does not go together.
    """
    if len(sources) < 1:
        raise ValueError("no LoRAs given: there is nothing to weigh")
    names = list(names or [None] * len(sources))
    if data is not None and not Path(data).expanduser().exists():
        raise ValueError(f"data {str(data)!r}: there is no such file or folder")
    if _of_texts(base, data):
        return _texts(base, sources, names, method, score, data, prompts)
    pipe = load_pipeline(base)
    loras, entries = [], []
    for source, name in zip(sources, names, strict=True):
        path, entry = find_lora(source)
        loras.append(files.load(path, base=pipe, name=name or (entry["name"] if entry else None)))
        entries.append(entry)
    shown = [lora.card.name or f"LoRA {i + 1}" for i, lora in enumerate(loras)]
    facts = {"base": base, "seed": seed, "denoising_steps": steps}
    if method == "learned":
        if score is not None:
            raise ValueError(
                f"score {score!r}: learned follows the gradient of a loss and takes no score; use lorahub"
            )
        objective = _with_gradients(pipe, loras, entries, data, prompts, draws, steps, seed, facts)
        return Prepared(loras, shown, objective, facts)
    if data is not None:
        raise ValueError(f"data {str(data)!r}: {method} on pictures draws its own; reference pictures are for learned")
    from multilora.lab.objectives_pictures import PictureScore

    known = score_of(score or "both", entries, shown)
    prompts = list(prompts) or search_prompts(entries, shown, 4)
    facts |= {"prompts": prompts, "seeds": [seed + i for i in range(seeds)]}
    objective = PictureScore(pipe, prompts, facts["seeds"], known, name=score or "both", steps=steps, cancel=cancel)
    return Prepared(loras, shown, objective, facts)


def _of_texts(base: str, data: Any) -> bool:
    folder = Path(base).expanduser()
    language = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    return language or (data is not None and holds_texts(data))


def _texts(
    base: str, sources: Sequence[str], names: Sequence[Any], method: str, score: str | None, data: Any, prompts: Any
) -> Prepared:
    from multilora.lab.objectives import function_of
    from multilora.lab.objectives_text import AnswerLoss, AnswerScore
    from multilora.pipelines.text import TextComposer
    from multilora.pipelines.text_load import load_text, text_lora

    if data is None:
        raise ValueError("a language model's weights are chosen on examples: give data, .jsonl with prompts and "
                         "completions")  # fmt: skip
    if prompts:
        raise ValueError("prompts are of pictures; a language model's are those of the examples")
    if score is not None and (score in SCORES or method == "learned"):
        raise ValueError(f"score {score!r}: texts are scored by their loss (no score), or by file.py:function for a "
                         "search without gradients")  # fmt: skip
    model, tokenizer = load_text(base)
    loras = [text_lora(model, source, name) for source, name in zip(sources, names, strict=True)]
    if score is None:
        objective: Any = AnswerLoss(model, tokenizer, data)
    else:
        objective = AnswerScore(TextComposer(model, tokenizer, base), data, function_of(score), name=score)
    shown = [lora.card.name or Path(source).stem for lora, source in zip(loras, sources, strict=True)]
    return Prepared(loras, shown, objective, {"base": base, "data": str(data)})


def score_of(score: str, entries: Sequence[Mapping[str, Any] | None], names: Sequence[str]) -> Any:
    """A score of pictures by its name. Raises UnknownName, and ValueError for LoRAs that presence cannot judge."""
    from multilora.lab.objectives import function_of
    from multilora.lab.objectives_pictures import clip_and_presence, clip_score, presence_score

    if ".py" in score:
        return function_of(score)
    if score not in SCORES:
        raise unknown("score", score, (*SCORES, "file.py:function"))
    if score == "clip":
        return clip_score()
    wanted = _by_category(entries, names, f"score {score!r}: recogniser A knows")
    return presence_score(wanted) if score == "presence" else clip_and_presence(wanted)


def _by_category(entries: Sequence[Mapping[str, Any] | None], names: Sequence[str], who: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry, name in zip(entries, names, strict=True):
        if entry is None:
            raise ValueError(f"{who} the embedded library's designs, and LoRA {name!r} is none of them; give prompts, "
                             "and score clip or file.py:function")  # fmt: skip
        if entry["category"] in found:
            raise ValueError(f"{who} one {entry['category']} in a picture, and {found[entry['category']]!r} and "
                             f"{name!r} both are one; give prompts, and score clip or file.py:function")  # fmt: skip
        found[entry["category"]] = entry["name"]
    return found


def search_prompts(
    entries: Sequence[Mapping[str, Any] | None], names: Sequence[str], count: int, stream: str = "search"
) -> list[str]:
    """Captions of scenes that show all the designs, other than those of any report. Raises ValueError if it cannot."""
    from multilora.lab.world.caption import caption
    from multilora.lab.world.scene import sample_scene

    designs = _by_category(entries, names, "prompts of their own have")
    generic = {} if "style" in designs else {"style": "flat"}
    seeds = [f"{stream}/{'+'.join(designs.values())}/{i}" for i in range(count)]
    return [caption(sample_scene(random.Random(seed), designs=designs, **generic), 1) for seed in seeds]


def own_prompts(entries: Sequence[Mapping[str, Any] | None], loras: Sequence[Lora], count: int) -> list[list[str]]:
    """[loras] prompts of each alone: scenes with its design, else its trigger words.

    Raises ValueError for a LoRA without trigger words that is not of the embedded library.
    """
    found = []
    for i, (entry, lora) in enumerate(zip(entries, loras, strict=True)):
        if entry is not None:
            found.append(search_prompts([entry], [entry["name"]], count))
        elif lora.card.triggers:
            found.append([", ".join(lora.card.triggers)] * count)
        else:
            name = lora.card.name or f"number {i + 1}"
            raise ValueError(f"LoRA {name!r} has no trigger words on its card: learned without reference pictures "
                             "needs a prompt for it; give data, a folder of pictures with captions")  # fmt: skip
    return found


def _with_gradients(
    pipe: Any, loras: Sequence[Lora], entries: Any, data: Any, prompts: Sequence[str], draws: int, steps: int,
    seed: int, facts: dict[str, Any],
) -> Any:  # fmt: skip
    from multilora.lab.objectives_denoising import own_predictions, reference_loss

    if prompts:
        raise ValueError("prompts: learned takes captions from its reference pictures, or each LoRA's own prompts")
    facts |= {"noise_levels": draws}
    if data is not None:
        facts |= {"data": str(data)}
        return reference_loss(pipe, data, draws=draws, seed=seed)
    own = own_prompts(entries, loras, 2)
    facts |= {"prompts": own}
    return own_predictions(pipe, loras, own, draws=draws, steps=steps, seed=seed)
