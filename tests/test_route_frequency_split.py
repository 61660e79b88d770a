"""Frequency split: against loops over waves in NumPy's double precision, on every layout of predictions."""

import numpy as np
import pytest
import torch

from multilora.method import resolve
from multilora.plan import Moment, shares


def plan_of(k, **options):
    return resolve("route", "frequency_split", **options)([object()] * k)


def moment(k):
    return Moment(0, 4, 500.0, None, tuple(0.5 + 0.2 * i for i in range(k)), (None,) * k)


def drawn(*shape, seed=1, k=3):
    base, *own = torch.randn(k + 1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [base, *(base + (0.4 + 0.2 * i) * o for i, o in enumerate(own))]


def by_hand(outputs, bands, sharpness):
    """[C, H, W] each: every wave of every channel by itself."""
    base, *changes = [np.asarray(o) for o in outputs]
    waves = [np.fft.fft2(e - base) for e in changes]
    height, width = base.shape[1:]
    band = np.empty((height, width), int)
    for y in range(height):
        for x in range(width):
            v = min(y, height - y) / height * 2
            u = min(x, width - x) / width * 2
            band[y, x] = min(int(np.sqrt((v * v + u * u) / 2) * bands), bands - 1)
    powers = []
    for wave in waves:
        one = np.zeros(bands)
        for b in range(bands):
            found = [abs(wave[c, y, x]) ** 2 for c in range(len(base)) for y in range(height) for x in range(width)
                     if band[y, x] == b]  # fmt: skip
            one[b] = np.mean(found) if found else 0.0
        powers.append(one / one.mean())
    total = np.zeros_like(waves[0])
    for wave, own in zip(waves, powers, strict=True):
        for y in range(height):
            for x in range(width):
                b = band[y, x]
                total[:, y, x] += wave[:, y, x] * (own[b] / max(p[b] for p in powers)) ** sharpness
    return torch.from_numpy(base + np.fft.ifft2(total).real)


@pytest.mark.parametrize(("bands", "sharpness", "size"), [(4, 1.0, (6, 6)), (2, 3.0, (5, 7)), (9, 0.5, (4, 8))])
def test_every_wave_by_hand(bands, sharpness, size):
    outputs = drawn(2, 3, *size)
    plan = plan_of(3, bands=bands, sharpness=sharpness)
    wanted = torch.stack([by_hand([o[b] for o in outputs], bands, sharpness) for b in range(2)])
    found = plan.combine(outputs, moment(3))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    plain = outputs[0] + sum(o - outputs[0] for o in outputs[1:])
    assert (found - plain).norm() > 0.01 * plain.norm()
    listed = plan.combine([[s[:, None] for s in o] for o in outputs], moment(3))  # Z-Image: lists of [C, 1, H, W]
    torch.testing.assert_close(torch.stack(listed)[:, :, 0], wanted, rtol=1e-9, atol=1e-9)


def test_tokens_have_the_frequencies_along_them():
    outputs = drawn(2, 6, 4)
    found = plan_of(3, sharpness=2).combine(outputs, moment(3))
    base, *own = outputs
    waves = [np.fft.fft(np.asarray(e - base), axis=1) for e in own]
    band = [min(int(min(t, 6 - t) / 6 * 2 * 4), 3) for t in range(6)]
    for b in range(2):
        powers = []
        for wave in waves:
            one = np.array(
                [np.mean([abs(wave[b, t]) ** 2 for t in range(6) if band[t] == r] or [0]) for r in range(4)]
            )
            powers.append(one / one.mean())
        total = sum(wave[b] * np.array([(own[r] / max(p[r] for p in powers)) ** 2 for r in band])[:, None]
                    for wave, own in zip(waves, powers, strict=True))  # fmt: skip
        torch.testing.assert_close(found[b], base[b] + torch.from_numpy(np.fft.ifft(total, axis=0).real))


def test_passes_and_the_limits_of_sharpness():
    passes = plan_of(3)(moment(3))
    assert [tuple(p.row) for p in passes] == [(0.0,) * 3, (0.5, 0.0, 0.0), (0.0, 0.7, 0.0), (0.0, 0.0, 0.9)]
    assert sum(shares(passes)) == pytest.approx(1.0)
    (only,) = plan_of(1)(moment(1))
    assert tuple(only.row) == (0.5,)
    outputs = drawn(1, 4, 6, 6)
    base = outputs[0]
    plain = base + sum(o - base for o in outputs[1:])
    torch.testing.assert_close(plan_of(3, sharpness=0).combine(outputs, moment(3)), plain)
    # A slow and a fine change have no band in common: each is there whole, and noise of another in it is not.
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    slow, fine = torch.cos(2 * torch.pi * x / 8)[None, None], ((-1.0) ** (x + y))[None, None]
    base = torch.randn(1, 1, 8, 8)
    found = plan_of(2, sharpness=64).combine([base, base + slow + 0.1 * fine, base + 3 * fine], moment(2))
    torch.testing.assert_close(found, base + slow + 3 * fine, rtol=1e-5, atol=1e-5)


def test_a_change_of_nothing_leaves_the_others_as_they_are_and_half_precision_stays():
    outputs = drawn(1, 2, 4, 4, k=2)
    outputs[2] = outputs[0].clone()
    torch.testing.assert_close(plan_of(2).combine(outputs, moment(2)), outputs[1])
    half = [o.half() for o in drawn(1, 2, 4, 4, k=2)]
    found = plan_of(2).combine(half, moment(2))
    assert found.dtype == torch.float16
    torch.testing.assert_close(
        found.double(), plan_of(2).combine([h.double() for h in half], moment(2)), rtol=2e-3, atol=2e-3
    )
