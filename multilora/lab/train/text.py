"""Train a LoRA for a language model from prompts and completions.

    from multilora.lab.train.text import train
    train("rude/", "embedded", None, "loras/rude")

The loss is the mean cross-entropy of all counted tokens of a step, whatever share of them a process holds: N processes
(`accelerate launch`) of batch B see the samples and the loss of one process of batch N * B. As with pictures, every
random number belongs to (seed, sample number), and an interrupted and resumed run gives the bits of another.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multilora import files
from multilora.lab.train import adapt
from multilora.lab.train.loop import Order, Steps, forget
from multilora.lab.train.lora import Trained
from multilora.lab.train.text_data import IGNORED, Tokens, digest, padded, read_texts, tokenised
from multilora.lora import Card, Lora
from multilora.pipelines.text_load import check_tokenizer, is_seq2seq, load_text, text_family


def train(
    data: str | Path | Sequence[Mapping[str, str]],
    model: Any = "embedded",
    tokenizer: Any = None,
    path: str | Path = "lora",
    *,
    rank: int = 8,
    alpha: float | None = None,
    modules: str | Sequence[str] = "all",
    dropout: float = 0.0,
    steps: int = 300,
    lr: float = 3e-4,
    batch: int = 16,
    accumulate: int = 1,
    warmup: int = 10,
    weight_decay: float = 0.01,
    length: int = 512,
    seed: int = 0,
    name: str | None = None,
    category: str = "",
    triggers: Sequence[str] = (),
    mixed_precision: str | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    dtype: torch.dtype = torch.float16,
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    cancel: Any = None,
) -> Trained:
    """Train a LoRA and write it, with its card and recipe, to `path`, a PEFT folder.

    data: a folder of .jsonl files, one file, or a list of {"prompt", "completion"} or {"text"}
    (`multilora.lab.train.text_data.read_texts`). model: "embedded", a folder, a hub id, or a loaded causal or seq2seq
    transformers model, which is left as it was; a loaded one comes with its tokenizer. alpha: None means rank.
    modules: "all", "attention", "feed_forward", or path endings. length: tokens of an example at most; what is longer
    is cut off. batch: examples a step and process. warmup and the cosine after it: `multilora.lab.train.loop.lr_at`.
    The base's own dropout is off, `dropout` is the LoRA's. cancel: like threading.Event; set, it stops the run with a
    checkpoint and raises `multilora.pipelines.denoise.Cancelled`. progress(step, steps, {"loss", "lr", "seconds"}).

    Raises BadData (a ValueError) naming file and line, before anything is written; ValueError for settings out of
    range, a tokenizer of another model, a checkpoint of other settings, or a loss that is not finite.
    """
    given = {k: v for k, v in locals().items() if k not in _NOT_SETTINGS}
    settings = _checked(given)
    path = Path(path).expanduser()
    if path.suffix == ".safetensors" or path.is_file():
        raise ValueError(f"path={str(path)!r}: a LoRA of a language model is a PEFT folder, not a file")
    say = echo or (lambda line: None)
    began = time.monotonic()

    examples = read_texts(data)  # before the model: bad data should not wait for gigabytes
    named = str(model) if isinstance(model, (str, Path)) else ""
    if named:
        model, own = load_text(model)
        tokenizer = own if tokenizer is None else tokenizer
    if not isinstance(model, nn.Module) or tokenizer is None:
        what = "a tokenizer" if isinstance(model, nn.Module) else f"a model, got {type(model).__name__}"
        raise ValueError(f"a loaded transformers model and its tokenizer are wanted, or a name: {what} is missing")
    check_tokenizer(model, tokenizer)
    adapt.refuse_adapters(model)
    store = tokenised(examples, tokenizer, seq2seq=is_seq2seq(model), length=length)
    with borrowed(model, seed, mixed_precision) as accelerator:
        paths = adapt.chosen(model, modules, adapt.TEXT_GROUPS)
        try:
            new = adapt.inject(model, paths, rank, settings["alpha"], dropout)
            for layer in adapt.layers(model).values():
                layer.lora_dropout.train()
            say(f"{len(examples)} examples, {len(paths)} layers, {sum(p.numel() for p in new):,} parameters")
            bound = settings | {"data": digest(examples), "processes": accelerator.num_processes}
            run = TextRun(model, store, padding(tokenizer), new, settings, bound, accelerator, path)
            losses, _ = run.steps(resume, checkpoint_every, 0, (), progress, cancel, say)
            parts = adapt.read_out({"": model}, settings["alpha"])
        finally:
            adapt.take_off(model)
    if accelerator.is_main_process:
        lora = Lora(parts, Card(name or path.name, category, tuple(triggers), text_family(model)))
        recipe = _recipe(settings, bound, named or getattr(model, "name_or_path", ""), model, len(examples), losses)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save(lora, path, format="peft", dtype=dtype, base=model, metadata={"recipe": recipe})
        run.checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    seconds = time.monotonic() - began
    say(f"wrote {path} after {seconds:.0f} s")
    return Trained(path, settings["steps"], tuple(losses), len(parts), seconds)


_NOT_SETTINGS = ("data", "model", "tokenizer", "path", "name", "category", "triggers", "checkpoint_every", "resume",
                 "dtype", "echo", "progress", "cancel")  # fmt: skip


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The settings, completed and in range, as JSON-able values."""
    s = dict(given)
    s["alpha"] = float(s["rank"] if s["alpha"] is None else s["alpha"])
    s["modules"] = s["modules"] if isinstance(s["modules"], str) else list(s["modules"])
    limits = {"rank": (1, 4096), "alpha": (0, 1e5), "dropout": (0, 1), "steps": (1, 10**7), "batch": (1, 4096),
              "accumulate": (1, 4096), "lr": (0, 1), "warmup": (0, 10**6), "weight_decay": (0, 10),
              "length": (2, 10**6)}  # fmt: skip
    for key, (low, high) in limits.items():
        if not (low <= s[key] <= high and math.isfinite(s[key])):
            raise ValueError(f"{key}={s[key]!r}: wanted {low} to {high}")
    if s["mixed_precision"] not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision={s['mixed_precision']!r}: wanted None, 'fp16' or 'bf16'")
    return s


@contextlib.contextmanager
def borrowed(model: nn.Module, seed: int, mixed_precision: str | None = None) -> Iterator[Any]:
    """A model for training, in evaluation mode, and an accelerator; afterwards flags and random numbers are as before.

    Whatever is put into the model within the block must be taken off within it.
    """
    accelerator = _accelerator(model, mixed_precision)
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = {m: m.training for m in model.modules()}
    rng = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model.eval()
        yield accelerator
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag
        torch.random.set_rng_state(rng)
        forget(accelerator)


def padding(tokenizer: Any) -> int:
    """A token to fill batches with."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # masked, so that any token serves
    return next(token for token in found if token is not None)


def _accelerator(model: nn.Module, mixed_precision: str | None) -> Any:
    from accelerate import Accelerator

    device = next(model.parameters()).device
    accelerator = Accelerator(mixed_precision=mixed_precision or "no", cpu=device.type == "cpu")
    if accelerator.device != device and accelerator.num_processes > 1:
        model.to(accelerator.device)
    return accelerator


def answer_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy [B, T] in float32 of every label of a `padded` batch, zero where nothing counts."""
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if is_seq2seq(model):
        start = model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(**inputs, decoder_input_ids=start).logits
    else:
        logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


class TextRun(Steps):
    """One training run, built by `train`, which puts the LoRA layers in and takes them off."""

    def __init__(
        self,
        model: nn.Module,
        store: Sequence[Tokens],
        pad: int,
        parameters: Sequence[nn.Parameter],
        settings: dict[str, Any],
        bound: dict[str, Any],
        accelerator: Any,
        out: Path,
    ) -> None:
        super().__init__([{"params": parameters, "base_lr": settings["lr"]}], settings, bound, accelerator, out)
        self.model, self.store, self.pad = model, store, pad
        self.order = Order(len(store), settings["seed"], "data")

    def batch_loss(self, call: int) -> Tensor:
        """Summed loss of a call's examples over the mean number of counted tokens in this step's calls.

        The mean of it over calls and processes is the mean over all tokens of the step, however they are dealt out.
        """
        size, calls = self.settings["batch"], self.settings["accumulate"] * self.accelerator.num_processes
        first = call // calls * calls * size
        counted = sum(self.store[self.order[g]].counted for g in range(first, first + calls * size)) / calls
        own = [self.store[self.order[g]] for g in range(call * size, (call + 1) * size)]
        batch = {key: value.to(self.device) for key, value in padded(own, self.pad).items()}
        return answer_losses(self.model, batch).sum() / counted


def _recipe(
    settings: dict[str, Any], bound: dict[str, Any], named: str, model: nn.Module, examples: int, losses: list
) -> dict[str, Any]:
    """What the file says about its making."""
    packages = ("torch", "transformers", "peft", "accelerate")
    last = losses[-20:]
    return {
        "trainer": "multilora.lab.train.text",
        "base": named or type(model).__name__,
        "architecture": text_family(model),
        "settings": settings,
        "data_sha256": bound["data"],
        "examples": examples,
        "final_loss": round(sum(last) / len(last), 5) if last else None,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
