"""The figures of docs/ideas that are not in docs/text: python docs/make_figures.py

lora.png and composition.png are drawn from docs/world/report.jsonl, guided_merge.png from review_test.json beside it;
loramoe.svg and lora_switch.svg are diagrams.
mole.png is what `multilora gates show zib_merlo_burgo --out docs/ideas/mole.png` draws.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

IDEAS, REPORT = DOCS / "ideas", DOCS / "world" / "report.jsonl"
INK, GREY, BLUE, ORANGE, PAPER = "#1a1a1a", "#6a6a6a", "#0072b2", "#d55e00", "#ffffff"


def main() -> None:
    from multilora.recipe import save_png

    for name, picture in {"lora": lora(), "composition": composition(), "guided_merge": guided_merge()}.items():
        print(save_png(picture, IDEAS / f"{name}.png") or IDEAS / f"{name}.png")
    for name, text in {"loramoe": loramoe(), "lora_switch": lora_switch()}.items():
        (IDEAS / f"{name}.svg").write_text(text, encoding="utf-8")
        print(IDEAS / f"{name}.svg")


def entries(part: str) -> list[dict[str, Any]]:
    lines = REPORT.read_text(encoding="utf-8").splitlines()
    return [e for e in map(json.loads, lines) if e["key"].startswith(f"{part}/")]


def lora() -> Any:
    """Each embedded LoRA alone: the share of pictures with its element, and without the LoRA for all together."""
    from multilora.lab.evaluate.statistics import wilson
    from multilora.lab.result_chart import Point, draw_points

    def point(name: str, mine: list[dict[str, Any]]) -> Point:
        found, asked = (sum(e[key] for e in mine) for key in ("found", "asked"))
        return Point(name, found / asked, *wilson(found, asked))

    alone = entries("alone")
    names = dict.fromkeys(e["name"] for e in alone)
    points = [point(name, [e for e in alone if e["name"] == name and e["on"]]) for name in names]
    points.append(point("the same prompts, no LoRA", [e for e in alone if not e["on"]]))
    return draw_points(points, title="One LoRA alone, weight 1", subtitle="share of pictures with its element")


def composition() -> Any:
    """Elements seen by the number of LoRAs, for the methods at weight 1."""
    from multilora.lab.evaluate.statistics import wilson
    from multilora.lab.result_chart import Point, draw_lines

    found = entries("composition")
    lines = {}
    for cell, name in {"merge, weight 1": "merge", "switch": "switch", "composite": "composite",
                       "sum of differences": "sum of differences"}.items():  # fmt: skip
        lines[name] = []
        for k in (2, 3, 4, 5):
            mine = [e for e in found if (e["cell"], e["k"]) == (cell, k)]
            seen, asked = (sum(e[key] for e in mine) for key in ("found", "asked"))
            lines[name].append(Point(name, seen / asked, *wilson(seen, asked), x=k))
    return draw_lines(lines, title="Several LoRAs in one picture", axis="LoRAs in the picture",
                      subtitle="share of the requested elements that are there, test LoRAs")  # fmt: skip


def guided_merge() -> Any:
    """What blind reviewers saw in pictures by Auto and by Merge at two weights, by the number of LoRAs."""
    from multilora.lab.evaluate.statistics import wilson
    from multilora.lab.result_chart import Point, draw_lines

    reviews = json.loads((DOCS / "world" / "review_test.json").read_text(encoding="utf-8"))
    lines = {}
    for arm, name in {"auto@1": "auto", "merge@0.8": "merge at .8", "merge@1": "merge at 1"}.items():
        lines[name] = []
        for k in (2, 3, 4, 5):
            mine = [by[str(k)][arm] for title, by in reviews.items() if "100 scenes" in title and arm in by[str(k)]]
            asked, seen = (sum(counts[i] for counts in mine) for i in (0, 1))
            lines[name].append(Point(name, seen / asked, *wilson(seen, asked), x=k))
    return draw_lines(lines, title="What reviewers saw", axis="LoRAs in the picture",
                      subtitle="share of the requested elements, test LoRAs")  # fmt: skip


def loramoe() -> str:
    """One feed-forward linear of LoRAMoE."""
    experts = ["knowledge", "knowledge", "other tasks", "other tasks"]
    parts = [_box(20, 150, 90, 40, "token x"), _box(190, 20, 190, 40, "W, frozen", GREY)]
    parts += [_arrow(110, 160, 190, 40), _arrow(380, 40, 560, 160)]
    for i, name in enumerate(experts):
        y, colour = 90 + 56 * i, BLUE if i < 2 else ORANGE
        parts += [_box(190, y, 190, 40, f"expert {i + 1}: {name}", colour), _arrow(110, 172, 190, y + 20),
                  _arrow(380, y + 20, 560, 172)]  # fmt: skip
    parts += [
        _box(190, 330, 190, 40, "router: softmax(x W_g)", INK),
        _arrow(65, 190, 190, 350),
        _arrow(380, 350, 578, 190),
        _box(560, 150, 60, 40, "+"),
        _box(660, 150, 90, 40, "token h"),
        _arrow(620, 170, 660, 170),
        _words(600, 300, "a share for every expert"),
        _words(470, 400, "balancing loss: experts of a group share the work, groups split by sample type"),
    ]
    return _svg(780, 420, parts)


def lora_switch() -> str:
    """One routing for a whole token."""
    parts = [_box(20, 120, 80, 40, "token"), _box(150, 120, 110, 40, "layer 1"), _box(150, 220, 110, 40, "router")]
    parts += [_arrow(100, 140, 150, 140), _arrow(205, 160, 205, 220), _line(260, 240, 675, 240)]
    for i, name in enumerate(("layer 2", "layer 3", "layer L")):
        x = 320 + 150 * i
        parts += [_box(x, 120, 110, 40, name), _arrow(x - (40 if i else 60), 140, x, 140)]
        parts += [_arrow(x + 55, 240, x + 55, 160)]
    parts += [_words(470, 262, "the same two LoRAs and shares for every layer")]
    parts += [_words(400, 60, "decode: the two LoRAs are merged into the weights per token, or run beside them")]
    parts += [_words(400, 84, "per-layer routers choose anew at every layer: L small decisions per token")]
    return _svg(780, 290, parts)


def _svg(width: int, height: int, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="14"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
        f'markerWidth="8" markerHeight="8" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>'
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _box(x: int, y: int, width: int, height: int, text: str, colour: str = INK) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{PAPER}" stroke="{colour}" '
        f'stroke-width="2"/>{_words(x + width / 2, y + height / 2 + 5, text, colour)}'
    )


def _words(x: float, y: float, text: str, colour: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" fill="{colour}">{text}</text>'


def _line(x: int, y: int, to_x: int, to_y: int, tip: str = "") -> str:
    return f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{GREY}" stroke-width="1.5"{tip}/>'


def _arrow(x: int, y: int, to_x: int, to_y: int) -> str:
    return _line(x, y, to_x, to_y, ' marker-end="url(#tip)"')


if __name__ == "__main__":
    main()
