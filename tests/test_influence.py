"""Influence of trigger words, W-Switch and W-Composite against numbers and step lists written out by hand."""

import math
import warnings

import pytest
import torch

from multilora.influence import influence, present, without
from multilora.lora import Card
from multilora.method import methods
from multilora.pipelines.composing import composing
from multilora.plan import Moment
from multilora.route.weighted_switch import turns
from tests import handloop, tiny

FOX, ROBE, PLAIN = Card("fox", "character", ("a fox",)), Card("robe", "garment", ("robe",)), Card("plain")


class Text:
    """Encodings from a table: text -> {name: tensor}."""

    def __init__(self, prompt, table):
        self.prompts, self.table, self.asked = [prompt], table, []

    def encoded(self, edit):
        self.asked.append(edit(self.prompts[0]))
        return self.table[self.asked[-1]]


def at(degrees, tokens=3):
    """[1, tokens, 2] whose mean over the tokens stands at an angle; the tokens themselves do not."""
    x = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
    off = torch.tensor([[5.0, -1.0], [-5.0, 1.0], [0.0, 0.0]])[:tokens]
    return (x + off)[None]


@pytest.mark.parametrize(
    ("text", "triggers", "left"),
    [
        ("a korv fox, in a robe", ["korv fox"], "a, in a robe"),
        ("KORV FOX, robe, night", ["korv fox", "night"], "robe"),
        ("a foxy fox (fox:1.2)", ["fox"], "a foxy (:1.2)"),
        ("a, b, c", ["b"], "a, c"),
        ("zib alien and zib", ["zib", "zib alien"], "and"),
        ("a c++ robe", ["c++"], "a robe"),
        ("robe", ["robe"], ""),
        ("plain", ["robe", ""], "plain"),
    ],
)
def test_triggers_are_taken_out_as_whole_words(text, triggers, left):
    assert without(text, [t for t in triggers if t]) == left
    assert present(triggers, [text]) == [t for t in triggers if t and left != text]


def test_ablation_is_one_minus_the_cosine_of_token_means():
    table = {
        "a fox, robe": {"prompt_embeds": at(0)},
        "robe": {"prompt_embeds": at(60)},  # without the fox: 1 - 0.5
        "a fox": {"prompt_embeds": at(90)},  # without the robe: 1 - 0
    }
    found = influence([FOX, ROBE], Text("a fox, robe", table), by="ablation")
    assert found == pytest.approx([0.5 / 1.5, 1.0 / 1.5], abs=1e-6)


def test_the_floor_of_ablation():
    table = {
        "a fox, robe": {"prompt_embeds": at(0)},
        "robe": {"prompt_embeds": at(2)},  # 1 - cos 2° = 0.0006, below the floor
        "a fox": {"prompt_embeds": at(90)},
    }
    text = Text("a fox, robe", table)
    assert influence([FOX, ROBE], text, by="ablation") == pytest.approx([0.05 / 1.05, 1.0 / 1.05], abs=1e-6)
    small = 1 - math.cos(math.radians(2))
    low = influence([FOX, ROBE], text, by="ablation", floor=0.0)
    assert low == pytest.approx([small / (1 + small), 1 / (1 + small)], abs=1e-5)


def test_triggers_are_compared_with_the_prompt_and_opposites_have_no_influence():
    table = {
        "a fox, robe": {"prompt_embeds": at(0)},
        "a fox": {"prompt_embeds": at(60)},
        "robe": {"prompt_embeds": at(120)},
    }
    assert influence([FOX, ROBE], Text("a fox, robe", table), by="triggers") == pytest.approx([1.0, 0.0], abs=1e-6)


def test_several_encodings_are_averaged_and_masked_tokens_left_out():
    def two(degrees, pooled):
        embeds = torch.cat([at(degrees), torch.full((1, 1, 2), 9.0)], dim=1)
        return {
            "prompt_embeds": embeds,
            "prompt_embeds_mask": torch.tensor([[1, 1, 1, 0]]),
            "pooled_prompt_embeds": at(pooled, 1)[:, 0] - torch.tensor([5.0, -1.0]),
        }

    table = {"a fox, robe": two(0, 0), "robe": two(60, 90), "a fox": two(90, 90)}
    found = influence([FOX, ROBE], Text("a fox, robe", table), by="ablation")
    assert found == pytest.approx([0.75 / 1.75, 1.0 / 1.75], abs=1e-6)
    as_list = {text: {"prompt_embeds": [e["prompt_embeds"][0, :3]]} for text, e in table.items()}
    found = influence([FOX, ROBE], Text("a fox, robe", as_list), by="ablation")
    assert found == pytest.approx([0.5 / 1.5, 1.0 / 1.5], abs=1e-6)


def test_a_lora_without_trigger_words_gets_the_mean_of_the_others_and_one_warning():
    table = {
        "a fox, robe": {"prompt_embeds": at(0)},
        "robe": {"prompt_embeds": at(60)},
        "a fox": {"prompt_embeds": at(90)},
    }
    hat = Card("hat", triggers=("top hat",))
    with pytest.warns(UserWarning, match="LoRA plain, hat: no trigger words in the prompt") as caught:
        found = influence([PLAIN, FOX, hat, ROBE], Text("a fox, robe", table), by="ablation")
    assert len(caught) == 1
    assert found == pytest.approx([0.75 / 3, 0.5 / 3, 0.75 / 3, 1.0 / 3], abs=1e-6)
    with pytest.warns(UserWarning, match="the prompt's words are not known"):
        assert influence([FOX, ROBE], None, by="triggers") == [0.5, 0.5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert influence([PLAIN], None, by="ablation") == [1.0]


def moment(steps, cards, step=0):
    return Moment(step, steps, 0.0, None, (1.0,) * len(cards), tuple(cards))


@pytest.mark.parametrize(
    ("shares", "cards", "steps", "every", "tail", "order"),
    [
        # round(5 * 1), round(5 * 0.5) = 2 (half to even, as numpy in the paper's code)
        ([2 / 3, 1 / 3], [ROBE, PLAIN], 14, 5, 0.0, "00000110000011"),
        # the paper's: 5 of 100 steps at the end for the character; turns of 5, 1 and 3
        ([0.6, 0.05, 0.35], [ROBE, PLAIN, FOX], 100, 5, 0.05, ("000001222" * 11)[:95] + "22222"),
        ([0.5, 0.5], [FOX, ROBE], 10, 2, 0.2, "0011001100"),
        ([0.5, 0.5], [PLAIN, ROBE], 10, 2, 0.2, "0011001100"),  # no character, no tail
        ([0.5, 0.3, 0.2], [PLAIN, FOX, ROBE], 3, 5, 0.5, "012"),  # each has a turn before there is a tail
        ([0.5, 0.5], [PLAIN, ROBE], 5, 5, 0.0, "00110"),  # every shrinks to 2
    ],
)
def test_turns_of_weighted_switch(shares, cards, steps, every, tail, order):
    assert turns(shares, moment(steps, cards), every, tail) == [int(c) for c in order]


def test_fewer_steps_than_loras_are_refused():
    with pytest.raises(ValueError, match=r"2 steps for 3 LoRAs.*weighted_composite"):
        turns([0.4, 0.3, 0.3], moment(2, [FOX, ROBE, PLAIN]), 5, 0.0)


# -- on real pipelines ------------------------------------------------------------------------------------------------

TRIGGERS = ("fox", "a wizard robe", "red")


def loras_for(pipe, text_encoder=True):
    found = []
    for i, trigger in enumerate(TRIGGERS):
        lora = tiny.lora_for(pipe, rank=2 + i, seed=i, text_encoder=text_encoder)
        found.append(lora.replace(card=lora.card.replace(triggers=(trigger,), category="character" if i == 1 else "")))
    return found


def by_hand(hand, without_it, alone, floor=0.05):
    """(ablation, triggers) influences with the hand loop's own encoding; the texts are written out here."""

    def vectors(text):
        named = hand.text(text, (0.0,) * 3)
        return [v.double().mean(1) if v.ndim == 3 else v.double() for v in named.values()]

    def cosine(a, b):
        each = [float((x * y).sum() / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)]
        return sum(each) / len(each)

    whole = vectors(handloop.PROMPT)
    ablated = [max(1 - cosine(whole, vectors(text)), floor) for text in without_it]
    similar = [max(cosine(whole, vectors(text)), 0.0) for text in alone]
    return [[v / sum(values) for v in values] for values in (ablated, similar)]


WITHOUT = ("a red in a wizard robe", "a red fox in", "a fox in a wizard robe")
ALONE = ("fox", "a wizard robe", "red")


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_shares_and_turns_on_a_pipeline_are_those_by_hand(family):
    """The predictions of W-Composite with shares by hand, and W-Switch's order; one, and three text encoders."""
    pipe = getattr(tiny, family)(torch.float64)
    loras, weights = loras_for(pipe), (0.9, 0.6, 1.1)
    make = handloop.HandSD15 if family == "sd15" else handloop.HandSD3
    hand = make(pipe, [handloop.factors(lora) for lora in loras], weights)
    ablated, similar = by_hand(hand, WITHOUT, ALONE)
    assert max(similar) - min(similar) > 1e-3
    # One small CLIP: every word says less than the floor of the paper's code, and turns are equal.
    assert (max(ablated) - min(ablated) > 1e-3) == (family == "sd3")
    texted = [any(key.startswith("text_encoder") for key in lora) for lora in loras]

    def row(i):
        own = tuple(w if j == i else 0.0 for j, w in enumerate(weights))
        return own, tuple(w if has else 0.0 for w, has in zip(own, texted, strict=True))

    latents = torch.randn(1, 4 if family == "sd15" else 8, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    lengths = [max(1, round(2 * v / max(ablated))) for v in ablated]
    cycle = [i for i, n in enumerate(lengths) for _ in range(n)]
    order = [cycle[step % len(cycle)] for step in range(7)] + [1]  # the character has the last one of 8 steps
    plans = {
        "weighted_composite": ({}, lambda step: [(share, *row(i)) for i, share in enumerate(similar)]),
        "weighted_switch": ({"every": 2, "tail": 0.125}, lambda step: [(1.0, *row(order[step]))]),
    }
    extra = {} if family == "sd15" else {"max_sequence_length": handloop.T5_LENGTH}
    for method, (options, plan) in plans.items():
        own = pipe.scheduler
        pipe.scheduler = type(own).from_config(own.config)
        _, wanted = hand.run(plan, type(own).from_config(own.config), 1, 3.0, latents)
        with composing(pipe, loras, method, weights=weights, **options):
            found = pipe(
                handloop.PROMPT, negative_prompt=handloop.NEGATIVE, guidance_scale=3.0, height=32, width=32,
                num_inference_steps=8, latents=latents, output_type="latent", **extra,
            ).images  # fmt: skip
        pipe.scheduler = own
        assert handloop.relative(found, wanted) < 1e-9, method
        _, equal = hand.run(lambda step: [(1 / 3, *row(i)) for i in range(3)], type(own).from_config(own.config), 1,
                            3.0, latents)  # fmt: skip
        assert handloop.relative(found, equal) > 1e-5


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_influence_is_known_on_pipelines_with_several_encoders(family):
    pipe = getattr(tiny, family)()
    loras, seen = loras_for(pipe), {}
    for by in ("ablation", "triggers"):
        plan_of = methods("route")["weighted_composite"]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with composing(pipe, loras, plan_of(by=by)) as conductor:
                extra = {"max_sequence_length": 16} if family == "flux" else {}
                pipe(handloop.PROMPT, num_inference_steps=1, height=32, width=32, output_type="latent", **extra)
                seen[by] = influence([m.lora.card for m in conductor.members], conductor.encodings, by=by)
        assert sum(seen[by]) == pytest.approx(1.0)
        assert max(seen[by]) - min(seen[by]) > 1e-3
    assert seen["ablation"] != pytest.approx(seen["triggers"], abs=1e-3)


def test_embeddings_in_place_of_a_prompt_give_equal_shares_and_a_warning():
    pipe = tiny.sd15()
    loras = loras_for(pipe, text_encoder=False)
    embeds = torch.randn(2, 1, 77, 32, generator=torch.Generator().manual_seed(1))
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    call |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
    call["latents"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with (
        pytest.warns(UserWarning, match="the prompt's words are not known"),
        composing(pipe, loras, "weighted_composite"),
    ):
        found = pipe(**call).images
    with composing(pipe, loras, "composite"):
        assert torch.allclose(found, pipe(**call).images, rtol=1e-4, atol=1e-5)
