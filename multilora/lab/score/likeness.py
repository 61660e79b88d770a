"""Presence on any base: which element's reference pictures does a picture resemble most?

    FOLDER/character/fox/1.png, 2.png, ...        category / label / pictures of it
    FOLDER/character/none/1.png, ...              a label for its absence makes "is it there" a question of two

The eyes of the embedded world are trained and their accuracy is known. These are as good as the embedder and the
references are: `accuracy()` reads every reference with the others, and says so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image

from multilora.lab.score.cache import Vectors, picture_hash
from multilora.lab.score.clip import CACHE, DEVICE
from multilora.lab.score.dino import load_embedder
from multilora.lab.score.embed import Embedder
from multilora.lab.score.presence import ARCHITECTURES, Eyes, load_recogniser
from multilora.lab.score.record import score
from multilora.method import Opt
from multilora.pipelines.pictures import read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SHARPNESS = 100.0  # of the softmax over cosines: CLIP's own logit scale after training


class Likeness(Eyes):
    """Eyes made of reference pictures: {category: {label: pictures}} and an embedder.

    A label's cosine is the mean over its references; the probabilities of a category are softmax(100 cos), as CLIP
    classifies. They order labels; they are not calibrated. Raises ValueError for a category of fewer than two labels.
    """

    def __init__(
        self,
        references: Mapping[str, Mapping[str, Sequence[Image.Image]]],
        embedder: Embedder,
        name: str = "references",
    ) -> None:
        for category, labels in references.items():
            if len(labels) < 2:
                raise ValueError(
                    f"{name}: category {category} has {len(labels)} labels, wanted at least 2 to choose from; "
                    "pictures without the element make a label such as 'none'"
                )
            if empty := [label for label, pictures in labels.items() if not pictures]:
                raise ValueError(f"{name}: {category}/{empty[0]} holds no pictures")
        if not references:
            raise ValueError(f"{name}: no categories, wanted at least one")
        self.embedder = embedder
        self.heads = {category: tuple(labels) for category, labels in references.items()}
        self.name = f"{name} by {embedder.name}"
        self._known = {c: [embedder.images(p) for p in labels.values()] for c, labels in references.items()}
        self._hashes = {
            c: {n: [picture_hash(i) for i in p] for n, p in labels.items()} for c, labels in references.items()
        }

    @property
    def facts(self) -> dict[str, Any]:
        return {"embedder": self.embedder.facts, "references": self._hashes, "sharpness": SHARPNESS}

    def probabilities(self, images: Sequence[Image.Image], batch: int = 64) -> dict[str, torch.Tensor]:
        """Per category [n, labels], float32 on the CPU."""
        seen = self.embedder.images(images, batch)
        return {
            category: (SHARPNESS * torch.stack([(seen @ one.T).mean(1) for one in known], 1)).softmax(1)
            for category, known in self._known.items()
        }

    def accuracy(self) -> dict[str, tuple[int, int]]:
        """Per category (right, asked): each reference read with all others; a label with one is not asked."""
        found = {}
        for category, known in self._known.items():
            right = asked = 0
            for label, own in enumerate(known):
                if len(own) < 2:
                    continue
                for i, seen in enumerate(own):
                    rest = torch.cat([own[:i], own[i + 1 :]])
                    means = [((rest if j == label else one) @ seen).mean() for j, one in enumerate(known)]
                    right += int(torch.stack(means).argmax()) == label
                    asked += 1
            found[category] = (right, asked)
        return found


def read_references(folder: str | Path) -> dict[str, dict[str, list[Image.Image]]]:
    """{category: {label: pictures}} of a folder of folders. Raises ValueError naming what is wrong with it."""
    folder = Path(folder).expanduser()
    found: dict[str, dict[str, list[Image.Image]]] = {}
    for path in sorted(folder.glob("*/*/*")):
        if path.suffix.lower() not in SUFFIXES:
            continue
        picture = read_picture("reference picture", path).image
        found.setdefault(path.parent.parent.name, {}).setdefault(path.parent.name, []).append(picture)
    if not found:
        raise ValueError(f"references {folder}: wanted pictures as CATEGORY/LABEL/PICTURE with {', '.join(SUFFIXES)}")
    return found


@functools.cache
def load_eyes(name: str = "b", embedder: str = "embedded", device: str = "cpu", cache: str = "") -> Eyes:
    """Recogniser "a" or "b", one by its .safetensors file, or a folder of reference pictures with an embedder."""
    if name in ARCHITECTURES or not Path(name).expanduser().is_dir():
        return load_recogniser(name)
    return Likeness(read_references(name), load_embedder(embedder, device, cache), f"references {name}")


class Presence:
    """The source of the score: the eyes look at a picture once, however many elements are asked for."""

    def __init__(self, eyes: Eyes, odds: bool = False, cache: str = "") -> None:
        self.eyes, self.odds = eyes, odds
        self.model = f"{eyes!r}{', probability' if odds else ''}"
        self._seen = Vectors(self._looked, picture_hash, lambda: eyes.facts | {"heads": eyes.heads}, cache)

    def _looked(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.cat(list(self.eyes.probabilities(images).values()), 1)

    def numbers(
        self, images: list[Image.Image], texts: list[str], references: list[tuple[Image.Image, ...]]
    ) -> list[float]:
        wanted = [self.eyes.find(text) for text in texts]
        rows = self._seen(images)
        by_head = dict(zip(self.eyes.heads, rows.split([len(x) for x in self.eyes.heads.values()], 1), strict=True))
        picked = [(by_head[head][n], index) for n, (head, index) in enumerate(wanted)]
        return [float(row[i]) if self.odds else float(int(row.argmax()) == i) for row, i in picked]


EYES = Opt("recogniser a or b of the embedded world, its .safetensors file, or a folder CATEGORY/LABEL/PICTURE")


@score(title="Presence of an element", needs=("element",), unit="0 or 1")
def presence(
    *,
    eyes: Annotated[str, EYES] = "b",
    embedder: Annotated[str, Opt("for a folder: a CLIP as clip_text takes it, or the folder of a DINO")] = "embedded",
    odds: Annotated[bool, Opt("the probability instead of yes or no")] = False,
    device: Annotated[str, DEVICE] = "cpu",
    cache: Annotated[str, CACHE] = "",
) -> Presence:
    """Is the element in the picture? Recogniser b measures; a is for searches, which must not be measured by it."""
    return Presence(load_eyes(eyes, embedder, device, cache), odds, cache)
