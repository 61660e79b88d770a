"""The stages that rebuild the embedded world, in order; and a folder of drawn pictures.

A stage is a function (out, settings, echo) that picks up where it was interrupted. To add one, write the
function and add a line to STAGES.
"""

import importlib
import json
import time
from dataclasses import asdict
from pathlib import Path

from multilora.lab.world.caption import caption
from multilora.lab.world.render import design_gallery, render, sheet
from multilora.lab.world.scene import labels, sample_scene
from multilora.lab.world.settings import FULL, SMOKE, TEXT_FULL, TEXT_SMOKE

GALLERY_LIMIT = 120


def _data(out, settings, echo):
    from multilora.lab.world.dataset import draw_dataset

    draw_dataset(out, settings, echo)


def _autoencoder(out, settings, echo):
    from multilora.lab.world.autoencoder import train_decoder

    train_decoder(out, settings, echo)


def _base(out, settings, echo):
    from multilora.lab.world.base import export_base, train_base

    train_base(out, settings, echo)
    export_base(out, settings, Path(out) / "assets" / "base", echo)


def _later(name):
    def run(out, settings, echo):
        importlib.import_module(f"multilora.lab.world.{name}").stage(Path(out), settings, echo)

    return run


# name: (function, what it makes)
STAGES = {
    "draw": (_data, "scenes -> data/: latents, tokens, captions, labels"),
    "autoencoder": (_autoencoder, "renders -> vae/: the patch projection and its decoder"),
    "base": (_base, "data/, vae/ -> assets/base: text encoder and U-Net"),
    "polish": (_later("polish"), "assets/base, renders -> assets/base/vae: its decoder on the base's own latents"),
    "eyes": (_later("eyes"), "renders -> assets/clip, assets/recogniser_a and _b"),
    "calibrate": (_later("calibrate"), "pictures without LoRAs -> assets/recogniser_b: fewer false alarms"),
    "loras": (_later("loras"), "forty pictures a design -> assets/loras"),
    "report": (_later("report"), "assets/ -> report.jsonl, assets/README.md"),
}
TEXT_STAGES = {
    "base": (_later("language_train"), "generated questions and answers -> assets/text: model and tokenizer"),
    "loras": (_later("language_loras"), "the same -> assets/text/loras"),
    "gates": (_later("language_gates"), "training prompts -> assets/gates: gates of four of them, README.md"),
    "report": (_later("language_report"), "assets/text -> text/report.jsonl, assets/text/README.md"),
}


def train(out, stages=None, smoke=False, echo=print, text=False):
    """Run the stages (all, or the named ones in the table's order) in the folder `out`; `text`: TEXT_STAGES.

    Finished or interrupted work found there is used. `smoke`: every stage at a size of seconds.
    """
    table = TEXT_STAGES if text else STAGES
    unknown = set(stages or ()) - set(table)
    if unknown:
        raise ValueError(f"no stage is named {', '.join(sorted(unknown))}; there are {', '.join(table)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = (TEXT_SMOKE if smoke else TEXT_FULL) if text else (SMOKE if smoke else FULL)
    (out / ("text_settings.json" if text else "settings.json")).write_text(
        json.dumps(asdict(settings), indent=2) + "\n"
    )

    def say(text):
        with (out / "world.log").open("a") as log:
            log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")
        echo(text)

    for name, (run, what) in table.items():
        if stages and name not in stages:
            continue
        say(f"{name}: {what}")
        started = time.time()
        run(out, settings, say)
        say(f"{name}: done in {time.time() - started:.0f} s")


def draw(out, count=24, seed=0, echo=print, **fixed):
    """Write `count` drawn pictures, metadata.jsonl (file_name, text, labels) and two galleries into `out`.

    `fixed` sets scene fields as in `sample_scene`, e.g. designs={"character": "zib"}.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images, notes = [], []
    for i in range(count):
        scene = sample_scene(seed * 1_000_003 + i, **fixed)
        images.append(render(scene))
        name = f"{i:05d}.png"
        images[-1].save(out / name)
        notes.append(json.dumps({"file_name": name, "text": caption(scene), **labels(scene)}))
    (out / "metadata.jsonl").write_text("\n".join(notes) + "\n")
    sheet(images[:GALLERY_LIMIT], 8).save(out / "gallery.png")
    design_gallery().save(out / "designs.png")
    echo(f"{count} pictures in {out}, with metadata.jsonl, gallery.png and designs.png")
