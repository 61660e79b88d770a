"""A judge of pairs: which of two pictures for one prompt is better? Asked of a vision-language model in both orders.

Models prefer a place: GPT-4V picked one method in 60 of 100 pairs when it was shown second and in 51 when it was shown
first (Zhong et al. 2024, https://arxiv.org/abs/2402.16843). So every pair is asked twice, once each way round, and a
picture's points are the mean: 1 when it wins both times, 0.5 for ties and for answers that follow the place.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol

from PIL import Image

from multilora.lab.score.cache import cache_file, model_key, picture_hash
from multilora.lab.score.clip import CACHE, DEVICE
from multilora.lab.score.record import ScoreFailed, mean, score
from multilora.method import Opt

Criterion = Literal["composition", "quality"]
CRITERIA: dict[str, str] = {
    "composition": (
        "Which picture shows more of what the request asks for? Go through every character, garment, object, "
        "background and style that it names: is it there, recognisable, and where it belongs? Do not judge how pretty "
        "they are."
    ),
    "quality": (
        "Which picture is better made? Look for deformed or broken parts, blur, stray pieces and whether the whole is "
        "pleasing. Do not judge how well they follow the request."
    ),
}
QUESTION = (
    "You see two pictures that were made for one request. The first picture is A, the second is B.\n\n"
    "Request: {prompt}\n\n{criterion}\n\n"
    "Reason in two sentences at most. Then end with a line that says nothing but VERDICT: A, or VERDICT: B, or, when "
    "neither is better, VERDICT: TIE."
)
REMINDER = "\n\nEnd with one of these lines, alone: VERDICT: A / VERDICT: B / VERDICT: TIE"
_SPACE = r"[\s:=*_\"'`\[({>–—-]*"
# A capital letter that is not the first of "A or B"; a small one, which may be the article, at the end of a line only.
_LETTER = r"(?-i:[AB])\b(?!\s*(?:/|&|,?\s*or|,?\s*and)\s*(?-i:[AB])\b)|[ab](?=\W*$)"
_VERDICT = re.compile(
    rf"\b(?:verdict|winner|answer)\b{_SPACE}(?:is\b)?{_SPACE}(?:(?:the )?(?:picture|image)\s+)?"
    rf"((?:a\s+)?(?:tie|draw)\b|{_LETTER})",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"{_SPACE}(?:picture |image )?(tie|draw|[ab])[\s.!*\"'`\])}}]*", re.IGNORECASE)
HOPELESS = 3  # refusals without a single answer, after which nothing more is asked


class Refused(ScoreFailed):
    """The model will not answer this one question (a content filter, a picture too large); others may be answered."""


def read_verdict(text: str) -> str | None:
    """ "A", "B" or "TIE" of an answer, None when it gives none or several.

    The last line that names a verdict counts; an answer that is nothing but a letter counts as well.
    """
    for line in reversed(text.strip().splitlines()):
        found = {_letter(match) for match in _VERDICT.findall(line)}
        if found:
            return found.pop() if len(found) == 1 else None
    alone = _ALONE.fullmatch(text.strip())
    return _letter(alone.group(1)) if alone else None


def _letter(word: str) -> str:
    return word.upper() if len(word) == 1 else "TIE"


@dataclass(frozen=True)
class Answer:
    """What a model said, and the tokens it says it took (0 where it does not say)."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


class Answerer(Protocol):
    """A vision-language model somewhere."""

    name: str
    facts: Mapping[str, Any]
    parallel: int
    output_tokens: int

    def reach(self) -> None:
        """Raises ScoreFailed when it cannot be asked now."""

    def answer(self, question: str, pictures: Sequence[Image.Image]) -> Answer:
        """Raises Refused for this question, ScoreFailed when it cannot be asked."""

    def input_tokens(self, question: str, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of a question with pictures of these sizes, before it is asked."""


@dataclass(frozen=True)
class Verdict:
    """What became of a pair.

    answers  "first", "second", "tie" or None (no readable answer), asked in this order and asked the other way round
    """

    answers: tuple[str | None, str | None]

    @property
    def points(self) -> float:
        """Of the first picture: the mean of 1 won, 0.5 tie, 0 lost over both orders; nan when one has no answer."""
        if None in self.answers:
            return math.nan
        return sum({"first": 1.0, "tie": 0.5, "second": 0.0}[a] for a in self.answers) / 2

    @property
    def consistent(self) -> bool:
        """Both orders gave the same answer."""
        return self.answers[0] is not None and self.answers[0] == self.answers[1]


@dataclass
class Tally:
    """What judging has taken and how it went. shown_first: answers for whichever picture was shown first."""

    calls: int = 0
    kept: int = 0
    unreadable: int = 0
    refused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    shown_first: int = 0
    shown_second: int = 0
    ties: int = 0

    @property
    def bias(self) -> float:
        """Share of the answers other than ties that name the picture shown first: 0.5 without bias, nan of none."""
        decided = self.shown_first + self.shown_second
        return self.shown_first / decided if decided else math.nan


@dataclass(frozen=True)
class Estimate:
    """What judging will take at least; unreadable answers are asked for again. money is nan without prices."""

    pairs: int
    calls: int
    pictures: int
    input_tokens: int
    output_tokens: int
    money: float = math.nan

    def __str__(self) -> str:
        text = (
            f"{self.pairs} pairs: {self.calls} calls with {self.pictures} pictures, about {self.input_tokens} tokens "
            f"in and at most {self.output_tokens} out"
        )
        return text if math.isnan(self.money) else f"{text}, about {self.money:.2f} at the given prices"


class Judge:
    """Asks an answerer about pairs, and is the source of the score `judge`.

    tries   times that a question is asked until its answer can be read
    prices  money per million tokens, in and out
    cache   a file that keeps readable answers, so that nothing is asked and paid for twice
    """

    def __init__(
        self,
        answerer: Answerer,
        criterion: Criterion = "composition",
        *,
        tries: int = 2,
        prices: tuple[float, float] | None = None,
        cache: str = "",
    ) -> None:
        self.answerer, self.criterion, self.tries, self.prices = answerer, criterion, tries, prices
        self.model = f"{answerer.name}, {criterion}, both orders"
        self.tally = Tally()
        self._file = cache_file(cache) if cache else None
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()

    @cached_property
    def _key(self) -> tuple[str, str]:
        asked = {"question": QUESTION, "criterion": CRITERIA[self.criterion]}
        return model_key(asked | dict(self.answerer.facts))

    def question(self, prompt: str) -> str:
        """What the model is told beside the two pictures."""
        return QUESTION.format(prompt=prompt, criterion=CRITERIA[self.criterion])

    def reach(self) -> None:
        """Raises ScoreFailed when the model cannot be asked: to be called before any picture is made."""
        self.answerer.reach()

    def estimate(self, prompts: Sequence[str], size: tuple[int, int] = (512, 512)) -> Estimate:
        """What pairs of pictures of one size, one pair per prompt, will take. Asks nothing."""
        counted = {p: self.answerer.input_tokens(self.question(p), [size, size]) for p in set(prompts)}
        calls = 2 * len(prompts)
        read, written = 2 * sum(counted[p] for p in prompts), calls * self.answerer.output_tokens
        money = (read * self.prices[0] + written * self.prices[1]) / 1e6 if self.prices else math.nan
        return Estimate(len(prompts), calls, 2 * calls, read, written, money)

    def compare(self, pairs: Sequence[tuple[Image.Image, Image.Image, str]]) -> Iterator[Verdict]:
        """A verdict per (first picture, second picture, prompt), in order, as they come. Equal pictures are a tie that
        is not asked about.

        Raises ScoreFailed when the model cannot be asked any more; what was answered is kept and not asked again.
        """
        asked = [(a, b, p) if turn == 0 else (b, a, p) for a, b, p in pairs for turn in (0, 1)]
        pool, ended = ThreadPoolExecutor(max_workers=max(1, self.answerer.parallel)), []
        try:
            answers = [pool.submit(self._asked, *one, ended) for one in asked]
            for straight, turned in zip(answers[::2], answers[1::2], strict=True):
                there, back = straight.result(), turned.result()
                yield Verdict((_named(there, "first", "second"), _named(back, "second", "first")))
        finally:
            ended.append(ScoreFailed("nobody waits for this verdict any more"))
            pool.shutdown(cancel_futures=True)

    def _asked(self, a: Image.Image, b: Image.Image, prompt: str, ended: list[Exception]) -> str | None:
        """ "A", "B" or "TIE" of one order; None after `tries` unreadable answers or a refusal.

        What ended the comparison is the first in `ended`: it keeps the questions that are left from being asked.
        """
        if ended:
            raise ended[0]
        try:
            return self._verdict(a, b, prompt)
        except Exception as error:
            ended.append(error)
            raise

    def _verdict(self, a: Image.Image, b: Image.Image, prompt: str) -> str | None:
        question, hashes = self.question(prompt), (picture_hash(a), picture_hash(b))
        if hashes[0] == hashes[1]:
            return "TIE"
        thing = hashlib.sha256(f"{' '.join(hashes)} {prompt}".encode()).hexdigest()
        verdict = self._kept(thing)
        for turn in range(0 if verdict else self.tries):
            try:
                answer = self.answerer.answer(question + (REMINDER if turn else ""), [a, b])
            except Refused as error:
                with self._lock:
                    self.tally.refused += 1
                    hopeless = not (self.tally.calls or self.tally.kept) and self.tally.refused >= HOPELESS
                if hopeless:
                    raise ScoreFailed(
                        f"{self.answerer.name} refused the first {HOPELESS} questions: {error}"
                    ) from error
                return None
            verdict = read_verdict(answer.text)
            with self._lock:
                self.tally.calls += 1
                self.tally.input_tokens += answer.input_tokens
                self.tally.output_tokens += answer.output_tokens
                self.tally.unreadable += verdict is None
            if verdict:
                self._keep(thing, verdict)
                break
        with self._lock:
            self.tally.shown_first += verdict == "A"
            self.tally.shown_second += verdict == "B"
            self.tally.ties += verdict == "TIE"
        return verdict

    def _kept(self, thing: str) -> str | None:
        with self._lock:
            found = self._known.get(thing)
        if found is None and self._file:
            row = self._file.get(self._key[0], [thing]).get(thing)
            found = row.decode() if row else None
        if found:
            with self._lock:
                self._known[thing] = found
                self.tally.kept += 1
        return found

    def _keep(self, thing: str, verdict: str) -> None:
        with self._lock:
            self._known[thing] = verdict
        if self._file:
            self._file.put(*self._key, {thing: verdict.encode()})

    def numbers(
        self, images: list[Image.Image], texts: list[str], references: list[tuple[Image.Image, ...]]
    ) -> list[float]:
        """Points of each picture against its rivals: the mean over those that got an answer, nan without any."""
        pairs = [(a, b, p) for a, rivals, p in zip(images, references, texts, strict=True) for b in rivals]
        points = iter([verdict.points for verdict in self.compare(pairs)])
        return [mean([next(points) for _ in rivals]) for rivals in references]


def _named(verdict: str | None, a: str, b: str) -> str | None:
    return {"A": a, "B": b, "TIE": "tie"}.get(verdict or "")


@score(
    title="Judge: better than its rival", needs=("prompt", "references"), unit="1 won, 0.5 tie, 0 lost",
    paper="https://arxiv.org/abs/2402.16843",
)  # fmt: skip
def judge(
    *,
    model: Annotated[str, Opt("the endpoint's name for it, or without url a folder of transformers")] = "",
    url: Annotated[str, Opt("of an OpenAI-compatible server, such as http://localhost:8000/v1")] = "",
    key: Annotated[str, Opt("environment variable that holds the server's key")] = "",
    criterion: Annotated[Criterion, Opt("what is compared")] = "composition",
    tries: Annotated[int, Opt("times a question is asked until its answer can be read", 1, 10)] = 2,
    parallel: Annotated[int, Opt("calls to a server at one time", 1, 64)] = 4,
    request: Annotated[str, Opt("JSON of more fields of a server's request; null leaves one out")] = "",
    input_price: Annotated[float, Opt("money per million tokens in, for the estimate", 0)] = 0.0,
    output_price: Annotated[float, Opt("money per million tokens out, for the estimate", 0)] = 0.0,
    device: Annotated[str, DEVICE] = "cpu",
    cache: Annotated[str, CACHE] = "",
) -> Judge:
    """How often each picture beats its reference picture, as a vision-language model sees it, asked both ways."""
    if not model:
        raise ValueError("score judge needs a model: its name at the url, or a folder of transformers")
    if url:
        from multilora.lab.score.judge_http import Endpoint

        answerer: Answerer = Endpoint(url, model, key=key, parallel=parallel, extra=_fields(request))
    else:
        from multilora.lab.score.judge_local import load_vlm

        answerer = load_vlm(model, device)
    prices = (input_price, output_price) if input_price or output_price else None
    return Judge(answerer, criterion, tries=tries, prices=prices, cache=cache)


def _fields(request: str) -> dict[str, Any]:
    try:
        found = json.loads(request or "{}")
    except ValueError as error:
        raise ValueError(f"judge request {request!r}: not JSON ({error})") from None
    if not isinstance(found, dict) or {"model", "messages", "stream"} & set(found):
        raise ValueError(
            f"judge request {request!r}: wanted an object of further fields, such as "
            '{"max_tokens": null, "max_completion_tokens": 800}'
        )
    return found
