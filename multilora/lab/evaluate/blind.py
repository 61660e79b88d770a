"""Pictures of an evaluation for a reviewer who knows neither what was asked for nor which method drew what.

    python -m multilora.lab.evaluate.blind pages DIR OUT [PICTURES]      numbered pages, a legend, OUT/sealed.json
    python -m multilora.lab.evaluate.blind count OUT ANSWERS.json        what the reviewer and B make of them

Every method draws the same scenes, so methods are compared on equal terms. The reviewer gets the pages and the legend,
and writes {number: {category: name in the legend, or "none"}}. Of the embedded world only: B knows its LoRAs.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from multilora.lab.evaluate.readings import Readers
from multilora.lab.evaluate.statistics import share
from multilora.lab.sheet import Cell, contact_sheet
from multilora.pipelines.load import library
from multilora.recipe import Recipe

PAGE, COLUMNS = 20, 5


def chosen(folder: str | Path, count: int, seed: int = 0) -> list[tuple[Path, Recipe]]:
    """About `count` pictures of an evaluation in a mixed order: all methods' pictures of as many scenes, the numbers
    of LoRAs as even as may be. Raises ValueError where no scene has been drawn by all methods."""
    scenes: dict[tuple, dict[str, tuple[Path, Recipe]]] = {}
    for path in sorted((Path(folder) / "pictures").glob("*.png")):
        recipe = Recipe.from_png(path)
        place = (len(recipe.loras), *(use.name for use in recipe.loras), recipe.prompt, recipe.seed)
        scenes.setdefault(place, {})[recipe.method] = (path, recipe)
    methods = {name for drawn in scenes.values() for name in drawn}
    whole = [place for place, drawn in scenes.items() if len(drawn) == len(methods)]
    if not whole:
        raise ValueError(f"{folder}: no scene is drawn by all of {', '.join(sorted(methods)) or 'its methods'} yet")
    chance = random.Random(seed)
    chance.shuffle(whole)
    by_k: dict[int, list[tuple]] = {}
    for place in whole:
        by_k.setdefault(place[0], []).append(place)
    turns = [place for turn in range(len(whole)) for k in sorted(by_k) for place in by_k[k][turn : turn + 1]]
    found = [one for place in turns[: max(1, count // len(methods))] for one in scenes[place].values()]
    chance.shuffle(found)
    return found


def pages(folder: str | Path, out: str | Path, count: int = 200) -> int:
    """Draw the pages and the legend, seal what was asked and what B sees. Returns the number of pictures."""
    found, known, out = chosen(folder, count), library(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images = [Image.open(path).convert("RGB") for path, _ in found]
    wanted = [{known[use.name]["category"]: use.name for use in recipe.loras} for _, recipe in found]
    readings = Readers.load("b", clip=None).read(images, [recipe.prompt for _, recipe in found], wanted)
    sealed = {
        str(i): {"method": recipe.method, "asked": asked, "b": dict(reading.seen), "prompt": recipe.prompt}
        for i, ((_, recipe), asked, reading) in enumerate(zip(found, wanted, readings, strict=True), 1)
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
    agreement   [value, low, high], 95% by Wilson
    tau         Kendall's tau-b of the methods' order by the one and by the other

    Raises ValueError for a number that is on no page, or an answer that is no name of the legend.
    """
    from scipy.stats import kendalltau

    asked, told = json.loads(Path(sealed).read_text()), json.loads(Path(answers).read_text())
    names = {name for each in asked.values() for name in each["asked"].values()}
    categories: dict[str, list[int]] = {}
    methods: dict[str, list[int]] = {}
    for number, labels in told.items():
        if number not in asked:
            raise ValueError(f"{answers}: picture {number} is on no page; there are 1 to {len(asked)}")
        for category, name in labels.items():
            if name not in names | {"none"}:
                raise ValueError(f"{answers}: picture {number}, {category} is {name!r}, wanted one of the legend's "
                                 f"names ({', '.join(sorted(names))}) or 'none'")  # fmt: skip
        for category, name in asked[number]["asked"].items():
            mine, its = labels.get(category) == name, asked[number]["b"][category]
            table = categories.setdefault(category, [0, 0, 0, 0])
            table[(0 if its else 1) if mine else (2 if its else 3)] += 1
            line = methods.setdefault(asked[number]["method"], [0, 0, 0])
            for i, plus in enumerate((1, mine, its)):
                line[i] += plus
    total = sum(map(sum, categories.values()))
    agreement = share(sum(t[0] + t[3] for t in categories.values()), total)
    order = [[line[i] / line[0] for line in methods.values()] for i in (1, 2)]
    tau = float(kendalltau(*order).statistic) if len(methods) > 1 else 1.0
    return {"pictures": len(told), "elements": total, "agreement": [agreement.value, agreement.low, agreement.high],
            "categories": categories, "methods": methods, "tau": tau}  # fmt: skip


def main(what: str, *given: str) -> None:
    """`pages` or `count`, as the head of this file says."""
    if what == "pages":
        folder, out, *number = given
        print(f"{pages(folder, out, *map(int, number))} pictures in {out}")
    else:
        out, answers = given
        print(json.dumps(count(Path(out) / "sealed.json", answers), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
