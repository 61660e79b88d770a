"""`@score` and the record behind every score: pictures (and prompts, elements, reference pictures) to numbers.

    records = scores()                                   # the folder is the list
    scorer = resolve("clip_text", model="ViT-B/32")      # options settled, nothing loaded yet
    scorer(images, prompts)                              # -> one number per picture
    scorer.model                                         # which model, precision and preprocessing gave the numbers

A score is a function of the folder with `@score(...)`: its keyword-only arguments are its options, and it returns the
`Source` that makes the numbers. A file may hold several. All are called alike, with what the record says it `needs`:

    "prompt"      texts: what each picture should show, one text for all or one each
    "element"     texts: the design, trigger, class or "head: label" to be found in each picture
    "references"  pictures to compare with: one for all, or for each picture one or a sequence
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from PIL import Image

from multilora.method import Option, options_of, unknown

NEEDS = ("prompt", "element", "references")
References = Sequence[Image.Image | Sequence[Image.Image]]


class ScoreFailed(RuntimeError):
    """A score that something outside has failed: a judge that cannot be reached, refuses, or answers nothing."""


class Source(Protocol):
    """What a score's function returns. `model` says what gives the numbers: model, precision, preprocessing."""

    model: str

    def numbers(
        self, images: list[Image.Image], texts: list[str], references: list[tuple[Image.Image, ...]]
    ) -> Sequence[float]:
        """One number per picture. texts and references are one per picture, or empty where they are not needed."""


@dataclass(frozen=True)
class Score:
    """A score's record. Calling it with options gives the scorer.

    unit is said for people ("cos x 100", "0 or 1"); higher: a higher number is better.
    """

    name: str
    title: str
    needs: tuple[str, ...]
    unit: str
    higher: bool
    paper: str
    options: tuple[Option, ...]
    fn: Callable[..., Source] = field(repr=False, compare=False)

    def __call__(self, **options: Any) -> Scorer:
        """The scorer with these options. Raises ValueError for an unknown option or a bad value."""
        known = {o.name: o for o in self.options}
        for name in options:
            if name not in known:
                raise unknown(f"option of score {self.name}", name, known)
        told = {n: o.check(options[n], self.name) if n in options else o.default for n, o in known.items()}
        return Scorer(self, told)


@dataclass(frozen=True)
class Scorer:
    """A score with its options settled. The model is loaded at the first use; `load()` shows early what is wrong."""

    record: Score
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def source(self) -> Source:
        """What makes the numbers, loaded. Raises ValueError when the model is missing."""
        return self.record.fn(**self.options)

    def load(self) -> Scorer:
        """Itself, with the model loaded."""
        _ = self.source
        return self

    def ready(self) -> Scorer:
        """Itself, loaded and, where the model is elsewhere, reached: to be called before any picture is made.

        Raises ValueError when the model is missing, ScoreFailed when it cannot be reached.
        """
        getattr(self.source, "reach", lambda: None)()
        return self

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def needs(self) -> tuple[str, ...]:
        return self.record.needs

    @property
    def model(self) -> str:
        """Which model, precision and preprocessing give the numbers; loads the model."""
        return self.source.model

    def __call__(
        self,
        images: Sequence[Image.Image],
        texts: str | Sequence[str] | None = None,
        references: References | None = None,
    ) -> list[float]:
        """One number per picture, nan where the score has no answer. What the score does not need is not looked at.

        Raises ValueError when something that it needs is missing or their numbers differ, ScoreFailed when something
        outside fails.
        """
        images = list(images)
        told = _texts(self, len(images), texts) if {"prompt", "element"} & set(self.needs) else []
        shown = _references(self, len(images), references) if "references" in self.needs else []
        if not images:
            return []
        found = [float(v) for v in self.source.numbers(images, told, shown)]
        if len(found) != len(images):
            raise ValueError(f"score {self.name} gave {len(found)} numbers for {len(images)} pictures")
        return found


def _texts(scorer: Scorer, count: int, texts: str | Sequence[str] | None) -> list[str]:
    what = "prompts" if "prompt" in scorer.needs else "elements"
    if texts is None:
        raise ValueError(f"score {scorer.name} needs {what}: give texts, one for all pictures or one for each")
    told = [texts] * count if isinstance(texts, str) else list(texts)
    _same(scorer, count, len(told), what)
    if wrong := next((t for t in told if not isinstance(t, str)), None):
        raise ValueError(f"score {scorer.name}: wanted {what} as text, got {wrong!r}")
    return told


def _references(scorer: Scorer, count: int, references: References | None) -> list[tuple[Image.Image, ...]]:
    if references is None:
        raise ValueError(f"score {scorer.name} needs reference pictures: give references, one for all or one for each")
    given = [references] if isinstance(references, Image.Image) else list(references)
    shown = [(r,) if isinstance(r, Image.Image) else tuple(r) for r in given]
    shown = shown * count if len(shown) == 1 else shown
    _same(scorer, count, len(shown), "references")
    if () in shown:
        raise ValueError(f"score {scorer.name}: picture {shown.index(())} has an empty set of references")
    return shown


def _same(scorer: Scorer, images: int, others: int, what: str) -> None:
    if images != others:
        raise ValueError(
            f"score {scorer.name}: {images} pictures but {others} {what}: wanted one for all or one for each picture"
        )


def score(
    *, title: str, needs: tuple[str, ...], unit: str, higher: bool = True, paper: str = ""
) -> Callable[[Callable[..., Source]], Score]:
    """Make a function the score of its name. Raises UnknownName for a need that is not one of NEEDS."""

    def wrap(fn: Callable[..., Source]) -> Score:
        for need in needs:
            if need not in NEEDS:
                raise unknown(f"need of score {fn.__name__}", need, NEEDS)
        return Score(fn.__name__, title, tuple(needs), unit, higher, paper, options_of(fn), fn)

    return wrap


def scores() -> dict[str, Score]:
    """All scores by name, sorted: every record that a file of this folder makes."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    found: dict[str, Score] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for record in vars(module).values():
            if isinstance(record, Score) and record.fn.__module__ == module.__name__:
                if record.name in found:
                    raise ValueError(f"two scores are named {record.name}, one of them in {module.__file__}")
                found[record.name] = record
    return dict(sorted(found.items()))


def resolve(which: str | Score | Scorer, **options: Any) -> Scorer:
    """A name, a record or a scorer, with options over it, as one scorer. Raises UnknownName and ValueError."""
    if isinstance(which, str):
        known = scores()
        if which not in known:
            raise unknown("score", which, known)
        which = known[which]
    if isinstance(which, Scorer):
        return which.record(**{**which.options, **options}) if options else which
    if not isinstance(which, Score):
        raise ValueError(f"wanted a score by name or record, got {which!r}")
    return which(**options)


@dataclass(frozen=True)
class Measured:
    """Numbers per score name, one per picture, and why the scores that have none have none."""

    values: dict[str, list[float]]
    failed: dict[str, str]


def ready(scorers: Iterable[Scorer]) -> tuple[list[Scorer], dict[str, str]]:
    """The scorers that can be used now, and why the others cannot. Raises ValueError when a model is missing."""
    there, failed = [], {}
    for scorer in scorers:
        try:
            there.append(scorer.ready())
        except ScoreFailed as error:
            failed[scorer.name] = str(error)
    return there, failed


def measure(
    scorers: Mapping[str, Scorer] | Iterable[Scorer],
    images: Sequence[Image.Image],
    *,
    prompts: str | Sequence[str] | None = None,
    elements: str | Sequence[str] | None = None,
    references: References | None = None,
) -> Measured:
    """Every score of the pictures, each given what it needs. One that fails outside (ScoreFailed) costs no other.

    Raises ValueError as the scorers do, and for two of one name: give those as {your name: scorer}.
    """
    listed = [(s.name, s) for s in scorers] if not isinstance(scorers, Mapping) else list(scorers.items())
    names = [name for name, _ in listed]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two scores are named {twice}: give a mapping of your own names to scorers")
    values: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, scorer in listed:
        try:
            values[name] = scorer(images, elements if "element" in scorer.needs else prompts, references)
        except ScoreFailed as error:
            failed[name] = str(error)
    return Measured(values, failed)


def mean(values: Iterable[float]) -> float:
    """The mean of the numbers that are there (nan is none); nan when none is."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
