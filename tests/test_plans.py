"""Route methods as plans: rows, shares and schedules against lists written by hand; what they refuse."""

import hashlib
import math

import pytest
import torch

from multilora.method import UnknownName, methods, resolve
from multilora.pipelines.composing import composing
from multilora.plan import Moment, Pass, shares
from tests import tiny


def moment(step, steps=8, weights=(0.9, 0.6, 1.1)):
    return Moment(step, steps, 500.0, None, weights, (None,) * len(weights))


def active(method, k, steps, **options):
    """Index of the only LoRA in the row at each step of a one-pass method."""
    plan = resolve("route", method, **options)([object()] * k)
    found = []
    for step in range(steps):
        (only,) = plan(moment(step, steps, (0.5,) * k))
        found += [i for i, v in enumerate(only.row) if v]
        assert sum(only.row) == 0.5
    return found


# -- switch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "steps", "every", "schedule", "expected"),
    [
        (3, 8, 2, "paper", [0, 0, 1, 1, 2, 2, 0, 0]),
        (3, 8, 2, "reference", [0, 0, 0, 1, 1, 2, 2, 0]),
        (2, 7, 3, "paper", [0, 0, 0, 1, 1, 1, 0]),
        (2, 7, 3, "reference", [0, 0, 0, 0, 1, 1, 1]),
        (2, 5, 1, "paper", [0, 1, 0, 1, 0]),
        (2, 5, 1, "reference", [0, 0, 1, 0, 1]),
        (1, 4, 5, "paper", [0, 0, 0, 0]),
        # Fewer steps than k * every: each LoRA stays steps // k.
        (3, 8, 5, "paper", [0, 0, 1, 1, 2, 2, 0, 0]),
        (3, 8, 5, "reference", [0, 0, 0, 1, 1, 2, 2, 0]),
        (3, 4, 5, "paper", [0, 1, 2, 0]),
        (3, 3, 5, "paper", [0, 1, 2]),
        (2, 10, 5, "paper", [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (2, 9, 5, "paper", [0, 0, 0, 0, 1, 1, 1, 1, 0]),
    ],
)
def test_switch_schedule(k, steps, every, schedule, expected):
    assert active("switch", k, steps, every=every, schedule=schedule) == expected


@pytest.mark.parametrize(("steps", "differ"), [(100, 19), (200, 39)])
def test_switch_schedules_differ_where_the_published_code_does(steps, differ):
    """Counted on the published code's settings: every 5 steps, 100 and 200 steps."""
    paper = active("switch", 4, steps, every=5)
    reference = active("switch", 4, steps, every=5, schedule="reference")
    assert sum(a != b for a, b in zip(paper, reference, strict=True)) == differ
    # The paper's formula, counting steps from 1.
    assert paper == [((t - 1) % (4 * 5)) // 5 for t in range(1, steps + 1)]


def test_switch_row_is_the_users_weight_at_that_step():
    plan = resolve("route", "switch", every=1)([object()] * 2)
    assert plan(moment(0, 4, (0.3, 0.7))) == [Pass((0.3, 0.0))]
    assert plan(moment(1, 4, (0.3, 0.7))) == [Pass((0.0, 0.7))]
    assert plan(moment(3, 4, (0.3, -0.2))) == [Pass((0.0, -0.2))]


@pytest.mark.parametrize(("k", "compensate", "factor"), [(4, 0.0, 1.0), (4, 0.5, 2.0), (3, 1.0, 3.0), (1, 1.0, 1.0)])
def test_switch_compensates_in_the_weight(k, compensate, factor):
    weights = (0.3, 0.7, 1.1, 0.5)[:k]
    plan = resolve("route", "switch", every=1, compensate=compensate)([object()] * k)
    for step in range(k):
        (only,) = plan(moment(step, k, weights))
        assert only.row == pytest.approx([factor * w * (i == step) for i, w in enumerate(weights)])


# -- the others -------------------------------------------------------------------------------------------------------


def test_merge_is_one_pass_at_the_weights():
    plan = resolve("route", "merge")([object()] * 3)
    (only,) = plan(moment(5))
    assert tuple(only.row) == (0.9, 0.6, 1.1)
    assert shares([only]) == [1.0]


def test_composite_is_one_pass_per_lora():
    passes = resolve("route", "composite")([object()] * 3)(moment(0))
    assert [tuple(p.row) for p in passes] == [(0.9, 0.0, 0.0), (0.0, 0.6, 0.0), (0.0, 0.0, 1.1)]
    assert shares(passes) == [1 / 3] * 3


def test_composite_of_the_paper_scales_predictions():
    passes = resolve("route", "composite", mix="paper")([object()] * 3)(moment(0))
    assert [tuple(p.row) for p in passes] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]
    assert shares(passes) == [0.9 / 3, 0.6 / 3, 1.1 / 3]


@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
def test_sum_of_differences_shares(strength):
    passes = resolve("route", "sum_of_differences", strength=strength)([object()] * 3)(moment(0))
    assert [tuple(p.row) for p in passes] == [
        (0.0, 0.0, 0.0),
        (0.9, 0.0, 0.0),
        (0.0, 0.6, 0.0),
        (0.0, 0.0, 1.1),
    ]
    assert shares(passes) == [1 - 3 * strength, strength, strength, strength]


def test_sum_of_differences_needs_no_base_pass_for_one_lora():
    passes = resolve("route", "sum_of_differences")([object()])(moment(0, weights=(0.7,)))
    assert passes == [Pass((0.7,), mix=1.0)]


@pytest.mark.parametrize("name", sorted(methods("route")))
def test_shares_sum_to_one_and_cost_is_what_the_record_says(name):
    record = methods("route")[name]
    for k in (1, 2, 5):
        plan = record.fn([object()] * k, **record.check({}))
        for step in range(10):
            passes = plan(moment(step, 10, tuple(0.5 + 0.1 * i for i in range(k))))
            assert math.isclose(sum(shares(passes)), 1.0, abs_tol=1e-12)
            assert len(passes) <= {"1": 1, "k": k, "k + 1": k + 1}.get(record.cost, len(passes))


@pytest.mark.parametrize("name", sorted(methods("route")))
def test_two_pictures_share_no_state(name):
    """A plan made later, or run in between, changes nothing for one that is under way."""
    bound = resolve("route", name)
    loras = [object()] * 3
    alone = bound(loras)
    expected = [alone(moment(step, 9)) for step in range(9)]
    first, second = bound(loras), bound(loras)
    mixed = []
    for step in range(9):
        mixed.append(first(moment(step, 9)))
        second(moment(8 - step, 9))
    assert mixed == expected


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd15()


@pytest.fixture(scope="module")
def loras(pipe):
    return [tiny.lora_for(pipe, rank=2, seed=i, text_encoder=True) for i in range(3)]


def trace(pipe):
    """All that a refusal must leave as it was."""
    digest = hashlib.sha256()
    for module in (pipe.unet, pipe.text_encoder):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in [*pipe.unet.modules()])
    wrapped = [n for n in ("set_timesteps", "step") if n in pipe.scheduler.__dict__]
    return digest.hexdigest(), hooks, type(pipe.unet), "encode_prompt" in pipe.__dict__, wrapped


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("swich", {}, ["'swich'", "Nearest: switch", "composite", "merge"]),
        ("Merge", {}, ["'Merge'", "merge"]),
        ("switch", {"evry": 3}, ["option of switch", "'evry'", "Nearest: every"]),
        ("merge", {"every": 3}, ["option of merge", "'every'", "Known: none"]),
        ("switch", {"every": 0}, ["every=0", "switch", "at least 1"]),
        ("switch", {"every": -2}, ["every=-2", "at least 1"]),
        ("switch", {"every": 2.5}, ["every=2.5", "int"]),
        ("switch", {"every": "five"}, ["every='five'", "int"]),
        ("switch", {"every": float("nan")}, ["every=nan"]),
        ("switch", {"every": True}, ["every=True", "int"]),
        ("switch", {"schedule": "papr"}, ["schedule='papr'", "'paper'", "'reference'"]),
        ("composite", {"mix": "sum"}, ["mix='sum'", "'mean'", "'paper'"]),
        ("sum_of_differences", {"strength": 9}, ["strength=9", "0.0 to 4.0"]),
        ("sum_of_differences", {"strength": float("inf")}, ["strength=inf", "finite"]),
        (3, {}, ["wanted a route method"]),
    ],
)
def test_bad_methods_and_options_are_refused(pipe, loras, method, options, words):
    before = trace(pipe)
    with pytest.raises(ValueError) as error, composing(pipe, loras, method, **options):
        pytest.fail("attached in spite of a bad argument")
    for word in words:
        assert word in str(error.value), str(error.value)
    assert trace(pipe) == before


def test_options_are_read_from_strings():
    known = {"every": 3, "schedule": "paper", "compensate": 0.0}
    assert resolve("route", "switch", every="3").options == known
    bound = resolve("route", resolve("route", "switch", every=3), schedule="reference")
    assert bound.options == {**known, "schedule": "reference"}
    with pytest.raises(UnknownName):
        resolve("route", "nothing")


def test_too_few_steps_for_switch_proposes_composite(pipe, loras):
    before = trace(pipe)
    with pytest.raises(ValueError, match=r"2 steps for 3 LoRAs.*'composite'"), composing(pipe, loras, "switch"):
        pipe("a fox", num_inference_steps=2, output_type="latent", height=32, width=32)
    assert trace(pipe) == before
    with composing(pipe, loras, "switch"):  # as many steps as LoRAs is enough
        latents = pipe("a fox", num_inference_steps=3, output_type="latent", height=32, width=32).images
    assert torch.isfinite(latents).all()
