"""Admission: what a file of a stranger passes before anything else sees it.

`admit` is `multilora.files.load` under the limits for strangers, within a library's folder. One reader serves both,
so whatever is admitted is exactly what is loaded, and the order is fixed: the path, the kind of file, the header, then
memory for the tensors, then what they mean (pairs, shapes, layers of the base; all of the file or nothing), then
finite values, ranks and norms. diffusers and PEFT never see the file, and its metadata configures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multilora.files import load
from multilora.limits import Limits, shown
from multilora.lora import Lora

__all__ = ["Limits", "admit", "shown"]


def admit(
    path: str | Path,
    base: Any = None,
    *,
    root: str | Path | None = None,
    limits: Limits | None = None,
    name: str | None = None,
    allow_partial: bool = False,
) -> Lora:
    """The Lora in a file that nobody vouches for, or one ValueError; nothing changes, here, in the base or on disk.

    path    a .safetensors file or a PEFT folder, never a name to be looked up elsewhere
    base    as in load; a service always gives it, since only then is every key known to name one of its layers
    root    the library's folder that the path is relative to and may not leave, by "..", absolute or through a link
    limits  None for `Limits()`
    name, allow_partial  as in load

    What is odd but allowed is listed in card.provenance["notes"]. The error names the file (its last name), the key or
    field, what was found and the limit; a file's own words in it are cut and on one line.
    """
    return load(path, base, name=name, allow_partial=allow_partial, limits=limits or Limits(), root=root)
