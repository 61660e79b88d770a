"""The app's engine on a tiny base in a folder, with faults at any step, for tests and benchmarks/faults.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from multilora import files
from multilora.method import methods
from multilora.recipe import LoraUse, Recipe
from multilora.web.service.engine import Engine
from tests import tiny
from tests.service_engine import fault_of

STEPS = 3
NAMES = ("fox", "robe", "ink")
FAULTS = ("raise", "memory", "nan", "layer", "encode", "decode")
METHODS = tuple(methods("route"))


def written(folder: Path) -> str:
    """A base of tests.tiny with three LoRAs beside it in folder/loras; the base's name."""
    pipe = tiny.sd15()
    pipe.save_pretrained(folder / "base")
    (folder / "loras").mkdir()
    for i, name in enumerate(NAMES):
        lora = tiny.lora_for(pipe, seed=i, text_encoder=i != 1, name=name)
        triggers = (("fox",), ("a robe",), ("ink",))[i]
        files.save(lora.replace(card=lora.card.replace(triggers=triggers)), folder / "loras" / f"{name}.safetensors")
    return str(folder / "base")


def recipe(base: str, method: str, seed: int = 1, names: tuple[str, ...] = NAMES, **more: Any) -> Recipe:
    """A picture of 32 x 32 in STEPS steps."""
    uses = [LoraUse(name=n, reference=n, weight=0.8 - 0.1 * i) for i, n in enumerate(names)]
    fields = {"prompt": "a fox in a robe", "negative_prompt": "blur", "guidance_scale": 3.0, "width": 32, "height": 32}
    given = {"every": 1} if method == "switch" else {}
    return Recipe(**{**fields, "base": base, "loras": uses, "method": method, "options": given, "seed": seed,
                     "steps": STEPS, **more})  # fmt: skip


def _raiser(error: BaseException) -> Any:
    def hook(*_: Any) -> None:
        raise error

    return hook


class Broken(Engine):
    """The engine with the fault that a recipe's `extra` asks for: {"fault": one of FAULTS or "die", "at": step}.

    raise, memory   after the step; layer: inside the model's next run, in its last layer
    nan             in the next prediction
    encode, decode  in the text encoder, in the VAE's decoder, whatever the step
    """

    def _composed(self, call: Any, recipe: Recipe, *rest: Any) -> Any:
        self.hooks: list[Any] = []
        fault = recipe.extra.get("fault", "")
        module = {"encode": "text_encoder", "decode": "vae"}.get(fault)
        if module:
            inner = getattr(self.pipe, module)
            inner = inner.decoder if module == "vae" else inner
            self.hooks.append(inner.register_forward_hook(_raiser(RuntimeError("on purpose"))))
        try:
            if fault in ("layer", "nan", "raise", "memory") and recipe.extra.get("at") == 0:
                self.stepped(recipe, 0)
            return super()._composed(call, recipe, *rest)
        finally:
            for hook in self.hooks:
                hook.remove()

    def stepped(self, recipe: Recipe, step: int) -> None:
        fault = fault_of(recipe, step)
        if fault == "die":
            os.kill(os.getpid(), 9)
        if fault == "raise":
            raise RuntimeError("on purpose")
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if fault == "layer":
            last = [m for m in self.denoiser.modules() if isinstance(m, torch.nn.Linear)][-1]
            self.hooks.append(last.register_forward_hook(_raiser(RuntimeError("on purpose"))))
        if fault == "nan":
            bad = float("nan")
            self.hooks.append(self.denoiser.conv_out.register_forward_hook(lambda m, i, out: out * bad))
