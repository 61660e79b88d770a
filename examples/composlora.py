"""ComposLoRA (arXiv 2402.16843) on real checkpoints: every method on the published testbed, one command.

To download first, into one FOLDER:

1. ComposLoRA.zip, linked in the README of github.com/maszhongming/Multi-LoRA-Composition: 22 LoRAs. Unzipped it has
   anime/ and reality/ with character_1.safetensors and so on; FOLDER/ is where these two lie.
2. anime_lora_info.json and reality_lora_info.json of that repository: names and trigger words.

The bases come from the hub when they are first used: gsdf/Counterfeit-V2.5 for anime; for reality
SG161222/Realistic_Vision_V5.1_noVAE with the decoder of stabilityai/sd-vae-ft-mse, saved once in FOLDER/base_reality.

    python examples/composlora.py FOLDER anime                             # 100 pictures a method and k, k = 2 to 5
    python examples/composlora.py FOLDER reality --k 2-3 --count 24 --clip ViT-B/16 --workers 2

What follows the style is given to `multilora eval` (see its --help); steps, guidance, size and LoRA scale are the
paper's (--preset). A GPU draws this in hours; on a CPU it is hopeless. Without --clip nothing scores the pictures:
`multilora judge FOLDER/evaluation_anime` asks a vision-language model. The paper's prompts start with words on quality
that are the authors' to give: add them with --prompt "WORDS, {triggers}" and --negative.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from multilora.cli import main

METHODS = "none,merge,switch,composite"
ANIME = "gsdf/Counterfeit-V2.5"
REALITY, DECODER = "SG161222/Realistic_Vision_V5.1_noVAE", "stabilityai/sd-vae-ft-mse"


def words(folder: Path, style: str, more: list[str]) -> list[str]:
    """The arguments of multilora. Raises FileNotFoundError saying what to download."""
    listing, loras = folder / f"{style}_lora_info.json", folder / style
    for path in (listing, loras):
        if not path.exists():
            raise FileNotFoundError(f"{path}: not there; what to download: python {__file__} --help")
    base = ANIME if style == "anime" else str(folder / "base_reality")
    found = ["eval", "--preset", style, "--base", base, "--library", str(listing), "--files", str(loras)]
    if "--methods" not in more:
        found += ["--methods", METHODS]
    if not {"--out", "-o"} & set(more):
        found += ["--out", str(folder / f"evaluation_{style}")]
    return found + more


def prepare(folder: Path) -> None:
    """The base of the reality half with its decoder, in FOLDER/base_reality."""
    if (folder / "base_reality" / "model_index.json").is_file():
        return
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    decoder = AutoencoderKL.from_pretrained(DECODER)
    pipe = StableDiffusionPipeline.from_pretrained(REALITY, vae=decoder, safety_checker=None)
    pipe.save_pretrained(folder / "base_reality")


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("folder", type=Path)
    reader.add_argument("style", choices=("anime", "reality"))
    given, rest = reader.parse_known_args()
    try:
        arguments = words(given.folder, given.style, rest)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    if given.style == "reality" and "--dry-run" not in rest:
        prepare(given.folder)
    main(arguments)
