"""LoRAHub: weights by CMA-ES on any score, without gradients (arXiv 2307.13269)."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from multilora.chosen import Chosen, Enough, Trial, answers_of, checked_set, name_of, number_of, write_json
from multilora.lora import Lora
from multilora.merge.factor import factor
from multilora.method import Opt, method

PAPER_L1 = 0.05  # alpha of the paper's objective, L + alpha sum |w|
PAPER_BOUND = 1.5  # |w| at most


@method(
    title="Gradient-free search (CMA-ES) for the weights with the best score",
    paper="https://arxiv.org/abs/2307.13269",
    cost="budget evaluations of the score",
)
def lorahub(
    loras: Sequence[Lora],
    objective: Any,
    *,
    budget: Annotated[int, Opt("candidates to score", 1, 1_000_000)] = 40,
    population: Annotated[int | None, Opt("candidates a generation; none: 4 + 3 ln k", 2, 10_000)] = None,
    l1: Annotated[float, Opt("price of the sum of the weights' sizes", 0)] = PAPER_L1,
    bound: Annotated[float, Opt("largest size of a weight", 1e-3, 100)] = PAPER_BOUND,
    start: Annotated[float, Opt("weight of every LoRA in the first candidate; 0 is the base model")] = 0.0,
    sigma: Annotated[float, Opt("standard deviation of the first generation", 1e-6, 100)] = 0.5,
    form: Annotated[
        Literal["delta", "factor"], Opt("weigh the updates, or as the paper their factors: (sum w A)(sum w B)")
    ] = "delta",
    model: Annotated[bool, Opt("try the minimum of a fitted quadratic in each generation too")] = True,
    batch: Annotated[int | None, Opt("candidates in one call of the score; none: a generation", 1)] = None,
    seed: Annotated[int, Opt("of the candidates", 0, 2**31 - 1)] = 42,
    state: Annotated[str | None, Opt("file to go on from, written after every call of the score")] = None,
) -> Chosen:
    """The candidate with the lowest objective + l1 * sum |w| of `budget`, the first of which has `start` everywhere.

    objective  (loras, rows) -> a number per row, lower is better; rows hold one weight per LoRA. In the factor form
               it gets the composed Loras (merge `factor`, convention "lorahub"), each with a one-hot row
    model      once there are more trials than a quadratic of k weights has coefficients, (k + 1)(k + 2) / 2, its
               minimum under the price and the bounds is injected into each generation (arXiv 1110.4181): a few
               weights are then found within tens of candidates; on a noisy score it is not behind plain CMA-ES. With
               many LoRAs and a small budget it never acts
    state      a JSON file. A search of the same LoRAs, score and settings goes on from it and ends as if it had never
               stopped, also under a larger budget

    The published code differs from the paper: Nevergrad's NGOpt, and the mean of |w| for the sum. Same arguments, same
    weights, bit for bit. Raises ValueError for a budget below the population, a score that returns no number (naming
    it), a start out of bounds, LoRAs that the factor form cannot take, and a state file of another search.
    """
    loras = checked_set(loras, "lorahub")
    k = len(loras)
    size = population or 4 + int(3 * math.log(k))
    if budget < size:
        raise ValueError(f"lorahub: budget={budget} is below the population of {size}: one generation needs {size}")
    if not abs(start) <= bound:
        raise ValueError(f"lorahub: start={start} is not within bound={bound}")
    if form == "factor":
        factor(loras, [1.0] * k, convention="lorahub")  # refuses unequal ranks before anything is scored
    settings = {"population": size, "l1": l1, "bound": bound, "start": start, "sigma": sigma, "form": form,
                "model": model, "batch": batch, "seed": seed}  # fmt: skip
    record = _Record(loras, objective, settings, state)
    strategy = _strategy([start] * k, sigma, bound, size, seed)
    ended = "budget"
    try:
        record.score([(float(start),) * k])
        while len(record.trials) < budget:
            if stopped := strategy.stop():
                ended = "converged: " + ", ".join(map(str, stopped))
                break
            if model:
                guess = _quadratic_minimum(record.trials, l1, bound)
                if guess is not None:
                    strategy.inject([guess], force=True)
            asked = strategy.ask()
            rows = [tuple(min(max(float(w), -bound), bound) for w in x) for x in asked]
            left = budget - len(record.trials)
            record.score(rows[:left])
            if left >= size:
                strategy.tell(asked, [trial.total for trial in record.trials[-size:]])
    except Enough:
        if not record.trials:
            raise
        ended = "stopped"
    best = min(record.trials, key=lambda trial: trial.total)
    return Chosen(best.weights, record.trials, best, ended, form)


def _strategy(start: list[float], sigma: float, bound: float, size: int, seed: int) -> Any:
    with warnings.catch_warnings():  # on import: no matplotlib; later: one dimension
        warnings.simplefilter("ignore")
        import cma

        rng = np.random.default_rng(seed)
        options = {"bounds": [-bound, bound], "popsize": size, "verbose": -9, "seed": math.nan,
                   "randn": lambda *shape: rng.standard_normal(shape)}  # fmt: skip
        return cma.CMAEvolutionStrategy(start, min(sigma, bound), options)


class _Record:
    """Every trial in order; those in the state file are taken from it instead of being scored again."""

    def __init__(self, loras: Sequence[Lora], objective: Any, settings: dict[str, Any], state: str | None) -> None:
        self.loras, self.objective, self.settings = loras, objective, settings
        self.path = Path(state).expanduser() if state else None
        self.head = {
            "method": "lorahub",
            "score": name_of(objective),
            "loras": [[lora.card.name, lora.card.sha256, len(lora), float(f"{lora.norm():.5g}")] for lora in loras],
            "settings": settings,
        }
        self.trials: list[Trial] = []
        self.known = self._read()

    def _read(self) -> list[tuple[tuple[float, ...], float]]:
        if self.path is None or not self.path.exists():
            return []
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            known = [(tuple(map(float, weights)), float(loss)) for weights, loss in found["trials"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"state {self.path}: no state of a search ({error}); give another file") from None
        for name, mine in self.head.items():
            if found.get(name) != json.loads(json.dumps(mine)):
                raise ValueError(
                    f"state {self.path}: belongs to another search: {name} was {found.get(name)!r:.200}, is "
                    f"{mine!r:.200}; give another file, or the same settings"
                )
        return known

    def score(self, rows: Sequence[tuple[float, ...]]) -> None:
        """Append a trial for every row, calling the objective for those that are new."""
        rows = list(rows)
        while rows and len(self.trials) < len(self.known):
            weights, loss = self.known[len(self.trials)]
            if weights != rows[0]:
                raise ValueError(f"state {self.path}: its candidates are not those of this search (another version "
                                 "of cma, numpy or multilora?); start anew")  # fmt: skip
            self._add(rows.pop(0), loss)
        step = self.settings["batch"] or len(rows) or 1
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            found = self._asked(part)
            losses = [number_of(v, self.objective, row) for v, row in zip(found, part, strict=True)]
            for row, loss in zip(part, losses, strict=True):
                self._add(row, loss)
            if self.path is not None:
                write_json(self.path, {**self.head, "trials": [[t.weights, t.loss] for t in self.trials]})

    def _asked(self, rows: Sequence[tuple[float, ...]]) -> list[Any]:
        if self.settings["form"] == "delta":
            return answers_of(self.objective, self.loras, rows)
        made = [factor(self.loras, list(row), convention="lorahub") for row in rows]
        return answers_of(self.objective, made, [tuple(map(float, one)) for one in np.eye(len(rows))])

    def _add(self, row: tuple[float, ...], loss: float) -> None:
        self.trials.append(Trial(row, loss, self.settings["l1"] * math.fsum(map(abs, row))))


def _quadratic_minimum(trials: Sequence[Trial], l1: float, bound: float) -> np.ndarray | None:
    """[k] the minimum of a quadratic through the best trials' losses plus l1 * sum |w|, within the bounds.

    None while there are too few trials, and where the quadratic has no minimum along an axis.
    """
    k = len(trials[0].weights)
    wanted = (k + 1) * (k + 2) // 2
    if len(trials) <= wanted:
        return None
    near = sorted(trials, key=lambda t: t.total)[: 2 * wanted]
    points, losses = np.array([t.weights for t in near]), np.array([t.loss for t in near])
    centre = points[0]
    unit = np.abs(points - centre).max()
    if not unit > 0.0:
        return None
    x = (points - centre) / unit
    pairs = list(itertools.combinations_with_replacement(range(k), 2))
    table = np.column_stack([np.ones(len(x)), x, *(x[:, i] * x[:, j] for i, j in pairs)])
    found = np.linalg.lstsq(table, losses - losses[0], rcond=None)[0]
    slope, curve = found[1 : k + 1], np.zeros((k, k))
    for (i, j), value in zip(pairs, found[k + 1 :], strict=True):
        curve[i, j] += value
        curve[j, i] += value
    if not (np.isfinite(found).all() and (np.diag(curve) > 0).all()):
        return None
    low, high, price, z = (-bound - centre) / unit, (bound - centre) / unit, l1 * unit, np.zeros(k)
    for _ in range(500):  # coordinate descent: along each axis the minimum is known
        before = z.copy()
        for i in range(k):
            free = z[i] - (slope[i] + curve[i] @ z) / curve[i, i] + centre[i] / unit  # w_i / unit without the price
            shrunk = math.copysign(max(abs(free) - price / curve[i, i], 0.0), free)
            z[i] = min(max(shrunk - centre[i] / unit, low[i]), high[i])
        if np.abs(z - before).max() < 1e-14:
            break
    guess = centre + unit * z
    if np.abs(points - guess).max(1).min() < 1e-9 * bound:
        return None  # scored already
    return guess
