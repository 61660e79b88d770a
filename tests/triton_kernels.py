"""The Triton kernels against float64: on a CUDA device, or with TRITON_INTERPRET=1 in the interpreter on the CPU.

test_kernels_triton.py runs it in the interpreter. On a bare GPU machine, from a checkout and without installing it:

    PYTHONPATH=. python3 -m pytest -q -p no:cacheprovider --noconftest tests/triton_kernels.py
"""

import pytest
import torch
from torch import nn

from multilora.attach import attached
from multilora.kernels import choice, triton_index, triton_rebuild, triton_segments
from multilora.kernels import routed as kernels
from multilora.lora import Lora, LowRank

assert choice.why_not_triton() == "", f"{choice.why_not_triton()}; TRITON_INTERPRET=1 checks the kernels without one"
DEVICE = "cpu" if choice.interpreted() else "cuda"

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
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(DEVICE, dtype)


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
    each = row.to(dtype).double().repeat_interleave(torch.tensor(ranks, device=DEVICE), -1)
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
    index = index.to(DEVICE)
    weight = _random(*index.shape, seed=5)
    delta = torch.cat([up.double() @ down.double(), _random(1, 71, 1100) * 0])[index]
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
    x, weight = _random(4, 9), torch.ones(4, 2, device=DEVICE)
    index = torch.tensor([[1, -1], [-1, -1], [1, 1], [-1, 1]], device=DEVICE)
    got = kernels.routed_by_index(x, down, up, index, weight, implementation="triton")
    want = torch.tensor([1.0, 0.0, 2.0, 1.0], device=DEVICE)[:, None] * (x @ (up[1] @ down[1]).T)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def _layers(shapes, dtype, gaps=True):
    """Layers in lists, as `rebuild_` takes them; the bases of linears with gaps in their strides."""
    layers = []
    for i, (shape, rank) in enumerate(shapes):
        base = _random(*shape, seed=i, dtype=dtype)
        base = base.mT.contiguous().mT if gaps and base.ndim == 2 else base
        down = _random(rank, *shape[1:], seed=10 + i, dtype=dtype)
        up = _random(rank, shape[0], seed=20 + i).to(dtype).T
        layers.append((torch.empty_like(base, memory_format=torch.contiguous_format), base, down, up,
                       _random(rank, seed=30 + i)))  # fmt: skip
    return [list(column) for column in zip(*layers, strict=True)]


def rebuilt(outs, bases, downs, ups, scales):
    for out in outs:
        out.fill_(float("nan"))
    kernels.rebuild_(outs, bases, downs, ups, scales, implementation="triton")
    for out, base, down, up, scale in zip(outs, bases, downs, ups, scales, strict=True):
        left, right, base = up.double() * scale.double(), down.double().flatten(1), base.double()
        want = base + (left @ right).view(base.shape)
        # Sums in float32 (three products of tf32 for one) are off by bits of the largest partial sum.
        reach = base.abs() + (left.abs() @ right.abs()).view(base.shape)
        # The interpreter cuts bfloat16 off where a GPU rounds.
        half = 1.001 if out.dtype == torch.bfloat16 and DEVICE == "cpu" else 0.501
        ulp = half * torch.finfo(out.dtype).eps
        bound = (1e-14 if out.dtype == torch.float64 else 4e-6) * reach + ulp * want.abs()
        assert not torch.isnan(out).any()
        assert ((out.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("even", [False, True])
def test_rebuilding_many_weights(dtype, even):
    """even: whole rows can be read 16 bytes at a time."""
    odd = [((70, 65), 5), ((6, 4, 3, 3), 128), ((5, 3), 0), ((1, 65), 1)]
    lists = _layers([((70, 144), 5), ((6, 16, 3, 3), 9), ((130, 16), 16)] if even else odd, dtype, gaps=not even)
    rebuilt(*lists)
    assert triton_rebuild._kept[0][1][0].constants["EVEN"] is even


def test_a_table_is_kept_for_the_same_tensors_and_no_others():
    outs, bases, downs, ups, scales = _layers([((24, 32), 4), ((9, 16), 3)], torch.float32, gaps=False)
    triton_rebuild._kept.clear()
    rebuilt(outs, bases, downs, ups, scales)
    rebuilt(outs, bases, downs, ups, [scale.clone() * 2 for scale in scales])  # another row at other addresses
    rebuilt(outs, bases, downs, ups, [scale.half() for scale in scales])
    assert len(triton_rebuild._kept) == 1
    memory = [torch.empty_like(out).flatten() for out in outs]
    outs, bases = ([t.view(-1, 16) for t in each] for each in (memory, [b.flatten() for b in bases]))
    downs, ups = [d.view(-1, 16)[:3] for d in downs], [_random(len(b), 3, dtype=torch.float32) for b in bases]
    scales = [_random(3) for _ in bases]
    rebuilt(outs, bases, downs, ups, scales)  # the bases' addresses, another shape
    assert len(triton_rebuild._kept) == 2
    ups[0].copy_(_random(*ups[0].shape, seed=5))
    rebuilt(outs, bases, downs, ups, scales)
    ups[0] = _random(3, len(bases[0]), seed=6, dtype=torch.float16).T  # two launches
    rebuilt(outs, bases, downs, ups, scales)
    with pytest.raises(ValueError, match=r"layer 1 .* and scale \[4\]"):
        kernels.rebuild_(outs, bases, downs, ups, [scales[0], _random(4)], implementation="triton")
    for _ in range(2 * triton_rebuild.KEPT):
        memory.append(bases[0].clone())
        rebuilt(outs[:1], memory[-1:], downs[:1], ups[:1], scales[:1])
    assert len(triton_rebuild._kept) == triton_rebuild.KEPT


def test_a_table_that_points_to_copies_is_not_kept():
    outs, bases, downs, ups, scales = _layers([((6, 4, 3, 3), 2)], torch.float32)
    bases[0] = bases[0].contiguous(memory_format=torch.channels_last)
    triton_rebuild._kept.clear()
    rebuilt(outs, bases, downs, ups, scales)
    bases[0].mul_(2)
    rebuilt(outs, bases, downs, ups, scales)
    assert not triton_rebuild._kept


def test_all_run_in_a_graph():
    """Captured and replayed on other numbers at the same addresses; the interpreter has no graphs, and calls."""
    from multilora.captured import record

    lists = _layers([((64, 32), 4)], torch.float16)
    x, y = _random(3, 32, dtype=torch.float16), _random(3, 64, dtype=torch.float16)
    bank = _random(5, 4, 32, seed=1, dtype=torch.float16), _random(5, 4, 64, seed=2, dtype=torch.float16).mT
    index, weight = torch.tensor([1, 2], device=DEVICE), _random(2, seed=3, dtype=torch.float16)

    def call():
        kernels.rebuild_(*lists, implementation="triton")
        kernels.add_by_index_(y, x, *bank, index, weight, implementation="triton")
        return kernels.routed_segments(x[:, None], bank[0][:3], bank[1][:3], implementation="triton")

    with torch.no_grad():
        call()
        replay = record(call) if DEVICE == "cuda" else call
        lists[4][0].mul_(2)
        x.mul_(0.5)
        index.copy_(torch.tensor([4, 0]))
        before, out = y.clone(), lists[0][0].clone()
        z = replay()
        got = lists[0][0].clone(), y.clone(), z.clone()
        y.copy_(before)
        z = call()
    assert not torch.equal(got[0], out)
    for a, b in zip(got, (lists[0][0], y, z), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_bank_in_the_rebuilt_form_launches_once(dtype, monkeypatch):
    """Linear layers together, a convolution on its own; nothing of the base is left changed."""
    monkeypatch.setenv(choice.VARIABLE, "triton")
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(33, 20), "b": nn.Linear(20, 70, bias=False), "c": nn.Conv2d(3, 5, 3)})
    model = model.to(DEVICE, dtype)

    def part(layer, rank, seed):
        out, *rest = model[layer].weight.shape
        down, up = _random(rank, *rest, seed=seed + 1, dtype=dtype), 0.3 * _random(out, rank, seed=seed, dtype=dtype)
        return LowRank(down, up, kind="conv" if len(rest) > 1 else "linear")

    loras = [
        Lora({"a": part("a", 4, 1), "b": part("b", 4, 3)}),
        Lora({"b": part("b", 3, 5), "c": part("c", 2, 7)}),
        Lora({"a": part("a", 1, 9)}),
    ]
    before = {n: p.clone() for n, p in model.named_parameters()}
    launches = []
    launch = triton_rebuild._Group.launch

    def counted(group, scale):
        launches.append(len(group.layers))
        launch(group, scale)

    monkeypatch.setattr(triton_rebuild._Group, "launch", counted)
    with attached(model, loras, form="rebuilt") as bank:
        for row in ([0.0, 1.5, 0.0], [1.0, 0.0, 0.0], [0.5, -1.0, 2.0], [0.0, 0.0, 1.0]):
            bank.row = row
            for name, layer in model.items():
                found = before[f"{name}.weight"].double()
                for weight, lora in zip(row, loras, strict=True):
                    if name in lora:
                        found = found + weight * lora[name].to(torch.float64).delta()
                tolerance = 2e-3 if dtype == torch.float16 else 1e-5
                torch.testing.assert_close(layer.weight.double(), found, rtol=tolerance, atol=tolerance)
                assert (layer.weight != before[f"{name}.weight"]).any() == any(
                    w and name in each for w, each in zip(row, loras, strict=True)
                )
        assert launches == [2] * 4
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def _inputs():
    """op -> its arguments in float64, small, floats to be differentiated."""
    x, down, up = _random(2, 3, 5), _random(2, 4, 5, seed=1), _random(2, 6, 4, seed=2)
    index = torch.tensor([[0, 1, 1], [1, -1, 0], [0, 0, 2]], device=DEVICE)
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
    assert torch.autograd.gradcheck(
        op, tracked, fast_mode=True, nondet_tol=1e-12
    )  # the interpreter is too slow for every entry


@pytest.mark.long
def test_registration_of_the_operations_in_place():
    x, down, up, scale = _inputs()["gated"][1]
    torch.library.opcheck(triton_segments.add_segments_, (_random(2, 3, 6, seed=9), x, down, up, scale, 0.5))
    x, down, up, index, weight = _inputs()["by_index"][1]
    torch.library.opcheck(triton_index.add_by_index_, (_random(3, 6, seed=9), x, down, up, index, weight))
