"""Gate files: a .safetensors with the gate's tensors, and a card that names its LoRAs by sha256.

    gate = read_gate("fox_robe.safetensors")          # or the name of an embedded one
    order = gate.order([fox, robe])                    # a gate for other LoRAs is refused, by name

The card stands in the header's metadata as JSON under "multilora_gate".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora.limits import Limits
from multilora.lora import Lora
from multilora.method import unknown
from multilora.reading import parse_json, read_tensors
from multilora.stored import write_tensors

CARD = "multilora_gate"
VERSION = 1
# A gate of a large model has a few hundred layers of some 10^4 values each.
LIMITS = Limits(file_bytes=2**30)
_FIELDS = {"version": int, "kind": str, "loras": list, "settings": dict, "recipe": dict}


@dataclass(frozen=True)
class Gate:
    """A gate that was read or trained.

    kind      which method it is for: "mole", "loramoe", "token_switch"
    loras     its LoRAs in its own order, each {"name", "sha256"}
    tensors   by name, floating point
    settings  what the kind needs beside them (JSON-able); recipe: how it was made
    source    file name, for errors; sha256 of the file, "" for one that was not read
    """

    kind: str
    loras: tuple[Mapping[str, str], ...]
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: str = "gate"
    sha256: str = ""

    @property
    def names(self) -> list[str]:
        return [lora["name"] for lora in self.loras]

    def order(self, loras: Sequence[Lora]) -> list[int]:
        """[loras] which of the gate's LoRAs each of them is; those that are missing are masked out.

        Raises ValueError naming the first LoRA that the gate does not know, or that is there twice.
        """
        known = {lora["sha256"]: i for i, lora in enumerate(self.loras)}
        found: list[int] = []
        for i, lora in enumerate(loras):
            name = lora.card.name or f"number {i + 1}"
            at = known.get(identity(lora))
            if at is None:
                same = " (a LoRA of this name, but another file: trained anew?)" if name in self.names else ""
                raise ValueError(
                    f"gate {self.source}: made for {', '.join(self.names)}; LoRA {name!r} is none of them{same}. Use "
                    f"these LoRAs, or train a gate for yours: multilora train gate"
                )
            if at in found:
                raise ValueError(f"gate {self.source}: LoRA {name!r} is in the set twice, the gate has it once")
            found.append(at)
        return found

    def need(self, *kinds: str) -> Gate:
        """Itself. Raises ValueError when it is a gate of another kind."""
        if self.kind not in kinds:
            raise ValueError(f"gate {self.source}: a {self.kind} gate, wanted {' or '.join(kinds)}; use that method")
        return self


def identity(lora: Lora) -> str:
    """sha256 of the LoRA's file; of keys and values where it was computed in memory."""
    if lora.card.sha256:
        return lora.card.sha256
    digest = hashlib.sha256()
    for key in sorted(lora):
        part = lora[key]
        for name, tensor in sorted(vars(part).items()):
            if isinstance(tensor, Tensor):
                digest.update(f"{key} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def named(loras: Sequence[Lora]) -> tuple[dict[str, str], ...]:
    """The LoRAs of a card: their names (a number where there is none) and identities."""
    return tuple({"name": lora.card.name or f"lora {i + 1}", "sha256": identity(lora)} for i, lora in enumerate(loras))


def write_gate(gate: Gate, path: str | Path) -> Path:
    """Write a gate as `path`, a .safetensors file, whole or not at all.

    Raises ValueError for another ending and for a tensor that is not finite.
    """
    path = Path(path).expanduser()
    for name, tensor in gate.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path.name}: {name} is not finite; the training diverged, try a lower learning rate")
    card = {"version": VERSION, "kind": gate.kind, "loras": [dict(lora) for lora in gate.loras],
            "settings": dict(gate.settings), "recipe": dict(gate.recipe)}  # fmt: skip
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in gate.tensors.items()}
    return write_tensors(path, layout, gate.tensors.values(), {CARD: json.dumps(card), "format": "pt"})


def embedded_gates() -> dict[str, Path]:
    """The gates that come with multilora, by name."""
    import multilora.assets

    folder = Path(next(iter(multilora.assets.__path__))) / "gates"
    return {path.stem: path for path in sorted(folder.glob("*.safetensors"))}


def find_gate(name: str | Path) -> Path:
    """The file of a gate given by path or by its embedded name. Raises ValueError for neither."""
    path = Path(name).expanduser()
    known = embedded_gates()
    if path.is_file() or str(name) not in known:
        if not path.is_file():
            if path.suffix == ".safetensors" or path.parent != Path("."):
                raise ValueError(f"gate {str(name)!r}: no such file")
            raise unknown("gate (a .safetensors file, or an embedded one)", name, known)
        return path
    return known[str(name)]


def read_gate(name: str | Path) -> Gate:
    """The gate in a file, or an embedded one by name, checked.

    Raises ValueError naming the file and what is wrong: not safetensors, no card, a field that is missing or of
    another type, a newer version, a tensor that is not floating point or not finite.
    """
    path = find_gate(name)
    tensors, metadata, digest = read_tensors(path, LIMITS)
    if CARD not in metadata:
        raise ValueError(f"{path.name}: no gate, its header has no {CARD!r}; wanted a file of multilora train gate")
    card = parse_json(metadata[CARD], where=f"{path.name}: {CARD}", limits=LIMITS)
    if not isinstance(card, dict):
        raise ValueError(f"{path.name}: {CARD} is a {type(card).__name__}, wanted an object")
    for key, kind in _FIELDS.items():
        if not isinstance(card.get(key), kind) or isinstance(card.get(key), bool):
            raise ValueError(f"{path.name}: {CARD}.{key} is {card.get(key)!r:.60}, wanted a {kind.__name__}")
    if card["version"] > VERSION:
        raise ValueError(f"{path.name}: a gate of version {card['version']}, this multilora reads up to {VERSION}")
    for i, lora in enumerate(card["loras"]):
        if not isinstance(lora, dict) or not all(isinstance(lora.get(f), str) for f in ("name", "sha256")):
            raise ValueError(f"{path.name}: {CARD}.loras[{i}] is {lora!r:.60}, wanted a name and a sha256")
    hashes = [lora["sha256"] for lora in card["loras"]]
    if not hashes or len(set(hashes)) < len(hashes):
        raise ValueError(f"{path.name}: {CARD}.loras has {len(hashes)} LoRAs, wanted at least one and none twice")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path.name}: {key} holds no finite floating-point numbers")
    loras = tuple({"name": lora["name"], "sha256": lora["sha256"]} for lora in card["loras"])
    return Gate(card["kind"], loras, tensors, card["settings"], card["recipe"], path.name, digest)


def setting(gate: Gate, name: str, kind: type | tuple[type, ...], allowed: Sequence[Any] = ()) -> Any:
    """One of a gate's settings. Raises ValueError naming file and setting when it is another type or not allowed."""
    value = gate.settings.get(name)
    odd = (kind is not bool and isinstance(value, bool)) or (isinstance(value, float) and not math.isfinite(value))
    if not isinstance(value, kind) or odd or (allowed and value not in allowed):
        wanted = " or ".join(map(repr, allowed)) or getattr(kind, "__name__", "another type")
        raise ValueError(f"gate {gate.source}: setting {name} is {value!r:.60}, wanted {wanted}")
    return value


def heads_in(gate: Gate) -> dict[str, tuple[str, int]]:
    """Group -> (path of the layer that its gate looks at, width), of the setting "heads". Raises ValueError."""
    heads: dict[str, tuple[str, int]] = {}
    for group, head in setting(gate, "heads", dict).items():
        fits = isinstance(head, list) and len(head) == 2 and isinstance(head[0], str) and type(head[1]) is int
        if not fits or head[1] < 1:
            raise ValueError(f"gate {gate.source}: setting heads[{group!r}] is {head!r:.60}, wanted [path, width]")
        heads[group] = (head[0], head[1])
    return heads


def tensor(gate: Gate, name: str, *shape: int) -> Tensor:
    """One of a gate's tensors. Raises ValueError naming file and tensor when it is missing or of another shape."""
    found = gate.tensors.get(name)
    if found is None or tuple(found.shape) != shape:
        got = "missing" if found is None else f"of shape {list(found.shape)}"
        raise ValueError(f"gate {gate.source}: {name} is {got}, wanted {list(shape)}")
    return found
