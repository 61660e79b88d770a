"""Merged weights of many layers together: the bits that each layer by itself gives, on the CPU. Triton's part is in
triton_kernels.py."""

import pytest
import torch
from torch import nn

from multilora import attach, rebuilt_many
from multilora.attach import attached
from multilora.lora import Dense, Lora, LowRank

K = 3


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    layers = {
        "a": nn.Linear(33, 20),
        "b": nn.Linear(20, 70, bias=False),
        "c": nn.Conv2d(3, 5, 3),
        "d": nn.Linear(7, 9),
    }
    return nn.ModuleDict(layers).to(dtype)


def part(model, name, rank, seed):
    g = torch.Generator().manual_seed(seed)
    out, *rest = model[name].weight.shape
    down, up = torch.randn(rank, *rest, generator=g), 0.3 * torch.randn(out, rank, generator=g)
    return LowRank(down, up, kind="conv" if len(rest) > 1 else "linear")


def loras_of(model):
    """Ranks differ, parts are missing, `d` is no low-rank update in the last."""
    full = Dense(torch.randn(9, 7, generator=torch.Generator().manual_seed(11)))
    return [
        Lora({"a": part(model, "a", 4, 1), "b": part(model, "b", 4, 3)}),
        Lora({"b": part(model, "b", 3, 5), "c": part(model, "c", 2, 7)}),
        Lora({"a": part(model, "a", 1, 9), "d": full}),
    ]


BLOCKS = [{"a": 0.5}, None, {"a": 0.0, "d": 2.0}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_of_one_lora_gives_the_bits_of_each_layer_by_itself(dtype, monkeypatch):
    found = []
    together = []
    real = rebuilt_many.Many.add_alone
    monkeypatch.setattr(rebuilt_many.Many, "add_alone", lambda *args: (together.append(args[1:]), real(*args)))
    for at_once in (rebuilt_many.rebuilt_at_once, lambda bank, row: ()):
        monkeypatch.setattr(attach, "rebuilt_at_once", at_once)
        model = model_of(dtype)
        before = {n: p.clone() for n, p in model.named_parameters()}
        with attached(model, [lora.to(dtype) for lora in loras_of(model)], form="rebuilt", blocks=BLOCKS) as bank:
            for row in ([0.0, 1.5, 0.0], [1.0, 0.0, 0.0], [0.5, -1.0, 2.0], [0.0, 0.0, -0.25], [1.0, 0.0, 0.0]):
                bank.row = row
                found.append({n: p.clone() for n, p in model.named_parameters()})
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    half = len(found) // 2
    for ours, theirs in zip(found[:half], found[half:], strict=True):
        assert all(torch.equal(p, theirs[n]) for n, p in ours.items())
    assert any(not torch.equal(p, found[1][n]) for n, p in found[0].items())
    assert len(together) == (4 if dtype != torch.bfloat16 else 0)


def test_without_a_plain_linear_layer_each_is_rebuilt_by_itself():
    model = model_of()
    only = [Lora({"c": part(model, "c", 2, 1)}), Lora({"c": part(model, "c", 3, 2)})]
    base = model["c"].weight.clone()
    with attached(model, only, form="rebuilt") as bank:
        bank.row = [2.0, 0.0]
        want = base + 2.0 * only[0]["c"].delta().view_as(base)
        torch.testing.assert_close(model["c"].weight, want, rtol=1e-5, atol=1e-5)
        rebuilt_many.Many([]).build(torch.ones(2))
    assert torch.equal(model["c"].weight, base)


def test_a_weight_that_something_else_replaced_is_put_back_at_the_next_row():
    model = model_of()
    with attached(model, loras_of(model), form="rebuilt") as bank:
        bank.row = [1.0, 0.0, 0.0]
        want = model["b"].weight.clone()
        bank.row = [0.0, 1.0, 0.0]
        model["b"].weight.data = torch.zeros_like(want)
        bank.row = [1.0, 0.0, 0.0]
        assert torch.equal(model["b"].weight, want)
