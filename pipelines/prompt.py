"""Prompt encodings: one per distinct row of text-encoder weights, swapped in by the denoiser hook.

The pipeline calls its own `encode_prompt` as always; we stand in front of it for one composition, remember how it was
called, and call it again under another row when a pass needs that.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from multilora.attach import attached
from multilora.method import unknown
from multilora.pipelines.inputs import copied, encodings_of, inputs_of
from multilora.pipelines.lanes import lane
from multilora.pipelines.members import Member

MODES = ("per_row", "all", "first", "none")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Encodings:
    """The encodings of one picture's prompts by row.

    mode  "per_row": each pass runs on the prompt encoded under its own LoRAs; "all", "first", "none": one encoding
          for every pass, under all LoRAs, the first one, or none (the published code has "all" in Composite and
          "first" in Switch).
    """

    def __init__(self, pipe: Any, denoiser: Any, members: Sequence[Member], mode: str = "per_row"):
        if mode not in MODES:
            raise unknown("text_encoder mode", mode, MODES)
        self.pipe, self.denoiser, self.members, self.mode = pipe, denoiser, list(members), mode
        present = [c for c in TEXT_ENCODERS if getattr(pipe, c, None) is not None]
        self.encoders = [getattr(pipe, c) for c in present]
        self.components = [c for c in present if any(m.lora.part(c) for m in self.members)]
        self.calls: list[tuple[tuple, dict]] = []
        self._cache: dict[tuple[int, tuple[float, ...]], dict[str, Any]] = {}
        self._edited: dict[str, dict[str, Any]] = {}
        self._fallback = ""
        table = inputs_of(denoiser)
        self._most = 0 if table is None else 2 if table.negative == "second" else 1  # calls for one picture
        self.pictures = 0  # pictures that the pipeline encodes for, 0 while unknown
        self.used = False  # set by the denoiser: the next encode_prompt belongs to a new picture

    @property
    def swaps(self) -> bool:
        """Whether passes with different rows have different encodings at all."""
        return bool(self.components) and self.mode == "per_row" and not self._fallback

    def row(self, active: Sequence[float]) -> tuple[float, ...]:
        """[loras] text-encoder weights when LoRA i is in the pass with share active[i] of its weight."""
        texted = [any(m.lora.part(c) for c in self.components) for m in self.members]
        return tuple(m.text_weight * a if has else 0.0 for m, a, has in zip(self.members, active, texted, strict=True))

    def _start_row(self) -> tuple[float, ...]:
        k = len(self.members)
        first = [1.0] + [0.0] * (k - 1)
        return self.row({"first": first, "none": [0.0] * k}.get(self.mode, [1.0] * k))

    @contextlib.contextmanager
    def listening(self) -> Iterator[Encodings]:
        """Stand in front of `pipe.encode_prompt` for the block."""
        original = getattr(self.pipe, "encode_prompt", None)
        if original is None:  # a modular pipeline, whose text blocks run once
            with contextlib.ExitStack() as stack:
                if self.components:
                    self.fall_back("this pipeline has no encode_prompt")
                    self._attach(stack, self._start_row())
                yield self
            return
        check = getattr(self.pipe, "check_inputs", None)  # Z-Image has none

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            return self._first_encoding(original, args, kwargs)

        def check_inputs(*args: Any, **kwargs: Any) -> Any:
            self._restart()  # a picture begins; the last one may have ended before its first call of the denoiser
            return check(*args, **kwargs)

        self._original = original
        with contextlib.ExitStack() as stack:
            stack.enter_context(_instead(self.pipe, "encode_prompt", encode_prompt))
            if check is not None:
                stack.enter_context(_instead(self.pipe, "check_inputs", check_inputs))
            yield self

    def _restart(self) -> None:
        self.calls.clear()
        self._cache.clear()
        self._edited.clear()
        self._fallback = ""
        self.pictures, self.used = 0, False

    def begins(self, new_picture: bool) -> None:
        """The denoiser is called, `new_picture` for the first time in a picture."""
        if new_picture and self.used and self.calls:  # the pipeline encoded nothing for this one
            self._restart()
        self.used = True
        if new_picture and self.swaps and not self.calls:
            self.fall_back("the prompt came as embeddings, so the LoRAs' text-encoder parts cannot act on it")

    def fall_back(self, why: str) -> None:
        """From here on one encoding for all passes, with one warning."""
        if not self._fallback and self.mode == "per_row":
            warnings.warn(f"text_encoder='per_row' is not possible here: {why}. Running as 'all'.", stacklevel=3)
        self._fallback = why

    def _first_encoding(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        if self.used or len(self.calls) == self._most > 0:
            self._restart()
        row = self._start_row()
        given = [v for n, v in kwargs.items() if n.endswith("prompt_embeds") and v is not None]
        if given and self.components:
            self.fall_back("the prompt came as embeddings, so the LoRAs' text-encoder parts cannot act on it")
        try:
            returned = self._encode(original, args, kwargs, row)
        except BaseException:
            self._restart()  # this picture ends here; its calls are no part of the next one
            raise
        named = encodings_of(self.denoiser, returned)
        if named is not None:
            self._cache[len(self.calls), row] = named
            # A list has one entry for each prompt, however many pictures are made of it.
            embeds = named["prompt_embeds"]
            self.pictures = self.pictures or (embeds.shape[0] if isinstance(embeds, Tensor) else 0)
        elif self.components:
            self.fall_back(f"{type(self.pipe).__name__} is not in the table of prompt encodings")
        self.calls.append((args, kwargs))
        return returned

    def _encode(self, original: Callable, args: tuple, kwargs: dict, row: tuple[float, ...]) -> Any:
        with contextlib.ExitStack() as stack:
            self._attach(stack, row)
            # Copies: Z-Image's encode_prompt writes its chat template into the caller's list of prompts.
            return original(*copied(args, _same), **copied(kwargs, _same))

    def _attach(self, stack: contextlib.ExitStack, row: tuple[float, ...]) -> None:
        """The LoRAs' text-encoder parts under `row`, until the stack closes."""
        for encoder in self.encoders:  # another pipeline may share them
            stack.enter_context(lane(encoder))
        for component in self.components:
            model = getattr(self.pipe, component)
            bank = stack.enter_context(attached(model, [m.lora for m in self.members], component=component))
            bank.row = row

    def get(self, row: tuple[float, ...], call: int = 0) -> dict[str, Any]:
        """Encoding by name of the prompt of `encode_prompt`'s call number `call`, under the given row."""
        key = (call, row)
        if key not in self._cache:
            args, kwargs = self.calls[call]
            self._cache[key] = encodings_of(self.denoiser, self._encode(self._original, args, kwargs, row))
        return self._cache[key]

    @property
    def prompts(self) -> list[str]:
        """The texts of the first call, "prompt" before "prompt_2"; none where only embeddings are known."""
        if not self.calls:
            return []
        return [text for value in self._texts().values() for text in ([value] if isinstance(value, str) else value)]

    def encoded(self, edit: Callable[[str], str]) -> dict[str, Any]:
        """Embeddings by name of the first call's texts as `edit` changes them, with no LoRA in the text encoders.

        For a denoiser that is not in the table: what `encode_prompt` returns first.
        """
        own = self._texts()
        texts = {
            name: edit(value) if isinstance(value, str) else [edit(text) for text in value]
            for name, value in own.items()
        }
        key, none = repr(texts), self.row([0.0] * len(self.members))
        if key not in self._edited:
            named = self._cache.get((0, none)) if texts == own else None
            if named is None:
                args, kwargs = self.calls[0]
                given = inspect.signature(self._original).bind(*args, **kwargs)
                given.arguments.update(texts)
                returned = self._encode(self._original, given.args, given.kwargs, none)
                named = encodings_of(self.denoiser, returned) or {"prompt_embeds": returned[0]}
            positive = {n: v for n, v in named.items() if not n.startswith("negative")}
            self._edited[key] = {n: v for n, v in positive.items() if "embeds" in n}
        return self._edited[key]

    def _texts(self) -> dict[str, Any]:
        """Arguments of the first call that hold texts: a string or a list of strings by name."""
        args, kwargs = self.calls[0]
        given = inspect.signature(self._original).bind(*args, **kwargs).arguments
        found = {name: given.get(name) for name in ("prompt", "prompt_2", "prompt_3")}
        return {name: value for name, value in found.items() if value and _is_text(value)}


@contextlib.contextmanager
def _instead(pipe: Any, name: str, function: Callable) -> Iterator[None]:
    """`function` in the place of one pipeline's method, for the block."""
    own = pipe.__dict__.get(name)
    try:
        pipe.__dict__[name] = function
        yield
    finally:
        if own is None:
            pipe.__dict__.pop(name, None)
        else:
            pipe.__dict__[name] = own


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))
