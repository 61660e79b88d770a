"""lorahub: CMA-ES against known optima, the paper's factor form by hand, stop and resume, bad scores."""

import itertools
import json

import numpy as np
import pytest
import torch

from multilora.chosen import Enough
from multilora.lora import Card, Lora, LowRank
from multilora.method import resolve
from multilora.weigh.lorahub import PAPER_BOUND, PAPER_L1


def _loras(k, rank=2, scale=1.0):
    rng = np.random.default_rng(k)
    made = []
    for i in range(k):
        down, up = (torch.tensor(rng.normal(size=s)) for s in ((rank, 5), (3, rank)))
        made.append(Lora({"layer": LowRank.from_factors(down, up, alpha=rank * scale)}, Card(name=f"l{i}")))
    return made


def _search(loras, objective, **options):
    return resolve("weigh", "lorahub", **options)(loras, objective)


def _bowl(k, seed, condition=10.0):
    """(objective, its minimum) of a rotated quadratic whose minimum 0 lies within the bounds."""
    rng = np.random.default_rng(seed)
    lowest, (turn, _) = rng.uniform(-1, 1, k), np.linalg.qr(rng.normal(size=(k, k)))
    curve = turn @ np.diag(np.geomspace(1, condition, k)) @ turn.T
    return lambda loras, rows: [float((np.array(r) - lowest) @ curve @ (np.array(r) - lowest)) for r in rows], lowest


@pytest.mark.parametrize("seed", range(5))
def test_a_quadratic_of_five_weights_within_200_evaluations(seed):
    objective, lowest = _bowl(5, seed)
    found = _search(_loras(5), objective, budget=200, l1=0.0, seed=seed)
    assert len(found.trials) <= 200
    assert found.trials[0].weights == (0.0,) * 5
    assert found.best.loss < 1e-6 < found.trials[0].loss
    np.testing.assert_allclose(found, lowest, atol=1e-3)


def test_plain_cma_es_finds_a_quadratic_too_with_more_evaluations():
    objective, _ = _bowl(5, 0)
    short = _search(_loras(5), objective, budget=200, l1=0.0, model=False)
    long = _search(_loras(5), objective, budget=900, l1=0.0, model=False)
    assert long.best.loss < 1e-6 < short.best.loss


@pytest.mark.parametrize(("noise", "at_most"), [(0.05, 0.5), (0.5, 1.0), (2.0, 1.5)])
def test_the_fitted_quadratic_does_not_hurt_where_the_score_is_noisy(noise, at_most):
    """The true loss of what is found, geometric mean of 36 searches each with the model and without: their ratio.

    The bowl's curvatures are 1 to 10, so that noise of 2 is as large as a step of one in a weight.
    """
    logs = {True: [], False: []}
    for k, seed in itertools.product((2, 3, 5), range(12)):
        objective, _ = _bowl(k, seed)
        for model, found in logs.items():
            shaken = np.random.default_rng(seed)
            search = _search(
                _loras(k), lambda a, rows, f=objective, r=shaken: [v + noise * r.normal() for v in f(a, rows)],
                budget=40, l1=0.0, seed=seed, model=model,
            )  # fmt: skip
            found.append(np.log(objective(None, [search])[0]))
    assert np.exp(np.mean(logs[True]) - np.mean(logs[False])) < at_most


def test_a_price_makes_weights_zero_that_gain_less_than_they_cost():
    """Of sum_i a (w_i - t_i)^2 + l1 |w_i| the minimum is t_i shrunk by l1 / 2a, by hand."""
    target, l1 = np.array([1.0, 0.02, -0.5]), 0.2

    def objective(loras, rows):
        return [float(((np.array(r) - target) ** 2).sum()) for r in rows]

    found = _search(_loras(3), objective, budget=120, l1=l1)
    np.testing.assert_allclose(found, [0.9, 0.0, -0.4], atol=1e-4)
    assert found.best.penalty == pytest.approx(l1 * 1.3, abs=1e-3)
    at_the_wall = _search(_loras(3), lambda a, rows: [-sum(r) for r in rows], budget=120, bound=0.7)
    assert max(abs(w) for t in at_the_wall.trials for w in t.weights) <= 0.7
    np.testing.assert_allclose(at_the_wall, [0.7] * 3, atol=1e-2)


def test_defaults_are_the_papers():
    options = {o.name: o.default for o in resolve("weigh", "lorahub").record.options}
    assert (PAPER_L1, PAPER_BOUND) == (0.05, 1.5)
    assert (options["l1"], options["bound"], options["start"], options["budget"]) == (0.05, 1.5, 0.0, 40)
    found = _search(_loras(4), _bowl(4, 1)[0])
    assert all(t.penalty == pytest.approx(0.05 * sum(map(abs, t.weights))) for t in found.trials)
    assert len(found.trials) == 40


def test_the_factor_form_is_the_published_composition():
    """(sum_i w_i B_i)(sum_i w_i A_i) under the common scale, from the factors by hand in float64."""
    scale, loras = 2.0, _loras(3, scale=2.0)
    seen = []

    def objective(made, rows):
        assert len(made) == len(rows)
        for one, row in zip(made, rows, strict=True):
            assert sum(row) == 1.0
            assert row[len(seen) % len(rows) if len(made) == 1 else made.index(one)] == 1.0
            seen.append(one)
        return [float(i) for i in range(len(rows))]

    found = _search(loras, objective, form="factor", budget=15)
    assert found.form == "factor"
    assert len(seen) == 15
    checked = 0
    for trial, made in zip(found.trials, seen, strict=True):
        if not any(trial.weights):
            assert len(made) == 0
            continue
        a = sum(w * lora["layer"].down for w, lora in zip(trial.weights, loras, strict=True))
        b = sum(w * lora["layer"].up / scale for w, lora in zip(trial.weights, loras, strict=True))
        torch.testing.assert_close(made["layer"].delta(), scale * b @ a, rtol=1e-9, atol=1e-9)
        apart = sum(w * lora["layer"].delta() for w, lora in zip(trial.weights, loras, strict=True))
        assert (made["layer"].delta() - apart).norm() > 0.05 * apart.norm()
        checked += 1
    assert checked == 14


def test_factor_form_refuses_unequal_ranks_before_anything_is_scored():
    mixed = [*_loras(1), Lora({"layer": LowRank(torch.randn(4, 5), torch.randn(3, 4))}, Card(name="wide"))]
    with pytest.raises(ValueError, match="factors of one rank"):
        _search(mixed, lambda a, rows: pytest.fail("scored"), form="factor")


@pytest.mark.parametrize("k", [1, 2, 7])
def test_same_seed_same_weights_bit_for_bit(k):
    objective, _ = _bowl(k, 3)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = _search(_loras(k), objective, budget=60, seed=9)
    assert (np.random.get_state()[1] == before).all(), "the global random numbers were used"
    np.random.seed(77)
    again = _search(_loras(k), objective, budget=60, seed=9)
    other = _search(_loras(k), objective, budget=60, seed=10)
    assert list(first) == list(again)
    assert first.trials == again.trials
    assert first.trials != other.trials


@pytest.mark.parametrize("stop_at", [1, 6, 17])
def test_stopped_and_gone_on_is_the_same_search(tmp_path, stop_at):
    objective, _ = _bowl(4, 2)
    calls = []

    def stopping(loras, rows):
        if len(calls) >= stop_at:
            raise Enough
        calls.extend(rows)
        return objective(loras, rows)

    state = tmp_path / "s.json"
    options = {"budget": 50, "batch": 3, "seed": 1}
    whole = _search(_loras(4), objective, **options)
    objective.name = stopping.name = "bowl"
    cut = _search(_loras(4), stopping, state=str(state), **options)
    assert cut.ended == "stopped"
    assert 0 < len(cut.trials) == len(json.loads(state.read_text())["trials"]) < 50
    assert cut.best.total == min(t.total for t in cut.trials)
    scored = []

    def counting(loras, rows):
        scored.extend(rows)
        return objective(loras, rows)

    counting.name = "bowl"
    gone_on = _search(_loras(4), counting, state=str(state), **options)
    assert gone_on.trials == whole.trials
    assert list(gone_on) == list(whole)
    assert len(scored) == 50 - len(cut.trials)
    longer = _search(_loras(4), counting, state=str(state), **{**options, "budget": 60})
    assert longer.trials[:50] == whole.trials
    assert len(longer.trials) == 60


def test_candidates_come_in_batches():
    objective, _ = _bowl(3, 0)
    sizes = []

    def counting(loras, rows):
        sizes.append(len(rows))
        return objective(loras, rows)

    _search(_loras(3), counting, budget=23, population=10)
    assert sizes == [1, 10, 10, 2]
    sizes.clear()
    _search(_loras(3), counting, budget=21, population=10, batch=4)
    assert sizes == [1, 4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize(
    "value", [None, "high", float("nan"), float("inf"), True, [1.0], torch.tensor([1.0, 2.0])], ids=repr
)
def test_a_score_that_returns_no_number_is_named(tmp_path, value):
    def prettiness(loras, rows):
        return [value] * len(rows)

    state = tmp_path / "s.json"
    with pytest.raises(ValueError, match=r"score 'prettiness' returned no number but .*\[0, 0\].*finite number"):
        _search(_loras(2), prettiness, state=str(state))
    assert not state.exists()


def test_other_bad_input(tmp_path):
    objective, _ = _bowl(2, 0)
    with pytest.raises(ValueError, match="budget=4 is below the population of 6"):
        _search(_loras(2), objective, budget=4)
    with pytest.raises(ValueError, match=r"start=2\.0 is not within bound=1\.5"):
        _search(_loras(2), objective, start=2.0)
    with pytest.raises(ValueError, match="returned 3 numbers for 1 candidates"):
        _search(_loras(2), lambda a, rows: [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="wanted a list with one number each"):
        _search(_loras(2), lambda a, rows: 1.0)
    with pytest.raises(ValueError, match="wanted a callable"):
        _search(_loras(2), 3)
    state = tmp_path / "s.json"
    objective.name = "bowl"
    _search(_loras(2), objective, state=str(state))
    before = state.read_bytes()
    for changed in ({"seed": 1}, {"l1": 0.5}):
        with pytest.raises(ValueError, match="belongs to another search: settings"):
            _search(_loras(2), objective, state=str(state), **changed)
    with pytest.raises(ValueError, match="belongs to another search: loras"):
        _search(_loras(3)[:2], objective, state=str(state))
    assert state.read_bytes() == before
    state.write_text("{")
    with pytest.raises(ValueError, match="no state of a search"):
        _search(_loras(2), objective, state=str(state))
