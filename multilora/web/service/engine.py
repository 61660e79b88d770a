"""Inside the worker: one pipeline, requests run on it one at a time, and what stands around each of them."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import math
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from multilora.pipelines.composing import denoiser_of, member
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.image import Composed, Composer
from multilora.pipelines.load import EMBEDDED, load_pipeline
from multilora.recipe import LoraUse, PictureUse, Recipe, Resolved, png_bytes
from multilora.web.service.spec import Event, Picture, Result, opened
from multilora.web.service.state import State
from multilora.web.service.worker import Answer, Task

CACHE_BYTES = 2 * 2**30  # of LoRAs that are kept in memory between requests
PREVIEW_SECONDS = 0.25  # between two previews: each costs the device some of a step, and a browser shows no more


class NotFinite(ArithmeticError):
    """A prediction with NaN or Inf in it; the message names step and LoRA."""


class OutOfMemory(MemoryError):
    """No way to run the request in the memory there is; the message says what to do."""


class Engine:
    """One pipeline on one device. `run` never raises: whatever happens becomes an Answer.

    After each request the pipeline is compared with what it was when it was loaded.
    """

    def __init__(self, base: str, device: str | None = None, clip: str = ""):
        self.device, self.clip = device, clip
        self.threads = torch.get_num_threads()
        self._loras: OrderedDict[tuple, Any] = OrderedDict()
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self.first, self.base = base, ""
        self.hold(base)

    def hold(self, base: str) -> None:
        """Load a base in place of the one there is. ValueError when it cannot be; the old one is gone then, too."""
        if base == self.base:
            return
        self.pipe: Any = None
        self.base = ""
        self._loras.clear()
        _free()
        self.pipe = load_pipeline(base, device=self.device)
        self.base = base
        self.component, self.denoiser = denoiser_of(self.pipe)
        self.before = State.of(self.pipe)

    def about(self) -> dict[str, Any]:
        """Facts of the base that is held; see Service.about."""
        from multilora import files

        composer = self.composer()
        width, height = composer.size
        own = type(self.pipe.scheduler).__name__
        compatible = sorted({own, *(c.__name__ for c in getattr(self.pipe.scheduler, "compatibles", []))})
        return {
            "base": self.base,
            "family": files.family_of_model(self.pipe),
            "pipeline": type(self.pipe).__name__,
            "denoiser": type(self.denoiser).__name__,
            "device": str(self.denoiser.device),
            "dtype": str(self.denoiser.dtype).removeprefix("torch."),
            "steps": int(composer.defaults["num_inference_steps"]),
            "guidance_scale": float(composer.defaults["guidance_scale"]),
            "width": width,
            "height": height,
            "scheduler": own,
            "schedulers": compatible,
            "tasks": composer.tasks,
            "threads": self.threads,
        }

    def composer(self) -> Composer:
        """A new Composer around the pipeline: no LoRA of another request is in it."""
        return Composer(self.pipe, base=self.base)

    # -- one request --------------------------------------------------------------------------------------------

    def run(self, task: Task, emit: Callable[[Event], None], cancel: Any) -> Answer:
        """Run a task by the action of its request."""
        from multilora.web.service.actions import ACTIONS

        call = Call(task, emit, cancel)

        def work() -> Result:
            if not task.request.recipes_of():  # a recipe names its own base
                self.hold(getattr(task.request, "base", "") or self.first)
            return ACTIONS[task.request.action](self, call)

        answer = self._answer(work, call)
        torch.set_num_threads(self.threads)
        if self.pipe is None:
            return Answer(answer.kind, code=answer.code, message=answer.message, spent=True)
        try:
            drift = self.before.differences(State.of(self.pipe))
        except Exception as error:  # a device that is lost cannot even be looked at
            drift = [f"cannot be looked at: {type(error).__name__}: {error}"]
        return Answer(answer.kind, answer.result, answer.code, answer.message, drift, answer.spent)

    def _answer(self, work: Callable[[], Result], call: Call) -> Answer:
        def note(message: Warning | str, category: type, *_: Any, **__: Any) -> None:
            if category is UserWarning:  # what is said to users; others are for those who write programs
                call.emit(Event("note", message=str(message)))

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = note
                return Answer("done", work())
        except Cancelled:
            return Answer("cancelled")
        except NotFinite as error:
            return Answer("failed", code="nan", message=str(error))
        except OutOfMemory as error:
            return Answer("failed", code="memory", message=str(error), spent=True)
        except ValueError as error:
            return Answer("failed", code="request", message=str(error))
        except Exception as error:
            if out_of_memory(error):
                return Answer("failed", code="memory", message=f"out of memory: {_first_line(error)}", spent=True)
            message = f"this request failed: {type(error).__name__}: {_first_line(error)}"
            return Answer("failed", code="failed", message=message)

    def lora(self, place: str) -> Any:
        """The Lora at a path or library name, checked against the base; kept for the next request that wants it."""
        path = Path(place)
        key = (place, path.stat().st_mtime_ns if path.suffix and path.exists() else 0)
        if key not in self._loras:
            self._loras[key] = member(self.pipe, place).lora
            while len(self._loras) > 1 and sum(map(_bytes, self._loras.values())) > CACHE_BYTES:
                self._loras.popitem(last=False)
        self._loras.move_to_end(key)
        return self._loras[key]

    def stepped(self, recipe: Recipe, step: int) -> None:
        """Called after each step of a picture, before it is told of; tests put faults in here."""

    # -- drawing ------------------------------------------------------------------------------------------------

    def draw(
        self, call: Call, recipe: Recipe, *, pictures: dict[str, bytes], masks: dict[str, bytes], preview: bool,
        score: bool, number: int = 0, of: int = 1,
    ) -> list[Picture]:  # fmt: skip
        """The pictures of a recipe, with less in one call of the model when memory is short; the recipe says so."""
        self.hold(recipe.base)
        began = time.perf_counter()
        seen = {"passes": max(1, len(recipe.loras))}

        def progress(step: int, steps: int, info: dict) -> None:
            self.stepped(recipe, step)
            seen["passes"] = max(seen["passes"], info["passes"])
            call.emit(Event("progress", step=step, steps=steps, number=number, of=of))

        def show(step: int, steps: int, image: Any) -> None:
            call.emit(Event("preview", step=step, steps=steps, number=number, of=of, image=image))

        callbacks = {"progress": progress, "cancel": call.cancel}
        if preview:
            callbacks |= {"preview": show, "preview_seconds": PREVIEW_SECONDS}
        notes: list[str] = []
        least = recipe.resolved.passes_per_call if recipe.resolved else None
        while True:
            try:
                made = self._composed(call, recipe, least, pictures, masks, callbacks)
                break
            except Exception as error:
                if not out_of_memory(error):
                    raise
                tried, why = least or seen["passes"], _first_line(error)
            _free()  # outside of the except block: its traceback holds the tensors
            if tried <= 1:
                raise OutOfMemory(
                    f"a picture of {recipe.width} x {recipe.height} with {len(recipe.loras)} LoRAs does not fit into "
                    f"the memory of this device, one model run at a time; try a smaller size, or fewer LoRAs ({why})"
                )
            least = tried // 2
            notes.append(f"out of memory with {tried} model runs in one call; drawn with {least} in one call")
            call.emit(Event("note", message=notes[-1]))
        seconds = time.perf_counter() - began
        extra = {**recipe.extra, **({"masks": _coded(masks)} if masks else {}), **({"notes": notes} if notes else {})}
        references = {use.name: use.reference for use in recipe.loras}
        uses = [u.model_copy(update={"reference": references[u.name]}) for u in made.recipe.loras]
        said = made.recipe.model_copy(update={"loras": uses, "extra": extra})
        wanted = [recipe.index] if recipe.resolved is not None else range(len(made.images))
        drawn = []
        for i in wanted:
            own = said.model_copy(update={"index": i})
            scores = self.scored([made.images[i]], recipe.prompt, recipe.loras, call)[0] if score else {}
            drawn.append(Picture(png_bytes(made.images[i], own), own, scores, seconds))
        return drawn

    def _composed(
        self, call: Call, recipe: Recipe, least: int | None, pictures: dict, masks: dict, callbacks: dict
    ) -> Composed:
        composer = self.composer()
        masks = {**_decoded(recipe.extra.get("masks")), **masks}
        for use in recipe.loras:
            mask = opened(masks[use.name]) if use.name in masks else None
            composer.add(self.lora(call.task.places[use.reference]), name=use.name, mask=mask)
        inputs = {role: opened(data) for role, data in pictures.items()}
        known = {use.role for use in recipe.pictures}
        new = [
            PictureUse(role=role, sha256=_sha256(role, image)) for role, image in inputs.items() if role not in known
        ]
        resolved = recipe.resolved
        if least is not None:
            own = resolved.model_dump() if resolved else self._resolved()
            resolved = Resolved(**{**own, "passes_per_call": least})
        inside = recipe.model_copy(
            update={
                "loras": [LoraUse(**{**u.model_dump(), "reference": "", "mask": None}) for u in recipe.loras],
                "pictures": [*recipe.pictures, *new],
                "resolved": resolved,
            }
        )
        threads = resolved.threads if resolved else self.threads
        torch.set_num_threads(threads if threads <= (os.cpu_count() or 1) else self.threads)
        with finite(self.pipe, composer, callbacks):
            return composer.compose(inside, inputs, **callbacks)

    def _resolved(self) -> dict[str, Any]:
        kind = str(self.denoiser.dtype).removeprefix("torch.")
        return {"device": str(self.denoiser.device), "dtype": kind, "threads": self.threads, "form": "auto"}

    def scored(self, images: list[Any], prompt: str, loras: list[LoraUse], call: Call) -> list[dict[str, Any]]:
        """Scores of each picture: CLIP where there is a scorer, presence on the embedded world (recogniser A)."""
        found: list[dict[str, Any]] = [{} for _ in images]
        embedded = self.base == EMBEDDED
        name = "embedded" if embedded else self.clip
        if name:
            from multilora.lab.score.clip import load_clip

            scorer = load_clip(name)
            for scores, value in zip(found, scorer.score(images, prompt), strict=True):
                scores |= {"clip": value, "clip_model": scorer.name}
        if embedded and loras:
            from multilora.lab.score.presence import load_recogniser

            recogniser = load_recogniser("a")
            odds = recogniser.probabilities(images)
            for scores in found:
                scores |= {"presence": {}, "recogniser": recogniser.name}
            for use in loras:
                card = self.lora(call.task.places[use.reference]).card
                head, label = card.category, (card.triggers or ("",))[0]
                if head not in recogniser.heads or label.split(" ")[0] not in recogniser.heads[head]:
                    continue  # an upload of a thing that the recognisers were not shown
                index = recogniser.index(head, label)
                for scores, row in zip(found, odds[head], strict=True):
                    present = bool(row.argmax() == index)
                    about = {"category": head, "label": label, "probability": float(row[index]), "present": present}
                    scores["presence"][use.name] = about
        return found


class Call:
    """A task with its way back: emit(Event), cancel.is_set()."""

    def __init__(self, task: Task, emit: Callable[[Event], None], cancel: Any):
        self.task, self.request, self.emit, self.cancel = task, task.request, emit, cancel

    def check_cancel(self) -> None:
        """Raises Cancelled when the task was."""
        if self.cancel.is_set():
            raise Cancelled("cancelled")


@contextlib.contextmanager
def finite(pipe: Any, composer: Composer, callbacks: dict[str, Any]) -> Iterator[None]:
    """In the block a prediction that is not finite raises NotFinite; it counts steps by callbacks["progress"]."""
    step, told = 0, callbacks["progress"]

    def progress(now: int, steps: int, info: dict) -> None:
        nonlocal step
        step = now
        told(now, steps, info)

    def look(module: nn.Module, args: tuple, output: Any) -> None:
        if not all(bool(torch.isfinite(t).all()) for t in _tensors(output)):
            raise NotFinite(
                f"step {step + 1}: the model's prediction has NaN or infinite values; {_suspect(composer)}"
            )

    hook = composer.denoiser.register_forward_hook(look)
    callbacks["progress"] = progress
    try:
        yield
    finally:
        callbacks["progress"] = told
        hook.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from _tensors(each)


def _suspect(composer: Composer) -> str:
    """The LoRA whose update is largest, in words."""
    sizes = {m.name: abs(m.weight.peak) * m.lora.norm() for m in composer.loras.values()}
    if not sizes:
        return "there is no LoRA, so it is the base model; try float32"
    name = max(sizes, key=lambda n: sizes[n] if math.isfinite(sizes[n]) else math.inf)
    return f"most likely LoRA {name!r}, whose update is the largest (norm {sizes[name]:.3g}); lower its weight"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory, on an accelerator or the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _bytes(lora: Any) -> int:
    tensors = [t for part in lora.values() for t in vars(part).values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _sha256(role: str, image: Any) -> str:
    from multilora.pipelines.pictures import read_picture

    return read_picture(role, image).sha256


def _coded(masks: dict[str, bytes]) -> dict[str, str]:
    """Masks for a recipe's `extra`, so that a picture's file is enough to make it again: grey PNG, base64."""
    coded = {}
    for name, data in masks.items():
        stream = io.BytesIO()
        opened(data).convert("L").save(stream, format="PNG")
        coded[name] = base64.b64encode(stream.getvalue()).decode()
    return coded


def _decoded(coded: Any) -> dict[str, bytes]:
    if not coded:
        return {}
    try:
        return {str(name): base64.b64decode(text, validate=True) for name, text in dict(coded).items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"extra.masks of the recipe cannot be read: {error}") from None
