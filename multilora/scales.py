"""What a file says beside its tensors that decides their scale: PEFT's configuration, diffusers' metadata.

A configuration never chooses modules or shapes here; it is refused where it contradicts the tensors or means another
kind of adapter.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from multilora.limits import shown
from multilora.lora import COMPONENTS
from multilora.reading import parse_json

# Fields of a PEFT configuration that change what the weights mean; set, they make the adapter another kind.
_OTHER_PEFT = {
    "modules_to_save": "whole modules saved beside the LoRA (modules_to_save)",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA of bare parameters (target_parameters)",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "megatron_config": "Megatron layers",
    "arrow_config": "Arrow routing",
}
# Initialisations that change the base itself when the adapter is put in: the tensors alone are not the update.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
KINDS = ("LORA", "LOHA", "LOKR")  # PEFT's names of what is read
SCALE_CAP = 1e4  # largest |alpha / rank|; trainers use at most a few hundred, 1e9 is a broken or hostile file


class Scales:
    """Alpha, rsLoRA and kind of each layer, as diffusers' metadata or a PEFT configuration give them."""

    def __init__(self, metadata: Mapping[str, str], config: Mapping[str, Any] | None, source: str) -> None:
        self.source, self.sections = source, {}
        if config is not None:
            self.sections[""] = self._checked(dict(config), "adapter_config.json")
        elif "lora_adapter_metadata" in metadata:
            text = metadata["lora_adapter_metadata"]
            fields = parse_json(text, where=f"{source}: metadata lora_adapter_metadata")
            if not isinstance(fields, dict):
                raise ValueError(f"{source}: metadata lora_adapter_metadata holds a {type(fields).__name__}")
            for component in COMPONENTS:
                own = {k.removeprefix(component + "."): v for k, v in fields.items() if k.startswith(component + ".")}
                if own:
                    self.sections[component] = self._checked(own, "lora_adapter_metadata")
            if not self.sections and fields:
                self.sections[""] = self._checked(fields, "lora_adapter_metadata")

    def _checked(self, fields: dict[str, Any], where: str) -> dict[str, Any]:
        kind = str(fields.get("peft_type", "LORA")).rpartition(".")[2]
        if kind not in KINDS:
            more = "; run it with multilora.pipelines.xlora.load_xlora" if kind == "XLORA" else ""
            known = ", ".join(KINDS)
            raise ValueError(f"{self.source}: {where} says peft_type={shown(kind)}, read here are {known}{more}")
        for name, other in _OTHER_PEFT.items():
            if fields.get(name):
                raise ValueError(f"{self.source}: {where} sets {name}: this is {other}, which is not read here")
        start = fields.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
            raise ValueError(
                f"{self.source}: {where} says init_lora_weights={shown(repr(start), 40)}, which changes the base "
                "itself when the adapter is put in: its tensors alone are no update; convert it to a plain LoRA "
                "first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
            )
        tables: dict[str, dict[str, tuple[int, Any]]] = {"rank_pattern": {}, "alpha_pattern": {}}
        for name in tables:
            patterns = fields.get(name) or {}
            if not isinstance(patterns, dict):
                raise ValueError(f"{self.source}: {where}, {name} holds a {type(patterns).__name__}, wanted an object")
            for place, pattern in enumerate(patterns):
                # Never compiled as a regular expression: a file could hang the reader with one.
                if not re.fullmatch(r"\^?[A-Za-z0-9_.\\-]+", pattern):
                    found = f"{name} {shown(pattern)}"
                    raise ValueError(f"{self.source}: {where}, {found}: only plain module paths are read")
                # By plain text, so that a file with as many patterns as modules is no quadratic search.
                tables[name].setdefault(pattern.replace("\\", ""), (place, patterns[pattern]))
        for name in ("use_rslora", "use_dora"):
            if not isinstance(fields.get(name) or False, bool):
                found = f"{name} is {shown(repr(fields[name]), 40)}"
                raise ValueError(f"{self.source}: {where}, {found}, wanted true or false")
        return {**fields, **tables, "where": where, "kind": kind}

    def _number(self, fields: Mapping[str, Any], name: str, path: str) -> float | None:
        alpha = "lora_alpha" if fields["kind"] == "LORA" else "alpha"
        value = fields.get("r" if name == "rank_pattern" else alpha)
        ends = [f"^{path}", path, *(path[i + 1 :] for i, c in enumerate(path) if c == ".")]
        matches = [fields[name][end] for end in ends if end in fields[name]]
        if matches:
            value = min(matches)[1]  # the first in the file, as in PEFT
        number = isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
        if value is not None and not number:
            found = shown(repr(value), 40)
            raise ValueError(f"{self.source}: {fields['where']}, {name} of {path} is {found}, wanted a number")
        return value

    def _section(self, layer: str) -> tuple[Mapping[str, Any] | None, str]:
        whole = layer.removeprefix("base_model.model.")
        component, _, path = whole.partition(".")
        if component in self.sections:
            return self.sections[component], path
        return self.sections.get(""), whole

    def of(self, layer: str, rank: int | None) -> tuple[float | None, float | None, bool]:
        """(alpha or None, rank that it is divided by or None, rsLoRA) of a layer whose tensors have `rank`.

        A LoKr of two whole matrices has no rank of its own (None): PEFT divides by the configured one there.
        Raises ValueError when the rank in the configuration is not that of the tensors.
        """
        fields, path = self._section(layer)
        if fields is None:
            return None, rank, False
        said = self._number(fields, "rank_pattern", path)
        if said is not None and rank is not None and said != rank:
            raise ValueError(f"{self.source}: {fields['where']} gives {path} rank {said}, its tensors have {rank}")
        return self._number(fields, "alpha_pattern", path), rank or said, bool(fields.get("use_rslora"))

    def kind(self, layer: str) -> str:
        """PEFT's name of the kind of adapter a configuration says this is; "" when none says."""
        fields, _ = self._section(layer)
        return fields["kind"] if fields else ""

    def says_dora(self, layer: str) -> bool:
        fields, _ = self._section(layer)
        return bool(fields and fields.get("use_dora"))


def checked_scale(alpha: float | None, rank: float | None, rslora: bool, *, where: str) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rslora; 1 without an alpha or a rank.

    An alpha of zero or below is warned about (`where` begins the warning). Raises ValueError for one that is not
    finite and for a scale above SCALE_CAP.
    """
    if not rank or (alpha is None and not rslora):
        return 1.0
    alpha = float(rank if alpha is None else alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is a finite number, got {alpha}")
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    if abs(scale) > SCALE_CAP:
        raise ValueError(f"alpha {alpha:g} at rank {rank:g} is a scale of {scale:g}, the limit is {SCALE_CAP:g}")
    if alpha <= 0:
        warnings.warn(f"{where}: alpha is {alpha:g}, {'no' if alpha == 0 else 'a reversed'} effect", stacklevel=4)
    return scale


def alpha_of(tensor: Tensor) -> float:
    """The number in an `.alpha`. Raises ValueError when it holds several."""
    if tensor.numel() != 1:
        raise ValueError(f"its alpha has shape {list(tensor.shape)}, wanted one number")
    return float(tensor)
