"""Words and small tables on the pages, as HTML: everything that comes from a user or a file is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from multilora.web.service import Job, Result

STYLE = """<style>
.ml-said{margin:.25rem 0;padding:.5rem .75rem;border-left:3px solid var(--border-color-accent);min-height:1.4em;
 color:var(--body-text-color);overflow-wrap:anywhere}
.ml-said.ml-bad{border-left-color:#c0392b;background:rgba(192,57,43,.1)}
.ml-said:empty{display:none}
.ml-about{color:var(--body-text-color-subdued);margin:.25rem 0}
.ml-about a,.ml-table a{color:var(--link-text-color)}
.ml-wide{overflow-x:auto;max-width:100%}
.ml-table{border-collapse:collapse;color:var(--body-text-color);font-size:var(--text-sm)}
.ml-table caption{text-align:left;font-weight:600;padding:.5rem 0 .25rem;color:var(--body-text-color)}
.ml-table caption small{display:block;font-weight:400;color:var(--body-text-color-subdued)}
.ml-table th,.ml-table td{padding:.25rem .6rem;border:1px solid var(--border-color-primary);text-align:left;
 vertical-align:top;overflow-wrap:anywhere}
.ml-table th{font-weight:500;white-space:nowrap;color:var(--body-text-color-subdued)}
.ml-heat td{text-align:right;font-variant-numeric:tabular-nums;min-width:3.6em;overflow-wrap:normal}
.ml-bar{display:inline-block;height:.75em;background:#0072b2;border-radius:2px;vertical-align:baseline}
.ml-shelf .grid-container{grid-template-columns:repeat(auto-fill,minmax(5.5rem,1fr))!important;gap:.35rem}
.ml-pictures .grid-wrap{height:auto!important;min-height:0!important;max-height:none!important}
.ml-pictures .grid-container{grid-template-columns:repeat(auto-fill,minmax(8rem,1fr))!important}
.ml-shelf .thumbnail-item,.ml-shelf .gallery-item{aspect-ratio:1}
</style>"""


def intro(text: str) -> str:
    """The sentence at the top of a page, with the styles of everything here."""
    return f"{STYLE}<p>{_e(text)}</p>"


def said(text: str = "", bad: bool = False) -> str:
    """A line about how it goes, read out by screen readers; `bad` for what was refused or failed."""
    role = "alert" if bad else "status"
    return f'<p class="ml-said{" ml-bad" if bad else ""}" role="{role}">{html.escape(text)}</p>' if text else ""


def followed(job: Job, doing: str) -> Iterator[str]:
    """Words on how a job goes, as it goes; the iterator's return value is its Result. Left early, it is cancelled.

    Raises Refused with the job's message when it fails.
    """
    for event in job.events():
        if event.kind == "queued":
            yield "waiting: yours is next" if not event.position else f"waiting: {event.position} before you"
        elif event.kind == "progress":
            of = f", {event.number + 1} of {event.of}" if event.of > 1 else ""
            yield f"{doing}{of}: {event.step} of {event.steps}"
        elif event.kind == "note":
            yield event.message
    result: Result = job.result()
    return result


def facts(rows: Mapping[str, Any], caption: str = "", more: str = "") -> str:
    """A table of two columns, without the rows that have nothing to say."""
    shown = [(k, _plain(v)) for k, v in rows.items() if v not in (None, "", [], {}, ())]
    lines = "".join(f'<tr><th scope="row">{_e(k)}</th><td>{_e(v)}</td></tr>' for k, v in shown)
    return _table(lines, caption, more)


def heat(names: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]],
         caption: str = "", more: str = "") -> str:  # fmt: skip
    """A table of numbers from -1 to 1 with colour behind them: orange above 0, blue below."""
    head = "".join(f'<th scope="col">{_e(c)}</th>' for c in columns)
    lines = [f"<tr><td></td>{head}</tr>"]
    for name, row in zip(names, values, strict=True):
        lines.append(f'<tr><th scope="row">{_e(name)}</th>{"".join(map(_warm, row))}</tr>')
    return _table("".join(lines), caption, more, " ml-heat")


def bars(values: Mapping[str, float], caption: str = "", more: str = "") -> str:
    """Shares from 0 to 1 as bars with their numbers."""
    most = max(values.values(), default=0.0) or 1.0
    lines = "".join(
        f'<tr><th scope="row">{_e(name)}</th><td><span class="ml-bar" style="width:{8 * share / most:.2f}em"></span> '
        f"{share:.1%}</td></tr>"
        for name, share in values.items()
    )
    return _table(lines, caption, more)


def _table(lines: str, caption: str, more: str, kind: str = "") -> str:
    small = f"<small>{_e(more)}</small>" if more else ""
    head = f"<caption>{_e(caption)}{small}</caption>" if caption else ""
    return f'<div class="ml-wide"><table class="ml-table{kind}">{head}<tbody>{lines}</tbody></table></div>'


def _warm(value: float | None) -> str:
    if value is None:
        return "<td>none</td>"
    colour = "213,94,0" if value > 0 else "0,114,178"
    return f'<td style="background:rgba({colour},{0.65 * min(1.0, abs(value)):.3f})">{value:+.2f}</td>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _e(text: Any) -> str:
    return html.escape(str(text))
