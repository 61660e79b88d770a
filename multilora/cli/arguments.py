"""What users type, read and checked before anything heavy is imported. Every error names its option."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.method import Bound, methods, resolve, unknown


@dataclass(frozen=True)
class LoraArgument:
    """One --lora: a file, folder or library name, what to call it, and its weight (None: 1)."""

    source: str
    name: str | None = None
    weight: float | str | None = None


def read_lora(text: str) -> LoraArgument:
    """`[NAME=]FILE_OR_LIBRARY_NAME[:WEIGHT]`. Raises ValueError for a weight that is no number and no schedule."""
    from multilora.schedule import Schedule

    source, weight = text, None
    head, colon, tail = text.rpartition(":")
    if colon and len(head) != 1 and not any(c in tail for c in "/\\"):  # C:\fox.safetensors has no weight
        source, weight = head, tail
        try:
            schedule = Schedule.parse(tail)
        except ValueError as error:
            raise ValueError(f"--lora {text!r}: weight: {error}") from None
        weight = tail if schedule.constant is None else schedule.constant
    name, equals, rest = source.partition("=")
    if equals and not Path(source).exists():
        source = rest
    else:
        name = None
    if not source or name == "":
        raise ValueError(f"--lora {text!r}: wanted FILE_OR_LIBRARY_NAME[:WEIGHT], such as fox.safetensors:0.8")
    return LoraArgument(source, name, weight)


def read_size(text: str | None) -> tuple[int | None, int | None]:
    """`128x96` as (width, height)."""
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size {text!r}: wanted WIDTHxHEIGHT in pixels, such as 128x128")
    return int(width), int(height)


def read_pairs(option: str, texts: Iterable[str], wanted: str) -> list[tuple[str, str]]:
    """`key=value` texts of a repeatable option, in order."""
    pairs = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise ValueError(f"{option} {text!r}: wanted {wanted}")
        pairs.append((key.strip(), value.strip()))
    return pairs


def read_methods(names: Sequence[str], options: Iterable[str], kind: str = "route") -> list[Bound]:
    """Methods of a kind by name with --option texts `key=value` or `method.key=value`.

    With several methods, an option goes to those that have it. Raises ValueError for an unknown method, an option
    that none of them has, or a bad value.
    """
    known = methods(kind)
    for i, name in enumerate(names):
        if name not in known:
            raise unknown("method", name, known)
        if name in names[:i]:
            raise ValueError(f"method {name!r} is named twice")
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in read_pairs("--option", options, "KEY=VALUE, such as every=5"):
        owner, dot, option = key.rpartition(".")
        if dot and owner not in given:
            raise unknown("method in --option", owner, names)
        takers = [n for n in names if (not dot or n == owner) and option in {o.name for o in known[n].options}]
        if not takers:
            all_options = sorted({o.name for n in names for o in known[n].options if not dot or n == owner})
            near = difflib.get_close_matches(option, all_options, n=3, cutoff=0.5)
            hint = f" Nearest: {', '.join(near)}." if near else ""
            raise ValueError(
                f"--option {key}={value}: unknown option of {', '.join([owner] if dot else names)}.{hint} Known: "
                f"{', '.join(all_options) or 'none'}."
            )
        for name in takers:
            given[name][option] = value
    return [resolve(kind, name, **given[name]) for name in names]


def read_weights(text: str | None, loras: Sequence[LoraArgument]) -> list[float]:
    """One number per LoRA: of `--weights 1,0.8,-0.5`, else of the LoRAs' own `:WEIGHT`, else 1.

    Raises ValueError for another count, a weight in both places, and one that is no number.
    """
    own = [lora.weight for lora in loras]
    for lora in loras:
        if isinstance(lora.weight, str):
            raise ValueError(f"{lora.source}:{lora.weight}: a file's weight is a number; schedules belong to compose")
    if text is None:
        return [1.0 if weight is None else float(weight) for weight in own]
    if any(weight is not None for weight in own):
        raise ValueError(f"--weights {text!r}: a LoRA has a weight of its own (NAME:WEIGHT); give one of the two")
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights {text!r}: wanted numbers joined by commas, such as 1,0.8,-0.5") from None
    if len(found) != len(loras):
        raise ValueError(f"--weights {text!r}: {len(found)} numbers for {len(loras)} LoRAs, wanted one each")
    return found


def read_blocks(texts: Iterable[str]) -> dict[str, float]:
    """`GLOB=FACTOR` texts in order. Raises ValueError for a factor that is no number."""
    found = {}
    for glob, value in read_pairs("--block", texts, "GLOB=FACTOR, such as '*attn2*=0.5'"):
        try:
            found[glob] = float(value)
        except ValueError:
            raise ValueError(f"--block {glob}={value}: wanted a number after =") from None
    return found


def block_weights(weight: float, factors: dict[str, Any]) -> float | dict[str, float]:
    """A LoRA's weight with block factors on it, as the merges take it."""
    if not factors:
        return weight
    return {"*": weight, **{glob: weight * float(by) for glob, by in factors.items()}}


def check_limits(rank: int | None, energy: float | None) -> None:
    """Refuse a --rank and --energy that cut nothing or cannot be."""
    if rank is None and energy is None:
        raise ValueError("--rank N or --energy SHARE is missing: say how much to keep")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank {rank}: wanted at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"--energy {energy}: wanted a share above 0 and at most 1, such as 0.95")


def check_picture(plot: Path, force: bool) -> None:
    """Refuse a --plot that cannot be written."""
    if plot.suffix.lower() != ".png":
        raise ValueError(f"--plot {str(plot)!r}: wanted a .png file")
    if plot.exists() and not (force and plot.is_file()):
        raise ValueError(f"--plot {str(plot)!r}: exists already; --force replaces it")
    check_folder(plot.parent, "--plot")


def read_lora_options(
    block: Sequence[str], mask: Sequence[str], text_encoder_weight: Sequence[str], positive_only: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Options of LoRAs by the LoRA's name, as `Composer.add` takes them."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in read_pairs("--block", block, "LORA:GLOB=FACTOR, such as 'fox:*attn2*=0.5'"):
        name, colon, glob = key.partition(":")
        if not colon or not glob:
            raise ValueError(f"--block {key}={value}: wanted LORA:GLOB=FACTOR, such as 'fox:*attn2*=0.5'")
        found.setdefault(name, {}).setdefault("blocks", {})[glob] = value
    for name, value in read_pairs("--mask", mask, "LORA=PICTURE, such as fox=left.png"):
        found.setdefault(name, {})["mask"] = value
    for name, value in read_pairs("--text-weight", text_encoder_weight, "LORA=WEIGHT, such as fox=0.5"):
        found.setdefault(name, {})["text_encoder_weight"] = value
    for name in positive_only:
        found.setdefault(name, {})["positive_only"] = True
    return found


def options_of(loras: Sequence[LoraArgument], options: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The options of each LoRA, looked up by its name, its source or its file's stem.

    Raises ValueError for options of a LoRA that is not there.
    """
    names = [{n for n in (lora.name, lora.source, Path(lora.source).stem) if n} for lora in loras]
    for name in options:
        if not any(name in own for own in names):
            raise unknown("LoRA in an option (--block, --mask, ...)", name, [lo.name or lo.source for lo in loras])
    return [{k: v for name in own for k, v in options.get(name, {}).items()} for own in names]


def read_pictures(
    given: dict[str, str | None], request: dict[str, Any], controlnet: str | None, again: bool
) -> dict[str, Any]:
    """The pictures of --image, --mask-image and --control-image by the Composer's names, read from their files.

    again: a recipe has the ones that are not given. Raises ValueError for a file that is no picture, and for options
    without the one that they belong to.
    """
    from multilora.pipelines.pictures import check_mask, read_picture

    found = {}
    for role, path in given.items():
        if path is not None:
            try:
                found[role] = read_picture(role, path)
                check_mask(found[role])
            except ValueError as error:
                raise ValueError(f"--{role.replace('_', '-')}: {str(error).removeprefix(f'{role}: ')}") from None
    if again:
        return found
    if "image" not in found and "mask_image" in found:
        raise ValueError("--mask-image: goes with --image, the picture that the mask belongs to")
    if "image" not in found and "strength" in request:
        raise ValueError("--strength: goes with --image; a method's own strength is --option strength=...")
    if "control_image" not in found and (controlnet or "controlnet_conditioning_scale" in request):
        raise ValueError(f"--{'controlnet' if controlnet else 'control-scale'}: goes with --control-image")
    if controlnet and not Path(controlnet).expanduser().is_dir():
        raise ValueError(f"--controlnet {controlnet!r}: no such folder")
    return found


def check_out(out: Path, single: bool) -> None:
    """Refuse an --out that cannot be written to, before minutes are spent on pictures."""
    if out.suffix and out.suffix.lower() != ".png":
        raise ValueError(f"--out {str(out)!r}: wanted a folder, or a .png file for one picture")
    if out.suffix and not single:
        raise ValueError(f"--out {str(out)!r}: several pictures come out, wanted a folder")
    if out.exists() and out.is_dir() == bool(out.suffix):
        raise ValueError(f"--out {str(out)!r}: is {'a folder' if out.is_dir() else 'a file'} already")
    check_folder(out.parent if out.suffix else out)


def check_folder(folder: Path, option: str = "--out") -> None:
    """Refuse a folder that cannot be made or written to."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{option} {str(folder)!r}: {above} is no folder that can be written to")


def check_batch(out: Path, workers: int | None, threads: int | None) -> None:
    """Refuse what no batch can run with: too few workers or threads, a file where its folder is to be."""
    for name, value in (("--workers", workers), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: wanted at least 1")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r}: is a file already, wanted a folder")
    check_folder(out)
