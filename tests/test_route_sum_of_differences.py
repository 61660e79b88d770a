"""Sum of differences: strengths by LoRA and step, and the guard, against sums written out in float64."""

import math

import pytest
import torch

from multilora.lora import Card, Lora
from multilora.method import resolve
from multilora.plan import Moment, shares

WEIGHTS = (0.9, 0.6, 1.1)
LORAS = [Lora({}, Card(name=name)) for name in ("fox", "robe", "night")]


def moment(step=0, steps=5, sigma=None):
    return Moment(step, steps, 500.0, sigma, WEIGHTS, (None,) * 3)


def plan_of(loras=LORAS, **options):
    return resolve("route", "sum_of_differences", **options)(loras)


def mixes(strengths, step=0, sigma=None, **options):
    return shares(plan_of(strengths=strengths, **options)(moment(step, sigma=sigma)))


@pytest.mark.parametrize(
    ("strengths", "step", "wanted"),
    [
        ("0.5", 0, [0.5, 0.5, 0.5]),
        ("fox=1.5", 0, [1.5, 1.0, 1.0]),
        (" 0.5 | night = 2 ", 0, [0.5, 0.5, 2.0]),
        ("robe=1@0,0.5@1", 0, [1.0, 1.0, 1.0]),
        ("robe=1@0,0.5@1", 2, [1.0, 0.75, 1.0]),
        ("robe=1@0,0.5@1|robe=0.25", 4, [1.0, 0.25, 1.0]),
    ],
)
def test_strengths_by_lora_and_step(strengths, step, wanted):
    assert mixes(strengths, step) == pytest.approx([1 - sum(wanted), *wanted])
    halved = [0.5 * w for w in wanted]
    assert mixes(strengths, step, strength=0.5) == pytest.approx([1 - sum(halved), *halved])


def test_a_strength_of_zero_needs_no_pass_and_sigmas_are_read():
    passes = plan_of(strengths="robe=0")(moment())
    assert [tuple(p.row) for p in passes] == [(0.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.0, 0.0, 1.1)]
    assert shares(plan_of(strengths="0")(moment())) == [1.0]
    assert mixes("2@7sigma,0@2sigma", sigma=4.5) == pytest.approx([-2.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("strengths", "words"),
    [("cat=1", ["'cat'", "fox, robe, night"]), ("fox=much", ["much"]), ("1|", ["''"]), ("nan", ["finite"])],
)
def test_bad_strengths_are_refused(strengths, words):
    with pytest.raises(ValueError) as error:
        plan_of(strengths=strengths)
    assert all(word in str(error.value) for word in words), str(error.value)


def predictions(alike, samples=2, seed=0):
    """Base and three predictions [samples, 4, 5, 3] whose changes have `alike` of one common direction."""
    generator = torch.Generator().manual_seed(seed)
    base, common, *own = torch.randn(5, samples, 4, 5, 3, generator=generator, dtype=torch.float64)
    return [base, *(base + 0.3 * (alike * common + (1 - alike) * one) for one in own)]


def by_hand(outputs, strengths, guard):
    """Sample by sample, with sums over plain lists."""
    found = []
    for base, *own in zip(*outputs, strict=True):
        changes = [s * (e - base) for s, e in zip(strengths, own, strict=True)]
        total = sum(changes)
        size = math.sqrt(math.fsum(v * v for v in total.flatten().tolist()))
        apart = math.sqrt(math.fsum(v * v for one in changes for v in one.flatten().tolist()))
        found.append(base + total * min(1.0, guard * apart / size))
    return torch.stack(found)


@pytest.mark.parametrize("guard", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_guard_is_the_formula_for_tensors_and_lists(guard, dtype):
    plan = plan_of(guard=guard, strengths="fox=1.5")
    outputs = predictions(0.8)
    wanted, plain = by_hand(outputs, (1.5, 1.0, 1.0), guard), by_hand(outputs, (1.5, 1.0, 1.0), 1e9)
    assert (wanted - plain).norm() > 0.1 * plain.norm()
    assert len(plan(moment())) == 4
    loose = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    found = plan.combine([o.to(dtype) for o in outputs], moment())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=loose, atol=loose)
    listed = plan.combine([list(o.to(dtype)) for o in outputs], moment())
    assert torch.equal(torch.stack(listed), found)


def test_the_guard_leaves_alone_what_is_unrelated_and_one_lora():
    plan, outputs = plan_of(guard=1.001), predictions(0.0)
    changes = [o - outputs[0] for o in outputs[1:]]
    for i, change in enumerate(changes):  # made exactly orthogonal
        for other in changes[:i]:
            share = (change * other).flatten(1).sum(1) / (other * other).flatten(1).sum(1)
            change -= share[:, None, None, None] * other
    outputs = [outputs[0], *(outputs[0] + c for c in changes)]
    torch.testing.assert_close(plan.combine(outputs, moment()), outputs[0] + sum(changes))
    assert getattr(plan_of(LORAS[:1], guard=1.0), "combine", None) is None
    assert getattr(plan_of(), "combine", None) is None
    still = plan_of(guard=1.0, strengths="0")
    assert torch.equal(still.combine(outputs[:1], moment()), outputs[0])
    assert torch.equal(plan.combine([outputs[0]] * 4, moment()), outputs[0])  # no change, no direction
