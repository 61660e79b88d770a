"""`multilora search`: weights for several LoRAs, by a score or a loss."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json


def search(
    lora: Annotated[list[str], typer.Option("--lora", help="[NAME=]FILE_OR_LIBRARY_NAME; repeat")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the .json file")] = Path("weights.json"),
    method: Annotated[str, typer.Option(help="lorahub, learned or uniform")] = "lorahub",
    score: Annotated[
        str | None, typer.Option(help="lorahub: clip, presence, both (default) or file.py:function; texts: their loss")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="candidates of lorahub (40), steps of learned (100)")] = None,
    base: Annotated[
        str, typer.Option(help="'embedded', a folder of a pipeline or language model, or a hub id")
    ] = "embedded",
    data: Annotated[
        str | None, typer.Option(help=".jsonl of prompts and completions; learned: folder of pictures with captions")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="of the pictures, default scenes with all LoRAs")] = None,
    seeds: Annotated[int, typer.Option(help="pictures a prompt, the same noise for every candidate")] = 2,
    seed: Annotated[int, typer.Option(help="of the noise; of the candidates: --option seed=")] = 0,
    steps: Annotated[int, typer.Option(help="denoising steps of a picture")] = 12,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the method, such as l1=0.1")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the state beside --out")] = True,
    plot: Annotated[Path | None, typer.Option(help="chart of the search, a .png; default beside --out")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is at --out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Search weights for LoRAs. Ctrl-C ends the search and keeps the best; run again to go on (lorahub)."""
    wanted = [arguments.read_lora(text) for text in lora]
    for one in wanted:
        if one.weight is not None:
            raise ValueError(f"--lora {one.source}:{one.weight}: a search finds the weight; give the name alone")
    for name, value in (("--seeds", seeds), ("--steps", steps)):
        if value < 1:
            raise ValueError(f"{name} {value}: wanted at least 1")
    given = list(option or [])
    named = {"lorahub": "budget", "learned": "steps"}.get(method)
    if budget is not None:
        if named is None:
            raise ValueError(f"--budget {budget}: {method} tries nothing")
        given.append(f"{named}={budget}")
    state = out.with_name(f"{out.stem}.state.json")
    if method == "lorahub":
        given.append(f"state={state}")
    bound = arguments.read_methods([method], given, "weigh")[0]
    plot = plot or out.with_suffix(".png")
    going_on = method == "lorahub" and resume and state.exists()
    _check(out, plot, force or going_on)
    if not resume:
        state.unlink(missing_ok=True)

    from multilora.chosen import Enough, write_json
    from multilora.lab.objectives import Watched
    from multilora.lab.search import prepared
    from multilora.lab.search_chart import draw_search
    from multilora.recipe import save_png

    stop = threading.Event()
    with _interrupts(stop), bars() as start:
        found = prepared(
            base, [one.source for one in wanted], method=method, score=score, names=[one.name for one in wanted],
            data=data, prompts=prompt or [], seed=seed, seeds=seeds, steps=steps, cancel=stop,
        )  # fmt: skip
        of = bound.options.get("budget") or bound.options.get("steps", 0) + 1
        advance = start(f"{method}, {len(found.loras)} LoRAs", of)
        before = _known(state) if going_on else 0
        if before:
            note(f"going on after {before} candidates in {state}")
        watched = Watched(
            found.objective, lambda done, low: advance(before + done, f"lowest loss {low:.4f}"), cancel=stop
        )
        try:
            chosen = bound(found.loras, watched)
        except Enough:
            note("stopped before a candidate was scored; nothing is written")
            raise typer.Exit(130) from None
    said = _described(bound, found, chosen, [one.source for one in wanted])
    write_json(out, said)
    if chosen.trials:
        words = f"{found.objective.name}; {len(chosen.trials)} candidates, ended: {chosen.ended}"
        save_png(draw_search(found.names, chosen.trials, title=f"Weights by {method}", subtitle=words), plot)
    if chosen.ended != "stopped":
        state.unlink(missing_ok=True)
    elif method == "lorahub":
        note(f"stopped after {len(chosen.trials)} candidates; the same command goes on from {state}")
    if as_json:
        print_json({**said, "path": str(out), "plot": str(plot) if chosen.trials else None})
        return
    for one in said["loras"]:
        shown = one["weight"] if isinstance(one["weight"], float) else one["mean"]
        each = "" if isinstance(one["weight"], float) else ", the mean over its layers"
        note(f"{one['name']}: {shown:.3f}{each}")
    print(out)


def _check(out: Path, plot: Path, force: bool) -> None:
    if out.suffix != ".json":
        raise ValueError(f"--out {str(out)!r}: wanted a .json file")
    if out.exists() and not (force and out.is_file()):
        raise ValueError(f"--out {str(out)!r}: exists already; --force replaces it")
    arguments.check_folder(out.parent)
    arguments.check_picture(plot, force)


def _known(state: Path) -> int:
    import json

    try:
        return len(json.loads(state.read_text(encoding="utf-8"))["trials"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # the search itself says what is wrong with the file


@contextlib.contextmanager
def _interrupts(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM sets `stop`, the second one ends everything."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: Any) -> None:
        stop.set()
        note("ending the search with the best so far; once more to give up")
        restored()

    def restored() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restored()


def _described(bound: Any, found: Any, chosen: Any, sources: list[str]) -> dict[str, Any]:
    """The record of a search: what was asked, the weights, every candidate."""
    loras = []
    for i, (lora, name, source) in enumerate(zip(found.loras, found.names, sources, strict=True)):
        entry = {"name": name, "source": source, "sha256": lora.card.sha256, "weight": chosen[i]}
        if isinstance(chosen[i], dict):
            entry["mean"] = sum(chosen[i].values()) / max(1, len(chosen[i]))
        loras.append(entry)
    best = chosen.best
    return {
        "version": 1,
        "method": bound.record.name,
        "options": {k: v for k, v in bound.options.items() if k != "state"},
        **found.facts,
        "score": found.objective.name,
        "form": chosen.form,
        "ended": chosen.ended,
        "loss": best.loss if best else None,
        "penalty": best.penalty if best else None,
        "loras": loras,
        "trials": [{"weights": t.weights, "loss": t.loss, "penalty": t.penalty} for t in chosen.trials],
    }
