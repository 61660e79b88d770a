"""Run by test_kernels_triton.py with TRITON_INTERPRET=1: the Triton kernels on the CPU, against float64."""

import os

import pytest
import torch

from multilora.kernels import choice, triton_index, triton_segments
from multilora.kernels import routed as kernels

assert os.environ.get("TRITON_INTERPRET") == "1"
assert choice.why_not_triton() == ""

# Sums in float32; half precision rounds the factors' intermediate (segments) and the result.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# The interpreter is slow: by default every operation in two types at one rank.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.long),
    pytest.param(torch.float64, marks=pytest.mark.long),
]
CASES = [
    (torch.float32, 5),
    (torch.float16, 5),
    *(
        pytest.param(dtype, rank, marks=pytest.mark.long)
        for dtype, rank in (
            (torch.float32, 1), (torch.float32, 128), (torch.float32, 150), (torch.bfloat16, 5), (torch.float64, 5)
        )
    ),
]  # fmt: skip


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got, want):
    tolerance = TOLERANCE[got.dtype]
    scale = want.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * max(scale, 1.0))
    assert scale > 1.0


@pytest.mark.parametrize(("dtype", "rank"), CASES)
def test_segments(dtype, rank):
    down, up = _random(3, rank, 70, seed=1, dtype=dtype), _random(3, 75, rank, seed=2, dtype=dtype) / rank**0.5
    x = _random(6, 70, 9, dtype=dtype).mT  # strided
    delta = up.double() @ down.double()
    want = torch.stack([x[b].double() @ delta[b // 2].T for b in range(6)])
    close(kernels.routed_segments(x, down, up, implementation="triton"), want)
    y = _random(6, 9, 75, seed=3, dtype=dtype)
    total = y.double() + 0.5 * want
    got = kernels.add_folded(y, x, down.mT, up.mT, 0.5, inplace=True, implementation="triton")
    assert got is y
    close(y, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 5, 4)], ids=str)
def test_gated_concatenation(dtype, shape):
    ranks = (1, 3, 0, 7)
    x, row = _random(2, 5, 33, dtype=dtype), _random(*shape, seed=3)
    down, up = _random(11, 33, seed=1, dtype=dtype), _random(37, 11, seed=2, dtype=dtype)
    each = row.to(dtype).double().repeat_interleave(torch.tensor(ranks), -1)
    each = each.reshape(*each.shape[:-1], *[1] * (3 - each.ndim), 11)
    want = ((x.double() @ down.double().T) * each) @ up.double().T
    close(kernels.routed(x, down, up, row, ranks, implementation="triton"), want)
    flat, each = x[0], each.expand(2, 5, 11)[0]
    got = kernels.routed(flat, down, up, row if row.ndim == 1 else row[0], ranks, implementation="triton")
    if row.ndim != 2:  # a row for each sample is one for all tokens of the first
        close(got, ((flat.double() @ down.double().T) * each) @ up.double().T)


@pytest.mark.parametrize(("dtype", "rank"), CASES)
@pytest.mark.parametrize("shared", [False, True])
def test_experts_by_index(dtype, rank, shared):
    down, up = _random(5, rank, 1100, seed=1, dtype=dtype) / 33, _random(5, 71, rank, seed=2, dtype=dtype)
    x = _random(1100, 1, 3, dtype=dtype).permute(1, 2, 0)
    index = torch.randint(5, (3,) if shared else (1, 3, 3), generator=torch.Generator().manual_seed(4))
    index[..., 1] = index[..., 0]  # repeated
    index.view(-1, 3)[0, 2] = -1
    weight = _random(*index.shape, seed=5)
    delta = torch.cat([up.double() @ down.double(), torch.zeros(1, 71, 1100, dtype=torch.float64)])[index]
    want = torch.einsum("...j,...joi,...i->...o", weight, delta, x.double())
    stored = up.mT.contiguous().mT if shared else up
    got = kernels.routed_by_index(x, down, stored, index, weight, implementation="triton")
    close(got, want)
    assert torch.equal(got, kernels.routed_by_index(x, down, stored, index, weight, implementation="triton"))
    y = _random(1, 3, 71, seed=6, dtype=dtype)
    total = y.double() + want
    assert kernels.add_by_index_(y, x, down, up, index, weight, implementation="triton") is y
    close(y, total)


def test_experts_that_nobody_picks_are_not_read():
    down, up = _random(3, 4, 9, seed=1), _random(3, 7, 4, seed=2)
    down[0] = up[0] = down[2] = up[2] = float("nan")
    x, index, weight = _random(4, 9), torch.tensor([[1, -1], [-1, -1], [1, 1], [-1, 1]]), torch.ones(4, 2)
    got = kernels.routed_by_index(x, down, up, index, weight, implementation="triton")
    want = torch.tensor([1.0, 0.0, 2.0, 1.0])[:, None] * (x @ (up[1] @ down[1]).T)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rebuilding_many_weights(dtype):
    layers = []
    for i, (shape, rank) in enumerate([((70, 65), 5), ((6, 4, 3, 3), 128), ((5, 3), 0), ((1, 65), 1)]):
        base = _random(*shape, seed=i, dtype=dtype)
        base = base.mT.contiguous().mT if base.ndim == 2 else base  # strided
        down, up = (
            _random(rank, *shape[1:], seed=10 + i, dtype=dtype),
            _random(rank, shape[0], seed=20 + i).to(dtype).T,
        )
        layers.append((torch.empty(shape, dtype=dtype), base, down, up, _random(rank, seed=30 + i)))
    kernels.rebuild_(*zip(*layers, strict=True), implementation="triton")
    for out, base, down, up, scale in layers:
        want = base.double() + ((up.double() * scale) @ down.double().flatten(1)).view(base.shape)
        absolute = 1e-11 if dtype == torch.float64 else 3e-5
        # The interpreter cuts bfloat16 off where a GPU rounds.
        ulp = {torch.float16: 0.501, torch.bfloat16: 1.001}.get(dtype, 0.0) * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), want, rtol=ulp, atol=absolute)


def _inputs():
    """op -> its arguments in float64, small, floats to be differentiated."""
    x, down, up = _random(2, 3, 5), _random(2, 4, 5, seed=1), _random(2, 6, 4, seed=2)
    index = torch.tensor([[0, 1, 1], [1, -1, 0], [0, 0, 2]])
    bank = _random(3, 2, 5, seed=3), _random(3, 6, 2, seed=4)
    return {
        "segments": (triton_segments.segments, (x, down, up, None)),
        "gated": (triton_segments.segments, (x, down, up, _random(2, 3, 4, seed=5))),
        "by_index": (triton_index.by_index, (x[0], *bank, index, _random(3, 3, seed=6))),
        "by_index shared": (triton_index.by_index, (x[0], *bank, index[0], _random(3, seed=6))),
    }


@pytest.mark.long
@pytest.mark.parametrize("name", _inputs())
def test_gradients_and_registration(name):
    op, arguments = _inputs()[name]
    tracked = tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
    )
    torch.library.opcheck(op, tracked)
    assert torch.autograd.gradcheck(op, tracked, fast_mode=True)  # the interpreter is too slow for every entry


@pytest.mark.long
def test_registration_of_the_operations_in_place():
    x, down, up, scale = _inputs()["gated"][1]
    torch.library.opcheck(triton_segments.add_segments_, (_random(2, 3, 6, seed=9), x, down, up, scale, 0.5))
    x, down, up, index, weight = _inputs()["by_index"][1]
    torch.library.opcheck(triton_index.add_by_index_, (_random(3, 6, seed=9), x, down, up, index, weight))
