"""The Fisher-weighted mean of LoRAs: delta = sum_m w_m F_m delta_m / sum_m w_m F_m (arXiv 2111.09832, equation 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from multilora.blocks import weights_of
from multilora.elementwise import elementwise
from multilora.fishers import Fisher, checked_fisher, consents, fisher_mean, norm_over
from multilora.lora import Lora
from multilora.method import Opt, method
from multilora.sites import label


@method(
    title="Mean of the updates, each entry weighted by its Fisher information",
    paper="https://arxiv.org/abs/2111.09832",
    cost="1",
    laws=("zero", "gauge", "permutation", "mean_of_equals"),
)
def fisher(
    loras: Sequence[Lora],
    weights: Sequence[float | Mapping[str, float]],
    *,
    fishers: Annotated[
        str | Sequence[Any] | None, Opt("one Fisher file per LoRA (see multilora fisher), joined by commas")
    ] = None,
    normalize: Annotated[bool, Opt("divide each Fisher by its L2 norm over all modules")] = True,
    floor: Annotated[float, Opt("the least that an entry counts as, before the norm divides it", 0)] = 1e-6,
    favor_target: Annotated[bool, Opt("the floor is the first LoRA's alone, as in the published code")] = False,
    rank: Annotated[int | None, Opt("largest rank of a module; none: the sum of the LoRAs' ranks", 1)] = None,
    dense: Annotated[bool, Opt("keep whole matrices, without a loss")] = False,
) -> Lora:
    """One LoRA in which every entry of a weight follows the LoRAs that it matters to.

    weights  shares of a mean, at least 0: only their ratios count, and a LoRA alone comes out at strength 1. Per block
             as in every merge
    fishers  one per LoRA, in their order: a path, a mapping {parameter name or module path: tensor of the weight's
             shape}, or a `multilora.fishers.Fisher`; in one text, paths joined by commas. They are Fishers over the
             entries of W, from `multilora.lab.train.fisher.estimate`
    floor, favor_target  the published code has 1e-6 and True. By default here no order of the LoRAs decides: where all
             Fishers are below the floor the result is the mean by weights and norms

    A LoRA that lacks a module counts as zero there if its Fisher has the module, else it has no say. Scaling all
    Fishers changes nothing as long as no entry is at the floor. Raises ValueError naming LoRA and key when a Fisher is
    missing, was estimated for another LoRA or family, lacks a module, or has another shape there; and for a negative
    weight.
    """
    loras = list(loras)
    with ExitStack() as files:
        known = _fishers(loras, fishers, files)
        names = {key: _names(key, loras, known) for key in dict.fromkeys(key for lora in loras for key in lora)}
        weights_at = weights_of(loras, weights, name="fisher")
        for key in names:
            if any(weights_at(key)):  # all of them 0 leaves the module out
                consents(weights_at(key), len(loras), f"fisher: {key}", "LoRAs")
        norms = None
        if normalize:
            used = [[n for row in names.values() for n in row[m] if n is not None] for m in range(len(loras))]
            norms = [norm_over(f, entries) for f, entries in zip(known, used, strict=True)]

        def combine(key: str, deltas: list[Tensor], row: list[float]) -> Tensor:
            module, bias = (key, False) if key in names else (key.removesuffix(".bias"), True)
            found: list[Tensor | None] = []
            for m, delta in enumerate(deltas):
                name = names[module][m][bias]
                found.append(None if name is None else _fitting(known[m][name], delta, name))
            return fisher_mean(deltas, found, row, norms=norms, floor=floor, favor_target=favor_target)

        facts = {"normalize": normalize, "floor": floor, "favor_target": favor_target}
        facts["fishers"] = [{"name": f.name, **{k: f.about[k] for k in _KEPT if k in f.about}} for f in known]
        return elementwise(loras, weights, combine, name="fisher", rank=rank, dense=dense, options=facts)


_KEPT = ("estimator", "examples", "base", "lora", "lora_sha256")  # of a Fisher's card, kept on the merge's


def _fishers(loras: Sequence[Lora], fishers: Any, files: ExitStack) -> list[Fisher]:
    """One checked Fisher per LoRA."""
    if isinstance(fishers, (str, Path)):
        fishers = [text.strip() for text in str(fishers).split(",")]
    if isinstance(fishers, Mapping):
        raise ValueError("fisher: fishers is one mapping, wanted a list with one Fisher per LoRA")
    fishers = list(fishers or ())
    found = []
    for m, lora in enumerate(loras):
        who = label(lora, m)
        if m >= len(fishers) or fishers[m] is None or (isinstance(fishers[m], str) and not fishers[m]):
            raise ValueError(
                f"fisher: {who} has no Fisher: {len(fishers)} given for {len(loras)} LoRAs; estimate one with "
                "`multilora fisher` (without Fishers this method is the mean: use linear at weights that sum to 1)"
            )
        fisher = checked_fisher(fishers[m], f"fisher: the Fisher of {who}", files)
        about, card = fisher.about, lora.card
        for what, theirs, ours in (
            ("LoRA", about.get("lora_sha256"), card.sha256),
            ("family", about.get("family"), card.family),
        ):
            if theirs and ours and theirs != ours:
                was = repr(about.get("lora")) if what == "LoRA" else theirs
                raise ValueError(
                    f"fisher: {fisher.name} was estimated for another {what} ({was}) than {who}; give the Fishers in "
                    "the order of the LoRAs"
                )
        found.append(fisher)
    if len(fishers) > len(loras):
        raise ValueError(f"fisher: {len(fishers)} Fishers for {len(loras)} LoRAs, wanted one each")
    return found


def _names(key: str, loras: Sequence[Lora], fishers: Sequence[Fisher]) -> list[tuple[str | None, str | None]]:
    """Per LoRA the names of (weight, bias) of a module in its Fisher; None where the LoRA has no say.

    Raises ValueError when a LoRA's update has no Fisher, or a Fisher has another shape than the layer.
    """
    shape = next((lora[key].shape for lora in loras if key in lora and lora[key].shape), None)
    rows = []
    for m, (lora, fisher) in enumerate(zip(loras, fishers, strict=True)):
        part = lora.get(key)
        weight, bias = fisher.of(key), f"{key}.bias" if f"{key}.bias" in fisher else None
        who = f"fisher: the Fisher of {label(lora, m)}{f' ({fisher.name})' if fisher.name else ''}"
        for missing, wanted in (
            (part is not None and part.shape is not None and weight is None, f"{key}.weight"),
            (part is not None and part.bias is not None and bias is None, f"{key}.bias"),
        ):
            if missing:
                raise ValueError(
                    f"{who} has no {wanted!r}, which the LoRA changes: it was estimated for another LoRA or base, or "
                    f"for fewer modules (it has {len(fisher)} tensors)"
                )
        if weight is not None and shape is not None and fisher.shape(weight) != tuple(shape):
            raise ValueError(
                f"{who} is {list(fisher.shape(weight))} at {weight!r}, the layer's weight is {list(shape)}: it was "
                "estimated on another base"
            )
        rows.append((weight, bias))
    return rows


def _fitting(fisher: Tensor, delta: Tensor, name: str) -> Tensor:
    if fisher.shape != delta.shape:
        raise ValueError(f"fisher: {name!r} is {list(fisher.shape)} in a Fisher, the update is {list(delta.shape)}")
    return fisher
