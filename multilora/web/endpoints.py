"""Typed functions as named endpoints of the API, and so as tools of the MCP server."""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.api_component import Api
from gradio_client.utils import python_type_to_json_schema
from pydantic import TypeAdapter, ValidationError


def endpoint(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function an endpoint with its name, its types and its docstring; called inside gr.Blocks.

    A Path is a file that is uploaded, or one to download, list[Path] several; gr.Gallery is pictures with captions.
    ValueErrors become gradio's errors, in words. Yields are what a client that looks on sees; the last one is the
    result. gr.api does the same for functions without files.
    """
    hints = typing.get_type_hints(fn)
    inputs = [
        _component(hints[p.name], None if p.default is p.empty else p.default)
        for p in inspect.signature(fn).parameters.values()
        if hints[p.name] is not gr.Request
    ]
    given = hints.get("return", Any)
    if typing.get_origin(given) is Iterator:
        given = typing.get_args(given)[0]
    kinds = typing.get_args(given) if typing.get_origin(given) is tuple else (given,)
    outputs = [_component(kind) for kind in kinds]
    gr.Button(visible=False).click(
        in_words(typed(fn, hints)), inputs, outputs, api_name=fn.__name__, show_progress="hidden"
    )
    return fn


def typed(fn: Callable[..., Any], hints: Mapping[str, Any]) -> Callable[..., Any]:
    """The function, given only values of its types: others raise ValueError naming the argument. None stands for a
    default. Gradio itself hands over whatever JSON a program sends."""
    parameters = inspect.signature(fn).parameters.values()
    kinds = {p.name: TypeAdapter(hints[p.name]) for p in parameters if hints[p.name] is not gr.Request}
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def read(args: tuple, kwargs: dict) -> dict[str, Any]:
        given = inspect.signature(fn).bind(*args, **kwargs).arguments
        for name, kind in kinds.items():
            if name not in given or (given[name] is None and name in defaults):
                given.pop(name, None)
                continue
            try:
                given[name] = kind.validate_python(given[name])
            except ValidationError as error:
                said = error.errors(include_url=False, include_context=False)[0]["msg"]
                raise ValueError(f"{name}={given[name]!r:.60}: {said}") from None
        return given

    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def going(*args: Any, **kwargs: Any) -> Iterator[Any]:
            yield from fn(**read(args, kwargs))

        return going
    return functools.wraps(fn)(lambda *args, **kwargs: fn(**read(args, kwargs)))


def in_words(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, raising gr.Error with the message of what it refuses, which is shown to whoever asked; what JSON
    has not in what it gives (paths, numbers as keys) becomes text."""
    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def going(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                with contextlib.closing(fn(*args, **kwargs)) as said:
                    for each in said:
                        yield _sent(each)
            except ValueError as error:  # Refused and pydantic's are ValueErrors
                raise gr.Error(str(error), print_exception=False) from None

        return going

    @functools.wraps(fn)
    def done(*args: Any, **kwargs: Any) -> Any:
        try:
            return _sent(fn(*args, **kwargs))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return done


def _sent(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _sent(each) for key, each in value.items()}
    return type(value)(map(_sent, value)) if type(value) in (list, tuple) else value


def telling(going: Generator[str, None, Any], shown: Callable[[str], Any]) -> Generator[Any, None, Any]:
    """`shown` of each line that a generator says; its return value. Left early, the generator is closed."""
    try:
        while True:
            yield shown(next(going))
    except StopIteration as end:
        return end.value
    finally:
        going.close()


def finished(going: Generator[Any, None, Any]) -> Any:
    """The return value of a generator, whatever it says on the way."""
    try:
        while True:
            next(going)
    except StopIteration as end:
        return end.value


def _component(hint: Any, default: Any = None) -> Any:
    either = (hint, *typing.get_args(hint))  # of a type or None
    if Path in either and typing.get_origin(hint) is not list:
        return gr.File(visible=False)
    if list[Path] in either:
        return gr.File(visible=False, file_count="multiple")
    if hint is gr.Gallery:
        return gr.Gallery(visible=False, format="png")
    return Api(default, python_type_to_json_schema(hint), label="value")
