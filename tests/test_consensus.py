"""The entry-wise pieces of merges against numpy, PEFT's merge_utils and loops over single entries."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from multilora.consensus import (
    agreed_sum_,
    drop_,
    drop_by_rank_,
    generator_of,
    keep_largest_,
    kth_largest,
    weighted_sum_,
)

few = settings(max_examples=40, deadline=None)


def made(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loop(values, weights, majority, vote, divide):
    """One entry of agreed_sum_, from the description: values and weights are lists of floats."""
    votes = [w * v if vote == "weighted" else v for v, w in zip(values, weights, strict=True)]
    tally = sum(votes) if majority == "total" else sum((v > 0) - (v < 0) for v in votes)
    sign = 1 if tally >= 0 else -1
    agree = [i for i, v in enumerate(votes) if v * sign > 0]
    total = sum(weights[i] * values[i] for i in agree)
    divisor = {"count": len(agree), "weights": sum(weights[i] for i in agree), "none": 1}[divide]
    return total / divisor if divisor != 0 else total


# -- trimming -------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 60), st.integers(1, 40), st.floats(0.001, 1), st.integers(0, 10**6), st.booleans())
def test_trim_keeps_exactly_the_largest_and_the_first_of_equals(rows, columns, density, seed, whole):
    x = made((rows, columns), seed)
    x = (2 * x).round() if whole else x  # whole numbers: many equal magnitudes, of both signs
    flat = x.flatten().numpy()
    keep = max(1, int(density * flat.size))
    want = np.zeros_like(flat)
    order = np.argsort(-np.abs(flat), kind="stable")[:keep]
    want[order] = flat[order]
    got = keep_largest_(x.clone(), density)
    assert np.array_equal(got.flatten().numpy(), want)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(37, 29), (6, 3, 3, 2), (501, 403)])
def test_trim_is_pefts_where_no_two_are_equal(shape, density):
    x = made(shape, dtype=torch.float32)
    assert torch.equal(keep_largest_(x.clone(), density), merge_utils.magnitude_based_pruning(x, density))


LARGE = {
    "normal": lambda n, g: torch.randn(n, generator=g),
    "heavy": lambda n, g: torch.randn(n, generator=g) ** 7,
    "product": lambda n, g: torch.randn(n, generator=g) * torch.randn(n, generator=g),
    "few values": lambda n, g: torch.randint(0, 5, (n,), generator=g).float(),
    "equal": lambda n, g: torch.ones(n),
    "sorted": lambda n, g: torch.randn(n, generator=g).sort().values,
    "mostly zero": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.02),
    # The sample sees only zeros: its bracket must be found to miss.
    "hidden": lambda n, g: torch.where(torch.arange(n) % (n // 4096 | 1) == 0, 0.0, torch.rand(n, generator=g) + 1),
}


@pytest.mark.parametrize("kind", LARGE)
def test_the_limit_is_exact_where_a_sample_brackets_it_and_where_the_sample_misleads(kind):
    x = LARGE[kind](90_001, torch.Generator().manual_seed(1)).abs()
    ordered = x.sort(descending=True).values
    for k in (1, 2, 17, 900, 18_000, 45_000, 81_000, 90_000, 90_001):
        assert kth_largest(x, k) == ordered[k - 1], k


# -- random drops ---------------------------------------------------------------------------------------------------


def test_drops_keep_their_share_and_the_mean_and_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    x = made((211, 173), dtype=torch.float32)
    got = drop_(x.clone(), 0.3, generator_of(5, "a.b", 1))
    kept = got != 0
    n = x.numel()
    assert abs(float(kept.float().mean()) - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
    assert torch.equal(got[kept], x[kept] / 0.3)
    assert torch.equal(before, torch.get_rng_state())
    mean = sum(drop_(x.double(), 0.3, generator_of(s, "k", 0)) for s in range(200)) / 200
    error = (mean - x).norm() / x.norm()
    assert abs(float(error) - (0.7 / 0.3 / 200) ** 0.5) < 0.01  # the predicted noise of the mean, nothing beside it


def test_masks_depend_on_seed_key_and_place_and_on_nothing_else():
    def mask(seed, key, index):
        return drop_(torch.ones(400), 0.5, generator_of(seed, key, index), "none")

    masks = {a: mask(*a) for a in itertools.product((0, 1), ("x", "y"), (0, 1))}
    for (a, x), (b, y) in itertools.combinations(masks.items(), 2):
        assert 120 < int((x != y).sum()) < 280, (a, b)
    assert all(torch.equal(mask(*a), masks[a]) for a in reversed(masks))


@pytest.mark.parametrize("drop", [drop_, lambda x, d, g, r: drop_by_rank_(x, d, 0.2, g, r)])
def test_l1_rescaling_keeps_the_l1_norm_and_the_mask(drop):
    x = made((31, 17))
    bare, scaled = (drop(x.clone(), 0.4, generator_of(0, "k", 0), r) for r in ("none", "l1"))
    assert float(scaled.abs().sum() / x.abs().sum()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(scaled, bare * (x.abs().sum() / bare.abs().sum()), rtol=1e-12)
    assert set(bare.flatten().tolist()) <= {0.0, *x.flatten().tolist()}
    assert not drop(torch.zeros(5), 0.4, generator_of(0, "k", 0), "l1").any()


def test_della_keeps_by_rank_within_the_row_and_each_entry_keeps_its_mean():
    x = torch.tensor([[3.0, -1.0, 0.5, -7.0, 2.0], [0.1, 0.2, -0.3, 0.4, -0.5]]).double()
    ladder = {0: 0.3, 1: 0.4, 2: 0.5, 3: 0.6, 4: 0.7}  # density 0.5, epsilon 0.2, five entries
    want = torch.tensor([[ladder[int((row.abs() < v.abs()).sum())] for v in row] for row in x]).double()
    runs = 4000
    total, kept = torch.zeros_like(x), torch.zeros_like(x)
    for seed in range(runs):
        got = drop_by_rank_(x.clone(), 0.5, 0.2, generator_of(seed, "k", 0))
        kept += got != 0
        total += got
    assert ((kept / runs - want).abs() < 4 * (want * (1 - want) / runs).sqrt()).all()
    assert ((total / runs - x).abs() < 4 * x.abs() * ((1 / want - 1) / runs).sqrt()).all()


def test_della_at_epsilon_zero_is_dare_also_in_one_dimension_and_for_kernels():
    for shape in ((9,), (7, 5), (4, 3, 2, 2), (6, 1)):
        x = made(shape)
        for rescale in ("chance", "l1", "none"):
            a = drop_by_rank_(x.clone(), 0.6, 0.0, generator_of(1, "k", 0), rescale)
            b = drop_(x.clone(), 0.6, generator_of(1, "k", 0), rescale)
            assert torch.allclose(a, b, rtol=1e-14, atol=0), (shape, rescale)


# -- consensus ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divide", ["count", "weights", "none"])
@pytest.mark.parametrize("vote", ["delta", "weighted"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 1.3, 0.2], [1.0, -0.6, 0.4], [0.5]])
def test_agreed_sums_entry_by_entry(weights, majority, vote, divide):
    deltas = [keep_largest_(made((13, 7), seed), 0.6) for seed in range(len(weights))]
    want = [loop([float(d.flatten()[i]) for d in deltas], weights, majority, vote, divide) for i in range(13 * 7)]
    got = agreed_sum_([d.clone() for d in deltas], weights, majority=majority, vote=vote, divide=divide)
    np.testing.assert_allclose(got.flatten().numpy(), want, rtol=1e-9, atol=1e-12)
    assert np.count_nonzero(want) > 30


@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_agreed_sums_are_pefts_bit_for_bit_over_many_pieces(majority):
    deltas = [keep_largest_(made((517, 301), seed, torch.float32), 0.3) for seed in range(3)]
    weights = [0.5, 2.0, -1.0]
    stack = torch.stack(deltas)
    mask = merge_utils.calculate_majority_sign_mask(stack, method=majority)
    want = merge_utils.disjoint_merge(stack * torch.tensor(weights)[:, None, None], mask)
    got = agreed_sum_([d.clone() for d in deltas], weights, majority=majority)
    assert torch.equal(got, want)


def test_a_sign_that_nothing_has_gives_zero_not_nan():
    zero = torch.zeros(3, 2)
    for vote, divide in itertools.product(("delta", "weighted"), ("count", "weights", "none")):
        assert torch.equal(agreed_sum_([zero.clone(), zero.clone()], [1.0, -1.0], vote=vote, divide=divide), zero)


def test_weighted_sum():
    deltas = [made((5, 3), s) for s in range(3)]
    want = 0.5 * deltas[0] - 2 * deltas[1] + deltas[2]
    assert torch.allclose(weighted_sum_([d.clone() for d in deltas], [0.5, -2.0, 1.0]), want, rtol=1e-14)
