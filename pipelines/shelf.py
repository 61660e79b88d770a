"""The LoRAs of one picture: a Composer's own, those that a prompt or a recipe names, those of its library.

A library (multilora.resident) lends its LoRAs for the length of the picture.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from multilora.method import UnknownName, unknown
from multilora.pipelines.composing import member, tagged
from multilora.pipelines.members import Member
from multilora.recipe import LoraUse, Recipe
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


def asked_for(composer: Any, prompt: str, loras: Mapping[str, Any] | None) -> tuple[str, list[Member]]:
    """The prompt without its `<lora:...>` tags, and the composer's members with those that tags and `loras` name.

    A tag that names a member gives that member its weight for this picture. Raises ValueError as `tagged` does, and
    UnknownName for a name beside the composer's library.
    """
    clean, tags = parse_prompt(prompt)
    members = dict(composer.loras)
    for tag in (*tags, *named(loras)):
        if tag.name not in members:
            _check_name(composer, tag.name)
        members[tag.name] = tagged(composer.pipe, tag, members.get(tag.name))
    return clean, list(members.values())


def _check_name(composer: Any, name: str) -> None:
    """Raise UnknownName where a composer with a library would open a file that is not in it."""
    if _closed_to_paths(composer):
        error = unknown("LoRA of the library", name, [*composer.library.names, *composer.loras])
        raise UnknownName(f"{error} Files by path: Composer(library=..., paths=True)")


def _closed_to_paths(composer: Any) -> bool:
    return composer.library is not None and not composer.paths


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


@contextlib.contextmanager
def remade(composer: Any, recipe: Recipe) -> Iterator[Any]:
    """A composer with the LoRAs of a recipe and no others; those of a library are kept for the length of the block.

    Raises ValueError when a LoRA has no file, or its file has changed (sha256), and UnknownName for one beside the
    composer's library.
    """
    library = composer.library
    shelved = [] if library is None else [use for use in recipe.loras if _on_shelf(composer, use)]
    with library.using([use.name for use in shelved]) if shelved else contextlib.nullcontext({}) as found:
        again = copy.copy(composer)
        again.loras, again.library = {}, None
        for use in recipe.loras:
            own = composer.loras.get(use.name)
            source, reference = use.reference or (own.lora if own else None), use.reference
            if use.name in found:
                source, reference = found[use.name], str(library.path(use.name))
            elif _closed_to_paths(composer) and own is not None and own.reference == use.reference:
                source = own.lora
            elif use.reference:
                _check_name(composer, use.reference)
            if source is None:
                raise ValueError(f"LoRA {use.name!r} of the recipe has no file; add it under that name first")
            new = again.add(
                source,
                name=use.name,
                weight=use.weight,
                text_encoder_weight=use.text_encoder_weight,
                blocks=use.blocks,
                positive_only=use.positive_only,
                mask=use.mask or (own.mask if own else None),
            )
            again.loras[use.name] = dataclasses.replace(new, reference=reference)
            sha256 = new.lora.card.sha256
            if use.sha256 and sha256 and sha256 != use.sha256:
                raise ValueError(
                    f"LoRA {use.name!r} at {reference!r} is not the file of the recipe: sha256 {sha256[:12]}, the "
                    f"recipe has {use.sha256[:12]}"
                )
        yield again


def _on_shelf(composer: Any, use: LoraUse) -> bool:
    """Whether a recipe's LoRA is the library's of that name: its file, or whatever else it was when paths are not
    opened. Its sha256 decides then."""
    own = composer.loras.get(use.name)
    if use.name not in composer.library or (own is not None and own.reference == use.reference):
        return False
    return not composer.paths or use.reference in ("", str(composer.library.path(use.name)))
