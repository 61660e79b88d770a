"""Stale sums: which rows a step runs, and what stands in for the others, against sums by hand in float64."""

import math

import pytest
import torch

from multilora.lora import Card, Lora
from multilora.method import resolve
from multilora.plan import Moment, shares

K, STEPS = 3, 13
LORAS = [Lora({}, Card(name=name)) for name in ("fox", "robe", "night")]
WEIGHTS = (0.9, 0.6, 1.1)
DRAWN = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def base_at(step, half=0):
    """A base's prediction [2, 5, 3] that bends over the steps."""
    return DRAWN[half, 0] * math.cos(0.3 * step) + 0.1 * step


def change_at(i, step, weight, half=0):
    """What LoRA i changes, in proportion to its weight."""
    return weight * DRAWN[half, 1 + i] * math.sin(0.2 * step + i + 0.5)


def linear_change(i, step, weight, half=0):
    return weight * DRAWN[half, 1 + i] * (1 + 0.3 * step - 0.1 * i)


class Run:
    """A method over the steps of a picture: which rows it asks for, and the prediction of every call."""

    def __init__(self, method, weights=lambda step: WEIGHTS, calls=1, base=base_at, change=change_at, **options):
        plan = resolve("route", method, **options)(LORAS[:K])
        self.asked, self.found = [], []
        for step in range(STEPS):
            for half in range(calls):
                w = weights(step)
                moment = Moment(step, STEPS, 500.0, None, w, (None,) * K)
                passes = plan(moment)
                rows = [tuple(p.row) for p in passes]
                assert sum(shares(passes)) == pytest.approx(1.0)
                assert all(sum(v != 0 for v in row) <= 1 for row in rows)
                assert all(v in (0.0, w[i]) for row in rows for i, v in enumerate(row))
                outputs = [
                    base(step, half) + sum(change(i, step, v, half) for i, v in enumerate(row) if v) for row in rows
                ]
                combine = getattr(plan, "combine", None)
                if combine is None:
                    found = sum(m * o for m, o in zip(shares(passes), outputs, strict=True))
                else:
                    found = combine(outputs, moment)
                self.found.append(found)
                self.asked.append("".join("b" if not any(row) else str(row.index(max(row))) for row in rows))


def exact(step, strengths, half=0, change=change_at):
    return base_at(step, half) + sum(s * change(i, step, WEIGHTS[i], half) for i, s in enumerate(strengths))


FIRST = "b012"
SCHEDULES = {
    1: [FIRST, "0", "1", "2", "b", "0", "1", "2", "b", "0", "1", "2", "b"],
    2: [FIRST, "01", "b2", "01", "b2", "01", "b2", "01", "b2", "01", "b2", "01", "b2"],
    3: [FIRST, "012", "b01", "b20", "b12", "012", "b01", "b20", "b12", "012", "b01", "b20", "b12"],
}


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_of_each_step(rows):
    assert Run("stale_sum", rows=rows).asked == SCHEDULES[rows]
    assert Run("stale_composite", rows=min(rows, 2)).asked == SCHEDULES[min(rows, 2)]


@pytest.mark.parametrize("rows", [1, 2])
def test_the_first_steps_may_run_everything(rows):
    run, plain = Run("stale_sum", rows=rows, exact=0.3), Run("sum_of_differences")
    assert run.asked[:5] == [FIRST] * 4 + [SCHEDULES[rows][1]]
    for found, wanted in zip(run.found[:4], plain.found, strict=False):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (run.found[9] - plain.found[9]).norm() > 1e-3


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(
    ("method", "strengths", "extrapolate"),
    [("stale_sum", (1.0,) * 3, 0.0), ("stale_sum", (1.0,) * 3, 0.7), ("stale_composite", (1 / 3,) * 3, 0.7)],
)
def test_what_is_not_run_follows_its_last_two_measurements(method, strengths, extrapolate, rows):
    if (method, rows) == ("stale_composite", 3):
        return  # Composite itself
    run, asked = Run(method, rows=rows, extrapolate=extrapolate), SCHEDULES[rows]
    bases = [n for n, names in enumerate(asked) if "b" in names]

    def measured(i, n):
        """The change of LoRA i at a step that ran it: against the base, or the line between the base's neighbours."""
        if n in bases:
            return change_at(i, n, WEIGHTS[i])
        left, right = max(b for b in bases if b < n), min(b for b in bases if b > n)
        between = base_at(left) + (base_at(right) - base_at(left)) * (n - left) / (right - left)
        return base_at(n) + change_at(i, n, WEIGHTS[i]) - between

    for step, found in enumerate(run.found):
        settled, changes = max(n for n in bases if n <= step), []
        for i in range(K):
            known = [n for n in range(settled + 1) if str(i) in asked[n]]
            now = measured(i, known[-1])
            if len(known) > 1:
                trend = (now - measured(i, known[-2])) / (known[-1] - known[-2])
                now = now + extrapolate * (step - known[-1]) * trend
            changes.append(now)
        base, own = base_at(step), [i for i in range(K) if str(i) in asked[step]]
        exact_ones = {i: base + change_at(i, step, WEIGHTS[i]) for i in own}
        if "b" not in asked[step]:
            base = sum(e - changes[i] for i, e in exact_ones.items()) / len(own)
        for i, e in exact_ones.items():
            changes[i] = e - base
        wanted = base + sum(s * c for s, c in zip(strengths, changes, strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert (run.found[6] - exact(6, strengths)).norm() > 1e-3


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_changes_on_a_straight_line_are_exact_once_their_trend_is_known(rows):
    run = Run("stale_sum", rows=rows, extrapolate=1.0, change=linear_change, base=lambda n, half: DRAWN[half, 0] * n)
    for step, found in enumerate(run.found):
        wanted = DRAWN[0, 0] * step + sum(linear_change(i, step, WEIGHTS[i]) for i in range(K))
        if step == 0 or step > 5:
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_enough_rows_are_the_exact_methods():
    for method, rows, plain in (("stale_sum", 4, "sum_of_differences"), ("stale_composite", 3, "composite")):
        run, other = Run(method, rows=rows), Run(plain)
        assert run.asked == other.asked
        assert all(torch.equal(a, b) for a, b in zip(run.found, other.found, strict=True))


@pytest.mark.parametrize("rows", [1, 2])
def test_calls_of_one_step_do_not_see_each_other(rows):
    """Separate calls for the two halves of guidance, or a solver's second call."""
    both = Run("stale_sum", rows=rows, calls=2)
    for half in range(2):
        alone = Run(
            "stale_sum",
            rows=rows,
            base=lambda step, _, half=half: base_at(step, half),
            change=lambda i, step, w, _, half=half: change_at(i, step, w, half),
        )
        assert alone.asked == both.asked[half::2]
        assert all(torch.equal(a, b) for a, b in zip(alone.found, both.found[half::2], strict=True))


@pytest.mark.parametrize("rows", [1, 2])
def test_weights_may_change_and_loras_come_and_go(rows):
    def weights(step):
        return (0.5 + 0.1 * step, 0.0 if step < 4 else 0.8, 1.1 if step < 7 else 0.0)

    still = {"base": lambda step, half: DRAWN[half, 0], "change": lambda i, step, w, half: w * DRAWN[half, 1 + i]}
    run = Run("stale_sum", weights=weights, rows=rows, extrapolate=0.0, **still)
    assert run.asked[0] == "b02"
    assert run.asked[4] == "b1"
    assert not any("1" in asked for asked in run.asked[:4])
    assert not any("2" in asked for asked in run.asked[7:])
    for step, found in enumerate(run.found):
        wanted = DRAWN[0, 0] + sum(w * DRAWN[0, 1 + i] for i, w in enumerate(weights(step)))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_strengths_are_those_of_the_sum():
    options = {"strength": 0.5, "strengths": "robe=2@0,0@1"}
    still = {
        "base": lambda step, half: DRAWN[half, 0] * step,
        "change": lambda i, step, w, half: w * DRAWN[half, 1 + i],
    }
    run = Run("stale_sum", rows=2, **still, **options)
    for step, found in enumerate(run.found):
        strengths = (0.5, 1.0 - step / (STEPS - 1), 0.5)
        wanted = DRAWN[0, 0] * step + sum(s * w * d for s, w, d in zip(strengths, WEIGHTS, DRAWN[0, 1:], strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_lists_are_tensors_sample_by_sample_and_a_new_shape_starts_anew(rows):
    plan = resolve("route", "stale_sum", rows=rows)(LORAS)
    other = resolve("route", "stale_sum", rows=rows)(LORAS)
    counts = []
    for step in range(8):
        moment = Moment(step, 8, 500.0, None, WEIGHTS, (None,) * K)
        passes, same = plan(moment), other(moment)
        counts.append(len(passes))
        samples = 2 if step < 4 else 1  # the negative half ends
        outputs = [torch.stack([base_at(step) + 0.1 * j * DRAWN[h, j] for h in range(samples)])
                   for j, _ in enumerate(passes)]  # fmt: skip
        found = plan.combine([list(o) for o in outputs], moment)
        assert len(passes) == len(same)
        assert torch.equal(torch.stack(found), other.combine(outputs, moment))
    assert counts == [4, rows, rows, rows, rows, 4, rows, rows]
