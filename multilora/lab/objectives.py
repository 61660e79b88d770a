"""What weights are chosen by: objectives `(loras, rows) -> one loss per row` as multilora.chosen describes them.

objectives_text has the few-shot loss of a language model, objectives_pictures scores of drawn pictures,
objectives_denoising losses with gradients. Here: putting a row on models, an objective out of a plain function, and
the wrapper that counts, shows and ends a search.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from multilora.attach import Bank, attached
from multilora.chosen import Enough, Row, answers_of, name_of
from multilora.lora import Lora
from multilora.pipelines.denoise import Cancelled
from multilora.sites import canonical


def set_row(bank: Bank, row: Row, component: str | None = None) -> None:
    """A row on a bank: numbers or a tensor for all layers, {Lora key: tensor [k]} for each its own."""
    if not isinstance(row, Mapping):
        bank.row = row
        return
    prefix = f"{component}." if component else ""
    table = {canonical(key.removeprefix(prefix)): value for key, value in row.items() if key.startswith(prefix)}
    bank.gate = lambda path, x: table[path]


@contextlib.contextmanager
def weighed(models: Mapping[str | None, nn.Module], loras: Sequence[Lora]) -> Iterator[Callable[[Row], None]]:
    """The LoRAs on several components for a block; yields what sets the row of all of them.

    models  component name ("unet", None for a bare model) -> module; one that no LoRA has parts for is left alone
    """
    with contextlib.ExitStack() as stack:
        banks = [
            (name, stack.enter_context(attached(model, loras, component=name, form="side")))
            for name, model in models.items()
            if any(lora.part(name) for lora in loras)
        ]

        def put(row: Row) -> None:
            for name, bank in banks:
                set_row(bank, row, name)

        yield put


def gradients(rows: Sequence[Row]) -> bool:
    """Whether the rows are tensors, alone or per layer, that a loss should be differentiable in."""
    return any(isinstance(row, (Tensor, Mapping)) for row in rows)


def each(score: Callable[[Sequence[Lora], Row], Any], name: str = "") -> Any:
    """An objective out of a function of one row: `score(loras, row) -> loss`."""

    def objective(loras: Sequence[Lora], rows: Sequence[Row]) -> list[Any]:
        return [score(loras, row) for row in rows]

    objective.name = name or name_of(score)
    return objective


class Watched:
    """An objective that counts, reports, and ends the search when `cancel` is set.

    progress  called with (rows done, lowest loss so far) after each call
    cancel    an object with is_set(), looked at before each call
    """

    def __init__(
        self, objective: Any, progress: Callable[[int, float], None] | None = None, cancel: Any = None
    ) -> None:
        self.objective, self.progress, self.cancel = objective, progress, cancel
        self.name, self.done, self.lowest = name_of(objective), 0, float("inf")

    def __call__(self, loras: Sequence[Lora], rows: Sequence[Row]) -> list[Any]:
        """Raises Enough when the search was cancelled, also within a call of the objective."""
        if self.cancel is not None and self.cancel.is_set():
            raise Enough(f"stopped after {self.done} candidates")
        try:
            found = answers_of(self.objective, loras, rows)
        except Cancelled as stopped:
            raise Enough(str(stopped)) from None
        self.done += len(found)
        numbers = [float(v.detach()) for v in found if isinstance(v, Tensor) and v.numel() == 1]
        self.lowest = min([self.lowest, *numbers, *(v for v in found if isinstance(v, float))])
        if self.progress is not None:
            self.progress(self.done, self.lowest)
        return found


def function_of(text: str) -> Callable[..., Any]:
    """The function that `file.py:function` names. The file is run: it is the user's own code.

    Raises ValueError for a text of another form, a missing file, one that fails, and a name that is no function in it.
    """
    file, colon, name = text.rpartition(":")
    path = Path(file).expanduser()
    if not colon or path.suffix != ".py" or not name.isidentifier():
        raise ValueError(f"score {text!r}: wanted file.py:function")
    if not path.is_file():
        raise ValueError(f"score {text!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"score_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"score {text!r}: {path} fails with {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"score {text!r}: {path} has no function {name!r}")
    return found
