"""The kernels against the definition, at odd sizes, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from multilora.kernels import routed as kernels

RANKS = (1, 3, 0, 7)
R, K = sum(RANKS), len(RANKS)


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _delta(down, up, row):
    """[out, in, *kernel] of one sample or token, from a loop over LoRAs."""
    total, start = 0, 0
    for rank, weight in zip(RANKS, row, strict=True):
        span = slice(start, start + rank)
        total = total + weight * torch.einsum("or,r...->o...", up[:, span], down[span])
        start += rank
    return total


ROWS = {"all": (K,), "sample": (2, K), "token": (2, 5, K)}


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_linear_equals_a_loop_over_dense_deltas(shape, implementation):
    x, down, up, row = _random(2, 5, 9), _random(R, 9, seed=1), _random(6, R, seed=2), _random(*shape, seed=3)
    got = kernels.routed(x, down, up, row, RANKS, implementation=implementation)
    each = row.reshape(*row.shape[:-1], *[1] * (3 - row.ndim), K).expand(2, 5, K)
    want = torch.stack([torch.stack([_delta(down, up, each[b, t]) @ x[b, t] for t in range(5)]) for b in range(2)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(K,), (2, K)], ids=["all", "sample"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [((3, 3), (2, 2), (1, 1), (1, 1), 1), ((1, 1), (1, 1), (0, 0), (1, 1), 1), ((3, 3), (1, 1), (2, 2), (2, 2), 2),
     ((3,), (1,), "same", (1,), 3), ((3, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 1)],
    ids=["3x3s2", "1x1", "groups", "1d-same", "3d"],
)  # fmt: skip
def test_conv_equals_the_convolution_by_the_dense_delta(
    kernel, stride, padding, dilation, groups, shape, implementation
):
    x, row = _random(2, 6, *[7] * len(kernel)), _random(*shape, seed=3)
    down, up = _random(R, 6 // groups, *kernel, seed=1), _random(12, R, seed=2)
    geometry = (stride, padding, dilation, groups)
    got = kernels.routed_conv(x, down, up, row, RANKS, *geometry, implementation=implementation)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    rows = row.expand(2, K)
    want = torch.cat([conv(x[b : b + 1], _delta(down, up, rows[b]), None, *geometry) for b in range(2)])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("shape", ROWS.values(), ids=ROWS)
def test_embedding_equals_the_lookup_in_the_dense_delta(shape, implementation):
    ids = torch.tensor([[0, 10, 3, 3, 1], [2, 2, 9, 0, 5]])
    down, up, row = _random(R, 11, seed=1), _random(6, R, seed=2), _random(*shape, seed=3)
    got = kernels.routed_embedding(ids, down, up, row, RANKS, implementation=implementation)
    each = row.reshape(*row.shape[:-1], *[1] * (3 - row.ndim), K).expand(2, 5, K)
    rows = [torch.stack([_delta(down, up, each[b, t]).T[ids[b, t]] for t in range(5)]) for b in range(2)]
    torch.testing.assert_close(got, torch.stack(rows), rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_argument_and_equal_the_reference():
    shapes = [(2, 5, 9), (R, 9), (6, R), (2, 5, K)]
    grads = []
    for implementation in ("torch", "reference"):
        tensors = [_random(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
        kernels.routed(*tensors, RANKS, implementation=implementation).square().sum().backward()
        grads.append([t.grad for t in tensors])
    for fast, slow in zip(*grads, strict=True):
        assert slow.abs().sum() > 0
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_folded_linear(shared, inplace):
    x, y = _random(6, 4, 9), _random(6, 4, 5, seed=1)
    down, up = _random(9, 3, seed=2) if shared else _random(3, 9, 3, seed=2), _random(3, 3, 5, seed=3)
    downs = down.expand(3, 9, 3)
    want = torch.stack([y[b] + 0.5 * x[b] @ downs[b // 2] @ up[b // 2] for b in range(6)])
    got = kernels.add_folded(y, x, down, up, 0.5, inplace=inplace)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (got is y) == inplace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": (1, 3)}, r"sum to 4; wanted down \[4"),
        ({"row": torch.ones(3)}, r"row of 4 entries .* got shape \[3\]"),
        ({"row": torch.ones(3, 4)}, r"row \[3, 4\] does not fit x \[2, 5, 9\]"),
        ({"implementation": "fast"}, "implementation 'fast': wanted one of torch, reference"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": _random(2, 5, 9), "down": _random(R, 9), "up": _random(6, R), "row": torch.ones(K)}
    with pytest.raises(ValueError, match=message):
        kernels.routed(**{"ranks": RANKS, **arguments, **change})
