"""`lbw=` strings: factors per block as sd-webui-lora-block-weight writes them, turned into globs of module paths.

A string is 12, 17, 20, 26 or 61 numbers joined by commas, or a name: a preset, one block ("OUT04": nothing else acts),
"N" before a block (all but it), "ALL0.5" (all at a factor), or a line of the user's own preset file.

    SD 1.5   17  BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 .. OUT11         26  BASE IN00 .. IN11 M00 OUT00 .. OUT11
    SDXL     12  BASE IN04 IN05 IN07 IN08 M00 OUT00 .. OUT05                   20  BASE IN00 .. IN08 M00 OUT00 .. OUT08
    FLUX     61  CLIP T5 IN D00 .. D18 S00 .. S37 OUT

BASE (for FLUX: CLIP, T5) is the text encoder's part. A block that a list does not name has factor 0, as in the
extension; modules outside of all blocks (a U-Net's time embedding and last convolution) keep factor 1. Layouts,
presets and these two rules: github.com/hako-mikan/sd-webui-lora-block-weight, README and scripts/lora_block_weight.py.
ALL and NONE mean every block here; there ALL is 17 numbers, which leave the samplers of a LoCon at 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from multilora.lora import Lora
from multilora.method import UnknownName, unknown
from multilora.sites import canonical

SPECIAL = ("lbw", "in", "mid", "out")  # keys of a `blocks` mapping that `expanded` writes out


def _numbered(word: str, *spans: tuple[int, int]) -> tuple[str, ...]:
    return tuple(f"{word}{i:02}" for first, last in spans for i in range(first, last + 1))


LAYOUTS: dict[int, tuple[str, ...]] = {
    12: ("BASE", *_numbered("IN", (4, 5), (7, 8)), "M00", *_numbered("OUT", (0, 5))),
    17: ("BASE", *_numbered("IN", (1, 2), (4, 5), (7, 8)), "M00", *_numbered("OUT", (3, 11))),
    20: ("BASE", *_numbered("IN", (0, 8)), "M00", *_numbered("OUT", (0, 8))),
    26: ("BASE", *_numbered("IN", (0, 11)), "M00", *_numbered("OUT", (0, 11))),
    61: ("CLIP", "T5", "IN", *_numbered("D", (0, 18)), *_numbered("S", (0, 37)), "OUT"),
}
# The extension's presets are for SD 1.5; those for SDXL are its README's (INS, OUTD) and ours in the same sense.
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "sd15": {
        "INS": ("BASE", *_numbered("IN", (1, 2), (4, 4))),
        "IND": ("BASE", *_numbered("IN", (5, 5), (7, 8))),
        "INALL": ("BASE", *_numbered("IN", (1, 2), (4, 5), (7, 8))),
        "MIDD": ("BASE", *_numbered("IN", (5, 5), (7, 8)), "M00", *_numbered("OUT", (3, 6))),
        "OUTD": ("BASE", *_numbered("OUT", (3, 6))),
        "OUTS": ("BASE", *_numbered("OUT", (7, 11))),
        "OUTALL": ("BASE", *_numbered("OUT", (3, 11))),
    },
    "sdxl": {
        "INS": ("BASE", *_numbered("IN", (4, 5))),
        "IND": ("BASE", *_numbered("IN", (7, 8))),
        "INALL": ("BASE", *_numbered("IN", (4, 5), (7, 8))),
        "MIDD": ("BASE", *_numbered("IN", (7, 8)), "M00", *_numbered("OUT", (0, 2))),
        "OUTD": ("BASE", *_numbered("OUT", (0, 2))),
        "OUTS": ("BASE", *_numbered("OUT", (3, 5))),
        "OUTALL": ("BASE", *_numbered("OUT", (0, 5))),
    },
    "flux": {"FLUXALL": LAYOUTS[61]},
}
_COUNTS = {"sd15": (12, 17, 20, 26), "sdxl": (12, 17, 20, 26), "flux": (61,)}
_EVERY = re.compile(r"ALL(\d*\.?\d+)?|NONE")
_EXAMPLES = "lbw=OUTALL or lbw=1,0,0,..."


def read_presets(path: str | Path) -> dict[str, str]:
    """The presets of a file with lines `NAME:1,0,0,...`; empty lines, and those with a #, are comments.

    Raises ValueError naming file and line for any other line, and for a name that is given twice.
    """
    found: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"lbw presets {str(path)!r}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or "#" in line:
            continue
        name, colon, values = (part.strip() for part in line.partition(":"))
        where = f"lbw presets {str(path)!r}, line {number}"
        if not colon or not name:
            raise ValueError(f"{where}: wanted NAME:1,0,0,..., got {line.strip()[:60]!r}")
        if name in found:
            raise ValueError(f"{where}: {name!r} is there already")
        try:
            _numbers(values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        found[name] = values
    return found


def checked(text: Any, presets: Mapping[str, str] | None = None) -> str:
    """An lbw string with a name of `presets` replaced by its numbers, as far as it can be checked without a LoRA.

    Raises ValueError for another count of numbers, what is no number, and UnknownName for a name that no model has.
    """
    text = str(text).strip()
    if presets and text in presets:
        text = presets[text]
    if "," in text:
        _numbers(text)
        return text
    for layout in PRESETS:
        if _named(text, layout) is not None:
            return text
    raise _unknown(text, {*(presets or ()), *(name for layout in PRESETS for name in PRESETS[layout])})


def layout_of(model: Any) -> str:
    """ "sd15" (a U-Net of four levels), "sdxl" (of fewer), "flux", or "" for a denoiser without such blocks."""
    model = getattr(model, "_orig_mod", model)
    paths = {name for name, _ in model.named_children()}
    if "down_blocks" in paths and "up_blocks" in paths:
        return "sd15" if len(model.down_blocks) > 3 else "sdxl"
    return "flux" if "single_transformer_blocks" in paths else ""


def block_of(path: str, layout: str) -> tuple[str, str]:
    """(block, glob of it that matches the path) of a module of the denoiser; ("", "") outside of all blocks.

    Positions are those of SD 1.5 and SDXL: a level has two layers, then its sampler, in IN; three layers, the last of
    them with the sampler, in OUT.
    """
    words = path.split(".")
    head = ".".join(words[:2]) + ".*"
    if layout == "flux":
        if words[0] in ("transformer_blocks", "single_transformer_blocks") and len(words) > 2:
            return f"{words[0][0].replace('t', 'D').replace('s', 'S')}{int(words[1]):02}", head
        if words[0] in ("x_embedder", "context_embedder", "time_text_embed"):
            return "IN", path if len(words) == 1 else f"{words[0]}.*"
        return ("OUT", path) if words[0] in ("proj_out", "norm_out") else ("", "")
    if path == "conv_in":
        return "IN00", path
    if words[0] == "mid_block":
        return "M00", "mid_block.*"
    if words[0] not in ("down_blocks", "up_blocks") or len(words) < 4:
        return "", ""
    level, part, layer = int(words[1]), words[2], int(words[3])
    sampler, glob = part.endswith("samplers"), ".".join(words[:4]) + ".*"
    if words[0] == "up_blocks":
        return f"OUT{3 * level + (2 if sampler else layer):02}", glob
    return f"IN{3 * level + (3 if sampler else 1 + layer):02}", glob


def expanded(
    blocks: Mapping[str, Any] | str, lora: Lora, model: Any, component: str, who: str
) -> tuple[dict[str, Any], float]:
    """(globs of the denoiser's modules -> factor, factor of the text-encoder part) of a `blocks` option.

    blocks  a mapping whose keys "lbw" (a string as above) and "in", "mid", "out" (factors of a U-Net's three parts, as
            SD.Next's tags have them; modules in none of the three go with "in") are written out in their place, other
            keys stay; or an lbw string alone
    who     of the LoRA, for errors

    Raises ValueError naming LoRA and field when the string is wrong or the denoiser has no such blocks.
    """
    blocks = {"lbw": blocks} if isinstance(blocks, str) else blocks
    paths, layout, text = [canonical(p) for p in lora.part(component)], layout_of(model), 1.0
    found: dict[str, Any] = {}
    for key, value in blocks.items():
        if key not in SPECIAL:
            found[str(key)] = value
            continue
        if not layout or (key != "lbw" and layout == "flux"):
            kind = "blocks of lbw=" if key == "lbw" else "down, mid and up blocks"
            raise ValueError(
                f"{key}={value} of {who}: a {type(model).__name__} has no {kind}; give its modules as globs, such as "
                f"{(paths or ['transformer_blocks.0'])[0].split('.')[0] + '.*'!r}"
            )
        if key == "lbw":
            try:
                factors = _factors(value, layout)
            except ValueError as error:
                raise ValueError(f"lbw={value} of {who}: {error}") from None
            text *= _text_factor(factors, layout, lora, who)
            for block, glob in dict.fromkeys(block_of(p, layout) for p in paths):
                if block and factors.get(block, 0.0) != 1.0:
                    found[glob] = factors.get(block, 0.0)
        else:
            found.update(dict.fromkeys(_third(paths, key), value))
    return found, text


def _third(paths: Iterable[str], key: str) -> list[str]:
    """Globs of the modules that belong to "in", "mid" or "out" of a U-Net."""
    parts = {"mid_block": "mid", "up_blocks": "out"}
    mine = (p for p in paths if parts.get(p.split(".")[0], "in") == key)
    return list(dict.fromkeys(f"{p.split('.')[0]}.*" if "." in p else p for p in mine))


def _numbers(text: str) -> dict[str, float]:
    """block -> factor of a list of numbers."""
    words = [word.strip() for word in text.split(",")]
    if len(words) not in LAYOUTS:
        raise ValueError(f"{len(words)} values, wanted 12, 17, 20, 26 or 61, such as {_EXAMPLES}")
    found = {}
    for block, word in zip(LAYOUTS[len(words)], words, strict=True):
        if word[:1] in ("R", "U", "X"):
            raise ValueError(f"{block}={word}: random and inherited values are not supported; write the number")
        try:
            found[block] = float(word)
        except ValueError:
            raise ValueError(f"{block}={word!r}: wanted a number") from None
        if not math.isfinite(found[block]):
            raise ValueError(f"{block}={word!r}: wanted a finite number")
    return found


def _blocks(layout: str) -> tuple[str, ...]:
    return LAYOUTS[{"sd15": 26, "sdxl": 20, "flux": 61}[layout]]


def _unknown(name: str, known: Iterable[str]) -> UnknownName:
    found = unknown("lbw preset", name, {"ALL", "NONE", *known})
    return UnknownName(f"{found} Or one block such as OUT04, all but it as NOUT04, or a list of numbers.")


def _named(text: str, layout: str) -> dict[str, float] | None:
    """block -> factor of a name, None for one that this layout does not have."""
    blocks = _blocks(layout)
    if every := _EVERY.fullmatch(text):
        return dict.fromkeys(blocks, 0.0 if text == "NONE" else float(every.group(1) or 1.0))
    if text in PRESETS[layout]:
        return {block: float(block in PRESETS[layout][text]) for block in blocks}
    plain = text.replace("MID", "M00") if text in ("MID", "NMID") and layout != "flux" else text
    if plain in blocks:
        return {block: float(block == plain) for block in blocks}
    if plain[:1] == "N" and plain[1:] in blocks:
        return {block: float(block != plain[1:]) for block in blocks}
    return None


def _factors(text: Any, layout: str) -> dict[str, float]:
    text = str(text).strip()
    if "," not in text:
        found = _named(text, layout)
        if found is None:
            raise _unknown(text, PRESETS[layout])
        return found
    found, wanted = _numbers(text), _COUNTS[layout]
    if len(found) not in wanted:
        raise ValueError(f"{len(found)} values are for another model, wanted {' or '.join(map(str, wanted))}")
    return found


def _text_factor(factors: Mapping[str, float], layout: str, lora: Lora, who: str) -> float:
    if layout != "flux":
        return factors["BASE"]
    parts = {"text_encoder": "CLIP", "text_encoder_2": "T5"}
    own = {factors[block] for component, block in parts.items() if component in lora.components}
    if len(own) > 1:
        raise ValueError(f"lbw of {who}: CLIP={factors['CLIP']:g}, T5={factors['T5']:g}: wanted one factor for both")
    return own.pop() if own else 1.0
