"""`multilora gates` and `multilora train gate`: train gates, list them, see what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from multilora.cli import arguments
from multilora.cli.console import bars, note, print_json, print_table
from multilora.cli.train import train
from multilora.method import unknown

KINDS = ("mole", "loramoe", "token_switch")
gates = typer.Typer(help="gates: what there is, and what one does", no_args_is_help=True)


@gates.command("list")
def list_gates(as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False) -> None:
    """List the gates that come with multilora."""
    from multilora.gates import embedded_gates, read_gate

    found = {name: _said(read_gate(path)) for name, path in embedded_gates().items()}
    if as_json:
        print_json([{"name": name, **said} for name, said in found.items()])
        return
    rows = [(name, s["kind"], ", ".join(lora["name"] for lora in s["loras"]), s["per"]) for name, s in found.items()]
    print_table(("name", "method", "LoRAs", "a gate per"), rows)


@gates.command()
def show(
    gate: Annotated[str, typer.Argument(help="file of a gate, or the name of an embedded one")],
    prompt: Annotated[str | None, typer.Argument(help="default a scene with all the LoRAs")] = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="[NAME=]FILE_OR_LIBRARY_NAME[:WEIGHT]; default all the gate's")
    ] = None,
    mask: Annotated[str, typer.Option(help="names of LoRAs to leave out, comma-separated")] = "",
    base: Annotated[str, typer.Option(help="'embedded', a pipeline folder, or that of a language model")] = "embedded",
    seed: Annotated[int, typer.Option(help="of the picture")] = 0,
    steps: Annotated[int, typer.Option(help="of the picture")] = 25,
    tokens: Annotated[int, typer.Option(help="new ones, of a text")] = 24,
    out: Annotated[Path | None, typer.Option(help="the map, a .png; default beside you, named after the gate")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is at --out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print card and mean shares as JSON")] = False,
) -> None:
    """Draw a picture (or answer a prompt) with a gate, and map each LoRA's share by layer and step (or token)."""
    from multilora.gates import read_gate

    for name, value in (("--steps", steps), ("--tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} {value}: wanted at least 1")
    known = read_gate(gate)
    out = out or Path(f"{Path(known.source).stem}_map.png")
    arguments.check_picture(out, force)
    text = _is_text(base, known)
    wanted = [arguments.read_lora(text) for text in lora or []] or _own(gate, known, text)
    weights = [1.0 if one.weight is None else one.weight for one in wanted]

    from multilora.lab.gate_map import draw_map
    from multilora.method import resolve
    from multilora.recipe import save_png

    bound = resolve("route", known.kind, gate=gate, **({"mask": mask} if mask else {}))
    settings = {"seed": seed, "steps": steps, "tokens": tokens}
    found, prompt = _found(base, text, wanted, weights, bound, prompt, settings)
    words = f"{known.kind}, a gate per {known.settings.get('per', 'layer')}: {prompt}"
    save_png(draw_map(found, title=Path(known.source).stem, subtitle=words), out)
    mean = found.shares.nanmean((0, 1)).tolist()
    if as_json:
        shares = dict(zip(found.names, mean, strict=True))
        print_json({**_said(known), "prompt": prompt, "map": str(out), "shares": shares, "strongest": found.strongest,
                    "sharpest": found.sharpest})  # fmt: skip
        return
    for name, share in zip(found.names, mean, strict=True):
        note(f"{name}: {share:.3f} on the whole")
    print(out)


def _is_text(base: str, gate: Any) -> bool:
    """Whether a base is a language model; "embedded" is the one that the gate learned on."""
    if base == "embedded":
        return str(gate.recipe.get("learned_from", "")).endswith(" examples")
    folder = Path(base).expanduser()
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def _found(
    base: str, text: bool, wanted: Any, weights: list[Any], bound: Any, prompt: str | None, s: dict[str, int]
) -> Any:
    """(the map, the prompt)"""
    from multilora.lab.gate_map import map_of_picture, map_of_text

    names = [one.name for one in wanted]
    if text:
        from multilora.pipelines.text_load import load_text, text_lora

        if prompt is None:
            raise ValueError("PROMPT is missing: say what the language model should answer")
        model, tokenizer = load_text(base)
        loras = [text_lora(model, one.source, name) for one, name in zip(wanted, names, strict=True)]
        found = map_of_text(model, tokenizer, loras, bound, prompt, weights=weights, max_new_tokens=s["tokens"])
        return found, prompt
    from multilora import files
    from multilora.lab.search import search_prompts
    from multilora.pipelines.load import find_lora, load_pipeline

    pipe = load_pipeline(base)
    loras, entries = [], []
    for one in wanted:
        path, entry = find_lora(one.source)
        loras.append(files.load(path, base=pipe, name=one.name or (entry["name"] if entry else None)))
        entries.append(entry)
    if prompt is None:
        prompt = search_prompts(entries, [lora.card.name for lora in loras], 1)[0]
    pipe.set_progress_bar_config(disable=True)
    found = map_of_picture(pipe, loras, bound, prompt, weights=weights, seed=s["seed"], steps=s["steps"])
    return found, prompt


def _own(file: str, gate: Any, text: bool) -> list[arguments.LoraArgument]:
    """The gate's LoRAs: its experts beside it, or embedded ones. Raises ValueError naming one that is neither."""
    import hashlib

    from multilora.gate_loramoe import experts_of
    from multilora.gates import find_gate
    from multilora.pipelines.load import library
    from multilora.pipelines.text_load import text_library

    if beside := experts_of(find_gate(file)):
        return [arguments.LoraArgument(str(path)) for path in beside]
    if text:
        held = {name: folder / "adapter_model.safetensors" for name, folder in text_library().items()}
        names = {hashlib.sha256(path.read_bytes()).hexdigest(): name for name, path in held.items()}
    else:
        names = {entry["sha256"]: name for name, entry in library().items()}
    missing = [lora["name"] for lora in gate.loras if lora["sha256"] not in names]
    if missing:
        raise ValueError(f"gate {gate.source}: LoRA {missing[0]!r} is not in the library; give --lora, its file")
    return [arguments.LoraArgument(names[lora["sha256"]]) for lora in gate.loras]


def _said(gate: Any) -> dict[str, Any]:
    """A gate's card as JSON."""
    count = sum(t.numel() for t in gate.tensors.values())
    kept = {k: v for k, v in gate.settings.items() if k not in ("heads", "widths")}
    about = {"kind": gate.kind, "loras": [dict(lora) for lora in gate.loras], "sha256": gate.sha256}
    return {**about, "parameters": count, "per": "", **kept, "recipe": dict(gate.recipe)}


@train.command("gate")
def train_gate(
    out: Annotated[Path, typer.Option("--out", "-o", help="the .safetensors file; loramoe's experts come beside it")],
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="FILE_OR_LIBRARY_NAME, at least two; repeat. None of loramoe")
    ] = None,
    kind: Annotated[str, typer.Option(help="mole; token_switch or loramoe of a language model")] = KINDS[0],
    base: Annotated[
        str, typer.Option(help="'embedded', a folder of a pipeline or language model, or a hub id")
    ] = "embedded",
    data: Annotated[
        Path | None, typer.Option(help="pictures with captions, default none: LoRAs' own predictions; texts: .jsonl")
    ] = None,
    per: Annotated[
        str | None, typer.Option(help="sharing a gate: linear, layer (default), block or network (of token_switch)")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="of loramoe: their number, default 6")] = None,
    rank: Annotated[int | None, typer.Option(help="of loramoe: of each expert, default 4")] = None,
    modules: Annotated[
        str | None, typer.Option(help="of loramoe: all, attention, feed_forward (default), or path endings, by comma")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="of loramoe: of the balancing constraint, default 0.1; negative turns it")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="of token_switch: LoRAs that a token picks, default 2")] = None,
    head: Annotated[
        str | None, typer.Option(help="of token_switch: path of the linear to route by, default the first to run")
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="of pictures: a share per position, with --per linear")
    ] = False,
    timestep: Annotated[bool, typer.Option(help="of pictures: the gate sees the timestep")] = True,
    sums: Annotated[
        str, typer.Option(help="what the row sums to: one (the paper's), or count: the LoRAs' number")
    ] = "one",
    temperature: Annotated[float, typer.Option(help="of the softmax at first; it is learned")] = 1.0,
    balance: Annotated[float | None, typer.Option(help="weight of the balancing loss, default 0.5, else 0")] = None,
    steps: Annotated[int, typer.Option(help="optimiser steps")] = 200,
    batch: Annotated[int | None, typer.Option(help="examples in a step, default 8, else 16")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate, default 3e-4, token_switch 1e-2")] = None,
    draws: Annotated[int, typer.Option(help="noise levels per picture or prompt")] = 8,
    length: Annotated[int, typer.Option(help="of texts, in tokens at most")] = 512,
    size: Annotated[int | None, typer.Option(help="side of the pictures, default the base's own")] = None,
    seed: Annotated[int, typer.Option(help="of everything that is random")] = 0,
    mixed_precision: Annotated[str | None, typer.Option(help="fp16 or bf16")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 100,
    resume: Annotated[bool, typer.Option(help="go on from a checkpoint of the same settings")] = True,
    force: Annotated[bool, typer.Option("--force", help="replace what is at --out")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Train a gate for frozen LoRAs, or with its experts (loramoe); run again to go on where it stopped."""
    if kind not in KINDS:
        raise unknown("--kind", kind, KINDS)
    wanted = [arguments.read_lora(text) for text in lora or []]
    for one in wanted:
        if one.weight is not None or one.name is not None:
            raise ValueError(f"--lora {one.source}: a gate finds the weights; give the file or library name alone")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {str(out)!r}: a gate is a .safetensors file")
    if out.exists() and not (force and out.is_file()):
        raise ValueError(f"--out {str(out)!r}: exists already; --force replaces it")
    arguments.check_folder(out.parent)
    if data is not None and not data.exists():
        raise ValueError(f"--data {str(data)!r}: there is no such file or folder")
    from multilora.gate_loramoe import experts_folder

    shared: dict[str, Any] = {
        "per": per, "balance": balance, "batch": batch, "lr": lr, "data": data, "steps": steps, "length": length,
        "seed": seed, "mixed_precision": mixed_precision, "checkpoint_every": checkpoint_every, "resume": resume,
        "echo": note,
    }  # fmt: skip
    of_mole = {"token": True if token else None, "timestep": timestep, "sums": sums, "temperature": temperature,
               "draws": draws, "size": size}  # fmt: skip
    of_loramoe = {"experts": experts, "rank": rank, "modules": _modules(modules), "delta": delta}
    if kind != "loramoe":
        _refuse(kind, [name for name, value in of_loramoe.items() if value is not None])
    if kind in ("token_switch", "loramoe"):
        plain = {"token": None, "timestep": True, "sums": "one", "temperature": 1.0, "draws": 8, "size": None}
        _refuse(kind, [name for name, value in of_mole.items() if value != plain[name]])
    if kind == "loramoe":
        of_others = {"lora": lora, "per": per, "top_k": top_k, "head": head}
        _refuse(kind, [name for name, value in of_others.items() if value is not None])
        if data is None:
            raise ValueError("--data is missing: loramoe learns from prompts and completions (.jsonl)")
        if experts_folder(out).exists() and not force:
            raise ValueError(f"{str(experts_folder(out))!r} exists already; --force replaces its experts")
        from multilora.lab.train.loramoe import train as run

        shared |= of_loramoe
    elif kind == "token_switch":
        from multilora.lab.train.token_switch import train as run

        shared |= {"top_k": top_k, "head": head}
    else:
        _refuse(kind, [name for name, value in {"top_k": top_k, "head": head}.items() if value is not None])
        from multilora.lab.train.gates import train as run

        shared |= {"kind": kind, **of_mole}
    shared = {name: value for name, value in shared.items() if value is not None}
    with bars() as start:
        advance = None

        def progress(step: int, of: int, info: dict[str, float]) -> None:
            nonlocal advance
            advance = advance or start("training", of)
            advance(step, f"loss {info['loss']:.4f}")

        first = shared.pop("data") if kind == "loramoe" else [one.source for one in wanted]
        trained = run(first, base, out, progress=progress, **shared)
    if as_json:
        print_json({"path": str(trained.path), "steps": trained.steps, "gates": trained.modules,
                    "seconds": round(trained.seconds, 1)})  # fmt: skip
        return
    print(trained.path)


def _modules(text: str | None) -> Any:
    """A group's name as it is, path endings as a list."""
    return [part.strip() for part in text.split(",")] if text and "," in text else text


def _refuse(kind: str, options: list[str]) -> None:
    if options:
        raise ValueError(f"--{options[0].replace('_', '-')}: a gate of kind {kind} has no such option")
