"""One tensor for one text: what is made anew at each step from the same encodings is the same object every time.

The denoiser's text arguments are put together per call, from encodings that stay for the picture. As one object they
can be known again, which multilora.remembered does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from multilora.pipelines import inputs

_MOST = 64  # texts that are kept: more come only where rows change at every step, and there nothing is known again


class Steady:
    """The texts of one picture; `clear` before the next."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[list[Tensor], list[int], Tensor, int]] = {}

    def clear(self) -> None:
        self._made.clear()

    def same(self, key: Hashable, sources: Sequence[Any], make: Callable[[], Any]) -> Any:
        """make(), or what it gave before for this key and these very tensors, none of them changed since."""
        if not all(isinstance(s, Tensor) and not s.is_inference() for s in sources):
            return make()
        name = (key, *map(id, sources))  # the sources are kept, so that no other tensor gets their id
        versions = [s._version for s in sources]
        if name in self._made:
            _, before, value, version = self._made[name]
            if before == versions and value._version == version:
                return value
        value = make()
        if not isinstance(value, Tensor) or value.is_inference():
            return value
        if len(self._made) >= _MOST:
            self.clear()
        self._made[name] = (list(sources), versions, value, value._version)
        return value

    def repeated(
        self, table: inputs.Inputs, arguments: Mapping[str, Any], times: int, taken: Collection[str]
    ) -> dict[str, Any]:
        """inputs.repeat, with the texts that are not in `taken` as the same tensors at every step."""
        many = inputs.repeat(table, arguments, times)
        for path in table.text if times > 1 else ():
            if path not in taken and isinstance(inputs.get(many, path), Tensor):
                value = inputs.get(many, path)
                inputs.put(many, path, self.same((path, times), [inputs.get(arguments, path)], lambda v=value: v))
        return many
