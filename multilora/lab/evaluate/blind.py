"""Pictures of an evaluation for a reviewer who knows neither what was asked for nor which method drew what.

    python -m multilora.lab.evaluate.blind pages DIR OUT [PICTURES]      numbered pages, a legend, OUT/sealed.json
    python -m multilora.lab.evaluate.blind count OUT ANSWERS.json        what the reviewer and B make of them

Every method draws the same scenes, so methods are compared on equal terms. The reviewer gets the pages and the legend,
and writes {number: {category: name in the legend, or "none"}} with all numbers and categories, as JSON:

    {"1": {"character": "zib", "garment": "none"}, "2": {"character": "none", "garment": "merlo"}}

Of the embedded world only: B knows its LoRAs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from multilora.lab.evaluate.readings import Readers
from multilora.lab.evaluate.statistics import share
from multilora.lab.sheet import Cell, contact_sheet
from multilora.pipelines.load import library
from multilora.recipe import Recipe

PAGE, COLUMNS = 20, 5


def chosen(folder: str | Path, count: int, seed: int = 0) -> list[tuple[Path, Recipe, str]]:
    """About `count` pictures of an evaluation in a mixed order: all arms' pictures of as many scenes, the numbers of
    LoRAs as even as may be; each with its recipe and the name of its arm. Raises ValueError where no scene has been
    drawn by all arms."""
    scenes: dict[tuple, dict[tuple, tuple[Path, Recipe]]] = {}
    for path in sorted((Path(folder) / "pictures").glob("*.png")):
        recipe = Recipe.from_png(path)
        place = (len(recipe.loras), *(use.name for use in recipe.loras), recipe.prompt, recipe.seed)
        arm = (recipe.method, json.dumps(recipe.options, sort_keys=True), *(f"{u.weight}" for u in recipe.loras[:1]))
        if recipe.loras:
            scenes.setdefault(place, {})[arm] = (path, recipe)
    arms: dict[int, set[tuple]] = {}  # by k: a weight of 1/k is another one for each
    for place, drawn in scenes.items():
        arms.setdefault(place[0], set()).update(drawn)
    alike = {arm for some in arms.values() for arm in some if sum(a[0] == arm[0] for a in some) > 1}
    whole = [place for place, drawn in scenes.items() if len(drawn) == len(arms[place[0]])]
    if not whole:
        raise ValueError(f"{folder}: no scene is drawn by all methods of the evaluation yet")
    chance = random.Random(seed)
    chance.shuffle(whole)
    by_k: dict[int, list[tuple]] = {}
    for place in whole:
        by_k.setdefault(place[0], []).append(place)
    turns = [place for turn in range(len(whole)) for k in sorted(by_k) for place in by_k[k][turn : turn + 1]]
    most = max(1, count // max(map(len, arms.values())))
    found = [(*one, " ".join(arm) if arm in alike else arm[0])
             for place in turns[:most] for arm, one in scenes[place].items()]  # fmt: skip
    chance.shuffle(found)
    return found


def pages(folder: str | Path, out: str | Path, count: int = 200) -> int:
    """Draw the pages and the legend, seal what was asked and what B sees. Returns the number of pictures.

    Raises ValueError as `chosen` does, and for a LoRA that is not of the embedded world.
    """
    found, known, out = chosen(folder, count), library(), Path(out)
    strange = sorted({use.name for _, recipe, _ in found for use in recipe.loras} - set(known))
    if strange:
        raise ValueError(f"{folder}: {', '.join(strange[:5])}: no LoRAs of the embedded world, whose recogniser reads")
    out.mkdir(parents=True, exist_ok=True)
    images = [Image.open(path).convert("RGB") for path, *_ in found]
    wanted = [{known[use.name]["category"]: use.name for use in recipe.loras} for _, recipe, _ in found]
    readings = Readers.load("b", clip=None).read(images, [recipe.prompt for _, recipe, _ in found], wanted)
    sealed = {
        str(i): {"method": arm, "asked": asked, "b": dict(reading.seen), "prompt": recipe.prompt}
        for i, ((_, recipe, arm), asked, reading) in enumerate(zip(found, wanted, readings, strict=True), 1)
    }
    (out / "sealed.json").write_text(json.dumps(sealed, indent=1) + "\n")
    cells = [Cell(image, str(i)) for i, image in enumerate(images, 1)]
    for first in range(0, len(cells), PAGE):
        part = cells[first : first + PAGE]
        page = contact_sheet([part[i : i + COLUMNS] for i in range(0, len(part), COLUMNS)])
        page.save(out / f"page{first // PAGE + 1:02d}.png")
    names = {name for asked in wanted for name in asked.values()}
    rows: dict[str, list[Cell]] = {}
    for name, entry in known.items():
        if name in names:
            with Image.open(Path(entry["path"]).parent / entry["preview"]) as preview:
                cell = Cell(preview.convert("RGB"), f"{entry['category']}: {name}", entry["description"])
            rows.setdefault(entry["category"], []).append(cell)
    contact_sheet(list(rows.values()), title="What may be in the pictures").save(out / "legend.png")
    return len(found)


def count(sealed: str | Path, answers: str | Path) -> dict[str, Any]:
    """Agreement of the reviewer and B on the elements that were asked for, and what each makes of the methods.

    categories  category -> (both say there, only the reviewer, only B, neither)
    methods     method -> (elements asked for, seen by the reviewer, seen by B)
    agreement   [value, low, high], 95% by Wilson; kappa: Cohen's, agreement beyond that of chance
    tau         Kendall's tau-b of the methods' order by the one and by the other, [value, low, high], 95% by a
                bootstrap over the scenes

    Raises ValueError where a file is no JSON, the answers have not all pictures and categories and no others, or a
    name is not the legend's of its category.
    """
    asked, told = _read(sealed), _read(answers)
    names: dict[str, set[str]] = {}
    for each in asked.values():
        for category, name in each["asked"].items():
            names.setdefault(category, {"none"}).add(name)
    _same(f"{answers}: pictures", told, asked)
    categories = {category: [0, 0, 0, 0] for category in names}
    scenes: dict[str, dict[str, list[int]]] = {}
    for number, labels in told.items():
        if not isinstance(labels, dict):
            raise ValueError(f"{answers}: picture {number} is {labels!r:.60}, wanted {{category: name}}")
        _same(f"{answers}: picture {number}, categories", labels, names)
        for category, name in labels.items():
            if not isinstance(name, str) or name not in names[category]:
                wanted = ", ".join(sorted(names[category]))
                raise ValueError(f"{answers}: picture {number}, {category} is {name!r}, wanted one of {wanted}")
        line = scenes.setdefault(asked[number]["prompt"], {}).setdefault(asked[number]["method"], [0, 0, 0])
        for category, name in asked[number]["asked"].items():
            mine, its = labels[category] == name, asked[number]["b"][category]
            categories[category][(0 if its else 1) if mine else (2 if its else 3)] += 1
            for i, plus in enumerate((1, mine, its)):
                line[i] += plus
    both, mine, its, neither = (sum(column) for column in zip(*categories.values(), strict=True))
    total = both + mine + its + neither
    agreement = share(both + neither, total)
    by_chance = ((both + mine) * (both + its) + (neither + mine) * (neither + its)) / total**2
    chance, drawn = random.Random(0), list(scenes.values())
    taus = sorted(_tau(_methods(chance.choices(drawn, k=len(drawn)))) for _ in range(1000))
    methods = _methods(drawn)
    return {"pictures": len(told), "elements": total, "agreement": [agreement.value, agreement.low, agreement.high],
            "kappa": (agreement.value - by_chance) / (1 - by_chance) if by_chance < 1 else 1.0,
            "categories": categories, "methods": methods, "tau": [_tau(methods), taus[25], taus[974]]}  # fmt: skip


def _read(path: str | Path) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__}, wanted {{number: {{category: name}}}}")
    return found


def _same(what: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    more, less = sorted(set(given) - set(wanted)), sorted(set(wanted) - set(given))
    if more or less:
        told = [f"{word} {', '.join(some[:5])}" for word, some in (("unknown", more), ("missing", less)) if some]
        raise ValueError(f"{what}: {'; '.join(told)}")


def _methods(scenes: Iterable[dict[str, list[int]]]) -> dict[str, list[int]]:
    total: dict[str, list[int]] = {}
    for drawn in scenes:
        for name, line in drawn.items():
            total[name] = [a + b for a, b in zip(total.get(name, [0, 0, 0]), line, strict=True)]
    return total


def _tau(methods: dict[str, list[int]]) -> float:
    from scipy.stats import kendalltau

    if len(methods) < 2:
        return 1.0
    found = float(kendalltau(*([line[i] / line[0] for line in methods.values()] for i in (1, 2))).statistic)
    return 0.0 if math.isnan(found) else found  # one of the two finds all methods equal


def main(arguments: Sequence[str] | None = None) -> int:
    """`pages` or `count`, as the head of this file says. Returns the exit code."""
    reader = argparse.ArgumentParser(
        prog="python -m multilora.lab.evaluate.blind",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = reader.add_subparsers(dest="task", required=True, metavar="pages|count")
    draw = tasks.add_parser("pages", help="numbered pages, a legend, OUT/sealed.json")
    draw.add_argument("folder", metavar="DIR", type=Path, help="of an evaluation")
    draw.add_argument("out", metavar="OUT", type=Path)
    draw.add_argument("pictures", metavar="PICTURES", type=int, nargs="?", default=200, help="about so many, 200")
    reading = tasks.add_parser("count", help="what the reviewer and B make of the pictures")
    reading.add_argument("out", metavar="OUT", type=Path, help="that of pages")
    reading.add_argument("answers", metavar="ANSWERS.json", type=Path)
    given = reader.parse_args(arguments)
    try:
        if given.task == "pages":
            print(f"{pages(given.folder, given.out, given.pictures)} pictures in {given.out}")
        else:
            print(json.dumps(count(given.out / "sealed.json", given.answers), indent=1))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
