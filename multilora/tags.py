"""`<lora:...>` tags and their schedules in a prompt, as the web UIs and ComfyUI's prompt-control write them.

    <lora:fox>   <lora:fox:0.8>   <lora:fox:0@0,1@0.5>            weight 1, a weight, a weight over the steps
    <lora:fox:0.5:0.8>                                            text encoder 0.5, denoiser 0.8
    <lora:fox:0.8:te=0.5>   <lora:fox:unet=0.8:te=0.5>            the same by name
    <lora:fox:1:lbw=OUTALL:start=10:stop=20>   :step=10-20        factors per block; on from step 10, off from step 20
    <lora:fox:1:in=0.5:mid=0:out=1.2>                             weights of a U-Net's three parts
    [<lora:a:1>:<lora:b:1>:0.4]                                   a until 40 % of the run, then b
    [<lora:a:1>::0.5]   [<lora:a:1>:0.3]   [<lora:a:1>:0.2,0.7]   a until half; from 30 %; from 20 to 70 %
    [<lora:a:1>:<lora:b:1>:<lora:c:1>:0.2,0.7]                    a, then b, then c; brackets nest

Two numbers after the name are the text encoder's and the denoiser's, in AUTOMATIC1111's order; prompt-control has them
the other way round. `te=` alone leaves a weight that is given for both to the denoiser (AUTOMATIC1111 moves it too).
A position with a point is a fraction of the run, one without is a step, counted from 0 (AUTOMATIC1111's extension acts
one step earlier, Forge's as here), `s` and `sigma` say which. Sources: extensions-builtin/Lora of AUTOMATIC1111's web
UI, the READMEs of sd-webui-lora-block-weight and comfyui-prompt-control (doc/schedules.md), SD.Next's
modules/lora/extra_networks_lora.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from multilora import lbw
from multilora.schedule import FRACTION, SIGMA, STEP, Schedule

__all__ = ["LoraTag", "parse_prompt"]

FIELDS = ("te", "unet", "in", "mid", "out", "lbw", "start", "stop", "step")
_TAG = re.compile(r"<lora:([^<>]*)>")
_TAG_LIKE = re.compile(r"<\s*lora\s*[:>]", re.IGNORECASE)
_POSITION = re.compile(r"(\d+\.?\d*|\.\d+)(s|sigma)?", re.IGNORECASE)


@dataclass(frozen=True)
class LoraTag:
    """One LoRA of a prompt.

    text_encoder_weight  None follows the weight
    blocks               factors of parts of the denoiser, as Member.blocks; its keys "lbw", "in", "mid" and "out" are
                         written out by multilora.lbw.expanded
    """

    name: str
    weight: Schedule
    text_encoder_weight: float | None = None
    blocks: Mapping[str, float | str] = field(default_factory=dict, hash=False)


class _Window(NamedTuple):
    """When something acts: from start on and before stop; unit None as long as it is the whole run."""

    start: float = 0.0
    stop: float = math.inf
    unit: str | None = None


_Use = tuple[LoraTag, _Window, str]  # a tag, when it acts, how it was written


def parse_prompt(text: str, presets: Mapping[str, str] | None = None) -> tuple[str, list[LoraTag]]:
    """The prompt without its LoRA tags and their brackets, and the tags in order; see the module's docstring.

    A tag goes with one of the blanks around it; nothing else of the prompt changes. The weight is 1 when not given. A
    LoRA that is named several times has the sum of its weights, at every step.

    presets  the user's own lbw presets, name -> numbers (multilora.lbw.read_presets)

    Raises ValueError that shows the tag, the field and what was wanted.
    """
    whole = {match.start() for match in _TAG.finditer(text)}
    for match in _TAG_LIKE.finditer(text):
        if match.start() not in whole:
            shown = text[match.start() :][:60]
            raise ValueError(f"LoRA tag {shown!r} is broken: wanted <lora:name> or <lora:name:0.8>, in lower case")
    spans, found = _scan(text, _Window(), presets)
    tags: dict[str, list[_Use]] = {}
    for one in found:
        tags.setdefault(one[0].name, []).append(one)
    for start, stop in reversed(spans):
        left, right = text[:start], text[stop:]
        if not left or left[-1].isspace():
            right = right[1:] if right[:1].isspace() else right
            left = left if right else left.rstrip()
        text = left + right
    return text, [_joined(uses) for uses in tags.values()]


# -- brackets ---------------------------------------------------------------------------------------------------------


def _scan(text: str, window: _Window, presets: Any) -> tuple[list[tuple[int, int]], list[_Use]]:
    """(spans to take out, [(tag, when, how it was written)]) of a text that acts in a window."""
    spans: list[tuple[int, int]] = []
    found: list[_Use] = []
    at = 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
        elif match := _TAG.match(text, at):
            spans.append(match.span())
            found.append((_tag(match, presets), window, match.group()))
            at = match.end()
        elif text[at] == "[" and (end := _closing(text, at)) and _TAG.search(text, at, end):
            parts = _parts(text[at + 1 : end])
            if len(parts) > 1:
                spans.append((at, end + 1))
                found += _scheduled(parts, text[at : end + 1], window, presets)
                at = end + 1
            else:  # brackets without a colon are emphasis, a matter of the prompt
                at += 1
        else:
            at += 1
    return spans, found


def _closing(text: str, start: int) -> int:
    """Index of the ] that closes the [ at `start`, 0 when there is none."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] in "[]":
            depth += 1 if text[at] == "[" else -1
            if not depth:
                return at
        at += 1
    return 0


def _parts(text: str) -> list[str]:
    """A bracket's content at its own colons: those in tags and in inner brackets are not."""
    parts, depth, last = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "[<") - (letter in "]>")
        if letter == ":" and not depth:
            parts.append(text[last:at])
            last = at + 1
    return [*parts, text[last:]]


def _scheduled(parts: Sequence[str], shown: str, window: _Window, presets: Any) -> list[_Use]:
    """The tags of [before:during:after:x,y] and its shorter forms, each with its own window."""
    wanted = "wanted [before:after:0.4], [before::0.4], [after:0.4] or [before:during:after:0.3,0.7]"
    *texts, last = parts
    if len(texts) > 3:
        raise ValueError(f"{shown!r} has {len(texts)} parts before its position: {wanted}")
    try:
        ends = [_position(word) for word in last.split(",")]
        if len(ends) > 2:
            raise ValueError(f"{len(ends)} positions")
        if len({unit for _, unit in ends}) > 1:
            raise ValueError("a step and a fraction do not go together")
        if SIGMA in {unit for _, unit in ends}:
            raise ValueError("sigmas do not go with brackets")
        if ends != sorted(ends):
            raise ValueError("the second position lies before the first")
    except ValueError as error:
        raise ValueError(f"{shown!r}: {last.strip()!r}: {error}; {wanted}") from None
    unit = ends[0][1]
    first, second = ends[0][0], ends[1][0] if len(ends) > 1 else math.inf
    if len(ends) == 1:  # [a:x], [before:after:x], [before:during:after:x]
        texts = ["", *texts] if len(texts) == 1 else texts
    elif len(texts) < 3:  # [during:x,y], [during:after:x,y]
        texts = ["", *texts]
    bounds = [(0.0, first), (first, second), (second, math.inf)]
    found = []
    for text, (start, stop) in zip(texts, bounds, strict=False):
        if window.unit not in (None, unit):
            raise ValueError(f"{shown!r}: steps and fractions do not go together in nested brackets")
        end = 1.0 if unit == FRACTION else math.inf  # a fraction of 1 is the end of the run
        inner = _Window(max(window.start, start), min(window.stop, stop), unit)
        inner = inner._replace(start=min(inner.start, end), stop=math.inf if inner.stop >= end else inner.stop)
        if inner.start >= end:
            inner = inner._replace(start=0.0, stop=0.0)
        spans, tags = _scan(text, inner, presets)
        rest = text
        for a, b in reversed(spans):
            rest = rest[:a] + rest[b:]
        if rest.strip(" ,\n\t"):
            raise ValueError(
                f"{shown!r}: {rest.strip()!r} cannot change over the steps, only LoRA tags can; write it outside of "
                "the brackets"
            )
        found += tags
    return found


def _position(text: str) -> tuple[float, str]:
    """A position and its unit: a fraction where it has a point, else a step, unless it is marked."""
    match = _POSITION.fullmatch(text.strip())
    if match is None:
        raise ValueError("a position is a fraction such as 0.4 or a step such as 10")
    number, unit = float(match.group(1)), (match.group(2) or "").lower()
    if not unit:
        unit = FRACTION if "." in match.group(1) else STEP
    if unit == FRACTION and number > 1:
        raise ValueError("a fraction of the run is at most 1.0; write a step without a point")
    return number, unit


# -- one tag ----------------------------------------------------------------------------------------------------------


def _tag(match: re.Match[str], presets: Any) -> LoraTag:
    shown = match.group()
    name, *rest = (part.strip() for part in match.group(1).split(":"))
    if not name:
        raise ValueError(f"LoRA tag {shown!r} has no name: wanted <lora:name> or <lora:name:0.8>")
    try:
        return _read(name, rest, presets)
    except ValueError as error:
        raise ValueError(f"LoRA tag {shown!r}: {error}") from None


def _read(name: str, rest: Sequence[str], presets: Any) -> LoraTag:
    values, fields = [], {}
    for part in rest:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            values.append(part)
            continue
        key = {"w": "lbw"}.get(key, key)
        if key not in FIELDS:
            raise ValueError(f"unknown field {part!r}; known are {', '.join(f + '=' for f in FIELDS)}")
        if key in fields:
            raise ValueError(f"{key}= is there twice")
        fields[key] = value
    if len(values) > 1 and not _is_weight(values[-1]):  # the extension's older <lora:fox:1:OUTALL>
        if "lbw" in fields:
            raise ValueError(f"{values[-1]!r} is no weight, and lbw= is there already")
        fields["lbw"] = values.pop()
    if len(values) > 2:
        raise ValueError(f"{len(values)} weights after the name: wanted one, or the text encoder's and the denoiser's")
    both = _weight("weight", values[-1]) if values else None
    text = _constant("te", fields["te"]) if "te" in fields else None
    if text is None and len(values) == 2:
        text = _constant("the text encoder's weight", values[0])
    weight = _weight("unet", fields["unet"]) if "unet" in fields else both
    if weight is None:
        weight = Schedule.parse(1.0 if text is None else text)
    elif text is None and "unet" in fields and both is not None:
        text = _constant("the text encoder's weight", values[0])
    weight, blocks = _parted(weight, fields)
    if "lbw" in fields:
        if blocks:
            raise ValueError("lbw= and in=, mid=, out= both weigh parts of the LoRA: give one of them")
        try:
            blocks = {"lbw": lbw.checked(fields["lbw"], presets)}
        except ValueError as error:
            raise ValueError(f"lbw={fields['lbw']}: {error}") from None
    return LoraTag(name, _timed(weight, fields), text, blocks)


def _is_weight(text: str) -> bool:
    """Whether a value looks like a weight or a schedule, not like the name or the numbers of an lbw preset."""
    return "@" in text or bool(re.match(r"[-+.]?\d|[-+]?(nan|inf)", text, re.IGNORECASE) and "," not in text)


def _weight(what: str, text: str) -> Schedule:
    try:
        return Schedule.parse(text)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _constant(what: str, text: str) -> float:
    number = _weight(what, text).constant
    if number is None:
        raise ValueError(f"{what}: wanted a number, got {text!r}: a prompt is encoded once")
    return number


def _parted(weight: Schedule, fields: Mapping[str, str]) -> tuple[Schedule, dict[str, float | str]]:
    """(weight, factors) that give a U-Net's parts the weights in=, mid=, out=; those not given keep the weight."""
    own = {key: _constant(key, fields[key]) for key in ("in", "mid", "out") if key in fields}
    if not own:
        return weight, {}
    if weight.constant is None:
        raise ValueError(f"{', '.join(own)}: go with one weight, not with the schedule {str(weight)!r}")
    if weight.constant:
        return weight, {key: value / weight.constant for key, value in own.items()}
    return Schedule.parse(1.0), {key: own.get(key, 0.0) for key in ("in", "mid", "out")}


def _timed(weight: Schedule, fields: Mapping[str, str]) -> Schedule:
    """The weight from start= on and before stop=."""
    start, stop = fields.get("start"), fields.get("stop")
    if "step" in fields:
        if start is not None or stop is not None:
            raise ValueError("step= and start=, stop= say the same thing: give one of them")
        start, dash, stop = fields["step"].partition("-")
        if not dash:
            raise ValueError(f"step={fields['step']}: wanted FIRST-LAST, such as step=5-10")
    if start is None and stop is None:
        return weight
    if weight.constant is None:
        raise ValueError(f"start, stop and step go with one weight, not with the schedule {str(weight)!r}")
    ends = {}
    for key, value in (("start", start), ("stop", stop)):
        if value is not None:
            try:
                ends[key] = _position(value)
            except ValueError as error:
                raise ValueError(f"{key}={value}: {error}") from None
    units = {unit for _, unit in ends.values()}
    if len(units) > 1:
        raise ValueError(f"start={start}, stop={stop}: a step, a fraction and a sigma do not go together")
    unit = units.pop()
    if unit == SIGMA:
        if start is None:
            return Schedule.parse([(weight.constant, stop), (0, stop)])
        return Schedule.window(weight.constant, start, stop)
    first, last = ends.get("start", (0.0, ""))[0], ends.get("stop", (math.inf, ""))[0]
    if first >= last:
        raise ValueError(f"start={start or 0}, stop={stop}: stop lies after start")
    return _curve([(weight.constant, _Window(first, last, unit))])


# -- weights over the steps -------------------------------------------------------------------------------------------


def _joined(uses: Sequence[_Use]) -> LoraTag:
    """One tag of all that name the same LoRA: the sum of their weights at every step."""
    (tag, window, shown), *others = uses
    if not others and window.unit is None:
        return tag
    for other, _, text in others:
        if (other.text_encoder_weight, other.blocks) != (tag.text_encoder_weight, tag.blocks):
            raise ValueError(f"LoRA tags {shown!r} and {text!r}: one LoRA has one text weight and one set of blocks")
    for one, when, text in uses:
        if one.weight.constant is None and (others or when.unit is not None):
            raise ValueError(f"LoRA tag {text!r}: its schedule does not go with brackets or a second tag")
    if len({when.unit for _, when, _ in uses if when.unit is not None}) > 1:
        raise ValueError(f"LoRA {tag.name!r} is scheduled by steps and by fractions: give one kind")
    return replace(tag, weight=_curve([(one.weight.constant, when) for one, when, _ in uses]))


def _curve(windows: Sequence[tuple[float, _Window]]) -> Schedule:
    """The sum of constant weights, each in its window."""
    unit = next((w.unit for _, w in windows if w.unit is not None), FRACTION)
    edges = sorted({e for _, w in windows for e in (w.start, w.stop) if 0 < e < math.inf})

    def between(edge: float) -> float:
        return math.fsum(weight for weight, w in windows if w.start <= edge < w.stop)

    points, now = [], between(0.0)
    for edge in edges:
        after = between(edge)
        if after != now:
            points += [(now, f"{edge!r}{unit}"), (after, f"{edge!r}{unit}")]
        now = after
    return Schedule.parse(points) if points else Schedule.parse(now)
