"""Who draws the items of a batch: a renderer, and this process as the one that runs it.

A renderer is a callable `(recipe, cancel) -> (PIL picture, recipe of the picture)`. `make()` makes one; it must be
picklable where workers are other processes (multilora/lab/evaluate/ray_workers.py).
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from multilora.lab.evaluate.items import Item
from multilora.recipe import Recipe, png_bytes

Renderer = Callable[[Recipe, Any], tuple[Any, Recipe]]
DRAWN, WRONG, KILLED, BACK, UNUSABLE = "drawn", "wrong", "killed", "back", "unusable"
LORA_BYTES = 2 * 2**30  # LoRAs that a worker keeps in memory


class Unusable(Exception):
    """A renderer that can draw nothing at all, such as one whose base does not load: no fault of the item."""


@dataclass(frozen=True)
class Outcome:
    """What came of an item in a worker's hands.

    end      DRAWN, WRONG (the item's own error), KILLED (the worker was), BACK (given back), UNUSABLE (the renderer)
    png      the picture's file, when DRAWN
    error    in words, when WRONG or UNUSABLE
    """

    item: Item
    end: str
    png: bytes = b""
    error: str = ""
    seconds: float = 0.0
    worker: str = ""


class Workers(Protocol):
    """What runs the renderers. `shares_fate`: an item that kills its process kills the driver."""

    shares_fate: bool

    def free(self) -> int:
        """How many items can be given now."""

    def busy(self) -> int:
        """How many items are in hand."""

    def give(self, item: Item) -> None:
        """Have an item drawn by one that is free."""

    def results(self, stop: Any) -> list[Outcome]:
        """The outcomes since the last call; waits a moment, or for the picture, where there is none yet."""

    def end(self, seconds: float) -> list[Outcome]:
        """Stop: what is finished within `seconds`, the rest given back."""


def draw(renderer: Renderer, item: Item, cancel: Any = None) -> Outcome:
    """Draw an item. Its errors become an outcome; one that comes after `cancel` was set gives the item back."""
    began = time.monotonic()
    worker = f"{socket.gethostname()}:{os.getpid()}"
    try:
        image, recipe = renderer(item.recipe, cancel)
        recipe = recipe.model_copy(update={"extra": {**recipe.extra, "item": item.id}})
        png = png_bytes(image, recipe)
    except Unusable as error:
        return Outcome(item, UNUSABLE, error=str(error), worker=worker)
    except Exception as error:
        seconds = time.monotonic() - began
        if cancel is not None and cancel.is_set():
            return Outcome(item, BACK, seconds=seconds, worker=worker)
        return Outcome(item, WRONG, error=f"{type(error).__name__}: {error}", seconds=seconds, worker=worker)
    return Outcome(item, DRAWN, png, seconds=time.monotonic() - began, worker=worker)


class Crash:
    """A file that gets the traceback when this process dies of a segmentation fault, an abort or the like."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def watch(self) -> None:
        self._file = open(self.path, "w")  # noqa: SIM115 (written to by a dying process)
        self._before = faulthandler.is_enabled()
        faulthandler.enable(self._file, all_threads=False)

    def close(self) -> None:
        faulthandler.disable()
        if self._before and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)  # sys.stderr may be a stand-in without a file
        self._file.close()
        self.path.unlink(missing_ok=True)

    def read(self) -> str:
        """What a process that died has left, and "" when it was killed from outside; it is told once."""
        try:
            text = self.path.read_text(errors="replace").strip()
            self.path.unlink()
        except OSError:
            return ""
        return f"its process crashed: {text[:2000]}" if text else ""


class InProcess:
    """This process draws, one item at a time."""

    shares_fate = True

    def __init__(self, make: Callable[[], Renderer], folder: Path) -> None:
        self._renderer = make()
        self._crash = Crash(crash_file(folder))
        self._crash.watch()
        self._item: Item | None = None

    def free(self) -> int:
        return int(self._item is None)

    def busy(self) -> int:
        return int(self._item is not None)

    def give(self, item: Item) -> None:
        self._item = item

    def results(self, stop: Any) -> list[Outcome]:
        item, self._item = self._item, None
        return [draw(self._renderer, item, stop)] if item is not None else []

    def end(self, seconds: float) -> list[Outcome]:
        self._crash.close()
        item, self._item = self._item, None
        return [Outcome(item, BACK)] if item is not None else []


def crash_file(folder: Path, worker: str = "driver") -> Path:
    return Path(folder) / f".crash-{worker}.txt"


class ComposerRenderer:
    """Draws recipes with one Composer, whose base is loaded when a recipe asks for another; LoRAs are kept.

    device   "cpu", "cuda", ...; default the best there is
    threads  of torch while it draws, None: as they are. They may decide the last bits of a picture
    """

    def __init__(self, device: str | None = None, threads: int | None = None) -> None:
        self.device, self.threads = device, threads
        self._for: tuple[str, str] | None = None
        self._composer: Any = None

    def __call__(self, recipe: Recipe, cancel: Any = None) -> tuple[Any, Recipe]:
        out = self.composed(recipe, cancel)
        return out.images[recipe.index], out.recipe

    def composed(self, recipe: Recipe, cancel: Any = None) -> Any:
        """What the Composer gives for a recipe."""
        import torch

        before = torch.get_num_threads()
        try:
            torch.set_num_threads(self.threads or before)
            return self._composer_for(recipe).compose(recipe, cancel=cancel)
        finally:
            torch.set_num_threads(before)

    def _composer_for(self, recipe: Recipe) -> Any:
        wanted = (recipe.base, recipe.controlnet)
        if self._for != wanted:
            self._composer = self._for = None  # two bases at once may be more than memory holds
            try:
                made = keeping_composer().from_pretrained(
                    recipe.base, device=self.device, controlnet=recipe.controlnet or None
                )
            except Exception as error:
                raise Unusable(f"base {recipe.base!r}: {error}") from error
            self._composer, self._for = made, wanted
        return self._composer


def keeping_composer() -> type:
    """A Composer that reads a LoRA's file once and keeps what it read, up to LORA_BYTES of them."""
    from multilora.pipelines.image import Composer

    class Keeping(Composer):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.shelf: OrderedDict[str, tuple[Any, str]] = OrderedDict()
            super().__init__(*args, **options)

        def add(self, lora: Any, name: str | None = None, weight: Any = None, **options: Any) -> Any:
            if not isinstance(lora, (str, Path)):
                return super().add(lora, name, weight, **options)
            shelf = self.shelf  # one for all: Composer.compose works on a copy that shares it
            if str(lora) not in shelf:
                new = super().add(lora, name, weight, **options)
                shelf[str(lora)] = (new.lora, new.reference)
                while len(shelf) > 1 and sum(_bytes(kept) for kept, _ in shelf.values()) > LORA_BYTES:
                    shelf.popitem(last=False)
                return new
            shelf.move_to_end(str(lora))
            kept, reference = shelf[str(lora)]
            new = dataclasses.replace(super().add(kept, name, weight, **options), reference=reference)
            self.loras[new.name] = new
            return new

    return Keeping


def _bytes(lora: Any) -> int:
    tensors = (t for part in lora.values() for t in vars(part).values() if hasattr(t, "untyped_storage"))
    return sum(t.numel() * t.element_size() for t in tensors)
