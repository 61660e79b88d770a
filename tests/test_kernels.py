"""Segments, experts by index, rebuilding and the guided mean: against loops in float64, at odd sizes."""

import pytest
import torch

from multilora.kernels import routed as kernels

PLAIN = ("torch", "reference")


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _bank(experts=5, rank=3, wide=9, out=7):
    return _random(experts, rank, wide, seed=1), _random(experts, out, rank, seed=2)


def _routes(*lead, experts=5, seed=4):
    """Three picks a token, with a missing and a repeated one among them."""
    index = torch.randint(experts, (*lead, 3), generator=torch.Generator().manual_seed(seed))
    index[..., 1] = index[..., 0]
    index.view(-1, 3)[0, 2] = -1
    return index, _random(*lead, 3, seed=5)


def _by_hand(x, down, up, index, weight):
    flat, out = x.reshape(-1, x.shape[-1]), []
    routes = index.expand(*x.shape[:-1], index.shape[-1]).reshape(-1, index.shape[-1]).tolist()
    shares = weight.expand(*x.shape[:-1], index.shape[-1]).reshape(-1, index.shape[-1])
    for token, picks, each in zip(flat, routes, shares, strict=True):
        total = torch.zeros(up.shape[1], dtype=x.dtype)
        for expert, w in zip(picks, each, strict=True):
            if expert >= 0:
                total = total + w * (up[expert] @ (down[expert] @ token))
        out.append(total)
    return torch.stack(out).view(*x.shape[:-1], up.shape[1])


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("lead", [(2, 5), (7,), (1,)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 128])
def test_experts_by_index_equal_a_loop_over_tokens_and_picks(implementation, lead, shared, rank):
    down, up = _bank(rank=rank)
    x = _random(9, *lead).permute(*range(1, len(lead) + 1), 0)  # strided
    index, weight = _routes(*(() if shared else lead))
    want = _by_hand(x, down, up, index, weight)
    got = kernels.routed_by_index(x, down, up, index, weight, implementation=implementation)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    y = _random(*lead, 7, seed=6)
    added = y.clone()
    for stored in (up, up.mT.contiguous().mT):
        assert kernels.add_by_index_(added.copy_(y), x, down, stored, index, weight) is added
        torch.testing.assert_close(added, y + want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layers", [1, 3])
def test_loras_that_the_host_picks_are_those_picked_by_index(layers):
    """Layers side by side, LoRAs of two ranks, one of them picked twice; what is not picked is not read."""
    x = _random(9, 1, 1).permute(1, 2, 0)
    banks = [[t + n for t in _bank()] for n in range(layers)]
    banks = [(down[:, : 3 - i % 2], up[..., : 3 - i % 2]) for down, up in banks for i in range(5)]
    by_lora = [banks[i::5] for i in range(5)]
    downs = [torch.cat([down[i] for down, _ in each]).T for i, each in enumerate(by_lora)]
    ups = [torch.stack([up[i].T for _, up in each]) for i, each in enumerate(by_lora)]
    downs[4], ups[3] = downs[4] * float("nan"), ups[3] * float("nan")
    picks, weights = [2, 1, 2], [0.5, -1.0, 0.25]
    got = kernels.routed_picked(x, [downs[i] for i in picks], [ups[i] for i in picks], weights)
    assert len(got) == layers
    for n, delta in enumerate(got):
        want = sum(w * ups[i][n].T @ (downs[i].T.unflatten(0, (layers, -1))[n] @ x.flatten())
                   for i, w in zip(picks, weights, strict=True))  # fmt: skip
        torch.testing.assert_close(delta, want, rtol=1e-12, atol=1e-12)
    for n, delta in enumerate(kernels.routed_picked(x, [downs[2]], [ups[2]], [-0.5])):
        want = -0.5 * ups[2][n].T @ (downs[2].T.unflatten(0, (layers, -1))[n] @ x.flatten())
        torch.testing.assert_close(delta, want, rtol=1e-12, atol=1e-12)
    assert kernels.routed_picked(x, [], [], []) is None


@pytest.mark.parametrize("weights", [[0.1], [0.1, 0.05], [0.05, 0.1]])
def test_a_pick_that_is_large_before_its_weight_does_not_overflow(weights):
    x, down, up = (torch.full(s, v, dtype=torch.float16) for s, v in (((1, 1, 8), 30), ((8, 4), 3), ((1, 4, 5), 40)))
    (got,) = kernels.routed_picked(x, [down] * len(weights), [up] * len(weights), weights)
    want = sum(weights) * 4 * 40 * 8 * 30 * 3
    torch.testing.assert_close(got.float(), torch.full((5,), want), rtol=2e-3, atol=0)


def test_experts_that_no_token_picks_are_not_read():
    down, up = _bank()
    down[3] = up[3] = float("nan")
    x, index, weight = _random(4, 9), torch.tensor([2, 0]), torch.tensor([0.5, -1.0], dtype=torch.float64)
    y = kernels.add_by_index_(torch.zeros(4, 7, dtype=torch.float64), x, down, up, index, weight)
    torch.testing.assert_close(y, _by_hand(x, down, up, index, weight), rtol=1e-12, atol=1e-12)


def test_a_token_with_no_expert_gets_nothing():
    down, up = _bank()
    index = torch.full((4, 2), -1)
    got = kernels.routed_by_index(_random(4, 9), down, up, index, _random(4, 2))
    assert torch.equal(got, torch.zeros(4, 7, dtype=torch.float64))


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_experts_by_index(shared):
    down, up = (t.requires_grad_() for t in _bank(experts=3, wide=4, out=5))
    x = _random(3, 4).requires_grad_()
    index, weight = _routes(*(() if shared else (3,)), experts=3)
    inputs = (x, down, up, weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, d, u, w: kernels.routed_by_index(x, d, u, index, w), inputs)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("rank", [1, 5, 128])
def test_segments_equal_a_loop_over_samples(implementation, rank):
    down, up = _random(3, rank, 9, seed=1), _random(3, 7, rank, seed=2)
    x = _random(6, 9, 4).mT
    want = torch.stack([x[b] @ (up[b // 2] @ down[b // 2]).T for b in range(6)])
    got = kernels.routed_segments(x, down, up, implementation=implementation)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_gradients_of_segments():
    inputs = [_random(4, 2, 3).requires_grad_(), _random(2, 2, 3, seed=1).requires_grad_(),
              _random(2, 5, 2, seed=2).requires_grad_()]  # fmt: skip
    assert torch.autograd.gradcheck(kernels.routed_segments, inputs)


def _layers(dtype):
    """A linear, a convolution and one without any rank, with gaps in the strides of what is read."""
    layers = []
    for i, (shape, rank) in enumerate([((7, 9), 5), ((6, 4, 3, 3), 128), ((5, 3), 0), ((1, 65), 1)]):
        base = _random(*shape, seed=i).to(dtype)
        down, up = _random(rank, *shape[1:], seed=10 + i).to(dtype), _random(rank, shape[0], seed=20 + i).to(dtype).T
        layers.append([torch.empty_like(base), base, down, up, _random(rank, seed=30 + i)])
    return [list(column) for column in zip(*layers, strict=True)]


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rebuilding_many_weights_equals_the_sum_in_float64_rounded_once(dtype, implementation):
    outs, bases, downs, ups, scales = _layers(dtype)
    kernels.rebuild_(outs, bases, downs, ups, scales, implementation=implementation)
    for out, base, down, up, scale in zip(outs, bases, downs, ups, scales, strict=True):
        delta = sum(
            (scale[n] * torch.einsum("o,...->o...", up.double()[:, n], down.double()[n]) for n in range(len(scale))),
            torch.zeros(base.shape, dtype=torch.float64),
        )
        want = base.double() + delta
        # Sums of 128 products in float32 are off by 1e-5; then half an ulp of rounding.
        absolute = 1e-11 if dtype == torch.float64 else 3e-5
        relative = 0.501 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
        torch.testing.assert_close(out.double(), want, rtol=relative, atol=absolute)


X, DOWN, UP = torch.ones(4, 9), torch.ones(2, 3, 9), torch.ones(2, 7, 3)
TWO = torch.ones(4, 2)
BASE = torch.ones(7, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.routed_by_index(X, DOWN, UP, TWO, TWO), "index is torch.float32, wanted whole numbers"),
        (lambda: kernels.routed_by_index(X, DOWN, UP, TWO[:3].long(), TWO[:3]), r"index \[3, 2\] .* for x \[4, 9\]"),
        (lambda: kernels.routed_by_index(X, DOWN, UP.mT, TWO.long(), TWO), r"up \[E, out, r\], got .*\[2, 3, 7\]"),
        (lambda: kernels.routed_by_index(X[:, :5], DOWN, UP, TWO.long(), TWO), r"x \[4, 5\] has another width"),
        (lambda: kernels.add_by_index_(X, X, DOWN, UP, TWO.long(), TWO), r"y \[4, 9\], wanted contiguous \[4, 7\]"),
        (lambda: kernels.routed_segments(X[:3], DOWN, UP), r"x \[3, 9\] does not fall into 2 equal segments"),
        (lambda: kernels.rebuild_([BASE], [BASE], [DOWN[0]], [UP[0]], [X[0]]), r"layer 0 .* and scale \[9\]"),
        (lambda: kernels.rebuild_([BASE.half()], [BASE], [DOWN[0]], [UP[0]], [X[0, :3]]), "out 0 is torch.float16"),
        (lambda: kernels.rebuild_([BASE], [BASE], [], [], []), "1 outs for 1 bases, 0 downs"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
