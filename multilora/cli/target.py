"""LoRA files in and out of a command: inputs by path or library name, one result, never written over anything."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import note
from multilora.method import unknown

Out = Annotated[Path, typer.Option("--out", "-o", help="the .safetensors file (a folder with --format peft)")]
Format = Annotated[str | None, typer.Option("--format", help="diffusers, kohya or peft; default by --out's ending")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="fp32, fp16 or bf16; default as computed")]
Force = Annotated[bool, typer.Option("--force", help="replace what is at --out; never an input")]
WithCard = Annotated[bool, typer.Option("--card", help="also a model card in Markdown beside it")]
Base = Annotated[
    str | None, typer.Option("--base", help="check against it: 'embedded', a pipeline folder or a hub id")
]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def find(loras: Sequence[arguments.LoraArgument]) -> list[Path]:
    """The files or folders of LoRAs given by path or by name in the embedded library."""
    from multilora.pipelines.load import find_lora

    # A path to something is looked into, whatever its name, so that the error says what it is.
    there = [Path(lora.source).expanduser() for lora in loras]
    return [p if p.exists() else find_lora(lora.source)[0] for lora, p in zip(loras, there, strict=True)]


def load(loras: Sequence[arguments.LoraArgument], paths: Sequence[Path], base: str | None) -> list[Any]:
    """The Loras, checked against the base where one is given, and against each other's family.

    Raises ValueError naming the file; two that were made for different bases do not go together.
    """
    import warnings

    from multilora import files
    from multilora.bases import FAMILIES

    against = None if base is None else base_for(base)
    found = []
    for lora, path in zip(loras, paths, strict=True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.append(files.load(path, against, name=lora.name))
        for warning in said:
            note(f"warning: {warning.message}")
    known = [lora for lora in found if lora.card.family]
    for lora in known[1:]:
        first = known[0].card
        if lora.card.family != first.family:
            made, other = (FAMILIES.get(f, f) for f in (lora.card.family, first.family))
            names = f"{lora.card.name} was made for {made}, {first.name} for {other}"
            raise ValueError(f"{names}: wanted LoRAs of one base")
    return found


def base_for(base: str) -> Any:
    """What --base names, as far as reading files needs it: headers of a folder, or a pipeline that is loaded."""
    from multilora.bases import base_of
    from multilora.pipelines.load import EMBEDDED, load_pipeline

    if base == EMBEDDED or Path(base).expanduser().exists():
        return base_of(base)
    note(f"loading {base}")
    return load_pipeline(base, device="cpu")


@dataclass(frozen=True)
class Target:
    """Where a result goes and how: --out, --format, --dtype, --force, --card, --base."""

    out: Path
    format: str
    dtype: str | None = None
    force: bool = False
    card: bool = False
    base: str | None = None

    @classmethod
    def checked(
        cls,
        out: Path,
        format: str | None,
        dtype: str | None,
        force: bool,
        card: bool,
        base: str | None,
        inputs: Sequence[Path],
    ) -> Target:
        """The target, refused before any work when it cannot be written: ValueError says why.

        format  None: diffusers for a .safetensors file, peft for a folder
        """
        from multilora.writing import DTYPES, FORMATS

        out = out.expanduser()
        format = format or ("diffusers" if out.suffix == ".safetensors" else "peft")
        if format not in FORMATS:
            raise unknown("--format", format, FORMATS)
        if dtype is not None and dtype not in DTYPES:
            raise unknown("--dtype", dtype, DTYPES)
        if (format == "peft") == (out.suffix == ".safetensors"):
            wanted = "a folder's name" if format == "peft" else "a name that ends with .safetensors"
            raise ValueError(f"--out {str(out)!r}: wanted {wanted} for --format {format}")
        target = cls(out, format, dtype, force, card, base)
        target._free([path.resolve() for path in inputs])
        arguments.check_folder(out.parent)
        return target

    def _free(self, inputs: Sequence[Path]) -> None:
        out = self.out.resolve()
        for path in inputs:
            if out == path or path in out.parents or (path.is_file() and out in path.parents):
                raise ValueError(f"--out {str(self.out)!r}: is an input or lies in one; inputs are never written over")
        for path in [self.out, *([self._card_path()] if self.card else [])]:
            if path.is_dir() and self.format != "peft":
                raise ValueError(f"--out {str(path)!r}: is a folder")
            if path.is_file() and self.format == "peft" and path == self.out:
                raise ValueError(f"--out {str(path)!r}: is a file, wanted a folder")
            taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
            if taken and not self.force:
                raise ValueError(f"--out {str(path)!r}: exists already; --force replaces it")

    def _card_path(self) -> Path:
        return self.out / "README.md" if self.format == "peft" else self.out.with_suffix(".md")

    def write(self, lora: Any, plan: bool = False) -> dict[str, Any]:
        """Write the LoRA, or with `plan` only say what would be written; JSON-able, the same either way."""
        from multilora import writing
        from multilora.modelcard import model_card

        base = None if self.base is None or self.format != "peft" else base_for(self.base)
        named = self.out.name if self.format != "peft" else "adapter_model.safetensors"
        hub_id = self.base if self.base and "/" in self.base and not Path(self.base).exists() else None
        card = model_card(lora, base_model=hub_id, weights=named) if self.card else None
        options = {"format": self.format, "dtype": self.dtype, "base": base, "card": card}
        files = writing.rendered(lora, self.out, **options)
        if not plan:
            writing.put(lora, self.out, files)
        said = {"path": str(self.out), "format": self.format, "files": [_file(*f) for f in files.items()]}
        return {**result(lora), **said}


def _file(path: Path, pieces: Sequence[Any]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return {"path": str(path), "bytes": size, "sha256": digest.hexdigest()}


def result(lora: Any) -> dict[str, Any]:
    """What a LoRA is, in numbers."""
    ranks: dict[str, int] = {}
    for part in sorted((p for p in lora.values() if p.rank), key=lambda p: p.rank):
        ranks[str(part.rank)] = ranks.get(str(part.rank), 0) + 1
    dense = sum(part.rank is None for part in lora.values())
    return {"name": lora.card.name, "modules": len(lora), "ranks": ranks, "dense": dense, "norm": lora.norm()}


def in_words(found: dict[str, Any]) -> str:
    """One line about a result."""
    ranks = [int(r) for r in found["ranks"]]
    shown = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
    dense = f", {found['dense']} whole differences" if found["dense"] else ""
    size = sum(f["bytes"] for f in found["files"])
    return f"{found['modules']} modules{shown}{dense}, norm {found['norm']:.4g}, {size / 1e6:.2f} MB"
