"""`multilora judge`: the methods of an evaluation before a vision-language model."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json, print_table
from multilora.method import unknown

CRITERIA = ("composition", "quality")


def judge(
    folders: Annotated[list[Path], typer.Argument(help="of an evaluation, a batch or a grid", metavar="FOLDER...")],
    model: Annotated[str, typer.Option(help="the server's name for it; without --url a folder of transformers")],
    url: Annotated[str, typer.Option(help="of an OpenAI-compatible server, such as http://localhost:8000/v1")] = "",
    key: Annotated[str, typer.Option(help="environment variable that holds the server's key")] = "",
    criterion: Annotated[str, typer.Option(help="composition or quality")] = "composition",
    pairs: Annotated[int | None, typer.Option(help="at most so many for each two methods; default all", min=1)] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE: tries, parallel, device, input_price, output_price")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="table of all verdicts; default FOLDER/judged.csv")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would take, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """Ask a vision-language model which of two methods' pictures is better, every pair both ways round.

    Says first what it will take. Verdicts are kept in FOLDER/judge.sqlite: nothing is asked twice, and what was
    stopped goes on.
    """
    if criterion not in CRITERIA:
        raise unknown("--criterion", criterion, CRITERIA)
    out = out or folders[0] / "judged.csv"
    from multilora.lab.evaluate.judged import judged, pairs_of, read_pictures
    from multilora.lab.score.record import ScoreFailed, resolve

    recipes = read_pictures(folders)
    found = pairs_of(recipes, pairs)
    options: dict[str, Any] = dict(arguments.read_pairs("--option", option or [], "KEY=VALUE, such as parallel=8"))
    told = {"model": model, "url": url, "key": key, "criterion": criterion, "cache": str(folders[0] / "judge.sqlite")}
    source = resolve("judge", **told, **options).load().source
    largest = max(((r.width, r.height) for r in recipes.values()), key=math.prod)
    estimate = source.estimate([pair.prompt for pair in found], largest)
    note(f"{source.model}\n{estimate}, less what is kept in {told['cache']}")
    if dry_run:
        return
    arguments.check_folder(out.parent)
    source.reach()
    with bars() as start:
        bar = start("judging", len(found))
        result = judged(source, found, lambda done: bar(done))
    _write(out, result)
    note(f"verdicts: {out}")
    if as_json:
        print_json(_described(source, result, estimate))
    else:
        _show(source, result)
    if result.failed:
        note(f"{len(result.rows)} of {len(found)} pairs were judged; run it again to go on")
        raise ScoreFailed(result.failed)


def _write(out: Path, result: Any) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("first", "second", "points of first", "asked so", "asked the other way", "seed", "prompt",
                         "picture of first", "picture of second"))  # fmt: skip
        for pair, verdict in result.rows:
            points = "" if math.isnan(verdict.points) else verdict.points
            writer.writerow((*pair.methods, points, *(a or "no answer" for a in verdict.answers), pair.seed,
                             pair.prompt, *pair.paths))  # fmt: skip


def _show(source: Any, result: Any) -> None:
    names = result.methods
    rows = []
    for a in names:
        cells = [result.points(a, b) if a != b else None for b in names]
        rows.append((a, *("" if c is None else "none" if not c.n else _cell(c) for c in cells)))
    print("Points of each row against each column: 1 always better, 0.5 even, with 95% intervals")
    print_table(("", *names), rows)
    t, consistent = source.tally, result.consistent
    same = "" if math.isnan(consistent) else f"; {consistent:.0%} of the pairs got the same answer both ways round"
    first = (
        "" if math.isnan(t.bias) else f"; {t.bias:.0%} of the choices fell on the picture shown first (50% is fair)"
    )
    tokens = f"{t.input_tokens} tokens in, {t.output_tokens} out"
    print(f"{t.calls} calls, {tokens}, {t.kept} answers from before{same}{first}")
    if t.unreadable or t.refused:
        print(f"{t.unreadable} answers could not be read, {t.refused} questions were refused")


def _cell(c: Any) -> str:
    return f"{c.value:.2f} ({c.low:.2f} to {c.high:.2f}), n {c.n}"


def _described(source: Any, result: Any, estimate: Any) -> dict[str, Any]:
    matrix = {
        a: {b: {"points": c.value, "low": c.low, "high": c.high, "pairs": c.n}
            for b in result.methods if a != b and (c := result.points(a, b)).n}
        for a in result.methods
    }  # fmt: skip
    tally = vars(source.tally) | {"shown_first_share": None if math.isnan(source.tally.bias) else source.tally.bias}
    return {
        "judge": source.model, "points": matrix, "tally": tally, "estimate": str(estimate), "failed": result.failed,
        "consistent": None if math.isnan(result.consistent) else result.consistent,
    }  # fmt: skip
