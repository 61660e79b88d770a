"""`multilora extract`: a LoRA out of two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json
from multilora.cli.target import AsJson, Dtype, Force, Format, Out, Target, WithCard, in_words

RANK = 16


def extract(
    tuned: Annotated[Path, typer.Argument(help="the fine-tuned model: .safetensors file, model or pipeline folder")],
    base: Annotated[Path, typer.Argument(help="what it was tuned from")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help=f"largest of a module; default {RANK} without --energy")] = None,
    energy: Annotated[float | None, typer.Option(help="share of each module's change to keep, such as 0.9")] = None,
    only: Annotated[list[str] | None, typer.Option(help="glob of modules, such as '*attn*'; repeat")] = None,
    vectors: Annotated[bool, typer.Option("--vectors", help="also biases and norms, whole (kohya format)")] = False,
    name: Annotated[str | None, typer.Option(help="for the card, default the tuned model's")] = None,
    format: Format = None,
    dtype: Dtype = None,
    card: WithCard = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """The LoRA that turns one model into another: their difference, cut to a rank module by module."""
    rank = RANK if rank is None and energy is None else rank
    arguments.check_limits(rank, energy)
    target = Target.checked(out, format, dtype, force, card, None, [tuned, base])
    if vectors and target.format != "kohya":
        raise ValueError(f"--vectors: the {target.format} format cannot hold changes of norms, write --format kohya")
    from multilora.extract import extract as extracted

    with bars() as start:
        advance = None

        def progress(key: str, done: int, of: int) -> None:
            nonlocal advance
            advance = advance or start("extracting", of)
            advance(done, key)

        lora = extracted(
            tuned, base, rank=rank, energy=energy, vectors=vectors, embeddings=target.format == "peft",
            only=only or [], name=name, progress=progress,
        )  # fmt: skip
    facts = lora.card.provenance
    found = target.write(lora)
    if as_json:
        print_json({n: facts[n] for n in ("energy_kept", "modules", "left_out")} | {"result": found})
        return
    left = [f"{n} ({why:.3g})" if isinstance(why, float) else n for n, why in facts["left_out"].items()]
    note(f"{in_words(found)}, {facts['energy_kept']:.2%} of the change kept")
    if left:
        note(f"not in it: {', '.join(left[:6])}{f' and {len(left) - 6} more' if len(left) > 6 else ''}")
    print(found["path"])
