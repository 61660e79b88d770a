"""balanced: every LoRA keeps the same share of its own effect, by the formula in the method's docstring."""

import math

import pytest
import torch

from multilora.chosen import Enough
from multilora.lab.objectives import Watched
from multilora.lora import Card, Lora, LowRank
from multilora.method import resolve


def _loras(k):
    found = []
    for i in range(k):
        part = LowRank(torch.randn(2, 5), torch.randn(3, 2))
        found.append(Lora({"a": part}, Card(name=f"lora{i}")))
    return found


class Drowned:
    """A model of LoRAs that weaken each other: r_i = s_i w_i / (1 + sum_j s_j w_j)."""

    name = "drowned"

    def __init__(self, *strong):
        self.strong, self.rows = strong, []

    def __call__(self, loras, rows):
        self.rows += rows
        effects = [[s * w for s, w in zip(self.strong, row, strict=True)] for row in rows]
        return [[e / (1 + sum(own)) for e in own] for own in effects]


def test_weights_are_those_at_which_all_keep_the_same():
    strong = (0.5, 1.0, 2.0)
    found = resolve("weigh", "balanced", rounds=60, close=1e-6, mean=0.8)(_loras(3), Drowned(*strong))
    wanted = [1 / s for s in strong]
    factor = 0.8 * 3 / sum(wanted)
    assert list(found) == pytest.approx([w * factor for w in wanted], rel=1e-5)
    assert found.ended.startswith("converged: every LoRA keeps")
    assert found.trials[0].weights == (0.8,) * 3
    assert found.trials[0].loss == pytest.approx(math.log(2.0))  # 0.5, 1 and 2: the middle is 1
    assert found.best.loss == min(t.loss for t in found.trials) < 1e-6
    assert sum(found) == pytest.approx(0.8 * 3)


def test_a_round_goes_by_the_formula():
    told = Drowned(0.5, 1.0, 2.0)
    resolve("weigh", "balanced", rounds=2, power=0.25, close=0)(_loras(3), told)
    first = [s / 4.5 for s in told.strong]
    middle = math.prod(first) ** (1 / 3)
    moved = [(middle / r) ** 0.25 for r in first]
    assert told.rows[1] == pytest.approx([w * 3 / sum(moved) for w in moved])


def test_the_most_even_is_kept():
    answers = iter([[0.5, 0.4], [0.5, 0.49], [0.3, 0.9]])
    found = resolve("weigh", "balanced", rounds=3, close=0)(_loras(2), lambda loras, rows: [next(answers)])
    assert found.best is found.trials[1]
    assert list(found) == list(found.trials[1].weights)
    assert found.ended == "budget"


@pytest.mark.parametrize("kept", [[-3.0, -0.5], [0.001, -2.0], [0.04, 0.0001], [0.04, 0.04]])
def test_effects_that_are_gone_or_turned_round_are_not_even(kept):
    answers = iter([[0.9, 0.1], kept, [0.5, 0.2]])
    found = resolve("weigh", "balanced", rounds=3)(_loras(2), lambda loras, rows: [next(answers)])
    assert found.trials[1].loss >= -math.log(0.05)
    assert found.best is found.trials[2]
    assert found.ended == "budget"


def test_effects_that_are_enlarged_count_as_they_are():
    found = resolve("weigh", "balanced", rounds=1)(_loras(2), lambda loras, rows: [[9.0, 5.0]])
    assert found.best.loss == pytest.approx(math.log(9 / 45**0.5))
    assert found.ended == "budget"


def test_one_lora_and_the_bounds():
    assert list(resolve("weigh", "balanced")(_loras(1), Drowned(0.1))) == [1.0]
    told = Drowned(1.0, 1.0, 1.0, 1.0, 1e-3)
    resolve("weigh", "balanced", rounds=40, close=0, mean=0.5)(_loras(5), told)
    assert max(told.rows[-1]) == pytest.approx(2.5 * 0.5)
    told = Drowned(1.0, 1.0, 1.0, 1.0, 1e3)
    resolve("weigh", "balanced", rounds=40, close=0, mean=0.5)(_loras(5), told)
    assert min(told.rows[-1]) == pytest.approx(0.2 * 0.5)
    assert all(sum(row) == pytest.approx(2.5, rel=1e-9) for row in told.rows)


def test_it_stops_where_it_is_told_to():
    class Stop:
        def __init__(self, after):
            self.after = after

        def is_set(self):
            self.after -= 1
            return self.after < 0

    found = resolve("weigh", "balanced", close=0)(_loras(2), Watched(Drowned(1.0, 3.0), cancel=Stop(2)))
    assert (found.ended, len(found.trials)) == ("stopped", 2)
    with pytest.raises(Enough):
        resolve("weigh", "balanced")(_loras(2), Watched(Drowned(1.0, 3.0), cancel=Stop(0)))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([[0.5, math.nan]], "'lora1' changes nothing where it was measured .*trigger words"),
        ([[0.5]], "wanted a share of its effect for each of 2 LoRAs"),
        ([0.5], "wanted a share of its effect for each of 2 LoRAs"),
        ([], "returned 0 numbers for 1 candidates"),
    ],
)
def test_answers_that_are_no_shares(answer, said):
    with pytest.raises(ValueError, match=said):
        resolve("weigh", "balanced")(_loras(2), lambda loras, rows: answer)
