"""`multilora train`: LoRAs from a folder of pictures and captions, or of prompts and completions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json

train = typer.Typer(help="train LoRAs", no_args_is_help=True)


@train.callback()
def _train() -> None:
    """Train LoRAs."""  # one command with this callback stays `train lora`


@train.command()
def lora(
    data: Annotated[Path, typer.Argument(help="folder of pictures with captions, or of .jsonl texts")],
    out: Annotated[Path, typer.Option(help="the .safetensors file (a folder with --format peft and for texts)")],
    trigger: Annotated[str | None, typer.Option(help="new name and class word, such as 'zib alien'")] = None,
    base: Annotated[
        str, typer.Option(help="'embedded', a folder of a pipeline or language model, or a hub id")
    ] = "embedded",
    name: Annotated[str | None, typer.Option(help="for the card, default the trigger's first word")] = None,
    category: Annotated[str, typer.Option(help="for the card: character, garment, object, ...")] = "",
    rank: Annotated[int, typer.Option(help="of the update")] = 8,
    alpha: Annotated[float | None, typer.Option(help="default the rank")] = None,
    modules: Annotated[
        str, typer.Option(help="all, or attention, feed_forward, convolution, projection joined by +")
    ] = "all",
    dropout: Annotated[float, typer.Option(help="inside the LoRA")] = 0.0,
    steps: Annotated[int | None, typer.Option(help="optimiser steps, default by base")] = None,
    batch: Annotated[int | None, typer.Option(help="examples in a step, default 8, of texts 16")] = None,
    accumulate: Annotated[int, typer.Option(help="batches whose gradients are summed into a step")] = 1,
    lr: Annotated[float | None, typer.Option(help="learning rate, default by base")] = None,
    text_encoder: Annotated[bool, typer.Option("--text-encoder", help="train the text encoders too")] = False,
    text_encoder_lr: Annotated[float | None, typer.Option(help="default a quarter of --lr")] = None,
    min_snr: Annotated[float | None, typer.Option(help="gamma of min-SNR weighting, such as 5")] = None,
    high_noise: Annotated[float | None, typer.Option(help="share of samples from the noisiest fifth")] = None,
    prior: Annotated[str | None, typer.Option(help="folder of plain pictures of the class, or 'generate'")] = None,
    prior_weight: Annotated[float, typer.Option(help="of the prior pictures' loss")] = 1.0,
    size: Annotated[int | None, typer.Option(help="side of the pictures, default the base's own")] = None,
    length: Annotated[int | None, typer.Option(help="of texts, in tokens at most, default 512")] = None,
    seed: Annotated[int, typer.Option(help="of everything that is random")] = 0,
    mixed_precision: Annotated[str | None, typer.Option(help="fp16 or bf16")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="less memory, more time")
    ] = False,
    checkpoint_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 100,
    resume: Annotated[bool, typer.Option(help="go on from a checkpoint of the same settings")] = True,
    sample_every: Annotated[int, typer.Option(help="steps between sample pictures, 0 for none")] = 0,
    sample_prompt: Annotated[list[str] | None, typer.Option(help="what the samples show; repeat")] = None,
    format: Annotated[str, typer.Option(help="diffusers, kohya or peft")] = "diffusers",
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Train a LoRA from a folder of pictures and captions, or of .jsonl files with a prompt and a completion a line;
    run again to go on where it stopped."""
    arguments.check_folder(out.parent)
    shared = {
        "name": name, "category": category, "rank": rank, "alpha": alpha, "modules": modules, "dropout": dropout,
        "accumulate": accumulate, "seed": seed, "mixed_precision": mixed_precision,
        "checkpoint_every": checkpoint_every, "resume": resume, "echo": note,
    }  # fmt: skip
    shared |= {k: v for k, v in {"steps": steps, "batch": batch, "lr": lr}.items() if v is not None}
    from multilora.lab.train.text_data import holds_texts

    texts = holds_texts(data)
    if texts:
        of_pictures = {
            "--trigger": trigger, "--text-encoder": text_encoder, "--text-encoder-lr": text_encoder_lr,
            "--min-snr": min_snr, "--high-noise": high_noise, "--prior": prior, "--size": size,
            "--gradient-checkpointing": gradient_checkpointing, "--sample-every": sample_every,
            "--sample-prompt": sample_prompt,
        }  # fmt: skip
        _refuse(data, "texts", of_pictures)
        if format == "kohya" or out.suffix == ".safetensors":
            raise ValueError(f"--out {str(out)!r}: a LoRA of a language model is written as a PEFT folder")
        from multilora.lab.train.text import train as train_text
    else:
        _refuse(data, "pictures", {"--length": length})
        from multilora.lab.train.lora import train as train_lora

    with bars() as start:
        advance = None

        def progress(step: int, of: int, info: dict[str, float]) -> None:
            nonlocal advance
            advance = advance or start("training", of)
            advance(step, f"loss {info['loss']:.4f}")

        shared["progress"] = progress
        if texts:
            longest = {} if length is None else {"length": length}
            trained = train_text(data, base, None, out, **shared, **longest)
        else:
            trained = train_lora(
                data,
                base,
                out,
                trigger=trigger,
                text_encoder=text_encoder,
                text_encoder_lr=text_encoder_lr,
                min_snr=min_snr,
                high_noise=high_noise,
                prior=prior,
                prior_weight=prior_weight,
                size=size,
                gradient_checkpointing=gradient_checkpointing,
                sample_every=sample_every,
                sample_prompts=sample_prompt or [],
                format=format,
                **shared,
            )
    if as_json:
        done = {"path": str(trained.path), "steps": trained.steps, "modules": trained.modules}
        print_json({**done, "seconds": round(trained.seconds, 1), "samples": [str(p) for p in trained.samples]})
        return
    print(trained.path)


def _refuse(data: Path, kind: str, given: dict[str, Any]) -> None:
    """ValueError for options that the kind of data has no use for."""
    for option, value in given.items():
        if value not in (None, False, 0, []):
            raise ValueError(f"{option}: {data} holds {kind}, which have no such option")
