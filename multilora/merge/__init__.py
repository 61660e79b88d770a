"""Before the run: `(loras, weights, *, options) -> Lora`, one method per file.

The package can be called: `multilora.merge([fox, robe], [0.8, 0.6], method="linear")`.
"""

import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any


class _Merge(ModuleType):
    def __call__(
        self,
        loras: Sequence[Any],
        weights: Sequence[float | Mapping[str, float]] | None = None,
        method: Any = "linear",
        **options: Any,
    ) -> Any:
        """One Lora out of several by a merge method, named or bound; weights default to 1 each.

        A weight is a number or {glob: number} (multilora.blocks.weights_of).

        Raises ValueError for an unknown method or option, and for what the method itself refuses.
        """
        from multilora.method import resolve

        loras = list(loras)
        return resolve("merge", method, **options)(loras, [1.0] * len(loras) if weights is None else list(weights))


sys.modules[__name__].__class__ = _Merge
