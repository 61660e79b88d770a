"""Objectives on drawn pictures: any score of pictures and prompts, with the same noise for every candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from multilora.chosen import Row
from multilora.lab.objectives_text import negated_mean
from multilora.lab.world.loras import pictures
from multilora.lora import Lora

Score = Callable[[Sequence[Image.Image], Sequence[str]], Any]


class PictureScore:
    """Minus the mean score of the pictures that each row draws: every prompt with every seed, Merge at the weights.

    score  (pictures, their prompts) -> numbers, higher is better
    steps  few: a search compares, it does not show
    batch  pictures in one run of the pipeline

    The noise of a picture is its seed's for all rows, so differences are those of the weights. Raises ValueError
    without prompts or seeds.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        score: Score,
        *,
        name: str = "",
        steps: int = 12,
        guidance: float = 3.0,
        batch: int = 8,
        cancel: Any = None,
    ) -> None:
        self.pipe, self.score, self.steps, self.guidance = pipe, score, steps, guidance
        self.name = name or str(getattr(score, "__name__", "score"))
        self.batch, self.cancel = batch, cancel
        self.asked = [(prompt, seed) for prompt in prompts for seed in seeds]
        if not self.asked:
            raise ValueError(f"score {self.name!r}: {len(prompts)} prompts and {len(seeds)} seeds, wanted 1 of each")

    def __call__(self, loras: Sequence[Lora], rows: Sequence[Row]) -> list[Any]:
        return [negated_mean(self.score(self.drawn(loras, row), [p for p, _ in self.asked])) for row in rows]

    def drawn(self, loras: Sequence[Lora], row: Sequence[float]) -> list[Image.Image]:
        """The pictures of one row, in the order of `asked`. Raises Cancelled when `cancel` is set."""
        live = [(lora, float(w)) for lora, w in zip(loras, row, strict=True) if w and len(lora)]
        found: list[Image.Image] = []
        for first in range(0, len(self.asked), self.batch):
            part = self.asked[first : first + self.batch]
            found += pictures(
                self.pipe, [p for p, _ in part], [s for _, s in part], [lora for lora, _ in live],
                steps=self.steps, guidance=self.guidance, weights=[w for _, w in live], cancel=self.cancel,
            )  # fmt: skip
        return found


def clip_score(clip: str = "embedded") -> Score:
    """CLIP score of picture and prompt, as a cosine (0 to 1). clip: as multilora.lab.score.clip.load_clip takes it."""
    from multilora.lab.score.clip import load_clip

    scorer = load_clip(clip)
    return lambda images, prompts: [s / 100 for s in scorer.score(images, prompts)]


def presence_score(wanted: Mapping[str, str], recogniser: str = "a") -> Score:
    """Mean probability, over the wanted elements, that recogniser A gives them: smoother than counting what is there.

    wanted: {category: design}. Raises UnknownName for what the recogniser does not know, ValueError for recogniser B,
    which only measures.
    """
    from multilora.lab.score.presence import load_recogniser

    if recogniser == "b":
        raise ValueError("recogniser 'b' is for tables only: what a search optimised by it would be no measurement")
    eyes = load_recogniser(recogniser)
    for head, label in wanted.items():
        eyes.index(head, label)

    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        found = eyes.probability(images, wanted)
        return [sum(values) / len(values) for values in zip(*(p.tolist() for p in found.values()), strict=True)]

    return score


def clip_and_presence(wanted: Mapping[str, str], clip: str = "embedded", share: float = 0.5) -> Score:
    """share * presence + (1 - share) * CLIP cosine: the elements are there, and the whole is what the prompt says."""
    seen, told = presence_score(wanted), clip_score(clip)

    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        pairs = zip(seen(images, prompts), told(images, prompts), strict=True)
        return [share * a + (1 - share) * b for a, b in pairs]

    return score
