"""A Composer whose LoRAs come from a library larger than memory (multilora.resident) for the length of one picture."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from multilora.pipelines.composing import member
from multilora.schedule import Schedule
from multilora.tags import LoraTag, parse_prompt


def named(loras: Mapping[str, Any] | None) -> list[LoraTag]:
    """`{"fox": 0.8}` as the tags `<lora:fox:0.8>`. Raises ValueError naming the LoRA for a weight that is none."""
    if loras is None:
        return []
    if not isinstance(loras, Mapping) or not all(isinstance(name, str) for name in loras):
        raise ValueError(f"loras={loras!r}: wanted a dict of name -> weight")
    tags = []
    for name, weight in loras.items():
        try:
            tags.append(LoraTag(name, Schedule.parse(weight)))
        except ValueError as error:
            raise ValueError(f"weight of LoRA {name!r}: {error}") from None
    return tags


def served(call: Callable) -> Callable:
    """Composer.__call__ with the LoRAs that the request names and the composer's library has, kept while it runs."""

    @functools.wraps(call)
    def with_library(composer: Any, prompt: Any, *args: Any, loras: Any = None, **options: Any) -> Any:
        library = composer.library
        if library is None or not isinstance(prompt, str):
            return call(composer, prompt, *args, loras=loras, **options)
        tags = [*parse_prompt(prompt)[1], *named(loras)]
        names = [tag.name for tag in tags if tag.name not in composer.loras and tag.name in library]
        # Before the denoiser's lane: who waits for room must not hold up the picture that will make it.
        with library.using(names) as found:
            lent = copy.copy(composer)
            lent.loras = dict(composer.loras)
            for name, lora in found.items():
                new = member(composer.pipe, lora, name=name)
                lent.loras[name] = dataclasses.replace(new, reference=str(library.path(name)))
            return call(lent, prompt, *args, loras=loras, **options)

    return with_library
