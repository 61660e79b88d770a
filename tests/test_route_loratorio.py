"""LoRAtorio: the shares of patches against loops over patches, on every layout of predictions."""

import math

import pytest
import torch

from multilora.method import resolve
from multilora.plan import Moment, shares


def plan_of(k, **options):
    return resolve("route", "loratorio", **options)([object()] * k)


def moment(k):
    return Moment(0, 4, 500.0, None, tuple(0.5 + 0.2 * i for i in range(k)), (None,) * k)


def by_hand(outputs, patch, temperature):
    """[C, H, W] each: one patch after the other, cosines and shares in plain floats."""
    base, *own = outputs
    found = torch.zeros_like(base)
    for top in range(0, base.shape[1], patch):
        for left in range(0, base.shape[2], patch):
            at = (slice(None), slice(top, top + patch), slice(left, left + patch))
            b = base[at].flatten().tolist()
            likes = []
            for e in own:
                v = e[at].flatten().tolist()
                dot = math.fsum(x * y for x, y in zip(v, b, strict=True))
                likes.append(dot / math.sqrt(math.fsum(x * x for x in v) * math.fsum(x * x for x in b)))
            powers = [math.exp(-c / temperature) for c in likes]
            for e, power in zip(own, powers, strict=True):
                found[at] += e[at] * power / sum(powers)
    return found


def drawn(*shape, seed=1):
    """A base and three predictions near it."""
    base, *own = torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [base, *(base + 0.4 * o for o in own)]


@pytest.mark.parametrize(("patch", "temperature"), [(1, 0.1), (2, 0.02), (3, 0.5)])
def test_shares_are_those_of_patches(patch, temperature):
    outputs = drawn(2, 4, 5, 7)  # the patches at two edges are cut
    plan = plan_of(3, patch=patch, temperature=temperature)
    wanted = torch.stack([by_hand([o[b] for o in outputs], patch, temperature) for b in range(2)])
    found = plan.combine(outputs, moment(3))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert (found - sum(outputs[1:]) / 3).norm() > 0.01 * found.norm()
    # Lists of [C, 1, H, W] (Z-Image) and videos [B, C, F, H, W]: every frame has its own patches.
    listed = plan.combine([[s[:, None] for s in o] for o in outputs], moment(3))
    torch.testing.assert_close(torch.stack(listed)[:, :, 0], wanted, rtol=1e-10, atol=1e-10)
    video = plan.combine([torch.stack([o, o.flip(0)], 2) for o in outputs], moment(3))
    torch.testing.assert_close(video[:, :, 0], wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(video[:, :, 1], wanted.flip(0), rtol=1e-10, atol=1e-10)


def test_a_token_is_a_patch():
    outputs = drawn(2, 6, 8)
    wanted = [by_hand([o[b].T[:, :, None] for o in outputs], 1, 0.05)[:, :, 0].T for b in range(2)]
    found = plan_of(3, temperature=0.05).combine(outputs, moment(3))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-10)


def test_passes_and_the_limits_of_the_temperature():
    passes = plan_of(3)(moment(3))
    assert [tuple(p.row) for p in passes] == [(0.0,) * 3, (0.5, 0.0, 0.0), (0.0, 0.7, 0.0), (0.0, 0.0, 0.9)]
    assert sum(shares(passes)) == pytest.approx(1.0)
    (only,) = plan_of(1)(moment(1))
    assert tuple(only.row) == (0.5,)
    outputs = drawn(1, 4, 6, 6)
    torch.testing.assert_close(
        plan_of(3, temperature=1e6).combine(outputs, moment(3)), sum(outputs[1:]) / 3, rtol=1e-5, atol=1e-5
    )
    one = [o.clone() for o in outputs]
    one[2] = -one[0]  # nothing is further from the base
    torch.testing.assert_close(plan_of(3, temperature=1e-3).combine(one, moment(3)), one[2])
    half = plan_of(3).combine([o.to(torch.bfloat16) for o in outputs], moment(3))
    assert half.dtype == torch.bfloat16
