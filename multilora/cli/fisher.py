"""`multilora fisher`: the diagonal Fisher information of a LoRA or a model, for `multilora merge --method fisher`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json
from multilora.cli.target import AsJson, find


def fisher(
    out: Annotated[Path, typer.Option("--out", "-o", help="the .safetensors file")],
    lora: Annotated[str | None, typer.Argument(help="FILE_OR_LIBRARY_NAME[:WEIGHT]; none for the base itself")] = None,
    base: Annotated[str, typer.Option(help="'embedded', a folder or hub id of a pipeline or model")] = "embedded",
    data: Annotated[
        str | None, typer.Option(help="folder of pictures, .txt or .jsonl; none: pictures it draws itself")
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="pipelines: probe, empirical; models: sampled, exact, topk, probe")
    ] = None,
    examples: Annotated[int, typer.Option(help="noisy pictures, or texts")] = 256,
    prompt: Annotated[list[str] | None, typer.Option(help="that it draws, default the triggers; repeat")] = None,
    pictures: Annotated[int, typer.Option(help="how many it draws")] = 16,
    steps: Annotated[int, typer.Option(help="denoising steps of each")] = 20,
    module: Annotated[list[str] | None, typer.Option(help="glob of modules, default the LoRA's; repeat")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="every parameter, as a merge of whole checkpoints needs")
    ] = False,
    draws: Annotated[int, typer.Option(help="probes or sampled answers per example")] = 1,
    topk: Annotated[int, typer.Option(help="answers that --estimator topk looks at")] = 16,
    batch: Annotated[int, typer.Option(help="examples a forward pass")] = 1,
    size: Annotated[int | None, typer.Option(help="side of the pictures, default the base's own")] = None,
    length: Annotated[int, typer.Option(help="of texts, in tokens at most")] = 128,
    seed: Annotated[int, typer.Option(help="of everything that is random")] = 0,
    resume: Annotated[bool, typer.Option(help="go on from a checkpoint of the same settings")] = True,
    force: Annotated[bool, typer.Option("--force", help="replace what is at --out")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate which entries of the weights matter to a LoRA or a model; run again to go on where it stopped."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {str(out)!r}: a Fisher is a .safetensors file")
    if out.exists() and not force:
        raise ValueError(f"--out {str(out)!r}: exists already; --force replaces it")
    if everything and module:
        raise ValueError("--all and --module: give one of them")
    arguments.check_folder(out.parent)
    path, weight = None, 1.0
    if lora is not None:
        wanted = [arguments.read_lora(lora)]
        weight = arguments.read_weights(None, wanted)[0]
        path = find(wanted)[0]
        if path.resolve() == out.resolve():
            raise ValueError(f"--out {str(out)!r}: is the input, which is never written over")
    from multilora.lab.train.fisher import estimate

    with bars() as start:
        advance = None

        def progress(done: int, of: int, info: dict[str, float]) -> None:
            nonlocal advance
            advance = advance or start("estimating", of)
            advance(done)

        found = estimate(
            base,
            path,
            data,
            estimator=estimator,
            examples=examples,
            out=out,
            resume=resume,
            weight=weight,
            modules="all" if everything else module or None,
            draws=draws,
            topk=topk,
            batch=batch,
            prompts=prompt or [],
            pictures=pictures,
            steps=steps,
            size=size,
            length=length,
            seed=seed,
            echo=note,
            progress=progress,
        )
    if as_json:
        print_json({"path": str(out), "tensors": len(found), "about": found.about})
        return
    print(out)
