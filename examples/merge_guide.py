"""The picture of docs/merging.md: one merge of three LoRAs by five methods, drawn with one seed on the embedded base.

    python examples/merge_guide.py                       # writes docs/merging.jpg
    python examples/merge_guide.py --seeds 1 2 --out my.jpg

Each LoRA's files go in by its name in the library; the note under a picture is how large the merged file is, what it
keeps of each LoRA (its share of the result, 100% at weight 1 when no other interferes), and for a cut, of the energy.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import multilora as ml
from multilora import writing
from multilora.compare import shares_of
from multilora.lab.sheet import Cell, contact_sheet
from multilora.pipelines.image import Composer
from multilora.pipelines.load import find_lora, library

NAMES = ("korv", "dotta", "palma")
SENTENCE = "{} in {}, on {}"
METHODS = {
    "linear": {},
    "svd": {"rank": 4},
    "ties": {"density": 0.5},
    "dare": {"density": 0.7},
    "knots": {"density": 0.5},
}
MOST = 300_000  # bytes of the picture


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    reader.add_argument("--names", nargs="+", default=NAMES, help="a character, a garment and a background")
    reader.add_argument("--seeds", nargs="+", type=int, default=[1], help="one row of merges each")
    reader.add_argument("--steps", type=int, default=None)
    reader.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "merging.jpg")
    given = reader.parse_args()

    loras = [ml.load(find_lora(name)[0]) for name in given.names]
    prompt = SENTENCE.format(*(_article(library()[name]["trigger"]) for name in given.names))
    merges = {method: ml.merge(loras, method=method, **options) for method, options in METHODS.items()}

    composer = Composer.from_pretrained("embedded")

    def draw(lora: ml.Lora | None, seed: int):
        composer.loras.clear()
        if lora is not None:
            composer.add(lora, name="one")
        print(f"drawing {lora.card.name if lora else 'the base'}, seed {seed}", flush=True)
        return composer(prompt, seed=seed, num_inference_steps=given.steps).images[0]

    first = given.seeds[0]
    rows = [[Cell(draw(None, first), "base", "no LoRA")]]
    rows[0] += [Cell(draw(lora, first), name, "alone") for name, lora in zip(given.names, loras, strict=True)]
    for seed in given.seeds:
        rows.append([Cell(draw(m, seed), _title(name), _note(m, loras, given.names)) for name, m in merges.items()])
    subtitle = f"one merge by five methods; seed {', '.join(map(str, given.seeds))}"
    sheet = contact_sheet(rows, title=prompt, subtitle=subtitle)
    print(_save(sheet, given.out))


def _title(method: str) -> str:
    return " ".join([method, *(f"{name}={value}" for name, value in METHODS[method].items())])


def _note(merged: ml.Lora, loras: list[ml.Lora], names: tuple[str, ...]) -> str:
    shares = ", ".join(f"{n} {s:.0%}" for n, s in zip(names, shares_of(merged, loras), strict=True))
    made = merged.card.provenance
    lost = made.get("energy_lost", made.get("merge", {}).get("energy_lost")) or 0.0
    size = sum(len(piece) for file in writing.rendered(merged, Path("x.safetensors")).values() for piece in file)
    cut = f"; {1 - lost:.0%} of the energy kept" if lost > 0.005 else ""
    return f"{shares}{cut}; {size / 1e6:.1f} MB"


def _save(sheet, out: Path) -> Path:
    """A JPEG of at most MOST bytes."""
    for quality in range(92, 30, -6):
        data = io.BytesIO()
        sheet.save(data, "JPEG", quality=quality, optimize=True)
        if len(data.getvalue()) <= MOST:
            break
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(data.getvalue())
    return out


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


if __name__ == "__main__":
    main()
