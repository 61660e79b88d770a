"""Where LoRAs act: bad input by name, globs, modules of a foreign class."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multilora.attach import attached
from multilora.lora import Card, Lora
from multilora.sites import block_factors
from tests.test_attach import ROWS, _close, _inputs, _loras, _net, _per_sample


def _attach(net=None, loras=None, **options):
    with attached(net or _net(), _loras() if loras is None else loras, **options) as bank:
        return bank


def _row(row):
    net, (ids, x) = _net(), _inputs()
    with attached(net, _loras()) as bank:
        bank.row = row
        net(ids, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _attach(loras=[]), "no LoRAs given"),
        (lambda: _attach(loras=[{"embed": 1}]), "LoRA number 1 is a dict, wanted a Lora"),
        (lambda: _attach(form="sides"), "form 'sides': wanted one of auto, side, rebuilt, bank; nearest: side"),
        (lambda: _attach(loras=[Lora({"blocks.1.fcs": _loras()[2]["blocks.1.fc"]}, Card(name="fox"))]),
         r"LoRA 'fox': 'blocks.1.fcs' is no module of Net \(1 of its 1 modules are not\); nearest: blocks.1.fc"),
        (lambda: _attach(loras=[Lora({"blocks.1.fc": _loras()[2]["blocks.10.fc"]})]),
         r"'blocks.1.fc' is a Linear with a weight of shape \[12, 8\], the LoRA's is \[6, 12\]"),
        (lambda: _attach(blocks=[{"block.1.*": 1.0}, None, None]),
         "block 'block.1.*' of LoRA 'l1' matches none of its 4 modules; nearest: blocks.1"),
        (lambda: _attach(blocks=[{"blocks.1": 1.0}, None, None]), r"for all 1 modules in it write 'blocks.1.\*'"),
        (lambda: _attach(blocks=[{"blocks.1.*": float("nan")}, None, None]), "a finite number is wanted, got nan"),
        (lambda: _attach(blocks=[None]), "blocks: 1 entries for 3 LoRAs"),
        (lambda: _row([1, 2]), r"row of shape \[2\] for 3 LoRAs: wanted \[3\], \[B, 3\] or \[B, T, 3\]"),
        (lambda: _row([1, 2, float("inf")]), "finite numbers are wanted"),
        (lambda: _row([[1, 2, 3]] * 3), r"embed: the row has 3 samples, the layer's input \[6, 5\] has 6"),
        (lambda: _row(torch.ones(6, 4, 3)), r"embed: row of shape \[6, 4, 3\] .* input of \[6, 5\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_globs_touch_what_they_name():
    def factors(*patterns):
        paths = ["transformer_blocks.1.a", "transformer_blocks.10.a", "single_transformer_blocks.1.a", "down.0.b.c"]
        found = block_factors(paths, dict.fromkeys(patterns, 0.0), "fox")
        return [p for p in paths if found[p] == 0.0]

    assert factors("transformer_blocks.1.*") == ["transformer_blocks.1.a"]
    assert factors("transformer_blocks.1.a") == ["transformer_blocks.1.a"]
    assert factors("*transformer_blocks.1.*") == ["transformer_blocks.1.a", "single_transformer_blocks.1.a"]
    assert factors("down.0.*", "transformer_blocks.10*") == ["transformer_blocks.10.a", "down.0.b.c"]


class Int8Linear(nn.Module):
    """A foreign linear: int8 weights, one scale per row, the same call; keeps no floating-point weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, hidden):
        return F.linear(hidden, self.weight.to(hidden) * self.scale, self.bias)


def test_around_a_foreign_linear():
    net, (ids, x) = _net(), _inputs()
    foreign = _net()
    foreign.blocks["1"].fc = Int8Linear(net.blocks["1"].fc)
    with torch.no_grad():
        net.blocks["1"].fc.weight.copy_(foreign.blocks["1"].fc.weight * foreign.blocks["1"].fc.scale)
    with torch.no_grad(), attached(foreign, _loras()) as bank:
        assert bank.form == "side"
        for row in ROWS.values():
            bank.row = row
            _close(foreign(ids, x), _per_sample(net, _loras(), row if isinstance(row[0], list) else [row] * 6, ids, x))
        bank.check_called()
    foreign = _net()
    foreign.blocks["1"].fc = Int8Linear(net.blocks["1"].fc)
    for form in ("rebuilt", "bank"):
        with pytest.raises(ValueError, match=rf"form '{form}': blocks\.1\.fc is a quantised Int8Linear .* int8; use"):
            attached(foreign, _loras(), form=form).__enter__()
