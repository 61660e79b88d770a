"""Weights by gradient, the LoRAs and the model frozen (arXiv 2402.15414, "learned")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from multilora.chosen import Chosen, Enough, Trial, answers_of, checked_set, name_of
from multilora.lora import Lora
from multilora.method import Opt, method


@method(
    title="Weights learned by gradient from a loss, per layer or for all; LoRAs and model stay as they are",
    paper="https://arxiv.org/abs/2402.15414",
    cost="1 forward and backward a step",
)
def learned(
    loras: Sequence[Lora],
    objective: Any,
    *,
    scope: Annotated[Literal["layer", "global"], Opt("a weight for every adapted layer, or one for all")] = "layer",
    form: Annotated[
        Literal["simplex", "free", "bounded"], Opt("shares that sum to 1; any numbers; within plus and minus bound")
    ] = "simplex",
    bound: Annotated[float, Opt("largest size of a bounded weight", 1e-3, 100)] = 1.5,
    start: Annotated[float | None, Opt("weight of every LoRA at first; none: 1 / k")] = None,
    steps: Annotated[int, Opt("of the optimiser", 1, 1_000_000)] = 100,
    lr: Annotated[float, Opt("learning rate of AdamW, on the raw values", 1e-8, 10)] = 0.05,
    weight_decay: Annotated[float, Opt("of AdamW: pulls towards equal shares, or towards 0", 0, 10)] = 0.0,
    l1: Annotated[float, Opt("price of the sum of the weights' sizes, mean over the layers", 0)] = 0.0,
) -> Chosen:
    """The weights with the lowest loss on the way, from `steps` + 1 calls of the objective.

    objective  (loras, [row]) -> [loss]: a scalar tensor that depends on the row, a tensor [k], or with scope="layer"
               {Lora key: tensor [k]}. It should draw the same random numbers in every call
    form       with raw values v: simplex softmax(v), the paper's (from v = 1); free v; bounded bound * tanh(v). A
               LoRA that lacks a layer keeps its share of the simplex there

    The gradient is taken with respect to v alone: no `grad` of any other tensor changes. Returns numbers for
    scope="global", {Lora key: number} per LoRA else. Raises ValueError for a start that the form cannot have, a loss
    that does not depend on the weights, and one that is not finite (with step, learning rate and what to try).
    """
    loras = checked_set(loras, "learned")
    k = len(loras)
    keys = list(dict.fromkeys(key for lora in loras for key in lora)) if scope == "layer" else [""]
    with torch.inference_mode(False), torch.enable_grad():
        raw = torch.full((len(keys), k), _raw(form, start, bound, k), requires_grad=True)
        optimiser = torch.optim.AdamW([raw], lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
        trials: list[Trial] = []
        best: tuple[Trial, Tensor] | None = None
        ended = "budget"
        for step in range(steps + 1):
            weights = _weights(raw, form, bound)
            row = weights[0] if scope == "global" else dict(zip(keys, weights.unbind(0), strict=True))
            try:
                loss = _scalar(answers_of(objective, loras, [row])[0], objective, step, lr)
            except Enough:
                if best is None:
                    raise
                ended = "stopped"
                break
            price = l1 * weights.abs().sum(1).mean()
            trial = Trial(tuple(weights.detach().mean(0).tolist()), float(loss.detach()), float(price.detach()))
            trials.append(trial)
            if best is None or trial.total < best[0].total:
                best = trial, weights.detach().clone()
            if step < steps:
                total = loss + price.to(loss.device, loss.dtype)
                (raw.grad,) = torch.autograd.grad(total, [raw], allow_unused=True)
                if raw.grad is None:
                    raise ValueError(f"learned: the loss of {name_of(objective)!r} does not depend on the weights")
                optimiser.step()
    found = best[1]
    if scope == "global":
        return Chosen(found[0].tolist(), trials, best[0], ended)
    table = dict(zip(keys, found.tolist(), strict=True))
    return Chosen([{key: table[key][i] for key in lora} for i, lora in enumerate(loras)], trials, best[0], ended)


def _raw(form: str, start: float | None, bound: float, k: int) -> float:
    if form == "simplex":
        if start is not None and not math.isclose(start, 1 / k, rel_tol=1e-3):
            raise ValueError(f"learned: start={start} for {k} LoRAs: shares of a simplex start at 1 / {k}; use free")
        return 1.0
    start = 1 / k if start is None else start
    if form == "bounded":
        if not abs(start) < bound:
            raise ValueError(f"learned: start={start} is not within bound={bound}")
        return math.atanh(start / bound)
    return start


def _weights(raw: Tensor, form: str, bound: float) -> Tensor:
    """[layers, k] from raw values of the same shape."""
    if form == "simplex":
        return raw.softmax(-1)
    # A copy: whoever keeps a row must not see the optimiser change it.
    return bound * raw.tanh() if form == "bounded" else raw.clone()


def _scalar(loss: Any, objective: Any, step: int, lr: float) -> Tensor:
    who = f"learned: the loss of {name_of(objective)!r}"
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"{who} is {type(loss).__name__} {loss!r:.60}, wanted a tensor with one element")
    loss = loss.reshape(())
    if not torch.isfinite(loss.detach()):
        raise ValueError(
            f"{who} is {float(loss.detach())} at step {step} with lr={lr:g}: try a tenth of the learning rate, "
            "form=simplex or bounded, or float32"
        )
    if not loss.requires_grad:
        raise ValueError(f"{who} does not depend on the weights by gradient (was it computed under no_grad?)")
    return loss
