"""Guided merge: its share of the negative half, and each half against dense models, call by call, on every family."""

import copy
from types import SimpleNamespace

import pytest
from diffusers import ClassifierFreeGuidance

from multilora.method import resolve
from multilora.pipelines.composing import composing, guidance_of, member
from multilora.plan import Moment, Pass
from tests import dense, families, scene, tiny
from tests.test_composer import unheard

ONE = 1e-5


def planned(weights, guidance, **options):
    moment = Moment(1, 4, 9.0, None, weights, guidance=guidance)
    (one,) = resolve("route", "guided_merge", **options)([object()] * len(weights))(moment)
    assert one == Pass(weights, negative=one.negative)
    return one.negative


def test_a_change_that_both_halves_have_counts_the_same_at_any_guidance():
    for guidance in (3.0, 4.5, 7.5, 12.0):
        share = planned((0.9, 0.6, 1.1, 0.3), guidance, boost=2.0)
        assert guidance - (guidance - 1) * share == pytest.approx(2.5)  # 1 + 2 (1 - 1/4)
    assert planned((1.0,) * 5, 3.0) == pytest.approx(0.5)
    assert planned((1.0, 1.0), 1.5, boost=3.0) == 0.0  # more than guidance can give
    assert planned((1.0, 1.0), None) == planned((1.0, 1.0), 4.0)


@pytest.mark.parametrize(
    ("weights", "guidance", "boost"),
    [((0.7,), 7.5, 3.0), ((0.7, 0.0), 7.5, 3.0), ((0.7, 0.3), 7.5, 0.0), ((0.7, 0.3), 1.0, 2.0), ((0.7, 0.3), 0, 2.0)],
)
def test_it_is_merge_for_one_lora_without_boost_and_without_guidance(weights, guidance, boost):
    assert planned(weights, guidance, boost=boost) == 1.0


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ("sd15", "flux") else pytest.mark.long) for f in families.PIPES]
)
@pytest.mark.parametrize("images", [1, 2])
def test_each_half_is_merge_at_its_own_weights(family, images):
    """With parts in the text encoders, at guidance 4: f = 1 + 3 / 2, n = 1.5 / 3; Z-Image's 4 is 5 elsewhere."""
    share = 2.5 / 4 if family == "zimage" else 0.5
    pipe, loras = families.pipe(family), families.loras(family)
    make = families.call(family, True, 1, images)
    halves = [dense.Dense(pipe, loras, [w * s for w in families.WEIGHTS], make) for s in (1.0, share)]
    for one in halves:
        one.prepare()
    differences, apart = [], []

    def answer(args, kwargs):
        own = halves[0].own
        arguments = dense.by_name(own, args, kwargs)
        found = []
        for one in halves:
            one.advance(arguments)
            outputs = dense.tensors(one.run("merge", arguments)[0])
            found.append(outputs if family == "zimage" else outputs[0])
        positive, negative = found
        if family in ("flux", "qwen"):
            wanted = list((positive, negative)[len(differences) % 2])
        elif family == "zimage":
            wanted = [*positive[:images], *negative[images:]]
        else:
            wanted = [*negative[:images], *positive[images:]]
        got = list(own(*copy.deepcopy(args), **copy.deepcopy(kwargs))[0])
        differences.append(dense.relative(got, wanted))
        apart.append(dense.relative(list(positive), list(negative)))
        return halves[0].run("merge", arguments)

    with (
        composing(pipe, loras, "guided_merge", weights=families.WEIGHTS, boost=3.0),
        dense.standing(pipe, halves[0].name, dense.Stand(halves[0].own, answer)),
    ):
        make(pipe)
    assert max(differences) <= ONE, differences
    assert min(apart) > 0.01, apart


def test_with_nothing_left_in_the_negative_half_it_is_positive_only():
    pipe = families.pipe("sd15")
    loras, make = families.loras("sd15"), families.call("sd15", steps=3, guidance_scale=2.0)
    with composing(pipe, loras, "guided_merge", weights=families.WEIGHTS, boost=3.0):
        ours = make(pipe)
    only = [member(pipe, x, weight=w, positive_only=True) for x, w in zip(loras, families.WEIGHTS, strict=True)]
    with composing(pipe, only, "merge"):
        wanted = make(pipe)
    with composing(pipe, loras, "merge", weights=families.WEIGHTS):
        assert scene.apart(make(pipe), wanted) > 0.01
    assert scene.apart(ours, wanted) < ONE


def test_where_the_halves_are_not_known_it_is_merge_with_a_warning():
    pipe = unheard(tiny.sd15())
    with composing(pipe, scene.loras(pipe), "merge"):
        wanted = scene.draw(pipe, guidance=4.0)
    with (
        composing(pipe, scene.loras(pipe), "guided_merge"),
        pytest.warns(UserWarning, match=r"guided_merge: Unheard is not in the table.*part is unknown") as told,
    ):
        assert scene.apart(scene.draw(pipe, guidance=4.0), wanted) < ONE
    assert len(told) == 1


def test_the_scale_of_a_running_pipeline_and_of_a_guider():
    for family, scale in (("sd15", 4.0), ("sd3", 4.0), ("zimage", 5.0), ("flux", None), ("qwen", None)):
        pipe = families.pipe(family)
        families.call(family, steps=1)(pipe)
        assert guidance_of(pipe) == scale
    assert guidance_of(SimpleNamespace(guider=ClassifierFreeGuidance(guidance_scale=6.0))) == 6.0
    original = ClassifierFreeGuidance(guidance_scale=6.0, use_original_formulation=True)
    assert guidance_of(SimpleNamespace(guider=original)) == 7.0
    assert guidance_of(SimpleNamespace()) is None


def test_gates_are_held_back_as_weights_are():
    """MoLE without a gate is the mean of its LoRAs; Arrow with nothing left in the negative half, positive_only."""
    pipe, loras = families.pipe("sd15"), families.loras("sd15", False)

    def drawn(used, method, guidance, weights=families.WEIGHTS, **options):
        with composing(pipe, used, method, weights=weights, **options):
            return families.call("sd15", steps=3, guidance_scale=guidance)(pipe)

    ours = drawn(loras, "mole", 4.0, boost=3.0)
    wanted = drawn(loras, "guided_merge", 4.0, [w / 2 for w in families.WEIGHTS], boost=3.0)
    assert scene.apart(ours, wanted) < ONE
    assert scene.apart(ours, drawn(loras, "mole", 4.0)) > 0.005
    only = [member(pipe, x, weight=w, positive_only=True) for x, w in zip(loras, families.WEIGHTS, strict=True)]
    ours = drawn(loras, "arrow", 2.0, boost=3.0)
    assert scene.apart(ours, drawn(only, "arrow", 2.0, None)) < ONE
    assert scene.apart(ours, drawn(loras, "arrow", 2.0)) > 0.005


@pytest.mark.long
def test_gates_are_held_back_where_a_layer_joins_the_tokens_of_all_samples():
    pipe = families.pipe("zimage")
    loras = [
        tiny.lora_for(pipe, rank=3, seed=i, strength=2.0, modules=["all_x_embedder.2-1", "cap_embedder.1", "to_q"])
        for i in range(2)
    ]
    make = families.call("zimage", steps=2)
    with composing(pipe, loras, "mole", weights=families.WEIGHTS, boost=3.0):
        ours = make(pipe)
    with composing(pipe, loras, "guided_merge", weights=[w / 2 for w in families.WEIGHTS], boost=3.0):
        assert scene.apart(make(pipe), ours) < ONE
    with composing(pipe, loras, "mole", weights=families.WEIGHTS):
        assert scene.apart(make(pipe), ours) > 0.005


def test_nothing_is_said_of_prompts_where_no_lora_has_a_part_for_them(recwarn):
    pipe = unheard(tiny.sd15())
    with composing(pipe, scene.loras(pipe), "guided_merge"):
        scene.draw(pipe, guidance=4.0)
    assert not [w for w in recwarn if "text_encoder" in str(w.message)]


def test_a_guider_with_one_condition_does_not_guide():
    guider = ClassifierFreeGuidance(guidance_scale=6.0)
    guider.disable()
    assert guidance_of(SimpleNamespace(guider=guider)) == 1.0
