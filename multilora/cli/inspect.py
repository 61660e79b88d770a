"""`multilora inspect`: what a LoRA file is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import print_json
from multilora.cli.target import AsJson, Base, base_for, find

_BAR = 32


def inspect(
    files: Annotated[list[str], typer.Argument(help="files, PEFT folders or names of the library")],
    base: Base = None,
    plot: Annotated[Path | None, typer.Option(help="a .png with the energy by block and by rank, of one file")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the picture of --plot")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what LoRA files are: base, format, trainer, ranks, triggers, norms, energy by block, what is odd.

    A file that cannot be read is refused with the reason; exit status 2.
    """
    if plot is not None:
        if len(files) > 1:
            raise ValueError("--plot: draws one file; for several see: multilora compare FILES --plot")
        arguments.check_picture(plot, force)
    against = None if base is None else base_for(base)
    found = [_looked(text, against) for text in files]
    if plot is not None and "refused" not in found[0]:
        _draw(found[0], plot)
    shown = [{k: v for k, v in f.items() if k != "lora"} for f in found]
    if as_json:
        print_json(shown)
    for i, facts in enumerate(shown):
        if "refused" in facts:
            print(f"error: {facts['refused']}", file=sys.stderr)
        elif not as_json:
            print(("\n" if i else "") + _page(facts))
    if any("refused" in facts for facts in shown):
        raise typer.Exit(2)


def _looked(text: str, against: Any) -> dict[str, Any]:
    """The facts about a file, or the reason why it is refused."""
    import warnings

    from multilora import files
    from multilora.compare import energies, spectrum_of
    from multilora.detect import description

    try:
        path = find([arguments.LoraArgument(text)])[0]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lora = files.load(path, against)
    except ValueError as error:
        return {"path": text, "refused": str(error)}
    parts = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    spectrum, notes = spectrum_of(lora), list(lora.card.provenance.get("notes", ()))
    return {
        "path": str(path),
        "bytes": sum(p.stat().st_size for p in parts),
        **description(lora),
        "norm": lora.norm(),
        "energy_by_block": energies(lora),
        "energy_by_rank": spectrum,
        "warnings": [*dict.fromkeys([*notes, *(str(w.message) for w in said)])],
        "lora": lora,
    }


def _draw(facts: dict[str, Any], plot: Path) -> None:
    from multilora.lab.chart import draw_energy
    from multilora.recipe import save_png

    save_png(draw_energy(facts["name"], facts["energy_by_block"], facts["energy_by_rank"]), plot)


def _page(facts: dict[str, Any]) -> str:
    """The facts for a person: one a line, then the energy as bars."""
    ranks = ", ".join(f"{rank} ({count} modules)" if len(facts["ranks"]) > 1 else str(rank)
                      for rank, count in facts["ranks"].items())  # fmt: skip
    alphas = facts["alphas"]
    parts = ", ".join(f"{name or 'model'} {count}" for name, count in facts["components"].items())
    lines = {
        "name": facts["name"],
        "file": facts["path"],
        "base": facts["base"],
        "format": facts["format"] + (f", written by {facts['trainer']}" if facts["trainer"] else ""),
        "kind": ", ".join(facts["algorithms"]),
        "rank": ranks + (f"; {facts['dense']} whole differences" if facts["dense"] else ""),
        "alpha": ", ".join(f"{a:g}" if isinstance(a, (int, float)) else str(a) for a in alphas) if alphas else "",
        "modules": f"{facts['modules']}: {parts}",
        "values": ", ".join(facts["dtypes"]),
        "triggers": ", ".join(facts["triggers"]),
        "category": facts["category"],
        "norm": f"{facts['norm']:.4g}",
        "size": f"{facts['bytes']:,} bytes",
        "sha256": facts["sha256"],
    }
    lines |= {word.replace("ss_", ""): text for word, text in facts["metadata"].items() if word != "name"}
    lines |= {"left out": ", ".join(map(str, facts["left_out"][:5]))} if facts["left_out"] else {}
    width = max(len(word) for word in lines) + 2
    page = [f"{word.ljust(width)}{text}" for word, text in lines.items() if text]
    page += [f"{'warning'.ljust(width)}{text}" for text in facts["warnings"]]
    return "\n".join([*page, "", *_bars(facts["energy_by_block"]), "", _by_rank(facts["energy_by_rank"])])


def _bars(energy: dict[str, float]) -> list[str]:
    total, most = sum(energy.values()) or 1.0, max(energy.values(), default=0.0) or 1.0
    width = max((len(block) for block in energy), default=0)
    lines = ["energy by block"]
    for block, value in energy.items():
        bar = "█" * round(_BAR * value / most) or "▏"
        lines.append(f"  {block.ljust(width)}  {value / total:6.1%}  {bar}")
    return lines


def _by_rank(shares: list[float]) -> str:
    steps = [r for r in (1, 2, 4, 8, 16, 32, 64, 128, 256) if r < len(shares)] + ([len(shares)] if shares else [])
    return "energy by rank  " + (", ".join(f"{r}: {shares[r - 1]:.1%}" for r in steps) or "none")
