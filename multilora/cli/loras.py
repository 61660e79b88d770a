"""`multilora loras`: the embedded libraries."""

from __future__ import annotations

from typing import Annotated

import typer

from multilora.cli.console import note, print_json, print_table


def loras(
    category: Annotated[str | None, typer.Option(help="only this category")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """List the embedded LoRAs: name, category, trigger (write it in the prompt), what they show."""
    from multilora.method import unknown
    from multilora.pipelines.load import assets, library

    entries = list(library().values())
    known = {e["category"] for e in entries}
    if category is not None:
        if category not in known:
            raise unknown("--category", category, known)
        entries = [e for e in entries if e["category"] == category]
    if as_json:
        print_json([{**e, "path": str(e["path"])} for e in entries])
        return
    rows = [(e["name"], e["category"], e["trigger"], e.get("description", "")) for e in entries]
    print_table(("name", "category", "trigger", "what it shows"), sorted(rows, key=lambda r: (r[1], r[0])))
    if category is None:
        texts = sorted(folder.name for folder in (assets() / "text" / "loras").iterdir() if folder.is_dir())
        note(f"of the language model: {', '.join(texts)} (assets/text/README.md)")
