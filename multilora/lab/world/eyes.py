"""Stage: train the embedded CLIP and the recognisers A and B on drawn pictures, and measure them on held-out ones.

Training and held-out scenes come from differently named random streams. Recognisers also meet blur, noise, shifts,
slight colour changes and the autoencoder's round trip, so that they read generated pictures and not only drawn ones.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from multilora.lab.score.presence import ARCHITECTURES, Recogniser
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import CATEGORIES, DESIGNS
from multilora.lab.world.pen import COLOURS
from multilora.lab.world.render import render
from multilora.lab.world.scene import CLASSES, COLOURED, Scene, labels, sample_scene

DESIGN_SHARE = 0.35  # of each category in the scenes the eyes learn from
ROUND_TRIP = 0.1  # of the training pictures; a decode costs three training samples
CLEAN = 0.35  # of the training pictures stay as drawn: resampling blurs the big pixels that make a style
WEIGHTS = {"style": 4.0}  # big pixels are told from flat by fine detail, which is learnt last
IGNORED = -100

HEADS: dict[str, tuple[str, ...]] = {
    category: tuple(CLASSES[category]) + tuple(d.name for d in DESIGNS.values() if d.category == category)
    for category in CATEGORIES
} | {f"{category}_colour": tuple(COLOURS) for category in COLOURED}


def mixed_scene(stream: str, index: int, share: float = DESIGN_SHARE) -> Scene:
    """Scene `index` of the random stream `stream`: each category shows one of its designs with probability `share`."""
    rng = random.Random(f"eyes/{stream}/{index}")
    designs = {}
    for category in CATEGORIES:
        if rng.random() < share:
            designs[category] = rng.choice([d.name for d in DESIGNS.values() if d.category == category])
    return sample_scene(rng, designs=designs)


def truth(scene: Scene) -> dict[str, str | None]:
    """The label per head; None where the picture does not show it (a colour in a two-ink print)."""
    known = labels(scene)
    return {
        head: known[head] if head.endswith("_colour") else known[f"{head}_design"] or known[head] for head in HEADS
    }


def targets(scene: Scene) -> list[int]:
    """`truth` as class numbers in the order of HEADS."""
    found = truth(scene)
    return [IGNORED if found[head] is None else known.index(found[head]) for head, known in HEADS.items()]


def drawn(scene: Scene) -> torch.Tensor:
    """The scene's picture, uint8 [3, 128, 128]."""
    return torch.from_numpy(np.asarray(render(scene)).copy()).permute(2, 0, 1)


def worn(x: torch.Tensor, generator: torch.Generator, roundtrip: Callable | None = None) -> torch.Tensor:
    """Pictures [n, 3, h, w] in 0..1 as a generator might have made them: see the module's first lines."""
    n, h = len(x), x.shape[-1]

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    drawn_ones = x
    if roundtrip is not None:
        hit = draw(n) < ROUND_TRIP
        if hit.any():
            x = x.clone()
            x[hit] = roundtrip(x[hit])
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + (draw(n) - 0.5) * 0.06
    theta[:, :, 2] = (draw(n, 2) - 0.5) * 2 * 6 / h
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    small = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), (h, h), mode="bilinear")
    x = torch.lerp(x, small, draw(n, 1, 1, 1) * (draw(n, 1, 1, 1) < 0.6))
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + (draw(n, 1, 1, 1) - 0.5) * 0.3)
    x = (x - 0.5) * (1 + (draw(n, 1, 1, 1) - 0.5) * 0.2) + 0.5 + (draw(n, 1, 1, 1) - 0.5) * 0.1
    noise = torch.randn(x.shape, generator=generator)
    x = (x + noise * draw(n, 1, 1, 1) * 0.06).clamp(0, 1)
    return torch.where(draw(n, 1, 1, 1) < CLEAN, drawn_ones, x)


def autoencoder_roundtrip(vae: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Encode, disturb the latents slightly, decode: pictures [n, 3, h, w] in 0..1 to the same."""

    @torch.no_grad()
    def trip(x: torch.Tensor) -> torch.Tensor:
        latents = vae.encode(x * 2 - 1).latents
        latents = latents + torch.randn_like(latents) * 0.08 * latents.std()
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    return trip


def batches(stream: str, size: int, generator: torch.Generator) -> Iterator[tuple[list[Scene], torch.Tensor]]:
    """Endless fresh batches of scenes with their pictures, float [size, 3, 128, 128] in 0..1."""
    index = 0
    while True:
        scenes = [mixed_scene(stream, index + i) for i in range(size)]
        yield scenes, torch.stack([drawn(scene) for scene in scenes]).float() / 255
        index += size


def schedule(optimiser: torch.optim.Optimizer, steps: int, warmup: int = 50) -> torch.optim.lr_scheduler.LambdaLR:
    """Short warm-up, then a cosine to zero."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))
    )


def train_recogniser(
    which: str,
    out: Path,
    *,
    steps: int = 1500,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    vae: Any = None,
    start: Path | None = None,
    held_out: int = 2000,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train recogniser `which` ("a" or "b") and write `out` (.safetensors, half precision) and its .json.

    vae: the base's autoencoder for the round trip, or None. start: weights to go on from. Returns the .json's content,
    with the accuracy per head on `held_out` renders.
    """
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = ARCHITECTURES[which](HEADS)
    if start is not None:
        net.load_state_dict({key: value.float() for key, value in load_file(start).items()})
    optimiser = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.02)
    plan = schedule(optimiser, steps)
    trip = None if vae is None else autoencoder_roundtrip(vae)
    began, running = time.monotonic(), 0.0
    for step, (scenes, x) in zip(range(steps), batches(f"{which}/{seed}", batch, generator), strict=False):
        wanted = torch.tensor([targets(scene) for scene in scenes])
        found = net(worn(x, generator, trip))
        loss = sum(
            WEIGHTS.get(head, 1.0)
            * F.cross_entropy(found[head], wanted[:, i], ignore_index=IGNORED, label_smoothing=0.02)
            for i, head in enumerate(HEADS)
            if (wanted[:, i] != IGNORED).any()
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        plan.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            log(f"recogniser {which}: step {step + 1}/{steps}, loss {running:.3f}, {time.monotonic() - began:.0f} s")
    state = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    accuracy = recogniser_accuracy(Recogniser(net, HEADS, which), held_out)
    facts = {
        "name": which,
        "architecture": which,
        "heads": HEADS,
        "size": 128,
        "training": {"steps": steps, "batch": batch, "lr": lr, "seed": seed, "round_trip": vae is not None},
        "held_out": accuracy,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out)
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    log(f"recogniser {which}: " + ", ".join(f"{h} {r / n:.3f}" for h, (r, n) in accuracy.items()))
    return facts


def recogniser_accuracy(recogniser: Recogniser, count: int = 2000) -> dict[str, tuple[int, int]]:
    """(right, asked) per head on `count` held-out renders; scenes that do not show the head's colour are not asked."""
    scored = {head: [0, 0] for head in HEADS}
    for first in range(0, count, 100):
        scenes = [mixed_scene("held out", i) for i in range(first, min(first + 100, count))]
        found = recogniser.labels(torch.stack([drawn(scene) for scene in scenes]).float() / 255)
        for scene, seen in zip(scenes, found, strict=True):
            for head, label in truth(scene).items():
                if label is not None:
                    scored[head][1] += 1
                    scored[head][0] += seen[head] == label
    return {head: (right, asked) for head, (right, asked) in scored.items()}


def token_rows() -> list[int]:
    """The token numbers of clip.tokenize that occur in the world's captions, ascending (end of text is the last)."""
    import clip

    seen: set[int] = set()
    texts = [caption(mixed_scene("tokens", i), i) for i in range(4000)]
    texts += [d.trigger for d in DESIGNS.values()] + [d.description for d in DESIGNS.values()]
    for first in range(0, len(texts), 500):
        seen.update(clip.tokenize(texts[first : first + 500], truncate=True).unique().tolist())
    return sorted(seen - {0})


CLIP_SHAPE = {"size": 64, "patch": 8, "vision_width": 192, "vision_layers": 3, "width": 128, "layers": 2, "embed": 128}
CLIP_CONTEXT = 48  # tokens trained; the file's positions are padded to clip.tokenize's 77, behind every end of text


def train_clip(
    out: Path,
    *,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    held_out: int = 2048,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the embedded CLIP and write `out` (a folder: model.safetensors in OpenAI's layout, facts.json)."""
    import clip
    from clip.model import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = token_rows()
    compact = torch.zeros(49408, dtype=torch.long)
    compact[torch.tensor(ids)] = torch.arange(1, len(ids) + 1)
    s = CLIP_SHAPE
    net = CLIP(s["embed"], s["size"], s["vision_layers"], s["vision_width"], s["patch"], CLIP_CONTEXT, len(ids) + 1,
               s["width"], s["width"] // 64, s["layers"])  # fmt: skip
    optimiser = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    plan = schedule(optimiser, steps)
    began, running = time.monotonic(), 0.0
    for step, (scenes, x) in zip(range(steps), batches(f"clip/{seed}", batch, generator), strict=False):
        tokens = clip.tokenize([caption(scene, step) for scene in scenes], truncate=True)
        rows = compact[tokens]
        unknown = (torch.rand(rows.shape, generator=generator) < 0.01) & (rows != len(ids)) & (tokens != 0)
        rows[unknown] = 0
        x = clip_input(worn(x, generator), s["size"])
        image, text = net(x, rows[:, :CLIP_CONTEXT])
        answer = torch.arange(len(scenes))
        loss = (F.cross_entropy(image, answer) + F.cross_entropy(text, answer)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        plan.step()
        with torch.no_grad():
            net.logit_scale.clamp_(max=math.log(100))
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            log(f"clip: step {step + 1}/{steps}, loss {running:.3f}, {time.monotonic() - began:.0f} s")
    state = {key: value.detach().half() for key, value in net.state_dict().items()}
    places = state["positional_embedding"]
    state["positional_embedding"] = torch.cat([places, places.new_zeros(77 - len(places), places.shape[1])])
    state["token_embedding.rows"] = state.pop("token_embedding.weight")
    state["token_embedding.ids"] = torch.tensor(ids, dtype=torch.int32)
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "model.safetensors")
    right, asked = clip_top1(out / "model.safetensors", held_out)
    facts = {
        "layout": "OpenAI CLIP (clip-anytorch build_model), token rows compressed: multilora.lab.score.clip.expand",
        "shape": s,
        "training": {"steps": steps, "batch": batch, "lr": lr, "seed": seed},
        "held_out": {"top1_of_32": (right, asked)},
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    log(f"clip: top-1 of 32 {right}/{asked} = {right / asked:.3f}")
    return facts


def clip_input(x: torch.Tensor, size: int) -> torch.Tensor:
    """As clip-anytorch preprocesses: bicubic to `size`, then OpenAI's mean and deviation per channel."""
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
    deviation = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    return (x - mean) / deviation


def clip_top1(path: Path, count: int = 2048, of: int = 32) -> tuple[int, int]:
    """(right, asked): does each held-out picture choose its own caption among `of`, in groups of `of`?"""
    from multilora.lab.score.clip import load_clip

    scorer = load_clip(str(path))
    right = 0
    for first in range(0, count - count % of, of):
        scenes = [mixed_scene("held out", i) for i in range(first, first + of)]
        cosines = scorer.images([render(s) for s in scenes]) @ scorer.texts([caption(s, 7) for s in scenes]).T
        right += int((cosines.argmax(1) == torch.arange(of)).sum())
    return right, count - count % of


def stage(out: Path, settings: Any, echo: Callable[[str], None]) -> None:
    """As multilora.lab.world.stages calls it: CLIP and both recognisers into `out`/assets, finished ones kept."""
    from diffusers import AutoencoderTiny

    assets = Path(out) / "assets"
    small = settings.scenes < 1000
    vae = AutoencoderTiny.from_pretrained(assets / "base" / "vae").eval()
    for which, seed in (("a", 1), ("b", 2)):
        path = assets / f"recogniser_{which}.safetensors"
        if not path.with_suffix(".json").is_file():
            given = {"steps": 2, "batch": 4, "held_out": 32} if small else {}
            train_recogniser(which, path, seed=seed, vae=vae, log=echo, **given)
    if not (assets / "clip" / "facts.json").is_file():
        given = {"steps": 2, "batch": 4, "held_out": 32} if small else {}
        train_clip(assets / "clip", log=echo, **given)
