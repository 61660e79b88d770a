"""Is element X in the picture? Two recognisers of the embedded world, of different architecture and seed.

Recogniser A may be used by searches and training, recogniser B only by tables: a number that was optimised is not a
measurement. Both answer one softmax per head: character, garment, object, background, style (each named design is a
class of its own) and the colours of character, garment and object.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from multilora.lab.score.cache import weights_hash
from multilora.method import unknown

SIZE = 128


def pixels(images: Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
    """Pictures as float32 [n, 3, 128, 128] in 0..1. A float tensor [n, 3, h, w] in 0..1 is only resized."""
    if isinstance(images, torch.Tensor):
        batch = images.float()
    else:
        arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
        if len({a.shape for a in arrays}) > 1:
            arrays = [
                np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC), dtype=np.float32) / 255
                for image in images
            ]
        batch = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if batch.shape[-2:] != (SIZE, SIZE):
        batch = F.interpolate(batch, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
    return batch.contiguous()


def _conv(inner: int, outer: int, stride: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)
    )


class PlainNet(nn.Module):
    """Recogniser A: plain strided convolutions with batch norm, all heads on one flat 4 x 4 map."""

    def __init__(self, heads: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(3, 20, 2, 5), _conv(20, 40, 2), _conv(40, 72, 2),
            _conv(72, 112, 2), _conv(112, 128, 1), _conv(128, 64, 2),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(64 * 16, len(labels)) for name, labels in heads.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = F.dropout(self.body(x * 2 - 1).flatten(1), 0.1, self.training)
        return {name: head(flat) for name, head in self.heads.items()}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x))))


class AttentionNet(nn.Module):
    """Recogniser B: patches, residual blocks with group norm, and per head a learned question to the 8 x 8 map."""

    def __init__(self, heads: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        width = (40, 72, 112)
        self.patches = nn.Conv2d(3, width[0], 6, 4, 1)
        self.down1 = nn.Conv2d(width[0], width[1], 2, 2)
        self.down2 = nn.Conv2d(width[1], width[2], 2, 2)
        self.blocks1 = _Residual(width[0])
        self.blocks2 = nn.Sequential(_Residual(width[1]), _Residual(width[1]))
        self.blocks3 = nn.Sequential(_Residual(width[2]), _Residual(width[2]))
        self.norm = nn.LayerNorm(width[2])
        self.place = nn.Parameter(torch.randn(64, width[2]) * 0.02)
        self.questions = nn.ParameterDict({name: nn.Parameter(torch.randn(4, width[2]) * 0.05) for name in heads})
        self.heads = nn.ModuleDict({name: nn.Linear(4 * width[2], len(labels)) for name, labels in heads.items()})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.blocks1(self.patches(x * 2 - 1))
        x = self.blocks3(self.down2(self.blocks2(self.down1(x))))
        tokens = self.norm(x.flatten(2).transpose(1, 2))  # [n, 64, width]
        keys = tokens + self.place
        found = {}
        for name, head in self.heads.items():
            share = (keys @ self.questions[name].T).softmax(1)  # [n, 64, 4]
            found[name] = head((share.transpose(1, 2) @ tokens).flatten(1))
        return found


ARCHITECTURES = {"a": PlainNet, "b": AttentionNet}


class Eyes:
    """Something that tells what is in a picture: `heads` maps a category ("character_colour", ...) to its labels."""

    heads: dict[str, tuple[str, ...]]
    name: str

    def __repr__(self) -> str:
        return self.name

    def probabilities(self, images: Sequence[Image.Image] | torch.Tensor, batch: int = 64) -> dict[str, torch.Tensor]:
        """Per head the probabilities [n, labels], float32 on the CPU."""
        raise NotImplementedError

    @property
    def facts(self) -> dict[str, Any]:
        """What the probabilities depend on."""
        raise NotImplementedError

    def labels(self, images: Sequence[Image.Image] | torch.Tensor) -> list[dict[str, str]]:
        """Per picture the most probable label of every head."""
        picked = {head: p.argmax(1).tolist() for head, p in self.probabilities(images).items()}
        count = len(next(iter(picked.values())))
        return [{head: self.heads[head][picked[head][i]] for head in self.heads} for i in range(count)]

    def index(self, head: str, label: str) -> int:
        """Where `label` stands in `head`; a trigger such as "zib alien" means its design. Raises UnknownName."""
        if head not in self.heads:
            raise unknown(f"head of {self!r}", head, self.heads)
        for candidate in (label, label.split(" ")[0]):
            if candidate in self.heads[head]:
                return self.heads[head].index(candidate)
        raise unknown(f"{head} for {self!r}", label, self.heads[head])

    def find(self, element: str) -> tuple[str, int]:
        """(head, index) of "head: label", or of a label or trigger that one head knows.

        Raises UnknownName for what no head knows, ValueError for what several know ("red", "none").
        """
        head, colon, label = element.partition(": ")
        if colon and head in self.heads:
            return head, self.index(head, label)
        for candidate in (element, element.split(" ")[0]):
            known = [head for head, labels in self.heads.items() if candidate in labels]
            if len(known) == 1:
                return known[0], self.heads[known[0]].index(candidate)
            if known:
                readings = " or ".join(repr(f"{head}: {candidate}") for head in known)
                raise ValueError(f"element {element!r}: say which, {readings}")
        raise unknown(f"element for {self!r}", element, {x for labels in self.heads.values() for x in labels})

    def probability(
        self, images: Sequence[Image.Image] | torch.Tensor, requested: Mapping[str, str]
    ) -> dict[str, torch.Tensor]:
        """Per requested head the probability [n] that each picture shows the requested label."""
        wanted = {head: self.index(head, label) for head, label in requested.items()}
        found = self.probabilities(images)
        return {head: found[head][:, i] for head, i in wanted.items()}


class Recogniser(Eyes):
    """A trained recogniser of the embedded world."""

    def __init__(self, net: nn.Module, heads: Mapping[str, Sequence[str]], name: str) -> None:
        self.net = net.eval()
        self.heads = {head: tuple(labels) for head, labels in heads.items()}
        self.name = name

    def __repr__(self) -> str:
        return f"recogniser {self.name} (128 x 128 px, RGB)"

    @property
    def facts(self) -> dict[str, Any]:
        pixels = f"128 x 128 px bicubic, RGB 0..1, pillow {PIL.__version__}"
        return {"library": "multilora", "weights": weights_hash(self.net), "preprocessing": pixels}

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image] | torch.Tensor, batch: int = 64) -> dict[str, torch.Tensor]:
        """Per head the probabilities [n, labels], float32 on the CPU."""
        device = next(self.net.parameters()).device
        parts = [
            {head: logits.float().softmax(1).cpu() for head, logits in self.net(chunk.to(device)).items()}
            for chunk in pixels(images).split(batch)
        ]
        return {head: torch.cat([part[head] for part in parts]) for head in self.heads}

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image] | torch.Tensor, batch: int = 64) -> np.ndarray:
        """What the heads read, side by side: float32 [n, features]."""
        device, read = next(self.net.parameters()).device, []
        hooks = [head.register_forward_pre_hook(lambda module, args: read.append(args[0].float().cpu()))
                 for head in self.net.heads.values()]  # fmt: skip
        try:
            parts = []
            for chunk in pixels(images).split(batch):
                read.clear()
                self.net(chunk.to(device))
                parts.append(torch.cat(read, 1))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(parts).numpy()


@functools.cache
def load_recogniser(name: str | Path = "a") -> Recogniser:
    """Recogniser "a" or "b" of the assets, or one from the path of its .safetensors file (labels in the .json beside).

    Raises ValueError when a file is missing or does not fit its architecture.
    """
    from safetensors.torch import load_file

    from multilora.pipelines.load import assets

    path = assets() / f"recogniser_{name}.safetensors" if str(name) in ARCHITECTURES else Path(name)
    about = path.with_suffix(".json")
    for part in (path, about):
        if not part.is_file():
            raise ValueError(f"recogniser {str(name)!r}: {part} is missing; rebuild it with: multilora world train")
    facts = json.loads(about.read_text())
    if facts.get("architecture") not in ARCHITECTURES:
        raise unknown(f"architecture in {about}", facts.get("architecture"), ARCHITECTURES)
    net = ARCHITECTURES[facts["architecture"]](facts["heads"])
    try:
        net.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except RuntimeError as error:
        raise ValueError(f"recogniser {path}: its tensors do not fit {about}: {error}") from error
    return Recogniser(net, facts["heads"], facts["name"])


def presence(
    images: Sequence[Image.Image] | torch.Tensor,
    requested: Mapping[str, str],
    recogniser: str | Path | Eyes = "a",
) -> dict[str, list[bool]]:
    """Per requested category and picture: is the requested element the most probable one there?

    requested: {"character": "zib", "object_colour": "red", ...}, a class, a design's name or its trigger. Use
    recogniser "b" for tables only. Raises UnknownName for a category or a label that the recogniser does not know.
    """
    if not isinstance(recogniser, Eyes):
        recogniser = load_recogniser(recogniser)
    wanted = {head: recogniser.index(head, label) for head, label in requested.items()}
    found = recogniser.probabilities(images)
    return {head: (found[head].argmax(1) == i).tolist() for head, i in wanted.items()}
