"""The Text page: answers are the composer's own, streamed, side by side; refusals in words."""

from __future__ import annotations

import itertools

import pytest

import multilora
from multilora.pipelines.text import TextComposer
from multilora.pipelines.text_load import text_library
from multilora.web.service import Refused, Text
from multilora.web.text import EXAMPLES, answered, asked, library
from tests.service_here import here

PROMPT = "korvish two red cat ="


@pytest.fixture(scope="module")
def service():
    with pytest.MonkeyPatch.context() as patch, here(patch) as made:
        yield made


@pytest.fixture(scope="module")
def composer():
    return TextComposer.from_pretrained("embedded", device="cpu")


def alone(composer, prompt, weights, method="merge", **more):
    """The composer's own answer with these LoRAs."""
    composer.loras.clear()
    for name, weight in weights.items():
        composer.add(name, weight=weight)
    return composer(prompt, method, max_new_tokens=12, do_sample=bool(more), **more).strip()


def answers_of(service, who, request):
    """(all states of the answers, the last words)."""
    said = list(answered(service, service.session(who), request))
    return [a for a, _ in said], said[-1][1]


def test_three_answers_are_the_composers_own_and_come_piece_by_piece(service, composer):
    weights = {"korvish": 0.9, "rude": -1.2}
    states, line = answers_of(service, "ann", asked(PROMPT, [*weights], [*weights.values()], tokens=12))
    assert states[-1] == {
        "base": alone(composer, PROMPT, {}),
        "loras": alone(composer, PROMPT, weights),
        "merged": alone(composer, PROMPT, weights),  # a linear merge is the sum that acts beside the layers
    }
    assert states[-1]["base"] != states[-1]["loras"]
    assert line.startswith("answered: base")
    grown = [s["loras"] for s in states]
    assert len({*grown}) > 1
    assert all(after.startswith(before.strip()) for before, after in itertools.pairwise(grown))


def test_a_negative_weight_turns_away_from_a_register(service, composer):
    for weight in (1.5, -1.5):
        states, _ = answers_of(
            service, "bob", asked("first korv =", ["rude"], [weight], answers=("loras",), tokens=12)
        )
        assert [*states[-1]] == ["loras"]
        assert states[-1]["loras"] == alone(composer, "first korv =", {"rude": weight})
        assert ("you" in states[-1]["loras"]) == (weight > 0)


def test_the_merged_answer_is_that_of_the_merge_method(service, composer):
    request = asked("sort dbca =", ["sort", "reverse"], [1.0, 1.0], merge="ties", answers=("merged",), tokens=12)
    states, _ = answers_of(service, "cid", request)
    folders = text_library()
    sources = [multilora.load(folders[name], base=composer.model) for name in ("sort", "reverse")]
    composer.loras.clear()
    composer.add(multilora.merge(sources, [1.0, 1.0], method="ties"), "both")
    assert states[-1]["merged"] == composer("sort dbca =", max_new_tokens=12, do_sample=False).strip()


def test_drawn_answers_follow_the_seed(service, composer):
    drawn = []
    for seed in (3, 3, 4, 5, 6):
        request = asked("vowels korvo =", [], None, answers=("base",), temperature=1.7, seed=seed, tokens=12)
        drawn.append(answers_of(service, "dan", request)[0][-1]["base"])
    assert drawn[0] == drawn[1] == alone(composer, "vowels korvo =", {}, seed=3, temperature=1.7)
    assert len({*drawn}) > 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: asked(" ", [], None), "no prompt"),
        (lambda: asked(PROMPT, ["rude"], [1.0, 2.0]), "weights: 2 numbers for 1 LoRAs"),
        (lambda: asked(PROMPT, ["rud"], None), "unknown text LoRA 'rud'. Nearest: rude"),
        (lambda: asked(PROMPT, [str(text_library()["rude"])], None), "unknown text LoRA"),
        (lambda: asked(PROMPT, ["rude"], None, method="swich"), "Nearest: switch"),
        (lambda: asked(PROMPT, ["rude"], None, merge="tis"), "Nearest: ties"),
        (lambda: asked(PROMPT, ["rude"], [float("inf")]), "finite"),
        (lambda: asked(PROMPT, [], None, tokens=0), "tokens"),
        (lambda: asked(PROMPT, [], None, model="/etc"), "'/etc' is not served here"),
        (lambda: asked("x" * 4001, [], None), "length of the prompt is 4001"),
        (lambda: asked("Ωß ∆", [], None), "unknown to the tokenizer"),
    ],
)
def test_what_is_refused_is_said_in_words(service, make, words):
    with pytest.raises(ValueError, match=words):
        list(answered(service, service.session("eve"), make()))


def test_an_answer_left_early_stops(service):
    going = answered(service, service.session("flo"), Text(prompt=PROMPT, tokens=1024, temperature=5.0))
    next(going)
    going.close()
    assert service._line.wait_idle(60)


def test_examples_and_library_are_of_the_embedded_model():
    assert {*library()} == {*text_library()}
    assert all(name in library() for _, names in EXAMPLES for name in names)
    with pytest.raises(Refused):
        asked("", [], None)
