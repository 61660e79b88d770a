"""A method and its options as components, from the records: one group per method, that of the chosen one shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from multilora.method import Method, Option, methods
from multilora.web.options import control, explained


class MethodBlocks:
    """Drop-down, explanation and options of the methods of a kind, built where it is made.

    name        the drop-down
    components  it and all options: inputs of an event, whose values `read` takes
    """

    def __init__(self, kind: str, value: str, **about: Any):
        self.records: dict[str, Method] = methods(kind)
        self.name = gr.Dropdown(titled(self.records), value=value, filterable=False, **about)
        self.about = gr.HTML(explained(self.records[value]), apply_default_css=False)
        self._options: list[tuple[str, Option, Any]] = []
        self._groups = []
        for name, record in self.records.items():
            with gr.Row(visible=name == value and bool(record.options), elem_classes="ml-options") as group:
                for option in record.options:
                    self._options.append((name, option, control(option, name)))
            self._groups.append((name, record, group))
        self.components = [self.name, *(component for *_, component in self._options)]
        shown = [self.about, *(group for *_, group in self._groups)]
        self.name.change(self._chosen, self.name, shown, queue=False, show_progress="hidden", api_visibility="private")

    def _chosen(self, value: str) -> list[Any]:
        groups = [gr.Row(visible=name == value and bool(record.options)) for name, record, _ in self._groups]
        return [explained(self.records[value]), *groups]

    def read(self, values: Sequence[Any]) -> tuple[str, dict[str, dict[str, Any]]]:
        """(chosen method, {method: options}) of the components' values."""
        given: dict[str, dict[str, Any]] = {name: {} for name in self.records}
        for (name, option, _), value in zip(self._options, values[1:], strict=True):
            if value is not None and value != "":  # an emptied field stands for the default
                given[name][option.name] = value
        return values[0], given

    def write(self, name: str, options: dict[str, Any]) -> list[Any]:
        """Values of the components that `read` gives back as this method with these options."""
        values = [options.get(o.name, o.default) if owner == name else o.default for owner, o, _ in self._options]
        return [name, *values]


def titled(records: dict[str, Method]) -> list[tuple[str, str]]:
    """Choices of a drop-down or a group of boxes: a method's name in words."""
    return [(name.replace("_", " "), name) for name in records]
