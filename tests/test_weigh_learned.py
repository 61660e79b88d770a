"""learned: against finite differences and dense weights; nothing but the weights gets a gradient."""

import math

import pytest
import torch

import multilora as ml
from multilora.chosen import Enough
from multilora.lab.objectives import weighed
from multilora.lora import Lora, LowRank
from multilora.method import resolve

SEED = torch.Generator()


def _toy(k=3, layers=2, dtype=torch.float64):
    """(model, LoRAs, inputs, targets): the targets are those of known weights per layer."""
    SEED.manual_seed(k)

    def normal(*s):
        return torch.randn(*s, generator=SEED, dtype=dtype)

    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6, dtype=dtype) for _ in range(layers)))
    for p in model.parameters():
        p.data = normal(*p.shape) / 3
    loras = [Lora({str(n): LowRank(normal(2, 6), normal(6, 2)) for n in range(layers)}) for _ in range(k)]
    return model, loras, normal(40, 6)


def _output(model, loras, weights, x):
    """By hand: dense weights, weights[i][key] of LoRA i."""
    for n, layer in enumerate(model):
        delta = sum(w[str(n)] * lora[str(n)].delta() for w, lora in zip(weights, loras, strict=True))
        x = x @ (layer.weight + delta).T + layer.bias
    return x


def _objective(model, x, wanted):
    def loss(loras, rows):
        found = []
        with weighed({None: model}, loras) as put:
            for row in rows:
                put(row)
                found.append((model(x) - wanted).square().mean())
        return found

    return loss


def _learned(loras, objective, **options):
    return resolve("weigh", "learned", **options)(loras, objective)


def test_per_layer_weights_are_recovered():
    model, loras, x = _toy()
    true = [{"0": 0.7, "1": 0.1}, {"0": 0.2, "1": 0.6}, {"0": 0.1, "1": 0.3}]
    wanted = _output(model, loras, true, x).detach()
    found = _learned(loras, _objective(model, x, wanted), steps=500, lr=0.1)
    assert found.best.loss < 1e-3 * found.trials[0].loss
    for got, want in zip(found, true, strict=True):
        assert got == pytest.approx(want, abs=0.02)
    for key in "01":
        assert sum(w[key] for w in found) == pytest.approx(1.0, abs=1e-6)
    merged = ml.merge(loras, found)
    made = _output(model, [merged], [{"0": 1.0, "1": 1.0}], x)
    assert float((made - wanted).square().mean().detach()) == pytest.approx(found.best.loss, rel=1e-3, abs=1e-9)


def test_free_and_bounded_weights_leave_the_simplex():
    model, loras, x = _toy()
    true = [-0.8, 1.3, 0.4]
    wanted = _output(model, loras, [{"0": w, "1": w} for w in true], x).detach()
    objective = _objective(model, x, wanted)
    free = _learned(loras, objective, scope="global", form="free", steps=400, lr=0.05)
    assert list(free) == pytest.approx(true, abs=0.02)
    bounded = _learned(loras, objective, scope="global", form="bounded", bound=1.0, steps=400)
    assert max(map(abs, bounded)) <= 1.0
    simplex = _learned(loras, objective, scope="global", steps=100)
    assert sum(simplex) == pytest.approx(1.0, abs=1e-6)
    assert min(simplex) >= 0.0
    assert free.best.loss < bounded.best.loss < simplex.best.loss


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("form", ["simplex", "free", "bounded"])
def test_starts_uniform_and_its_gradient_is_that_of_finite_differences(scope, form):
    model, loras, x = _toy()
    wanted = torch.randn(40, 6, generator=SEED, dtype=torch.float64)
    rows = []
    loss = _objective(model, x, wanted)

    def objective(loras, asked):
        rows.append(asked[0])
        return loss(loras, asked)

    rate = 1e-2
    _learned(loras, objective, scope=scope, form=form, steps=1, lr=rate)
    first = torch.stack(list(rows[0].values())) if scope == "layer" else rows[0]
    torch.testing.assert_close(first.detach(), torch.full_like(first, 1 / 3), rtol=1e-5, atol=1e-6)
    # AdamW's first step moves every raw value by lr against the sign of its gradient: compared per raw value.
    raw = torch.full((2 if scope == "layer" else 1, 3), {"simplex": 1.0, "free": 1 / 3}.get(form, math.atanh(1 / 4.5)),
                     dtype=torch.float64)  # fmt: skip

    def value(raw):
        w = raw.softmax(-1) if form == "simplex" else 1.5 * raw.tanh() if form == "bounded" else raw
        w = w.expand(2, 3)
        return float(
            (_output(model, loras, [{"0": w[0, i], "1": w[1, i]} for i in range(3)], x) - wanted).square().mean()
        )

    slopes = torch.zeros_like(raw)
    for place in range(raw.numel()):
        step = torch.zeros_like(raw)
        step.view(-1)[place] = 1e-5
        slopes.view(-1)[place] = (value(raw + step) - value(raw - step)) / 2e-5
    moved = raw - rate * slopes.sign()
    expected = moved.softmax(-1) if form == "simplex" else 1.5 * moved.tanh() if form == "bounded" else moved
    second = torch.stack(list(rows[1].values())) if scope == "layer" else rows[1][None]
    torch.testing.assert_close(second.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_row_has_the_size_of_finite_differences():
    model, loras, x = _toy()
    objective = _objective(model, x, torch.randn(40, 6, generator=SEED, dtype=torch.float64))
    row = {key: torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True) for key in "01"}
    got = torch.stack(torch.autograd.grad(objective(loras, [row])[0], list(row.values())))
    for n, key in enumerate("01"):
        for i in range(3):
            ends = []
            for by in (1e-6, -1e-6):
                moved = {k: v.detach().clone() for k, v in row.items()}
                moved[key][i] += by
                ends.append(objective(loras, [moved])[0].item())
            assert got[n, i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_no_gradient_reaches_the_loras_or_the_model():
    model, loras, x = _toy()

    def tracked(part):
        return LowRank(part.down.clone().requires_grad_(), part.up.clone().requires_grad_())

    trained = [Lora({key: tracked(part) for key, part in lora.items()}) for lora in loras]
    before = [(p.down.detach().clone(), p.up.detach().clone()) for lo in trained for p in lo.values()]
    weights = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        found = _learned(trained, _objective(model, x, torch.zeros(40, 6, dtype=torch.float64)), steps=5)
    assert found.best.loss < found.trials[0].loss
    for lora in trained:
        for part in lora.values():
            assert part.down.grad is None
            assert part.up.grad is None
    assert all(p.grad is None for p in model.parameters())
    after = [(p.down, p.up) for lo in trained for p in lo.values()]
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_layer_that_a_lora_lacks_and_unequal_ranks():
    model, loras, x = _toy()
    short = Lora({"1": LowRank(torch.randn(3, 6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64))})
    found = _learned([loras[0], short], _objective(model, x, torch.zeros(40, 6, dtype=torch.float64)), steps=3)
    assert set(found[0]) == {"0", "1"}
    assert set(found[1]) == {"1"}
    assert ml.merge([loras[0], short], found)["1"].rank == 5


def test_bad_losses_are_named():
    _, loras, _ = _toy()

    def bad_step(loras, rows):
        bad_step.calls += 1
        return [rows[0].sum() * (math.nan if bad_step.calls > 3 else 1.0)]

    bad_step.calls = 0
    with pytest.raises(ValueError, match=r"loss of 'bad_step' is nan at step 3 with lr=0.5: try a tenth"):
        _learned(loras, bad_step, scope="global", lr=0.5)
    with pytest.raises(ValueError, match="does not depend on the weights"):
        _learned(loras, lambda a, rows: [torch.tensor(1.0)])
    with pytest.raises(ValueError, match="wanted a tensor with one element"):
        _learned(loras, lambda a, rows: [0.5])
    with pytest.raises(ValueError, match="start at 1 / 3"):
        _learned(loras, lambda a, rows: [0.5], start=0.9)
    with pytest.raises(ValueError, match="not within bound"):
        _learned(loras, lambda a, rows: [0.5], form="bounded", start=1.6)


def test_stopping_keeps_the_best():
    _, loras, _ = _toy()

    def objective(loras, rows):
        objective.calls += 1
        if objective.calls > 4:
            raise Enough
        return [(rows[0] - torch.tensor([0.9, 0.05, 0.05])).square().sum()]

    objective.calls = 0
    found = _learned(loras, objective, scope="global")
    assert found.ended == "stopped"
    assert len(found.trials) == 4
    assert list(found) == list(min(found.trials, key=lambda t: t.total).weights)
