"""Merging on the service, in words: what the Merge page and its endpoints do, without gradio."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Sequence
from typing import Any

from multilora.method import resolve
from multilora.recipe import LoraUse, Recipe
from multilora.web import said as words
from multilora.web.service import (
    Compare,
    Entry,
    Fisher,
    Gram,
    Merge,
    Output,
    Overlap,
    Refused,
    Service,
    Session,
    Share,
)

ESTIMATED = {
    "fisher": "fishers",
    "regmean": "grams",
}  # methods that need a file per LoRA -> the option that takes them
_estimates: weakref.WeakKeyDictionary[Session, dict[tuple, str]] = weakref.WeakKeyDictionary()


def merged(
    service: Service,
    session: Session,
    loras: Sequence[str],
    weights: Sequence[float] | None,
    method: str,
    options: dict[str, Any],
    *,
    rank: int | None = None,
    energy: float | None = None,
    estimate: dict[str, int] | None = None,
    **how: Any,
) -> Generator[str, None, tuple[dict[str, Any], Output]]:
    """Words on how the merge goes; the generator's return value is (facts, Output).

    loras     references of the library; weights: one each, default 1
    rank, energy  go to the method where it has such an option, else the result is cut to them
    estimate  examples, pictures, steps of the estimates that fisher and regmean get, where `options` names no files
    how       name, format and dtype of service.Merge

    Raises Refused for what cannot be done, ValueError naming the option for a bad one.
    """
    shares = _shares(loras, weights)
    record = resolve("merge", method).record
    inside = {o.name for o in record.options}
    cut = {n: v for n, v in (("rank", rank), ("energy", energy)) if v is not None}
    options = {**options, **{n: v for n, v in cut.items() if n in inside}}
    record.check({n: v for n, v in options.items() if n not in ESTIMATED.values()})
    wanted = ESTIMATED.get(method)
    if wanted and wanted not in options:
        options[wanted] = []
        for i, share in enumerate(shares):
            doing = f"estimate for {service.entry(session, share.reference).name}, {i + 1} of {len(shares)}"
            options[wanted].append((yield from _estimated(service, session, share, wanted, estimate or {}, doing)))
    after = {n: v for n, v in cut.items() if n not in inside}
    request = Merge(loras=tuple(shares), method=method, options=options, base=session.base, **after, **how)
    result = yield from words.followed(service.submit(request, session), "merging, layer")
    return result.facts, result.files[0]


def _shares(loras: Sequence[str], weights: Sequence[float] | None) -> list[Share]:
    if not loras:
        raise Refused("no LoRA is chosen; choose two or more")
    weights = [1.0] * len(loras) if not weights else list(weights)
    if len(weights) != len(loras):
        raise Refused(f"weights: {len(weights)} numbers for {len(loras)} LoRAs, one each is wanted")
    if any(isinstance(w, bool) or not isinstance(w, (int, float)) for w in weights):
        raise Refused(f"weights={weights!r:.80}: one number per LoRA is wanted")
    return [Share(reference=r, weight=w) for r, w in zip(loras, weights, strict=True)]


def _estimated(
    service: Service, session: Session, share: Share, kind: str, settings: dict[str, int], doing: str
) -> Generator[str, None, str]:
    """The reference of a LoRA's estimate, made unless this session has it already."""
    own = {k: v for k, v in settings.items() if k != "examples" or kind == "fishers"}
    weight = share.weight or 1.0
    key = (kind, share.reference, weight, session.base, *sorted(own.items()))
    kept = _estimates.setdefault(session, {})
    if kept.get(key) not in session.outputs:
        made = Fisher if kind == "fishers" else Gram
        request = made(reference=share.reference, weight=weight, base=session.base, **own)
        result = yield from words.followed(service.submit(request, session), doing)
        kept[key] = result.files[0].reference
    return kept[key]


def overlap(service: Service, session: Session, loras: Sequence[str]) -> Generator[str, None, dict[str, Any]]:
    """Words on how it goes; the return value is how much the LoRAs agree, as multilora.compare tells it."""
    request = Overlap(loras=tuple(loras), base=session.base)
    result = yield from words.followed(service.submit(request, session), "comparing")
    return result.facts


def previews(
    service: Service, session: Session, uses: Sequence[tuple[str, str, float]], file: str, prompt: str, seed: int
) -> Generator[tuple[list[tuple[Any, str]], str], None, None]:
    """(pictures with captions so far, words): each LoRA alone, then the merged file, on one prompt and seed.

    uses  (reference, name, weight) of each source; file: the merge's output
    """
    facts = service.about(session.base or None)
    common = {
        "prompt": prompt, "base": facts["base"], "base_family": facts["family"], "seed": seed, "steps": facts["steps"],
        "guidance_scale": facts["guidance_scale"], "width": facts["width"], "height": facts["height"],
        "scheduler": facts["scheduler"],
    }  # fmt: skip
    uses = list(uses)[: service.limits.compared - 1]
    drawn = [LoraUse(name=name, reference=reference, weight=weight) for reference, name, weight in uses]
    drawn.append(LoraUse(name="merged", reference=file))
    captions = [f"{name} alone, weight {weight:g}" for _, name, weight in uses] + ["merged"]
    job = service.submit(
        Compare(recipes=tuple(Recipe(**common, loras=[use]) for use in drawn), preview=False), session
    )
    made: list[tuple[Any, str]] = []
    for event in job.events():
        if event.kind == "picture":
            made = [*made, (event.picture.image, captions[event.number])]
            yield made, f"{len(made)} of {len(drawn)} drawn"
        elif event.kind == "progress":
            yield made, f"{captions[event.number]}: step {event.step} of {event.steps}"
        elif event.kind == "queued":
            yield made, f"waiting: {event.position} before you"
    job.result()
    yield made, f"prompt: {prompt}; seed {seed}"


def triggers(entries: Sequence[Entry]) -> str:
    """A prompt that wakes every one of these LoRAs."""
    return " and ".join(e.trigger.split(",")[0].strip() for e in entries if e.trigger)


def summary(facts: dict[str, Any]) -> str:
    """What a merge made, as a table."""
    ranks = facts["ranks"]
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
    dense = f", and {facts['dense']} whole matrices" if facts["dense"] else ""
    options = {k.replace("_", " "): v for k, v in facts["options"].items() if v not in (None, False, "")}
    rows = {
        "File": f"{facts['name']}, {facts['bytes'] / 1e6:.2f} MB, {facts['format']}",
        "Method": facts["method"],
        "Options": options,
        "Rank": f"{shown}{dense}, in {facts['modules']} layers",
        "Energy kept": f"{facts['energy_kept']:.2%} of the merge's squared norm",
        "Norm": facts["norm"],
    }
    shares = {
        f"{i['name']} at {_number(i['weight'])}": "none"
        if i["share"] is None
        else f"{i['share']:.1%} of it is in the result"
        for i in facts["inputs"]
    }
    return words.facts(rows, "The merge") + words.facts(
        shares, "The sources", "how much of each update the result has along it; above its weight where others agree"
    )


def heat_maps(facts: dict[str, Any]) -> str:
    """How LoRAs overlap, as heat maps: of the whole updates, of their input directions, and by block."""
    names, k = facts["names"], len(facts["names"])
    if k < 2:
        return ""
    pairs = [(i, j) for i in range(k) for j in range(i)]
    shown = sorted(pairs, key=lambda p: -abs(facts["cosine"][p[0]][p[1]] or 0.0))[:6]
    by_block = {b: [v["cosine"][i][j] for i, j in shown] for b, v in facts["blocks"].items()}
    whole = "cosine of the updates: 1 the same, 0 unrelated, -1 opposed"
    where = "cosine by block" if len(pairs) <= 6 else "cosine by block, of the six pairs that agree or disagree most"
    columns = [f"{names[j]}, {names[i]}" for i, j in shown]
    return (
        words.heat(names, names, facts["cosine"], "Overlap", whole)
        + words.heat(names, names, facts["overlap_in"], "Shared input directions", "0 none, 1 all of the smaller one")
        + words.heat(list(by_block), columns, list(by_block.values()), "Where they overlap", where)
    )


def _number(weight: Any) -> str:
    return f"{weight:g}" if isinstance(weight, (int, float)) else str(weight)
