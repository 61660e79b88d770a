"""`multilora resize`: a LoRA cut to a smaller rank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multilora.cli import arguments
from multilora.cli.console import note, print_json
from multilora.cli.target import AsJson, Base, Dtype, Force, Format, Out, Target, WithCard, find, in_words, load


def resize(
    file: Annotated[str, typer.Argument(help="[NAME=]FILE_OR_LIBRARY_NAME")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="largest rank of a module")] = None,
    energy: Annotated[float | None, typer.Option(help="share of each module's energy to keep, such as 0.95")] = None,
    format: Format = None,
    dtype: Dtype = None,
    base: Base = None,
    card: WithCard = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Cut a LoRA to a rank or to a share of its energy, the best of that rank; says what was kept."""
    arguments.check_limits(rank, energy)
    wanted: list[arguments.LoraArgument] = [arguments.read_lora(file)]
    paths: list[Path] = find(wanted)
    target = Target.checked(out, format, dtype, force, card, base, paths)
    before = load(wanted, paths, base)[0]
    from multilora.compare import energy_kept

    after = before.truncate(rank=rank, energy=energy)
    share, by_key = energy_kept(before, after)
    after = after.replace(card=after.card.replace(provenance={**after.card.provenance, "energy_kept": share}))
    found = target.write(after)
    modules = {
        key: {"rank_before": part.rank, "rank": after[key].rank, "energy_kept": by_key.get(key, 1.0)}
        for key, part in before.items()
    }
    if as_json:
        print_json({"energy_kept": share, "modules": modules, "result": found})
        return
    note(f"{in_words(found)}, {share:.2%} of the energy kept, least in {min(by_key, key=by_key.get, default='none')}")
    print(found["path"])
