"""What Compose says in HTML: the state of a job, scores. Everything from outside is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from multilora.web.service import Event

EMPTY = "Nothing drawn yet. Click LoRAs, write a prompt, then Draw."


def status(words: str, kind: str = "idle", share: float | None = None) -> str:
    """A line with a bar. kind: "idle", "busy", "done" or "error"; share: 0 to 1, None for no bar."""
    bar = "" if share is None else f'<div class="ml-progress"><i style="width:{100 * min(1.0, share):.0f}%"></i></div>'
    role = "alert" if kind == "error" else "status"
    return f'<div class="ml-status ml-{kind}" role="{role}">{bar}<span>{escape(words)}</span></div>'


def progress(event: Event) -> str:
    """The state of a job that waits or runs."""
    if event.kind == "queued":
        before = f"{event.position} before you" if event.position else "next"
        return status(f"waiting in line: {before}", "busy", 0.0)
    of = f"picture {event.number + 1} of {event.of}, " if event.of > 1 else ""
    share = (event.number + event.step / max(1, event.steps)) / event.of
    return status(f"{of}step {event.step} of {event.steps}", "busy", share)


def scores(found: dict[str, Any]) -> str:
    """CLIP score and presence of each LoRA's element, each with the name of what measured it."""
    if not found:
        return ""
    parts = []
    if "clip" in found:
        scorer = escape(str(found.get("clip_model", "")))
        parts.append(
            f"<p><b>CLIP score {found['clip']:.1f}</b> <small>how well picture and prompt agree, up to 100; higher is "
            f"better, and blind to small things (measured by {scorer})</small></p>"
        )
    presence = found.get("presence") or {}
    if presence:
        there = sum(each["present"] for each in presence.values())
        who = escape(str(found.get("recogniser", "")))
        parts.append(
            f"<p><b>{there} of {len(presence)} elements present</b> <small>does a recogniser see what each LoRA "
            f"stands for (recogniser {who})</small></p><table class='ml-presence'>"
        )
        for name, each in presence.items():
            odds = float(each["probability"])
            mark, words = ("yes", "✓ there") if each["present"] else ("no", "✗ not seen")
            parts.append(
                f"<tr><th scope='row'>{escape(name)} <small>{escape(str(each['category']))}</small></th>"
                f"<td><div class='ml-odds ml-{mark}'><i style='width:{100 * odds:.0f}%'></i></div></td>"
                f"<td>{100 * odds:.0f}%</td><td>{words}</td></tr>"
            )
        parts.append("</table>")
    return f'<div class="ml-scores">{"".join(parts)}</div>'


def short(found: dict[str, Any]) -> str:
    """The same in a caption's length."""
    presence = found.get("presence") or {}
    words = [f"CLIP {found['clip']:.1f}"] if "clip" in found else []
    words += [f"{sum(e['present'] for e in presence.values())} of {len(presence)} present"] if presence else []
    return ", ".join(words)


def notes(words: list[str]) -> str:
    """Remarks as a list, "" for none."""
    return "".join(f'<p class="ml-note">{escape(each)}</p>' for each in words)
