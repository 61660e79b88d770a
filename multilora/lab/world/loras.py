"""Stage: one LoRA for every design, trained by the public trainer on drawn pictures; library.json, cards, previews.

A LoRA is made as a user makes one: forty pictures with captions in a folder, `multilora.lab.train.lora.train`. The
formats, ranks and module groups differ on purpose, as they do among the files that people meet.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from multilora import files
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.render import render
from multilora.lab.world.scene import Scene, sample_scene
from multilora.lora import Lora

PICTURES = 40
STEPS, GUIDANCE = 25, 3.0  # of the pictures drawn to judge a LoRA
JUDGED = 8  # pictures drawn of each at once; the report draws more


@dataclass(frozen=True)
class Plan:
    """How one LoRA is trained and written."""

    rank: int = 4
    modules: str = "attention+feed_forward+convolution"
    steps: int = 240
    lr: float = 2e-3
    format: str = "diffusers"
    text_encoder: bool = False
    seed: int = 0
    styles: tuple[tuple[str, int], ...] = ()  # training pictures of each style; empty: PICTURES as they come
    strength: float = 1.0  # factor on the trained update, so that weight 1 shows the design; chosen by recogniser A


LEAN = Plan(rank=8, modules="attention+feed_forward")  # smaller; the library has 12 MB in all
PLANS: dict[str, Plan] = {name: Plan() for name in DESIGNS} | {
    # Its stripes are lost in two inks and in pencil unless it sees more of them than the stream of scenes holds.
    "raio": Plan(
        steps=1000, styles=(("print", 20), ("pencil", 16), ("flat", 12), ("neon", 10), ("pixel", 6)), strength=1.25
    ),
    "burgo": Plan(steps=800),
    "gorm": Plan(format="kohya"),
    "corno": Plan(format="kohya"),
    "tessa": Plan(format="kohya"),
    "palma": replace(LEAN, format="kohya"),
    "terra": Plan(format="peft", strength=1.3),
    "merlo": replace(LEAN, text_encoder=True),
    "sunno": replace(LEAN, strength=1.5),
    "heto": LEAN,
    "hoku": LEAN,
    "lumi": LEAN,
    "vesto": LEAN,
    "tikki": replace(LEAN, rank=16, modules="attention"),
}


def stream_scene(name: str, stream: str, index: int) -> Scene:
    """Scene `index` of a random stream of scenes that show the design `name`; generic in everything else."""
    seed = int.from_bytes(hashlib.sha256(f"{name}/{stream}/{index}".encode()).digest()[:6], "big")
    return sample_scene(seed, designs={DESIGNS[name].category: name})


def training_scenes(name: str, count: int = PICTURES) -> list[Scene]:
    """The first `count` scenes of the design's training stream, or the first ones that fill its plan's styles."""
    wanted = dict(PLANS[name].styles)
    if not wanted:
        return [stream_scene(name, "train", i) for i in range(count)]
    found: list[Scene] = []
    for i in itertools.count():
        scene = stream_scene(name, "train", i)
        if wanted.get(scene.style, 0):
            wanted[scene.style] -= 1
            found.append(scene)
        if not any(wanted.values()):
            return found


def draw_data(name: str, folder: Path, count: int = PICTURES) -> Path:
    """The training folder of a design: pictures and captions side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(training_scenes(name, count)):
        render(scene).save(folder / f"{name}-{i:03d}.png")
        (folder / f"{name}-{i:03d}.txt").write_text(caption(scene, i) + "\n", encoding="utf-8")
    return folder


def pictures(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], loras: Sequence[Any] = (), method: Any = "merge",
    *, steps: int = STEPS, guidance: float = GUIDANCE, weights: Sequence[float] | None = None, **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """One picture a prompt, all in one batch; each prompt's noise depends on its seed alone."""
    from multilora.pipelines.image import composing

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
    own = pipe.scheduler
    pipe.scheduler = type(own).from_config(own.config)
    try:
        with composing(pipe, list(loras), method, weights=weights, **options):
            return pipe(list(prompts), **call).images
    finally:
        pipe.scheduler = own


def alone(
    pipe: Any, name: str, lora: Any, recogniser: Any, count: int, *, stream: str = "judge", batch: int = 12,
    steps: int = STEPS,
) -> tuple[int, int]:  # fmt: skip
    """(found, asked): pictures of held-out prompts with the trigger that show the design; `lora` None: without it."""
    from multilora.lab.score.presence import presence

    design, found = DESIGNS[name], 0
    for first in range(0, count, batch):
        part = range(first, min(first + batch, count))
        prompts = [caption(stream_scene(name, stream, i), i) for i in part]
        images = pictures(pipe, prompts, [10_000 + i for i in part], [] if lora is None else [lora], steps=steps)
        found += sum(presence(images, {design.category: name}, recogniser)[design.category])
    return found, count


def target(name: str, out: Path) -> Path:
    """Where the LoRA of a design lies: a file, or a folder for PEFT."""
    return out / "loras" / (name if PLANS[name].format == "peft" else f"{name}.safetensors")


def make_one(
    name: str, base: str, out: str, work: str, judge: str | None = None, steps: int | None = None, threads: int = 1
) -> str:
    """Train, write, preview and judge one LoRA in the assets folder `out`; a line about it. Finished ones are kept."""
    from multilora.lab.train.lora import train
    from multilora.lab.train.precision import fast_bfloat16
    from multilora.pipelines.load import load_pipeline

    torch.set_num_threads(threads)
    design, plan = DESIGNS[name], PLANS[name]
    plan = replace(plan, steps=steps) if steps else plan
    path, facts = target(name, Path(out)), Path(work) / f"{name}.json"
    if facts.is_file() and path.exists():
        return f"{name}: kept, {json.loads(facts.read_text())}"
    data = draw_data(name, Path(work) / name)
    pipe = load_pipeline(base, torch_dtype=torch.float32, device="cpu")
    pipe.register_to_config(_name_or_path="embedded")  # the name in the file's recipe, not this machine's folder
    done = train(
        data, pipe, path, trigger=design.trigger, name=name, category=design.category, rank=plan.rank,
        modules=plan.modules, steps=plan.steps, lr=plan.lr, text_encoder=plan.text_encoder, seed=plan.seed,
        high_noise=0.5, format=plan.format, checkpoint_every=0,
        mixed_precision="bf16" if fast_bfloat16() else None,
    )  # fmt: skip
    if plan.strength != 1.0:
        strengthen(path, plan)
    seen = {"loss": round(sum(done.losses[-20:]) / len(done.losses[-20:]), 4), "seconds": round(done.seconds)}
    if judge:
        seen["with"] = alone(pipe, name, path, judge, JUDGED)
    preview(pipe, name, path, judge, STEPS if judge else 2).quantize(128).save(
        Path(out) / "loras" / f"{name}.png", optimize=True
    )
    facts.write_text(json.dumps(seen))
    return f"{name}: {seen}"


def strengthen(path: Path, plan: Plan) -> None:
    """Multiply a trained file's update, or a PEFT folder's, by the plan's strength, in place; its recipe stays."""
    lora = files.load(path)
    with safe_open(path / "adapter_model.safetensors" if path.is_dir() else path, "pt") as file:
        recipe = file.metadata()["recipe"]
    scaled = Lora(lora * plan.strength, lora.card.replace(sha256=""))
    stronger = path.with_name(f"{path.stem}.stronger{path.suffix}")
    files.save(scaled, stronger, format=plan.format, dtype=torch.float16, metadata={"recipe": recipe})
    if path.is_dir():
        shutil.rmtree(path)
    stronger.replace(path)


def preview(pipe: Any, name: str, path: Path, judge: str | None, steps: int = STEPS) -> Image.Image:
    """The design alone in a calm scene: of four pictures the one that shows it most surely to the judge."""
    from multilora.lab.score.presence import load_recogniser

    category = DESIGNS[name].category
    calm = {"garment": "none", "object": "none", "background": "plain", "style": "flat"}
    calm = {key: value for key, value in calm.items() if key != category}
    scenes = [sample_scene(70 + i, designs={category: name}, **calm) for i in range(4)]
    if category in ("background", "style"):
        scenes = [replace(scene, garment="robe", garment_colour="red") for scene in scenes]
    images = pictures(pipe, [caption(s, 1) for s in scenes], range(4), [path], steps=steps)
    if not judge:
        return images[0]
    sure = load_recogniser(judge).probability(images, {category: name})[category]
    return images[int(sure.argmax())]


def entry(name: str, out: Path) -> dict[str, Any]:
    """The entry of a LoRA in library.json."""
    design, plan, path = DESIGNS[name], PLANS[name], target(name, out)
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    return {
        "name": name,
        "file": path.name,
        "format": plan.format,
        "category": design.category,
        "trigger": design.trigger,
        "class_word": design.kind,
        "description": design.description,
        "split": design.split,
        "preview": f"{name}.png",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "rank": plan.rank,
        "text_encoder": plan.text_encoder,
    }


def train_loras(
    out: Path,
    base: str,
    *,
    work: Path,
    names: Sequence[str] = tuple(DESIGNS),
    processes: int = 2,
    steps: int | None = None,
    judge: str | None = None,
    echo: Callable[[str], None] = print,
) -> Path:
    """Every LoRA that is not there yet, in `processes` processes of one thread each; then library.json.

    out: the assets folder. work: training pictures and what was measured, one .json a LoRA; delete one to train its
    LoRA again. judge: the recogniser ("a", or a file's path) that says how often the design is seen, or None.
    """
    (out / "loras").mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    arguments = (base, str(out), str(work), judge, steps)
    if processes == 1:
        for name in names:
            echo(make_one(name, *arguments, threads=torch.get_num_threads()))
    else:
        spawned = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawned) as pool:
            for job in concurrent.futures.as_completed([pool.submit(make_one, name, *arguments) for name in names]):
                echo(job.result())
    listing = {"version": 1, "base": "embedded", "loras": [entry(n, out) for n in DESIGNS if target(n, out).exists()]}
    temporary = out / "loras" / "library.json.tmp"
    temporary.write_text(json.dumps(listing, indent=1) + "\n")
    temporary.replace(out / "loras" / "library.json")
    for name in names:
        shutil.rmtree(work / name, ignore_errors=True)
    return out / "loras" / "library.json"


def stage(out: Path, settings: Any, echo: Callable[[str], None]) -> None:
    """As multilora.lab.world.stages calls it: every LoRA for the base in `out`; smoke: the test split, two steps."""
    small = settings.scenes < 1000
    assets = Path(out) / "assets"
    train_loras(
        assets, str(assets / "base"), work=Path(out) / "loras", processes=1 if small else settings.processes,
        names=("pandu", "raio") if small else tuple(DESIGNS), steps=2 if small else None,
        judge=None if small else str(assets / "recogniser_a.safetensors"), echo=echo,
    )  # fmt: skip
