"""Diagonal Fisher information over the entries of W, per LoRA or per checkpoint.

    from multilora.lab.train.fisher import estimate
    estimate("embedded", "zib.safetensors", "zib/", examples=256, out="zib.fisher.safetensors")
    estimate(model, None, ["a line of text", ...], tokenizer=tokenizer, out="model.fisher.safetensors")

    estimate(base, lora, data, *, estimator, examples, out, resume, weight, modules, draws, topk, positions, batch,
             prompts, pictures, steps, size, length, tokenizer, seed, dtype, checkpoint_every, echo, progress, cancel)

Never over a LoRA's factors: those depend on how its update is factorised. The LoRA is in place, at its weight, and F
is E (d log p / d W) ** 2 at W + weight * delta. What p is, and the estimators: multilora.lab.train.observed. How
squares are taken per example: multilora.lab.train.squares. Normalising and floors are the merge's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multilora import files
from multilora.attach import attached
from multilora.bases import Base, base_of, component_of, family_of_model
from multilora.fishers import Fisher, save_fisher
from multilora.lab.train import adapt
from multilora.lab.train.cache import Latents, Store, latents_of
from multilora.lab.train.data import digest, read_folder
from multilora.lab.train.loss import Family, family_of_pipeline
from multilora.lab.train.observed import Answered, Denoised, caption_texts, self_drawn
from multilora.lab.train.squares import Squares, Tap, tappable
from multilora.lab.train.texts import read_examples
from multilora.lora import Lora
from multilora.method import unknown
from multilora.stored import Stored, write_tensors

DIFFUSION = ("probe", "empirical")
ANSWERS = ("sampled", "exact", "topk", "probe")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@torch.inference_mode(False)
@torch.enable_grad()
def estimate(
    base: Any = "embedded",
    lora: Lora | str | Path | None = None,
    data: Any = None,
    *,
    estimator: str | None = None,
    examples: int = 256,
    out: str | Path | None = None,
    resume: bool = True,
    weight: float = 1.0,
    modules: str | Sequence[str] | None = None,
    draws: int = 1,
    topk: int = 16,
    positions: int | None = None,
    batch: int = 1,
    prompts: Sequence[str] = (),
    pictures: int = 16,
    steps: int = 20,
    size: int | None = None,
    length: int = 128,
    tokenizer: Any = None,
    seed: int = 0,
    dtype: str = "float32",
    checkpoint_every: int = 32,
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    cancel: Any = None,
) -> Fisher:
    """The diagonal Fisher, by parameter name, as a mean over examples; written to `out` where there is one.

    base       "embedded", a folder or hub id of a pipeline or of a transformers model, a loaded pipeline, or a module
    lora       a Lora, its file, or None for the base as it is
    data       pipelines: a folder of pictures and captions, or None for pictures that the model draws itself, LoRA in
               place and without guidance, from `prompts` (default: the LoRA's triggers, else no text): `pictures` of
               them, in `steps` steps, each noised anew for every example. Models: a .txt (a text a line) or .jsonl
               file ("text", and "target" for a seq2seq model), a list of texts, of such mappings or of mappings of
               input tensors, or one tensor [n, ...] of inputs
    estimator  pipelines: "probe" (default: unbiased, no labels), "empirical" (gradient of half the squared error: one
               pass per example whatever `draws`, biased). Models: "sampled" (default: answers drawn from the model),
               "exact" (all classes), "topk" (the `topk` likeliest with their own probabilities), "probe" (Gaussian
               outputs)
    examples   how many noisy latents, or inputs; more than there are pictures or inputs go round, in a new order
    weight     of the LoRA while it is in place
    modules    None: the modules that the LoRA touches, biases where it has one. Globs of canonical module paths for
               others. "all": every parameter of the denoiser or model, as merge_checkpoints wants it (one example at
               a time). Without a LoRA None means "all"
    draws      probes or sampled answers per example
    positions  of a sequence that "exact" and "topk" look at, drawn per example; None for all
    batch      examples a forward pass; only layers whose input has the batch in front allow more than 1
    size, length    of pictures, in pixels; of texts, in tokens at most
    seed       every random number belongs to (seed, example): batches change rounding only, and a resumed run gives
               the bits of an uninterrupted one
    dtype      of the sums, "float32" or "float64"
    checkpoint_every    examples between checkpoints in `<out>.checkpoint`, which `resume` goes on from; 0 for none
    progress(done, examples, {}); cancel: like threading.Event, raises `Cancelled` after a checkpoint

    The unit is per example: a sequence's positions are summed. The model is left as it was. Raises ValueError for
    settings out of range, data it cannot use, a LoRA that does not fit, a layer that takes no part in the answer, and
    a checkpoint of other settings.
    """
    say = echo or (lambda line: None)
    _check(examples, draws, topk, positions, batch, pictures, steps, weight, dtype)
    out = None if out is None else Path(out).expanduser()
    if out is not None and out.suffix != ".safetensors":
        raise ValueError(f"out={str(out)!r}: a Fisher is a .safetensors file")
    base_name = getattr(base, "name_or_path", "") or type(base).__name__
    if isinstance(base, (str, Path)):
        base_name = str(base)
        base, tokenizer = _loaded(str(base), tokenizer)
    known = base_of(base)
    if isinstance(lora, (str, Path)):
        lora = files.load(lora, base=known)
    family = None if isinstance(base, nn.Module) else family_of_pipeline(base)
    estimator = estimator or ("sampled" if family is None else "probe")
    allowed = ANSWERS if family is None else DIFFUSION
    if estimator not in allowed:
        raise unknown("Fisher estimator for a " + ("model" if family is None else "pipeline"), estimator, allowed)
    taps, loose = _targets(known, base, family, lora, modules)
    if loose and batch > 1:
        raise ValueError(f"batch={batch}: {next(iter(loose))} is looked at one example at a time; use batch=1")
    size = size or (_native(base, family) if family else None)
    settings = {
        "estimator": estimator, "base": base_name, "lora_sha256": _lora_digest(lora), "weight": weight,
        "draws": draws, "topk": topk, "positions": positions, "batch": batch, "size": size, "length": length,
        "seed": seed, "dtype": dtype, "modules": [t.path for t in taps] + list(loose),
    }  # fmt: skip
    with _in_place(base, lora, weight):
        if family is None:
            inputs, settings["data"] = read_examples(data, tokenizer, length)
            source: Any = Answered(base, inputs, estimator, draws, topk, positions, seed, length)
        else:
            trained = any(n.startswith("text_encoder") for n in settings["modules"])
            own = prompts or (lora.card.triggers if lora is not None else ()) or ("",)
            store, settings["data"] = _pictures(base, family, data, own, pictures, steps, size, seed, trained, say)
            source = Denoised(base, family, store, estimator, draws, seed)
        squares = Squares(taps, loose, DTYPES[dtype])
        run = _Run(squares, source, settings, out, examples, batch, checkpoint_every, progress, cancel, say)
        run.all(resume)
    about = {
        **{k: v for k, v in settings.items() if k != "modules"}, "examples": examples,
        "lora": "" if lora is None else lora.card.name, "lora_sha256": "" if lora is None else lora.card.sha256,
        "family": family_of_model(base), "unit": "per example, log-density in nats",
    }  # fmt: skip
    if getattr(source, "mass", None):
        about["probability_covered"] = sum(source.mass) / len(source.mass)
    found = Fisher({n: t.div_(examples) for n, t in squares.sums.items()}, about, out.name if out else "")
    dead = [n for n, t in found.items() if not t.any()]
    if dead:
        say(f"{len(dead)} of {len(found)} tensors have a Fisher of zero everywhere, first {dead[0]}")
    if out is not None:
        save_fisher(found, out)
        run.checkpoint.unlink(missing_ok=True)
    return found


def _check(
    examples: int, draws: int, topk: int, positions: int | None, batch: int, pictures: int, steps: int, weight: float,
    dtype: str,
) -> None:  # fmt: skip
    counts = {"examples": examples, "draws": draws, "topk": topk, "batch": batch, "pictures": pictures, "steps": steps}
    if positions is not None:
        counts["positions"] = positions
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: wanted a whole number of at least 1")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < float("inf"):
        raise ValueError(f"weight={weight!r}: wanted a finite number")
    if dtype not in DTYPES:
        raise unknown("dtype of the sums", dtype, DTYPES)


def _loaded(base: str, tokenizer: Any) -> tuple[Any, Any]:
    """(pipeline, tokenizer as it was), or (transformers model, its tokenizer) for a folder or hub id of a model."""
    from multilora.pipelines.load import default_device, load_pipeline

    folder = Path(base).expanduser()
    if base == "embedded" or (folder / "model_index.json").is_file():
        return load_pipeline(base), tokenizer
    if not (folder / "config.json").is_file():
        return load_pipeline(base), tokenizer
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = next((n for n in config.architectures or () if hasattr(transformers, n)), None)
    if kind is None:
        raise ValueError(f"base {base!r}: config.json names no model of transformers ({config.architectures})")
    model = getattr(transformers, kind).from_pretrained(folder).to(default_device())
    if tokenizer is None and any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def _targets(
    known: Base, base: Any, family: Family | None, lora: Lora | None, modules: Any
) -> tuple[list[Tap], dict[str, nn.Parameter]]:
    """The layers and parameters to look at: taps where the layer allows it, loose parameters elsewhere."""
    if modules == "all" or (modules is None and lora is None):
        model = base if family is None else getattr(base, family.denoiser)
        prefix = "" if family is None else family.denoiser + "."
        return [], {prefix + n: p for n, p in model.named_parameters() if p.is_floating_point()}
    if modules is None:
        wanted = {key: (p.shape is not None, p.bias is not None) for key, p in lora.items()}
    else:
        globs = [modules] if isinstance(modules, str) else list(modules)
        wanted = {}
        for glob in globs:
            keys = [k for k, m in known.modules.items() if fnmatchcase(k, glob) and _weight(m) is not None]
            if not keys:
                raise unknown("module or glob", glob, known.modules)
            wanted |= dict.fromkeys(keys, (True, False))
    taps, loose = [], {}
    for key, (weight, bias) in wanted.items():
        module = known.modules.get(key)
        if module is None:
            raise unknown(f"module of {known.name}", key, known.modules)
        if tappable(module):
            taps.append(Tap(key, module, f"{key}.weight" if weight else None, f"{key}.bias" if bias else None))
            continue
        for name, chosen in (("weight", weight), ("bias", bias)):
            parameter = getattr(module, name, None)
            if chosen and not isinstance(parameter, nn.Parameter):
                raise ValueError(f"{key}: a {type(module).__name__} has no {name} that could have a Fisher")
            if chosen:
                loose[f"{key}.{name}"] = parameter
    return taps, loose


def _weight(module: nn.Module) -> Any:
    own = getattr(module, "weight", None)
    return own if tappable(module) or isinstance(own, nn.Parameter) else None


def _native(pipe: Any, family: Family) -> int:
    from multilora.lab.train.lora import native_size

    return native_size(pipe, family)


def _lora_digest(lora: Lora | None) -> str:
    """The file's hash, or one of the numbers where there is no file."""
    if lora is None or lora.card.sha256:
        return "" if lora is None else lora.card.sha256
    found = hashlib.sha256()
    for key, part in lora.items():
        delta, norm = part.delta(), part.norm()
        found.update(f"{key} {norm!r} {0.0 if delta is None else float(delta.double().sum())!r}".encode())
    return found.hexdigest()


@contextlib.contextmanager
def _in_place(base: Any, lora: Lora | None, weight: float) -> Iterator[None]:
    """The LoRA attached at its weight, everything frozen and in evaluation mode; afterwards all is as before."""
    parts = {"": base} if isinstance(base, nn.Module) else {
        n: m for n, m in base.components.items() if isinstance(m, nn.Module)}  # fmt: skip
    trained = {p: p.requires_grad for m in parts.values() for p in m.parameters()}
    training = {m: m.training for model in parts.values() for m in model.modules()}
    with contextlib.ExitStack() as stack:
        for model in parts.values():
            adapt.refuse_adapters(model)
        try:
            for model in parts.values():
                model.requires_grad_(False).eval()
            own = [component_of(base)] if "" in parts else lora.components if lora is not None else ()
            for component in own if lora is not None else ():
                model = parts.get("" if "" in parts else component)
                if model is None:
                    raise ValueError(f"the LoRA has modules of {component or 'a bare model'}, the base has none of it")
                bank = stack.enter_context(attached(model, [lora], component=component or None))
                bank.row = [float(weight)]
            yield
        finally:
            for parameter, flag in trained.items():
                parameter.requires_grad_(flag)
            for module, flag in training.items():
                module.training = flag


def _pictures(
    pipe: Any, family: Family, data: Any, prompts: Sequence[str], count: int, steps: int, size: int, seed: int,
    trained: bool, say: Callable[[str], None],
) -> tuple[Store, Any]:  # fmt: skip
    """(latents and captions, what tells them from others)."""
    if data is not None:
        examples = read_folder(data, size=size)
        captions = [e.caption for e in examples]
        with torch.no_grad():
            texts = caption_texts(pipe, family, captions, trained)
        return Store(latents_of(pipe, family, examples, size), captions, texts), digest(examples)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    say(f"the model draws {count} pictures for itself")
    latents, captions = self_drawn(pipe, family, prompts, count, steps, size, seed)
    with torch.no_grad():
        texts = caption_texts(pipe, family, captions, trained)
    return Store(Latents(latents, None), captions, texts), {"prompts": prompts, "pictures": count, "steps": steps}


class _Run:
    """The loop over examples, with its checkpoints."""

    def __init__(
        self, squares: Squares, source: Any, settings: dict[str, Any], out: Path | None, examples: int, batch: int,
        every: int, progress: Any, cancel: Any, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.squares, self.source, self.settings = squares, source, json.loads(json.dumps(settings))
        self.examples, self.batch, self.every = examples, batch, every if out is not None else 0
        self.progress, self.cancel, self.say = progress, cancel, say
        self.checkpoint = (out or Path("none")).with_suffix(".checkpoint.safetensors")

    def all(self, resume: bool) -> None:
        done = self._restore() if resume and self.every else 0
        saved = done
        with self.squares.watching():
            while done < self.examples:
                if self.cancel is not None and self.cancel.is_set():
                    from multilora.pipelines.denoise import Cancelled

                    if self.every and done > saved:
                        self._save(done)
                    raise Cancelled(f"Fisher estimate cancelled after example {done} of {self.examples}")
                numbers = range(done, min(done + self.batch, self.examples))
                for objective, weights, keep in self.source.objectives(numbers):
                    self.squares.add(objective, weights, keep=keep)
                done = numbers.stop
                if self.progress is not None:
                    self.progress(done, self.examples, {})
                if self.every and done - saved >= self.every and done < self.examples:
                    self._save(done)
                    saved = done

    def _save(self, done: int) -> None:
        sums, mass = self.squares.sums, getattr(self.source, "mass", [])
        about = {"done": done, "settings": self.settings, "mass": mass}
        layout = {name: (t.dtype, tuple(t.shape)) for name, t in sums.items()}
        write_tensors(self.checkpoint, layout, sums.values(), {"multilora_checkpoint": json.dumps(about)})

    def _restore(self) -> int:
        """Take up a checkpoint of the same settings; the number of examples in it, 0 where there is none."""
        if not self.checkpoint.is_file():
            return 0
        with Stored(self.checkpoint) as stored:
            about = json.loads(stored.metadata.get("multilora_checkpoint", "{}"))
            old, new = about.get("settings", {}), self.settings
            changed = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            if changed or about.get("done", 0) > self.examples:
                what = ", ".join(changed) or f"{about['done']} examples done, {self.examples} wanted"
                raise ValueError(
                    f"checkpoint {self.checkpoint} is of another estimate ({what}); use the same settings, delete it, "
                    "or pass resume=False"
                )
            for name, tensor in stored.items():
                self.squares.sums[name].copy_(tensor)
        if hasattr(self.source, "mass"):
            self.source.mass = list(about["mass"])
        self.say(f"resumed after example {about['done']} from {self.checkpoint}")
        return int(about["done"])
