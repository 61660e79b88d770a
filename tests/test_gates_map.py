"""Maps of gates: the numbers are the gate's own answers, in the order of steps or tokens."""

import pytest
import torch

from multilora.attach import attached
from multilora.gate_arrow import ArrowRouter
from multilora.lab.gate_map import draw_map, map_of_picture, map_of_text
from multilora.method import resolve
from multilora.routing import Asked
from tests import tiny, tiny_text


def test_of_a_picture_also_of_a_stack_that_is_measured_before_it():
    """Weights that add up to 3 have the plan run through once before the picture, without a model."""
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, rank=2, seed=i, name=n) for i, n in enumerate(("fox", "robe", "hat"))]
    found = map_of_picture(pipe, loras, resolve("route", "arrow", top_k=2), "a fox", steps=3, guidance=2.0)
    assert (found.names, found.columns, found.axis) == (("fox", "robe", "hat"), ("0", "1", "2"), "step")
    assert found.shares.shape == (3, len(loras[0]), 3)
    assert set(found.groups) == {key.removeprefix("unet.") for key in loras[0]}
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(3, len(loras[0])))
    assert 1 / 3 <= found.strongest <= found.sharpest <= 1
    assert found.made.size == (32, 32)
    mean = map_of_picture(pipe, loras, resolve("route", "mole"), "a fox", steps=2)
    assert (mean.groups, mean.strongest, mean.sharpest) == (("",), pytest.approx(1 / 3), pytest.approx(1 / 3))
    few, many = draw_map(mean, title="mean"), draw_map(found, title="arrow")
    assert few.width == many.width
    assert many.height > few.height + 3 * 18 * (len(loras[0]) - 1) - 1
    with pytest.raises(ValueError, match="method switch asks no gate"):
        map_of_picture(pipe, loras, resolve("route", "switch"), "a fox", steps=3)


def test_of_a_text_token_by_token():
    model, tokenizer, loras = tiny_text.model("llama"), tiny_text.tokenizer(), tiny_text.loras("llama", 3)
    found = map_of_text(model, tokenizer, loras, resolve("route", "arrow", top_k=2), "abc 12", max_new_tokens=4)
    assert found.axis == "token"
    assert len(found.columns) == len(found.shares)
    assert 6 <= len(found.columns) <= 9  # the last token is made, not read
    assert "".join(found.columns[:6]) == "abc 12"
    ids = tokenizer("abc 12", return_tensors="pt")["input_ids"]
    with torch.no_grad(), attached(model, loras, form="side") as bank:
        bank.gate = asked = Asked(ArrowRouter(2))
        model(ids)
    for g, group in enumerate(found.groups):
        torch.testing.assert_close(found.shares[:6, g], asked.shares[group][0].float(), rtol=1e-4, atol=1e-5)
    assert draw_map(found, title="arrow").height > 100
    with pytest.raises(ValueError, match="reads two"):
        map_of_text(tiny_text.model("t5"), tiny_text.tokenizer(True), loras, resolve("route", "arrow"), "a")


def test_of_a_text_without_a_gate_and_with_a_lora_at_0():
    """The mean has one answer for all tokens; a LoRA of weight 0 is not in the map."""
    model, tokenizer, loras = tiny_text.model("llama"), tiny_text.tokenizer(), tiny_text.loras("llama", 3)
    even = resolve("route", "token_switch")
    found = map_of_text(model, tokenizer, loras, even, "abc 12", weights=[1.0, 0.0, 0.5], max_new_tokens=3)
    assert found.names == (loras[0].card.name, loras[2].card.name)
    assert found.prompt == 6
    assert len(found.columns) == len(found.shares) >= 6
    assert "".join(found.columns) + found.unread != "".join(found.columns)
    torch.testing.assert_close(found.shares, torch.full_like(found.shares, 0.5))
    with pytest.raises(ValueError, match="no LoRA with a weight other than 0"):
        map_of_text(model, tokenizer, loras, even, "abc 12", weights=[0.0] * 3)
