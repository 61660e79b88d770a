"""uniform: 1 / k, and nothing is tried."""

import pytest
import torch

import multilora as ml
from multilora.lora import Lora, LowRank
from multilora.method import resolve
from multilora.plan import Moment


def _loras(k):
    return [Lora({"a": LowRank(torch.randn(2, 5), torch.randn(3, 2))}) for _ in range(k)]


def test_equal_shares_and_the_objective_is_never_called():
    def never(loras, rows):
        raise AssertionError("uniform tries nothing")

    loras = _loras(3)
    found = resolve("weigh", "uniform")(loras, never)
    assert list(found) == [1 / 3] * 3
    assert found.trials == ()
    wanted = sum(lora["a"].delta().double() for lora in loras) / 3
    assert torch.allclose(ml.merge(loras, found)["a"].delta().double(), wanted, atol=1e-6)
    plan = resolve("route", "merge")(loras)
    row = plan(Moment(0, 1, 0.0, None, tuple(found)))[0].row
    assert list(row) == [1 / 3] * 3


def test_refuses_an_empty_set_and_what_is_no_lora():
    with pytest.raises(ValueError, match="nothing to weigh"):
        resolve("weigh", "uniform")([], None)
    with pytest.raises(ValueError, match="LoRA number 2 is a str"):
        resolve("weigh", "uniform")([*_loras(1), "fox"], None)
