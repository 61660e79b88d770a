"""The pictures of a session: files in its folder, newest first. They go with the session."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multilora.recipe import Recipe
from multilora.web.service import Picture, Refused, Session
from multilora.web.service.sessions import written

MOST = 40


@dataclass(frozen=True)
class Kept:
    """A picture's PNG, the bytes that it was drawn as; its recipe, scores, and the seconds that it took."""

    path: Path
    recipe: Recipe
    scores: dict[str, Any]
    seconds: float


def keep(session: Session, picture: Picture) -> Kept:
    """Write a picture into its session's history; the oldest beyond MOST go. Raises Refused when the disk is full."""
    recipe = picture.recipe
    mark = hashlib.sha256(picture.png).hexdigest()[:10]
    path = session.folder / "history" / f"multilora-{recipe.method}-{recipe.seed + recipe.index}-{mark}.png"
    about = {"scores": picture.scores, "seconds": picture.seconds}
    written(path.with_suffix(".json"), json.dumps(about).encode())
    written(path, picture.png)
    for old in files(session)[MOST:]:
        old.unlink(missing_ok=True)
        old.with_suffix(".json").unlink(missing_ok=True)
    return Kept(path, recipe, picture.scores, picture.seconds)


def files(session: Session) -> list[Path]:
    """The PNGs, newest first."""
    return sorted(
        (session.folder / "history").glob("*.png"), key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True
    )


def kept(session: Session, name: str) -> Kept:
    """A picture by its file's name. Raises Refused when the session has none, or no longer."""
    found = [path for path in files(session) if path.name == name]
    if not found:
        raise Refused("this picture is no longer kept; draw it again")
    about = json.loads(found[0].with_suffix(".json").read_text(encoding="utf-8"))
    return Kept(found[0], Recipe.from_png(found[0]), about["scores"], about["seconds"])
