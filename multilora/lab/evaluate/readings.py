"""What a picture shows, in numbers: presence of the wanted elements and CLIP score, each saying who read it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Reading:
    """Of one picture. clip: 100 cos with its prompt, nan without a scorer. seen: category -> is the element there."""

    clip: float = math.nan
    seen: Mapping[str, bool] = field(default_factory=dict)

    @property
    def presence(self) -> float:
        """Share of the wanted elements that are there; nan where nothing can see them."""
        return sum(self.seen.values()) / len(self.seen) if self.seen else math.nan

    @property
    def complete(self) -> float:
        """1 when all wanted elements are there, else 0; nan where nothing can see them."""
        return float(all(self.seen.values())) if self.seen else math.nan


def told(reading: Reading) -> str:
    """A picture's readings in a few words: "2 of 3 seen, no object; CLIP 71"."""
    missing = [c for c, there in reading.seen.items() if not there]
    words = []
    if reading.seen:
        none = f", no {', '.join(missing)}" if missing else ""
        words.append(f"{len(reading.seen) - len(missing)} of {len(reading.seen)} seen{none}")
    if not math.isnan(reading.clip):
        words.append(f"CLIP {reading.clip:.0f}")
    return "; ".join(words)


@dataclass(frozen=True)
class Readers:
    """A recogniser of the embedded world (multilora.lab.score.presence) and a CLIP scorer (a Scorer), or either.

    Tables are read by recogniser B: A is what searches may use, and what was optimised is no measurement.
    """

    recogniser: Any = None
    clip: Any = None

    @classmethod
    def load(cls, recogniser: str | Path | None = "b", clip: str | None = "embedded") -> Readers:
        """By name; None for none. Raises ValueError when a model is missing."""
        from multilora.lab.score.clip import clip_text
        from multilora.lab.score.presence import load_recogniser

        return cls(
            load_recogniser(recogniser) if recogniser is not None else None,
            clip_text(model=clip).load() if clip is not None else None,
        )

    @property
    def names(self) -> dict[str, str]:
        """Who reads: {"presence": ..., "CLIP score": ...}, with models and preprocessing."""
        named = {"presence": self.recogniser and repr(self.recogniser), "CLIP score": self.clip and self.clip.model}
        return {what: name or "not measured" for what, name in named.items()}

    def read(
        self, images: Sequence[Image.Image], prompts: Sequence[str], wanted: Sequence[Mapping[str, str]]
    ) -> list[Reading]:
        """One reading per picture. wanted: per picture, category -> element (see Recogniser.index).

        Raises UnknownName for an element that the recogniser does not know.
        """
        scores = self.clip(images, list(prompts)) if self.clip is not None and images else [math.nan] * len(images)
        if self.recogniser is None or not images:
            return [Reading(score) for score in scores]
        likely = {head: p.argmax(1).tolist() for head, p in self.recogniser.probabilities(images).items()}
        found = []
        for i, (score, elements) in enumerate(zip(scores, wanted, strict=True)):
            seen = {c: likely[c][i] == self.recogniser.index(c, label) for c, label in elements.items()}
            found.append(Reading(score, seen))
        return found


class Kept:
    """Readings that were made once, in a file of JSON lines: by picture (sha256 of its file) and by who read it."""

    def __init__(self, path: Path, readers: Readers) -> None:
        self.path, self.readers, self.by = path, readers, json.dumps(readers.names)
        self._known: dict[str, Reading] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                one = json.loads(line)
                if one["by"] == self.by:
                    clip = math.nan if one["clip"] is None else float(one["clip"])
                    self._known[one["sha256"]] = Reading(clip, dict(one["seen"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill has torn: its picture is read again

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._known

    def __getitem__(self, sha256: str) -> Reading:
        return self._known[sha256]

    def read(
        self,
        keys: Sequence[str],
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        wanted: Sequence[Mapping[str, str]],
    ) -> None:
        """Read pictures, which are not known yet, and keep what is found."""
        lines = []
        for key, one in zip(keys, self.readers.read(images, prompts, wanted), strict=True):
            self._known[key] = one
            clip = None if math.isnan(one.clip) else one.clip
            lines.append(json.dumps({"sha256": key, "by": self.by, "clip": clip, "seen": one.seen}) + "\n")
        begun = "\n" if self.path.is_file() and not self.path.read_bytes().endswith(b"\n") else ""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(begun + "".join(lines))
