"""K-LoRA: sums of the largest entries, and who has which layer when, by hand; one layer's output under a real bank."""

import pytest
import torch
from torch import nn

from multilora.attach import attached
from multilora.gate_klora import KLoraRouter, Sums, largest
from multilora.lora import Card, Dense, Lora, LowRank
from multilora.method import resolve
from multilora.plan import Moment
from multilora.routing import Asked


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(rank, seed, scale=1.0, out=7, width=11):
    return LowRank(drawn(rank, width, seed=seed), scale * drawn(out, rank, seed=seed + 50))


CONTENT = Lora({"0": part(2, 1, 3.0), "2": part(3, 2, 0.5, 5, 7)}, Card(name="c", category="character"))
STYLE = Lora({"0": part(4, 3), "2": part(2, 4, 1.0, 5, 7)}, Card(name="s", category="style"))
OTHER = Lora({"2": part(1, 5, 2.0, 5, 7)}, Card(name="o", category="object"))


def by_hand(loras, key, factor, style):
    """Index of the LoRA that has a layer: sorted lists and plain sums."""

    def entries(lora, name):
        p = lora[name]
        return sorted((abs(v) for v in (p.up @ p.down).flatten().tolist()), reverse=True)

    count = 1
    for lora in loras:
        count *= lora[key].rank if key in lora else 1
    scores = {}
    for i, lora in enumerate(loras):
        if key in lora:
            shared = [k for k in loras[style] if k in lora]
            gamma = sum(sum(entries(lora, k)) / sum(entries(loras[style], k)) for k in shared) / len(shared)
            scores[i] = sum(entries(lora, key)[:count]) / gamma * (factor if i == style else 1.0)
    return max(scores, key=scores.__getitem__)


@pytest.mark.parametrize("loras", [(CONTENT, STYLE), (STYLE, CONTENT), (OTHER, CONTENT, STYLE)])
def test_each_layer_is_that_of_the_largest_score(loras):
    weights = tuple(0.5 + 0.2 * i for i in range(len(loras)))
    plan = resolve("route", "k_lora", alpha=4.0, beta=0.2)(list(loras))
    model = nn.Sequential(nn.Linear(11, 7), nn.Identity(), nn.Linear(7, 5)).double()
    x, steps, style, winners = drawn(3, 11, seed=9), 9, loras.index(STYLE), set()
    with torch.no_grad(), attached(model, list(loras), form="side") as bank:
        for step in range(steps):
            (only,) = plan(Moment(step, steps, 500.0, None, weights, tuple(lora.card for lora in loras)))
            factor = 4.0 * step / (steps - 1) + 0.2
            wanted, own = x, []
            for key in ("0", "2"):
                best = by_hand(loras, key, factor, style)
                own.append(best)
                p, layer = loras[best][key], model[int(key)]
                bank.row = (0.0,) * len(loras)
                wanted = layer(wanted) + weights[best] * wanted @ (p.up @ p.down).T
            bank.gate = only.row
            torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
            winners.add(tuple(own))
            bank.gate = None
    assert len(winners) > 1  # the style gains layers over the steps


def test_sums_are_of_magnitudes_and_vectors_have_theirs():
    p = LowRank(torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[-3.0], [1.0]]))
    assert largest(p, 2) == 9.0
    assert largest(p, 99) == pytest.approx(14.0)
    assert largest(Dense(bias=torch.tensor([1.0, -4.0])), 1) == 4.0
    assert Sums([CONTENT, STYLE], 1).gamma[1] == 1.0
    assert Sums([Lora({"9": part(1, 6)}), STYLE], 1).gamma == (1.0, 1.0)
    sums = Sums([CONTENT, STYLE], 1)
    assert KLoraRouter(sums, 1.0) == KLoraRouter(sums, 1.0) != KLoraRouter(sums, 2.0)
    assert Asked(KLoraRouter(sums, 1.0), (1.0, 1.0)) != Asked(KLoraRouter(sums, 0.5), (1.0, 1.0))


def test_without_a_style_the_last_one_is_it():
    plan = resolve("route", "k_lora", alpha=0.0, beta=1e9)([STYLE, CONTENT])
    (only,) = plan(Moment(0, 3, 500.0, None, (1.0, 1.0), (None, None)))
    assert only.row.router.sums.style == 1
