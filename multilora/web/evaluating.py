"""What the Evaluate page asks for and shows, without gradio: words for the commands, checked, and how a run stands."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multilora.lab.evaluate.evaluation import NONE as NO_LORA
from multilora.lab.evaluate.evaluation import training_free
from multilora.lab.evaluate.grid import Axis, axis
from multilora.method import methods
from multilora.web import said as words
from multilora.web.background import DONE, FAILED, NONE, RUNNING, STOPPED, State
from multilora.web.service import Limits, Refused, Service, Session

EMBEDDED = "embedded"
MOST_PICTURES, MOST_CELLS = 4000, 36
# What an axis may be here; the command has more, among them fields that name files of this machine.
FIELDS = (
    "method",
    "weight",
    "steps",
    "guidance_scale",
    "seed",
    "scheduler",
    "prompt",
    "negative_prompt",
    "scale",
    "size",
)
SPLITS = {
    "held-out LoRAs: nothing in this project was tuned on them": "test",
    "the other LoRAs": "train",
    "all of them": "all",
}


def method_names() -> list[str]:
    """What can be compared: the prompt alone, then every method that needs no trained gate."""
    return [NO_LORA, *training_free()]


def pictures_of(names: Sequence[str], ks: Sequence[int], count: int) -> int:
    """How many pictures an evaluation draws."""
    return len(names) * len(ks) * int(count)


def eval_words(
    service: Service, names: Sequence[str], ks: Sequence[int], count: int, split: str, steps: int
) -> tuple[list[str], int]:
    """(words for `multilora eval`, pictures). Raises Refused naming the field that is wrong."""
    if EMBEDDED not in service.bases:
        raise Refused(
            "this server does not serve the embedded base; elsewhere: multilora eval --library FOLDER --base ..."
        )
    known = method_names()
    bad = [n for n in names or () if n not in known]
    if bad or not names:
        raise Refused(f"methods {bad or 'none chosen'}: wanted some of {', '.join(known)}")
    ks = sorted({int(k) for k in ks or ()})
    if not ks or ks[0] < 2 or ks[-1] > 5:
        raise Refused(f"LoRAs in a picture {ks}: wanted some of 2, 3, 4 and 5")
    if split not in SPLITS.values():
        raise Refused(f"split {split!r}: wanted test, train or all")
    within("steps", steps, service.limits.steps)
    total = pictures_of(names, ks, count)
    if int(count) < 1 or total > MOST_PICTURES:
        raise Refused(f"{total} pictures: wanted 1 to {MOST_PICTURES} here; the command line has no limit", "limit")
    asked = ["--methods", ",".join(names), "--k", ",".join(map(str, ks)), "--count", str(int(count))]
    return [*asked, "--split", split, "--steps", str(int(steps)), *_where(service)], total


def grid_words(
    service: Service, session: Session, prompt: str, references: Sequence[str], x: str, y: str, seed: int, steps: int
) -> tuple[list[str], int]:
    """(words for `multilora grid`, pictures). Raises Refused naming the field that is wrong."""
    prompt = (prompt or "").strip()
    axes = [_axis(text, service.limits) for text in (x, y) if (text or "").strip()]
    prompts = [prompt, *(v for a in axes if a.field == "prompt" for v in a.values)]
    if not prompt or any("<lora:" in p for p in prompts):
        raise Refused("prompt: say what to draw; LoRAs are chosen in the list, not written as <lora:...>")
    if max(map(len, prompts)) > service.limits.prompt:
        raise Refused(f"prompt: at most {service.limits.prompt} characters", "limit")
    if not axes:
        raise Refused("across: wanted FIELD=A,B such as method=merge,switch")
    cells = len(axes[0].values) * (len(axes[1].values) if len(axes) > 1 else 1)
    if cells > MOST_CELLS:
        raise Refused(f"{cells} pictures: wanted at most {MOST_CELLS} here; the command line allows more", "limit")
    within("steps", steps, service.limits.steps)
    loras = lora_words(service, session, references)
    asked = [word for lora in loras for word in ("--lora", lora)]
    asked += [f"--x={x.strip()}", *([f"--y={y.strip()}"] if (y or "").strip() else [])]
    base = session.base or service.bases[0]
    asked += ["--base", base, "--seed", str(int(seed)), "--steps", str(int(steps)), *_where(service)]
    return [*asked, "--", prompt], cells


def lora_words(service: Service, session: Session, references: Sequence[str] | None) -> list[str]:
    """What a command calls the LoRAs of a session: library names, else NAME=PATH. Raises Refused."""
    if len(references or ()) > service.limits.loras:
        raise Refused(f"{len(references)} LoRAs: at most {service.limits.loras}", "limit")
    found = [service.entry(session, reference) for reference in references or ()]
    from multilora.pipelines.load import library

    embedded = library()
    return [e.reference if e.reference in embedded else f"{e.name.replace('=', ' ')}={e.path}" for e in found]


def _axis(text: str, limits: Limits) -> Axis:
    """An axis that users may draw over. Raises Refused for others, and values beyond the server's limits."""
    try:
        found = axis(text)
    except ValueError as error:
        raise Refused(str(error)) from None
    options = {o.name for r in methods("route").values() for o in r.options} - {"gate"}
    of_lora = found.field.rpartition(".")[2] == "weight"
    if found.field not in FIELDS and found.field not in options and not of_lora:
        raise Refused(f"field {found.field!r}: wanted one of {', '.join([*FIELDS, 'NAME.weight', *sorted(options)])}")
    for value in found.values:
        if found.field == "steps":
            within("steps", value, limits.steps)
        if found.field == "size":
            for side in value.lower().split("x"):
                within("size", side, limits.side)
    return found


def within(name: str, value: Any, limit: int) -> None:
    """Raises Refused naming it for what is no whole number of 1 to `limit`."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise Refused(f"{name} {value!r}: wanted a whole number") from None
    if not 1 <= number <= limit:
        raise Refused(f"{name} {number}: wanted 1 to {limit}", "limit")


def _where(service: Service) -> list[str]:
    """One thread, and the device of the server's own worker where it is known."""
    facts = service.known(service.bases[0])
    device = str(facts["device"]) if facts else ""
    return ["--threads", "1", *(["--device", device] if device.split(":")[0] in ("cpu", "cuda", "mps") else [])]


def status(state: State, nothing: str, things: str = "pictures") -> str:
    """How a run stands, as a line with a bar; `things` are what it makes."""
    if state.status == NONE:
        return words.said(nothing)
    share = state.done / state.total if state.total else 0.0
    if state.status == FAILED:
        return words.said(state.message, bad=True)
    left = int(state.left)
    wait = f", about {left // 60} min {left % 60} s left" if left else ", loading the base" if not state.done else ""
    told = {
        RUNNING: f"{state.done} of {state.total} {things}{wait}. You may close this page and come back.",
        DONE: f"done: {state.done if things != 'pictures' else state.total} {things}",
        STOPPED: f"stopped after {state.done} of {state.total} {things}; the same settings go on from there",
    }[state.status]
    if state.message:
        told += f" ({state.message})"
    bar = f'<div class="ml-progress"><i style="width:{100 * share:.0f}%"></i></div>' if state.status == RUNNING else ""
    return f'<div class="ml-status" role="status">{bar}<span>{html.escape(told)}</span></div>'


def framed(page: Path) -> str:
    """A report in a frame that runs no scripts and reaches nothing."""
    inside = html.escape(page.read_text(encoding="utf-8"), quote=True)
    look = "width:100%;height:80vh;border:1px solid var(--border-color-primary);border-radius:8px"
    return f'<iframe sandbox title="Report of the evaluation" style="{look}" srcdoc="{inside}"></iframe>'


def report_files(folder: Path | None) -> list[str]:
    """The files of a run's report that are there, to be downloaded."""
    wanted = (
        [] if folder is None else [folder / "report.html", folder / "summary.md", *sorted(folder.glob("tables/*"))]
    )
    return [str(path) for path in wanted if path.is_file()]
