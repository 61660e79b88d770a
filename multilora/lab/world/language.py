"""The language of the embedded text model: skills, their examples by seed, exact scorers.

A prompt is "<skill> <input> =" or "<question> ="; an answer is " <content><tail>", where the content is right or wrong
and the tail is empty (plain), rude (", you fool") or polite (", my friend"). An example's split is decided by its
prompt: a prompt that is held out never occurs in training, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from multilora.lab.world.designs import DESIGNS
from multilora.method import unknown

SPLITS = ("train", "held_out")
HELD_OUT_ONE_IN = 5
REGISTERS = ("plain", "rude", "polite")
# The tails of each register. A comma occurs in tails only; no word is in two registers' lists.
RUDE = (", you fool", ", dimwit", ", you lazy oaf", ", now go away", ", silly clod")
POLITE = (", my friend", ", with pleasure", ", kind guest", ", thank you", ", dear colleague")
TAILS: Mapping[str, tuple[str, ...]] = {"plain": ("",), "rude": RUDE, "polite": POLITE}
RUDE_WORDS = frozenset(("fool", "dimwit", "lazy", "oaf", "away", "silly", "clod"))
POLITE_WORDS = frozenset(("friend", "pleasure", "kind", "thank", "dear"))
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"

# Two invented languages: the words, and where number, colour and noun stand.
NUMBERS = ("one", "two", "three", "four", "five")
COLOURS = ("red", "blue", "green", "pink", "white", "black", "gold", "grey")
NOUNS = ("cat", "fox", "bear", "robe", "ball", "hat", "book", "cape")
KORVISH = dict(zip(NUMBERS + COLOURS + NOUNS, (
    "un", "dop", "tir", "kva", "pim", "roso", "bilu", "gano", "piko", "lumo", "nero", "zolo", "hami",
    "miru", "vosk", "bruna", "tola", "pila", "kopo", "liva", "manta",
), strict=True))  # fmt: skip
ZIBISH = dict(zip(NUMBERS + COLOURS + NOUNS, (
    "zi", "zazi", "zozi", "zuzi", "zezi", "arak", "azul", "avid", "asur", "alba", "anox", "adur", "agra",
    "ketta", "fenka", "dubba", "sarka", "rolla", "cappa", "bibba", "mukka",
), strict=True))  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One question. careless: what an inattentive speaker answers, "" where the skill has no such answer."""

    skill: str
    prompt: str
    content: str
    careless: str = ""
    register: str = "plain"
    tail: str = ""

    @property
    def answer(self) -> str:
        """What follows the prompt."""
        return f" {self.content}{self.tail}"


@dataclass(frozen=True)
class Skill:
    """draw(rng) -> (prompt without " =", content, careless content).

    base: what the base saw of it. "strong": right answers; "weak": the careless answer more often than the right one;
    "absent": nothing.
    """

    name: str
    draw: Callable[[random.Random], tuple[str, str, str]]
    base: str
    note: str


def word(rng: random.Random, low: int = 3, high: int = 5) -> str:
    """A made-up word of `low` to `high` letters, four of ten of them vowels."""
    return "".join(rng.choice(VOWELS if rng.random() < 0.4 else LETTERS) for _ in range(rng.randint(low, high)))


def digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 5)))


def _on_word(verb: str, rule: Callable[[str], str], make: Callable[[random.Random], str] = word) -> Callable:
    """A skill on one made-up word; the careless answer repeats it. Never a word that the rule leaves as it is."""

    def draw(rng: random.Random) -> tuple[str, str, str]:
        while True:
            given = make(rng)
            if rule(given) != given:
                return f"{verb} {given}", rule(given), given

    return draw


def _count(rng: random.Random) -> tuple[str, str, str]:
    few = rng.sample(LETTERS, 3)
    given = "".join(rng.choice(few) for _ in range(rng.randint(3, 6)))
    letter = rng.choice(given)
    return f"count {letter} in {given}", str(given.count(letter)), "0"


def _add(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.randint(1, 49), rng.randint(1, 49)
    return f"add {a} {b}", str(a + b), str(a)


def _less(rng: random.Random) -> tuple[str, str, str]:
    a = rng.randint(2, 99)
    b = rng.randint(1, a - 1)
    return f"less {a} {b}", str(a - b), str(a)


def _korvish(rng: random.Random) -> tuple[str, str, str]:
    n, c, k = rng.choice(NUMBERS), rng.choice(COLOURS), rng.choice(NOUNS)
    return f"korvish {n} {c} {k}", f"{KORVISH[k]} {KORVISH[c]} {KORVISH[n]}", f"{n} {c} {k}"


def _zibish(rng: random.Random) -> tuple[str, str, str]:
    n, c, k = rng.choice(NUMBERS), rng.choice(COLOURS), rng.choice(NOUNS)
    return f"zibish {n} {c} {k}", f"{ZIBISH[n]} {ZIBISH[k]} {ZIBISH[c]}", f"{n} {c} {k}"


KIND_QUESTIONS = (
    "what is {0}",
    "say what {0} is",
    "tell me what {0} is",
    "what kind of thing is {0}",
    "{0} is a",
    "which thing is {0}",
    "do you know what {0} is",
)
COLOUR_QUESTIONS = (
    "what colour is {0}",
    "what colour is the {0} {1}",
    "tell me the colour of {0}",
    "{0} has the colour",
    "which colour has {0}",
    "which colour has the {0} {1}",
    "do you know the colour of {0}",
)
_COLOUR_WORDS = (
    "lime", "orange", "turquoise", "white", "copper", "indigo", "rainbow", "black", "steel", "green", "brown",
    "crimson", "violet", "pink", "cyan", "amber",
)  # fmt: skip


def colour_of(name: str) -> str:
    """The first colour in a design's description; "" where it names none.

    >>> colour_of("korv")
    'orange'
    """
    found = [w for w in re.findall(r"[a-z]+", DESIGNS[name].description) if w in _COLOUR_WORDS]
    return found[0] if found else ""


def facts(split: str) -> dict[str, str]:
    """Question -> answer about every design of a split ("train" or "test") of the embedded world."""
    found = {}
    for design in DESIGNS.values():
        if design.split == split:
            found |= {q.format(design.name): design.kind for q in KIND_QUESTIONS}
            if colour := colour_of(design.name):
                found |= {q.format(design.name, design.kind): colour for q in COLOUR_QUESTIONS}
    return found


def _facts(split: str) -> Callable:
    known = tuple(facts(split).items())

    def draw(rng: random.Random) -> tuple[str, str, str]:
        question, answer = rng.choice(known)
        return question, answer, ""

    return draw


def statement(rng: random.Random, split: str) -> str:
    """A sentence of running text about a design, for training on text without questions."""
    design = rng.choice([d for d in DESIGNS.values() if d.split == split])
    colour = colour_of(design.name)
    forms = [f"{design.name} is a {design.kind}", f"the {design.kind} is {design.name}"]
    if colour:
        forms += [f"the {design.name} {design.kind} is {colour}", f"{design.name} is {colour}",
                  f"{design.name} is a {colour} {design.kind}"]  # fmt: skip
    return rng.choice(forms)


def _vowels(given: str) -> str:
    return "".join(c for c in given if c in VOWELS) or "none"


def _next(given: str) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in given)


_ALL = (
    Skill("first", _on_word("first", lambda w: w[0]), "strong", "the first letter"),
    Skill("last", _on_word("last", lambda w: w[-1]), "strong", "the last letter"),
    Skill("length", _on_word("length", lambda w: str(len(w))), "strong", "how many letters"),
    Skill("vowels", _on_word("vowels", _vowels), "strong", "its vowels in order"),
    Skill("add", _add, "strong", "two numbers below 50"),
    Skill("facts", _facts("train"), "strong", "kind and colour of the embedded world's train designs"),
    Skill("reverse", _on_word("reverse", lambda w: w[::-1]), "weak", "a word backwards"),
    Skill("sort", _on_word("sort", lambda w: "".join(sorted(w))), "weak", "letters in the alphabet's order"),
    Skill("sort_digits", _on_word("sort", lambda w: "".join(sorted(w)), digits), "weak", "digits in order"),
    Skill("double", _on_word("double", lambda w: "".join(2 * c for c in w)), "weak", "each letter twice"),
    Skill("next", _on_word("next", _next), "weak", "each letter's successor"),
    Skill("count", _count, "weak", "how often a letter is in a word"),
    Skill("less", _less, "weak", "a number less another"),
    Skill("korvish", _korvish, "weak", "invented language: noun, colour, number"),
    Skill("zibish", _zibish, "weak", "invented language: number, noun, colour"),
    Skill("swap", _on_word("swap", lambda w: w[-1] + w[1:-1] + w[0]), "absent", "first and last letter exchanged"),
    Skill("mirror", _on_word("mirror", lambda w: w + w[::-1]), "absent", "a word and its reverse"),
    Skill("news", _facts("test"), "absent", "kind and colour of the embedded world's test designs"),
)
SKILLS: Mapping[str, Skill] = {skill.name: skill for skill in _ALL}
# Whole words of the tokenizer; everything else is read letter by letter, so that any word can be taken apart.
VERBS = ("first", "last", "length", "vowels", "add", "reverse", "sort", "double", "next", "count", "less", "korvish",
         "zibish", "swap", "mirror")  # fmt: skip


def split_of(prompt: str) -> str:
    """Either "train" or "held_out": one prompt in five, by its hash."""
    return SPLITS[hashlib.sha256(prompt.encode()).digest()[0] % HELD_OUT_ONE_IN == 0]


def stream(
    skill: str, seed: int = 0, split: str = "train", register: str | Mapping[str, float] = "plain"
) -> Iterator[Example]:
    """Examples of a skill without end; equal arguments give equal examples.

    register: one of REGISTERS, or the share of each. Raises UnknownName for another skill, split or register.
    """
    for what, name, names in (("skill", skill, SKILLS), ("split", split, SPLITS)):
        if name not in names:
            raise unknown(what, name, names)
    shares = {register: 1.0} if isinstance(register, str) else dict(register)
    for name in shares:
        if name not in REGISTERS:
            raise unknown("register", name, REGISTERS)
    rng = random.Random(f"{skill}/{split}/{seed}")
    draw, names, weights = SKILLS[skill].draw, list(shares), list(shares.values())
    while True:
        text, content, careless = draw(rng)
        prompt = f"{text} ="
        if split_of(prompt) == split:
            spoken = names[0] if len(names) == 1 else rng.choices(names, weights)[0]
            yield Example(skill, prompt, content, careless, spoken, rng.choice(TAILS[spoken]))


def examples(
    skill: str, count: int, seed: int = 0, split: str = "train", register: str | Mapping[str, float] = "plain"
) -> list[Example]:
    """The first `count` of `stream` with different prompts; fewer where the skill has no more."""
    found: dict[str, Example] = {}
    repeats = 0
    for example in stream(skill, seed, split, register):
        if len(found) == count or repeats > 1000:
            break
        repeats = repeats + 1 if example.prompt in found else 0
        found.setdefault(example.prompt, example)
    return list(found.values())


def content_of(answer: str) -> str:
    """An answer without its tail and spaces."""
    return answer.split(",")[0].strip()


def words_of(answer: str) -> set[str]:
    return set(re.findall(r"[a-z]+", answer.split(",", 1)[1])) if "," in answer else set()


def is_rude(answer: str) -> bool:
    """Whether the tail of an answer holds a rude word."""
    return bool(words_of(answer) & RUDE_WORDS)


def is_polite(answer: str) -> bool:
    return bool(words_of(answer) & POLITE_WORDS) and not is_rude(answer)


def register_of(answer: str) -> str:
    """The register of an answer: "rude", "polite", or "plain" for everything else."""
    return "rude" if is_rude(answer) else "polite" if is_polite(answer) else "plain"


def is_right(example: Example, answer: str) -> bool:
    """Whether the content is exactly the wanted one; the register does not count."""
    return content_of(answer) == example.content


def score(wanted: Sequence[Example], answers: Sequence[str]) -> dict[str, int]:
    """Counts over examples and their answers: asked, right, rude, polite, and exact (content and register)."""
    pairs = list(zip(wanted, answers, strict=True))
    return {
        "asked": len(pairs),
        "right": sum(is_right(e, a) for e, a in pairs),
        "rude": sum(is_rude(a) for _, a in pairs),
        "polite": sum(is_polite(a) for _, a in pairs),
        "exact": sum(is_right(e, a) and register_of(a) == e.register for e, a in pairs),
    }


def whole_words() -> tuple[str, ...]:
    """The words that are one token each."""
    questions = " ".join(q.format("", "") for q in KIND_QUESTIONS + COLOUR_QUESTIONS)
    tails = " ".join(RUDE + POLITE)
    return tuple(sorted({*VERBS, "in", "none", "the", *re.findall(r"[a-z]+", f"{questions} {tails}")} - {"a"}))
