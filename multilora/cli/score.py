"""`multilora score`: numbers for pictures that are there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import note, print_json, print_table
from multilora.method import unknown

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHEETS = ("sheet_*.png", "gallery.png", "designs.png")  # what `compose` and `world draw` write beside pictures


def score(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="files or folders; none: list the scores", metavar="PICTURE...")
    ] = None,
    by: Annotated[list[str] | None, typer.Option("--by", help="a score's name, repeatable; default clip_text")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of the scores that have it, or SCORE.KEY, as model=ViT-B/32")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="for all pictures; default each one's own, from its recipe")
    ] = None,
    element: Annotated[str | None, typer.Option(help="what presence looks for: a design, trigger, class")] = None,
    reference: Annotated[list[Path] | None, typer.Option(help="picture or folder to compare with, repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """Score pictures: CLIP with the prompt or with references, DINO, presence of an element, a judge.

    A score that cannot be reached costs no other; the command then ends with status 1.
    """
    from multilora.lab.score.record import ScoreFailed, mean, measure, ready, scores

    known = scores()
    if not pictures:
        _listed(known, as_json)
        return
    names = by or ["clip_text"]
    for i, name in enumerate(names):
        if name not in known:
            raise unknown("--by", name, known)
        if name in names[:i]:
            raise ValueError(f"--by {name} is given twice")
    scorers, paths = _scorers(known, names, option or []), _found(pictures)
    images = [_opened(path) for path in paths]
    there, failed = ready(scorers)
    needs = {need for scorer in there for need in scorer.needs}
    given: dict[str, Any] = {"elements": element}
    if "prompt" in needs:
        given["prompts"] = prompt if prompt is not None else [_prompt(path) for path in paths]
    if "references" in needs and reference:
        given["references"] = [[_opened(path) for path in _found(reference)]]
    for scorer in there:
        if estimate := getattr(scorer.source, "estimate", None):
            told = [prompt] * len(paths) if prompt is not None else given["prompts"]
            rivals = len(given.get("references", [[]])[0])
            note(f"{scorer.model}: {estimate([p for p in told for _ in range(rivals)], images[0].size)}")
    measured = measure(there, images, **given)
    failed |= measured.failed
    models = {s.name: s.model for s in there if s.name in measured.values}
    means = {name: mean(values) for name, values in measured.values.items()}
    if as_json:
        rows = [
            {"picture": str(path)} | {name: _plain(values[i]) for name, values in measured.values.items()}
            for i, path in enumerate(paths)
        ]
        print_json(
            {"pictures": rows, "means": {n: _plain(m) for n, m in means.items()}, "by": models, "failed": failed}
        )
    elif measured.values:
        cells = [(*(_shown(v[i]) for v in measured.values.values()), str(path)) for i, path in enumerate(paths)]
        if len(paths) > 1:
            cells.append((*(_shown(m) for m in means.values()), f"mean of {len(paths)}"))
        print_table((*measured.values, "picture"), cells)
        for name, model in models.items():
            note(f"{name} ({known[name].unit}): {model}")
    if failed:
        raise ScoreFailed("; ".join(f"{name}: {why}" for name, why in failed.items()))


def _listed(known: dict[str, Any], as_json: bool) -> None:
    records = list(known.values())
    if as_json:
        print_json([
            {"name": r.name, "title": r.title, "needs": list(r.needs), "unit": r.unit, "higher_is_better": r.higher,
             "paper": r.paper, "options": {o.name: {"default": o.default, "help": o.help} for o in r.options}}
            for r in records
        ])  # fmt: skip
        return
    rows = [(r.name, ", ".join(r.needs), r.unit, r.title) for r in records]
    print_table(("name", "needs", "unit", "what it measures"), rows)
    for record in records:
        for o in record.options:
            print(f"  --by {record.name} --option {o.name}={o.default}  {o.help}")


def _scorers(known: dict[str, Any], names: list[str], texts: list[str]) -> list[Any]:
    options: dict[str, dict[str, str]] = {name: {} for name in names}
    for key, value in arguments.read_pairs("--option", texts, "KEY=VALUE, such as model=ViT-B/32"):
        owner, dot, own = key.rpartition(".")
        if dot and owner not in options:
            raise unknown("score in --option", owner, names)
        takers = [n for n in names if (not dot or n == owner) and own in {o.name for o in known[n].options}]
        if not takers:
            raise unknown("--option", own, {o.name for n in names if not dot or n == owner for o in known[n].options})
        for name in takers:
            options[name][own] = value
    return [known[name](**options[name]) for name in names]


def _found(given: list[Path]) -> list[Path]:
    paths: list[Path] = []
    for path in given:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: no pictures in it, wanted {', '.join(SUFFIXES)}")
        sheets = [p for p in inside if path.is_dir() and any(p.match(name) for name in SHEETS)]
        if sheets:
            note(f"left out, pictures of pictures: {', '.join(p.name for p in sheets)}")
            if len(sheets) == len(inside):
                raise ValueError(f"{path}: nothing else in it; name the pictures, or another folder")
        paths += [p for p in inside if p not in sheets]
    return paths


def _opened(path: Path) -> Any:
    from multilora.pipelines.pictures import read_picture

    return read_picture("PICTURE", path).image


def _prompt(path: Path) -> str:
    from multilora.recipe import Recipe, RecipeError

    try:
        return Recipe.from_png(path).prompt
    except RecipeError as error:
        raise ValueError(f"--prompt is missing, and there is none in the picture: {error}") from None


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(value: float) -> str:
    return "no answer" if math.isnan(value) else f"{value:.3f}"
