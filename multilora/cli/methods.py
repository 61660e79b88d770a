"""`multilora methods`: what there is, what it costs, where it is from."""

from __future__ import annotations

from typing import Annotated

import typer

from multilora.cli.console import print_json, print_table
from multilora.method import Method, Option, unknown
from multilora.method import methods as of_kind

KINDS = ("route", "merge", "weigh")


def methods(
    kind: Annotated[
        str, typer.Option(help="route (during the run), merge (before it), weigh (choosing weights), or all")
    ] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """List the methods: name, cost in model runs per step (k LoRAs), what it does, paper, options."""
    if kind not in (*KINDS, "all"):
        raise unknown("--kind", kind, (*KINDS, "all"))
    records = [m for k in KINDS if kind in (k, "all") for m in of_kind(k).values()]
    if as_json:
        print_json([_described(m) for m in records])
        return
    rows = [(m.kind, m.name, m.cost, m.title, m.paper) for m in records]
    print_table(("kind", "name", "runs per step", "what it does", "paper"), rows)
    for record in records:
        for o in record.options:
            allowed = f", one of {', '.join(map(str, o.choices))}" if o.choices else _span(o)
            print(f"  {record.name} --option {o.name}={o.default}  {o.help}{allowed}")


def _span(option: Option) -> str:
    low, high = option.minimum, option.maximum
    if low is not None and high is not None:
        return f", {low:g} to {high:g}"
    if low is not None:
        return f", at least {low:g}"
    return "" if high is None else f", at most {high:g}"


def _described(m: Method) -> dict:
    return {
        "kind": m.kind,
        "name": m.name,
        "title": m.title,
        "cost": m.cost,
        "paper": m.paper,
        "laws": list(m.laws),
        "options": [
            {
                "name": o.name,
                "type": o.type.__name__,
                "default": o.default,
                "help": o.help,
                "minimum": o.minimum,
                "maximum": o.maximum,
                "choices": list(o.choices),
            }
            for o in m.options
        ],
    }
