"""`multilora merge`: several LoRAs into one file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json
from multilora.cli.target import AsJson, Base, Dtype, Force, Format, Target, WithCard, find, in_words, load, result
from multilora.method import Bound


def merge(
    loras: Annotated[list[str], typer.Argument(help="[NAME=]FILE_OR_LIBRARY_NAME[:WEIGHT], one or more")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="the .safetensors file (a folder with --format peft)")
    ] = Path("merged.safetensors"),
    method: Annotated[str, typer.Option(help="how; see: multilora methods --kind merge")] = "linear",
    weights: Annotated[str | None, typer.Option(help="one per LoRA, such as 1,0.8,-0.5; default 1 each")] = None,
    option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the method, such as density=0.3")] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="LORA:GLOB=FACTOR, weight of part of a LoRA, such as 'fox:*attn2*=0.5'")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="largest rank of a module of the result")] = None,
    energy: Annotated[float | None, typer.Option(help="share of each module's energy to keep, such as 0.99")] = None,
    name: Annotated[str | None, typer.Option(help="for the card, default the inputs' joined")] = None,
    format: Format = None,
    dtype: Dtype = None,
    base: Base = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="merge in memory, say what would be written: ranks, energy, bytes")
    ] = False,
    card: WithCard = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Merge LoRAs into one, by any of the merge methods; the file keeps the recipe and the hashes of its inputs."""
    wanted = [arguments.read_lora(text) for text in loras]
    if rank is not None or energy is not None:
        arguments.check_limits(rank, energy)
    bound, cut = _bound(method, option or [], rank, energy)
    numbers = arguments.read_weights(weights, wanted)
    factors = arguments.options_of(wanted, arguments.read_lora_options(block or [], [], [], []))
    by_lora = [_weight(number, own) for number, own in zip(numbers, factors, strict=True)]
    paths = find(wanted)
    target = Target.checked(out, format, dtype, force, card, base, paths)
    members = load(wanted, paths, base)
    work = Work.of(members, bound)
    note(f"{bound.record.name}: {len(members)} LoRAs, {work.in_words()}")
    from multilora.compare import shares_of

    with _progress():
        merged, kept = _merged(bound, members, by_lora, cut, name)
    if not merged:
        raise ValueError("nothing is left of the merge: every weight is 0")
    found = target.write(merged, plan)
    shares = shares_of(merged, members)
    inputs = [
        {**result(lora), "path": str(path), "sha256": lora.card.sha256, "weight": weight, "share": share}
        for lora, path, weight, share in zip(members, paths, by_lora, shares, strict=True)
    ]
    said = {"method": bound.record.name, "options": bound.options, "plan": plan, "inputs": inputs, **kept}
    if as_json:
        print_json({**said, "memory": work.as_dict(merged), "result": found})
        return
    lines = [f"{i['name']}: weight {_shown(i['weight'])}, {_share(i['share'])} of it in the result" for i in inputs]
    lines.append(f"{in_words(found)}, {kept['energy_kept']:.2%} of the merge's energy kept")
    for line in lines:
        (print if plan else note)(line)
    if plan:
        print(f"not written: {found['path']}, sha256 {found['files'][0]['sha256']}")
        return
    print(found["path"])


def _bound(
    method: str, options: list[str], rank: int | None, energy: float | None
) -> tuple[Bound, dict[str, Any] | None]:
    """The method with its options, and the cut to make after it: none where the method itself takes the limits."""
    limits = {n: v for n, v in (("rank", rank), ("energy", energy)) if v is not None}
    known = {o.name for o in arguments.read_methods([method], [], "merge")[0].record.options}
    inside = {n: v for n, v in limits.items() if n in known}
    given = {key.rpartition(".")[2] for key, _ in arguments.read_pairs("--option", options, "KEY=VALUE")}
    for n in inside:
        if n in given:
            raise ValueError(f"--{n} and --option {n}=...: give one of them")
    bound = arguments.read_methods([method], [*options, *(f"{n}={v}" for n, v in inside.items())], "merge")[0]
    after = {n: v for n, v in limits.items() if n not in known}
    return bound, after or None


def _weight(number: float, own: dict[str, Any]) -> float | dict[str, float]:
    blocks = own.get("blocks", {})
    for glob, by in blocks.items():
        try:
            float(by)
        except ValueError:
            raise ValueError(f"--block ...:{glob}={by}: wanted a number after =") from None
    return arguments.block_weights(number, blocks)


def _merged(
    bound: Bound, members: Sequence[Any], weights: Sequence[Any], cut: dict[str, Any] | None, name: str | None
) -> tuple[Any, dict[str, Any]]:
    """(the result with its recipe on the card, what its cuts kept)."""
    from multilora.compare import energy_kept

    merged = bound(members, list(weights))
    before = merged.card.provenance
    made = before.get("merge") or {}
    lost = before.get("energy_lost", made.get("energy_lost"))
    by_method = 1.0 if lost is None else 1.0 - lost
    by_cut = 1.0
    if cut and merged:
        whole = merged
        merged = whole.truncate(**cut)
        by_cut = energy_kept(whole, merged)[0]
    kept = {"energy_kept": by_method * by_cut, "energy_kept_by_method": by_method, "energy_kept_by_cut": by_cut}
    recipe = {
        "terms": before.get("terms") or merged.card.terms(),
        "merge": {"method": bound.record.name, "options": bound.options},
        "energy_kept": kept["energy_kept"],
        **({"truncated": cut} if cut else {}),
    }
    card = merged.card.replace(sha256="", provenance=recipe)
    return merged.replace(card=card if name is None else card.replace(name=name)), kept


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """A bar over the modules, for the methods that tell."""
    from multilora.elementwise import echoing

    with bars() as start:
        advance = None

        def echo(key: str, done: int, of: int) -> None:
            nonlocal advance
            advance = advance or start("merging", of)
            advance(done, key)

        with echoing(echo):
            yield


@dataclass(frozen=True)
class Work:
    """An estimate of the memory of a merge in bytes.

    inputs  their tensors
    module  of the methods that look at whole matrices: the largest module's updates, one a LoRA, and two copies
    """

    inputs: int
    module: int

    @classmethod
    def of(cls, members: Sequence[Any], bound: Bound) -> Work:
        import math

        whole = any(o.name == "dense" for o in bound.record.options)
        sizes = [math.prod(p.shape) for lora in members for p in lora.values() if p.shape is not None]
        largest = 4 * max(sizes, default=0) * (len(members) + 2) if whole else 0
        return cls(sum(_bytes(lora) for lora in members), largest)

    def in_words(self) -> str:
        module = f", up to {self.module / 1e6:.1f} MB for a module at a time" if self.module else ""
        return f"{self.inputs / 1e6:.1f} MB in memory{module}"

    def as_dict(self, merged: Any) -> dict[str, int]:
        of_result = _bytes(merged)
        return {
            "inputs": self.inputs,
            "module": self.module,
            "result": of_result,
            "in_all": self.inputs + self.module + of_result,
        }


def _bytes(lora: Any) -> int:
    import torch

    tensors = [t for part in lora.values() for t in vars(part).values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _shown(weight: float | dict[str, float]) -> str:
    if not isinstance(weight, dict):
        return f"{weight:g}"
    return ", ".join(f"{glob}: {value:g}" for glob, value in weight.items())


def _share(share: float | None) -> str:
    return "nothing" if share is None else f"{share:.1%}"
