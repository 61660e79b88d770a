"""What the experiments on the embedded text model share: the model with its LoRAs, questions, a journal, intervals."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from multilora.attach import attached
from multilora.lab.journal import Journal
from multilora.lab.train.text import answer_losses, padding, train
from multilora.lab.train.text_data import IGNORED, Tokens, padded, read_texts, tokenised
from multilora.lab.train.text_other import put
from multilora.lab.world.language import Example, examples, score
from multilora.lab.world.language_loras import as_texts
from multilora.lab.world.language_train import answer
from multilora.lora import Lora
from multilora.pipelines.text_load import load_text, text_lora

DRAWN = 90_000  # seeds of examples that methods may see; LoRAs and base were trained on others
CHECKED = 95_000  # seeds of examples, also of training prompts, by which a method's one number is chosen


@dataclass(frozen=True)
class Size:
    """How much is measured.

    asked     held-out questions a skill
    seeds     repetitions of what is drawn or trained
    training  share of the training steps
    most      sets (pairs, targets) of an experiment at most
    """

    asked: int = 100
    seeds: int = 3
    training: float = 1.0
    most: int = 1_000

    def steps(self, full: int) -> int:
        return max(2, round(full * self.training))


FULL = Size()
SMOKE = Size(asked=3, seeds=1, training=0.02, most=1)


@dataclass(frozen=True)
class Target:
    """A task: a skill, answered in a register. An answer counts when it is right, and in another register than plain
    when it is in that one too."""

    skill: str
    register: str = "plain"

    @property
    def name(self) -> str:
        return self.skill if self.register == "plain" else f"{self.skill}, {self.register}"

    def draw(self, count: int, seed: int, start: int = DRAWN) -> list[Example]:
        """Examples to learn from: training prompts."""
        return examples(self.skill, count, start + seed, "train", self.register)

    def held_out(self, count: int) -> list[Example]:
        return examples(self.skill, count, split="held_out", register=self.register)

    def counts(self, scored: Mapping[str, int]) -> list[int]:
        """[right, asked]"""
        return [scored["right" if self.register == "plain" else "exact"], scored["asked"]]


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    claim    the paper's, in a line
    measure  (bench) -> None: fills the journal; what is in it already is not measured again
    tables   (journal) -> Markdown
    verdict  (journal) -> (whether the claim held, why)
    figure   (journal) -> a picture
    where    (the journal of texts) -> the journal that tables, verdict and figure read; by default the same one
    parts    what `measure` does, in named pieces that can be done side by side; none for an experiment in one piece
    """

    name: str
    title: str
    paper: str
    claim: str
    measure: Callable[[Bench], None]
    tables: Callable[[Journal], str]
    verdict: Callable[[Journal], tuple[bool, str]]
    figure: Callable[[Journal], Image.Image]
    where: Callable[[Journal], Journal] = lambda journal: journal
    parts: Mapping[str, Callable[[Bench], None]] = field(default_factory=dict)


@dataclass
class Bench:
    """The embedded text model (or another of its kind) with what it is asked, and where results go.

    work  folder of what is trained on the way
    """

    model: Any
    tokenizer: Any
    journal: Journal
    work: Path
    size: Size = FULL
    echo: Callable[[str], None] = print
    _loras: dict[str, Lora] = field(default_factory=dict)

    @classmethod
    def embedded(cls, journal: Path, work: Path, size: Size = FULL, echo: Callable[[str], None] = print) -> Bench:
        return cls(*load_text("embedded", device="cpu"), Journal(journal), work, size, echo)

    def cell(self, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The journal's entry of a key, made now where there is none."""
        if key not in self.journal:
            self.journal.add(key, **make())
            self.echo(f"{key}: {str({k: v for k, v in self.journal.lines[key].items() if k != 'key'})[:160]}")
        return self.journal.lines[key]

    def lora(self, name: str) -> Lora:
        """One of the embedded library's."""
        if name not in self._loras:
            self._loras[name] = text_lora(self.model, name)
        return self._loras[name]

    def trained(self, name: str, found: Sequence[Example], **settings: Any) -> Lora:
        """A LoRA trained on examples, kept in the work folder under its name."""
        folder = self.work / name
        if not folder.is_dir():
            train(as_texts(list(found)), self.model, self.tokenizer, folder, length=96, checkpoint_every=0, name=name,
                  **{"rank": 4, **settings})  # fmt: skip
        return text_lora(self.model, folder)

    @contextlib.contextmanager
    def weighed(self, loras: Sequence[Lora], row: Sequence[float] | None = None) -> Iterator[None]:
        """The LoRAs on the model at their weights (1 each by default)."""
        row = [1.0] * len(loras) if row is None else list(row)
        used = [(lora, w) for lora, w in zip(loras, row, strict=True) if w and len(lora)]
        if not used:
            yield
            return
        with attached(self.model, [lora for lora, _ in used], form="rebuilt") as bank:
            bank.row = [w for _, w in used]
            yield

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Other parameters in the model; the same bytes as before afterwards."""
        own = {n: p.detach().clone() for n, p in self.model.named_parameters() if n in weights}
        try:
            put(self.model, weights)
            yield
        finally:
            put(self.model, own)

    def ask(self, wanted: Sequence[Example], sample: int | None = None) -> dict[str, int]:
        """Counts of multilora.lab.world.language.score: greedy answers, or drawn at temperature 1 by a seed."""
        rng = torch.random.get_rng_state()
        try:
            said = answer(self.model, self.tokenizer, [e.prompt for e in wanted], sample=sample)
        finally:
            torch.random.set_rng_state(rng)
        return score(wanted, said)

    def right(self, target: Target, loras: Sequence[Lora] = (), row: Sequence[float] | None = None) -> list[int]:
        """[right, asked] on held-out prompts under LoRAs."""
        with self.weighed(loras, row):
            return target.counts(self.ask(target.held_out(self.size.asked)))

    def learned(self, target: Target, loras: Sequence[Lora], row: Sequence[float], count: int = 25) -> int:
        """How many training prompts, drawn to choose by, are right under LoRAs."""
        with self.weighed(loras, row):
            return target.counts(self.ask(target.draw(min(count, self.size.asked), 0, CHECKED)))[0]

    @torch.no_grad()
    def content_loss(self, wanted: Sequence[Example]) -> float:
        """Mean cross-entropy of the right contents' tokens: what follows them, a tail or the end, does not count."""
        pairs = [{"prompt": e.prompt, "completion": f" {e.content}"} for e in wanted]
        found = tokenised(read_texts(pairs), self.tokenizer, seq2seq=False, length=96)
        found = [Tokens(one.ids, (*one.labels[:-1], IGNORED)) for one in found]
        total = 0.0
        for first in range(0, len(found), 128):
            batch = padded(found[first : first + 128], padding(self.tokenizer))
            total += float(answer_losses(self.model, batch).sum())
        return total / sum(one.counted for one in found)


def mean_interval(values: Sequence[float], draws: int = 2_000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the 95% percentile bootstrap over independent values. Raises ValueError without any."""
    if not values:
        raise ValueError("an interval of no values: the experiment has measured nothing yet")
    rng = random.Random(seed)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return statistics.fmean(values), means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def shown(values: Sequence[float]) -> str:
    """ "0.93 (0.91 to 0.95), n 12": a bootstrapped mean."""
    mean, low, high = mean_interval(values)
    return f"{mean:.2f} ({low:.2f} to {high:.2f}), n {len(values)}"


def rate(pair: Sequence[int]) -> float:
    """The share of [right, asked]; 0 where nothing was asked."""
    return pair[0] / pair[1] if pair[1] else 0.0
