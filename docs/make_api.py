"""docs/api.md out of signatures and docstrings: python docs/make_api.py

tests/test_docs_made.py compares the page with what this makes: run it after a change of a public docstring or method.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from multilora.method import KINDS, Method, methods

PAGE = Path(__file__).resolve().parent / "api.md"
# module -> its public names
PUBLIC = {
    "multilora": ("load", "save", "merge", "Lora", "LowRank", "Dense", "Card", "attached", "Schedule", "methods"),
    "multilora.pipelines.image": ("Composer", "Composed", "composing"),
    "multilora.pipelines.text": ("TextComposer", "composing_text"),
    "multilora.pipelines.guider": ("MultiLoraGuider",),
    "multilora.pipelines.load": ("load_pipeline", "load_controlnet", "library", "find_lora"),
    "multilora.recipe": ("Recipe", "LoraUse", "Resolved", "RecipeError", "save_png"),
    "multilora.resident": ("Library",),
    "multilora.compare": ("compare",),
    "multilora.extract": ("extract",),
    "multilora.checkpoint_merge": ("merge_checkpoints",),
    "multilora.plan": ("Moment", "Pass", "one_hot"),
    "multilora.method": ("method", "Opt", "Method", "resolve"),
    "multilora.lab.train.lora": ("train",),
    "multilora.lab.train.text": ("train",),
    "multilora.lab.train.gates": ("train",),
    "multilora.lab.train.token_switch": ("train",),
    "multilora.lab.train.loramoe": ("train",),
    "multilora.lab.train.fisher": ("estimate",),
    "multilora.lab.train.gram": ("grams",),
    "multilora.lab.search": ("prepared",),
    "multilora.lab.score.record": ("score", "resolve", "measure"),
    "multilora.lab.evaluate.combinations": ("read_library", "combinations"),
    "multilora.lab.evaluate.evaluation": ("Plan", "arm", "evaluate"),
    "multilora.lab.evaluate.batch": ("run_batch",),
    "multilora.kernels.routed": ("routed", "routed_conv", "routed_segments", "routed_by_index"),
}
INTRO = """# API reference

Made by `python docs/make_api.py` from signatures and docstrings. The names of `multilora` are at hand after
`import multilora as ml`; all others are imported from the module that their section names. What is not here is not
promised to stay.
"""
KIND = {
    "route": ("Methods during the run", "`composer(..., method=NAME, OPTION=...)`, `multilora compose --method NAME`"),
    "merge": ("Methods before the run", "`ml.merge(loras, weights, method=NAME)`, `multilora merge --method NAME`"),
    "weigh": (
        "Methods that choose weights",
        "`resolve('weigh', NAME)(loras, objective)`, `multilora search --method NAME`",
    ),
}


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    parts = [INTRO]
    for module, names in PUBLIC.items():
        parts.append(f"## {module}\n")
        for name in names:
            parts += _object(name, getattr(importlib.import_module(module), name))
    for kind in KINDS:
        title, use = KIND[kind]
        parts.append(f"## {title}\n\n{use}\n")
        parts += [_method(record) for record in methods(kind).values()]
    return "\n".join(parts)


def _object(name: str, thing: Any) -> Iterator[str]:
    if inspect.ismodule(thing):  # multilora.merge: a package that can be called
        thing = type(thing).__call__
    if isinstance(thing, type):
        yield f"### class {name}\n\n{_signed(name, thing)}{_text(thing)}"
        for attribute, value in vars(thing).items():
            if attribute.startswith("_") and attribute != "__call__":
                continue
            inner = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
            if inspect.isfunction(inner) and inspect.getdoc(inner):
                is_call = attribute == "__call__"
                called = _signed(name.lower() if is_call else f".{attribute}", inner)
                yield f"#### {name}{'()' if is_call else '.' + attribute}\n\n{called}{_text(inner)}"
    else:
        yield f"### {name}\n\n{_signed(name, thing)}{_text(thing)}"


def _signed(name: str, thing: Any) -> str:
    """The call as a block of code, one argument a line where it would be long."""
    if hasattr(thing, "model_fields"):  # pydantic: the signature shows its validators, the source what is meant
        fields = "".join(f"    {key}: {hint}\n" for key, hint in vars(thing)["__annotations__"].items())
        return f"```text\n{name}(\n{fields})\n```\n\n"
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    told, keyword = [], False
    for p in signature.parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and not keyword:
            keyword = True
            told.append("*")
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        keyword = keyword or p.kind is p.VAR_POSITIONAL
        hint = "" if p.annotation is p.empty else f": {_hint(p.annotation)}"
        default = "" if p.default is p.empty else f"{' = ' if hint else '='}{_default(p.default)}"
        told.append(f"{star}{p.name}{hint}{default}")
    returns = "" if signature.return_annotation is signature.empty else f" -> {_hint(signature.return_annotation)}"
    line = f"{name}({', '.join(told)}){returns}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {one},\n" for one in told) + f"){returns}"
    return f"```text\n{line}\n```\n\n"


def _hint(hint: Any) -> str:
    return hint if isinstance(hint, str) else inspect.formatannotation(hint)


def _default(value: Any) -> str:
    said = getattr(value, "__name__", None) if callable(value) else None
    told = said or repr(value)
    return told if len(told) < 60 else f"{type(value).__name__}(...)"


def _text(thing: Any) -> str:
    """The docstring as it stands: its columns are aligned."""
    return f"```text\n{inspect.getdoc(thing)}\n```\n"


def _method(record: Method) -> str:
    paper = f"[{record.paper.removeprefix('https://')}]({record.paper})" if "://" in record.paper else record.paper
    lines = [
        f"### {record.kind} {record.name}\n",
        f"{record.title}.\n",
        f"From {paper}; cost: {record.cost}; laws: {', '.join(record.laws) or 'none'}.\n",
    ]
    if record.options:
        lines += ["| option | default | allowed | what |", "|---|---|---|---|"]
        for o in record.options:
            low, high = ("" if v is None else f"{v:g}" for v in (o.minimum, o.maximum))
            span = (
                f"{low} to {high}" if low and high else f"at least {low}" if low else f"at most {high}" if high else ""
            )
            allowed = ", ".join(map(str, o.choices)) or " ".join(w for w in (o.type.__name__, span) if w)
            default = "none" if o.default in (None, "") else o.default
            lines.append(f"| `{o.name}` | {default} | {allowed} | {o.help.replace('|', chr(92) + '|')} |")
        lines.append("")
    return "\n".join([*lines, _text(record.fn)])


if __name__ == "__main__":
    main()
