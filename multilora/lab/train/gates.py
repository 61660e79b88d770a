"""Train a MoLE gate for frozen LoRAs, on pictures or texts (arXiv 2404.13628).

    from multilora.lab.train.gates import train
    train(["zib", "merlo", "burgo"], "embedded", "gate.safetensors")                # no pictures needed
    train(["sort", "rude"], text_model, "gate.safetensors", data="examples.jsonl", tokenizer=tokenizer)

Pictures: the denoising loss on a folder of reference pictures that show the LoRAs together; or, without a folder, the
distance to each LoRA's own prediction on its own prompts. Texts: the loss of the answers. To it comes `balance` times
what the gate's balance loss has above its smallest value. Only the gate is trained; what a step draws belongs to
(seed, step), so a resumed run gives the bits of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multilora import files
from multilora.attach import Bank, attached
from multilora.gate_mole import PER, SUMS, MoleGate, group_of
from multilora.gates import Gate, named, write_gate
from multilora.lab.objectives import weighed
from multilora.lab.objectives_denoising import own_predictions, reference_loss
from multilora.lab.search import own_prompts
from multilora.lab.train.cache import encode_texts
from multilora.lab.train.loop import Order, Steps
from multilora.lab.train.lora import Trained
from multilora.lab.train.loss import Flow, family_of_pipeline
from multilora.lab.train.text import answer_losses, borrowed, padding
from multilora.lab.train.text_data import holds_texts, padded, read_texts, tokenised
from multilora.lora import Lora
from multilora.method import unknown
from multilora.pipelines.lanes import lane
from multilora.pipelines.load import find_lora, load_pipeline
from multilora.pipelines.text_load import check_tokenizer, is_seq2seq, load_text, text_lora
from multilora.routing import Asked, Layer, balance_loss

KINDS = ("mole",)
OWN_PROMPTS = 8  # of each LoRA, where none are given


def train(
    loras: Sequence[Any],
    base: Any = "embedded",
    out: str | Path = "gate.safetensors",
    *,
    data: str | Path | Sequence[Mapping[str, str]] | None = None,
    prompts: Sequence[Sequence[str]] | None = None,
    tokenizer: Any = None,
    kind: str = "mole",
    per: str = "layer",
    token: bool | None = None,
    timestep: bool = True,
    sums: str = "one",
    temperature: float = 1.0,
    balance: float = 0.5,
    steps: int = 200,
    batch: int = 8,
    accumulate: int = 1,
    lr: float = 3e-4,
    warmup: int = 10,
    weight_decay: float = 0.0,
    draws: int = 8,
    length: int = 512,
    size: int | None = None,
    seed: int = 0,
    mixed_precision: str | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    cancel: Any = None,
) -> Trained:
    """Train a gate and write it to `out`, a .safetensors file; see multilora.gate_mole for what it computes.

    loras    paths, library names or Loras; they stay as they are
    base     "embedded", a folder or a hub id of a pipeline or language model, or one that is loaded (a language model
             with its tokenizer), which is left as it was
    data     of pictures a folder with captions, or None; of texts .jsonl or {"prompt", "completion"} mappings
    prompts  [loras] each one's own, for training without data; by default scenes of the embedded world, else triggers
    per      the modules that share a gate: "linear", "layer", "block" or "network"
    token    a share per token: None means for texts, where a share per text would look at words to come. On pictures
             it wants per="linear", since layers differ in their tokens
    timestep of pictures: the gate sees it
    sums     the row sums to "one" (the paper's) or to the "count" of LoRAs
    balance  the paper's alpha
    lr       a step of AdamW moves a logit by up to lr * k * width: at 0.01 gates of the embedded base chose one LoRA
             a layer within 60 steps, and the pictures lost their elements
    draws    noise levels per reference picture, or per prompt without pictures

    Raises BadData (a ValueError) naming bad data, ValueError for settings that are out of range or do not go together,
    a checkpoint of other settings, or a loss that is not finite; Cancelled when `cancel` is set.
    """
    given = {k: v for k, v in locals().items() if k in _SETTINGS}
    out = Path(out).expanduser()
    settings = checked(given, out, len(loras))
    began, say = time.monotonic(), echo or (lambda line: None)
    if _is_text(base, data):
        job: Any = Texts(loras, base, tokenizer, data, settings)
    else:
        job = Pictures(loras, base, data, prompts, settings)
    losses: list[float] = []
    with lane(job.model), borrowed(job.model, seed, mixed_precision) as accelerator:
        for parameter in job.model.parameters():
            parameter.requires_grad_(False)
        with attached(job.model, job.loras, component=job.component, form="side") as bank:
            heads = heads_of(bank, per, lambda put: job.loss([0], put))
            gate = MoleGate.fresh(
                heads, bank.k, temperature=temperature, device=next(job.model.parameters()).device, per=per,
                token=settings["token"], time_scale=job.time_scale, sums=sums,
            )  # fmt: skip
            count = sum(t.numel() for t in gate.tensors.values())
            say(f"{bank.k} LoRAs, {len(heads)} gates, {count:,} parameters; {len(job)} {job.what}")
            bound = settings | {"loras": [one["sha256"] for one in named(job.loras)], "data": job.digest(),
                                "processes": accelerator.num_processes}  # fmt: skip
            run = GateRun(job, gate, bank, settings, bound, accelerator, out)
            losses, _ = run.steps(resume, checkpoint_every, 0, (), progress, cancel, say)
        if accelerator.is_main_process:
            tensors = {name: t.detach().cpu().clone() for name, t in gate.tensors.items()}
            made = recipe_of(settings, job, base, losses)
            write_gate(Gate(kind, named(job.loras), tensors, gate.settings(), made), out)
            run.checkpoint.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    seconds = time.monotonic() - began
    say(f"wrote {out} after {seconds:.0f} s")
    return Trained(out, steps, tuple(losses), len(heads), seconds)


_SETTINGS = (
    "kind", "per", "token", "timestep", "sums", "temperature", "balance", "steps", "batch", "accumulate", "lr",
    "warmup", "weight_decay", "draws", "length", "size", "seed", "mixed_precision",
)  # fmt: skip


def checked(given: dict[str, Any], out: Path, count: int, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """The settings in range, as JSON-able values. Raises ValueError naming one that is not."""
    s = dict(given)
    if out.suffix != ".safetensors":
        raise ValueError(f"out={str(out)!r}: a gate is a .safetensors file")
    if count < 2:
        raise ValueError(f"{count} LoRAs: a gate chooses among at least two")
    for key, known in (("kind", kinds), ("per", PER), ("sums", SUMS)):
        if key in s and s[key] not in known:
            raise unknown(key, s[key], known)
    limits = {"temperature": (1e-6, 1e6), "balance": (0, 1e4), "steps": (1, 10**7), "batch": (1, 4096),
              "accumulate": (1, 4096), "lr": (0, 1), "warmup": (0, 10**6), "weight_decay": (0, 10),
              "draws": (1, 1000), "length": (2, 10**6), "size": (16, 8192), "top_k": (1, 10**4),
              "explore": (0, 1)}  # fmt: skip
    for key, (low, high) in limits.items():
        if s.get(key) is not None and not (low <= s[key] <= high and math.isfinite(s[key])):
            raise ValueError(f"{key}={s[key]!r}: wanted {low} to {high}")
    return s


def _is_text(base: Any, data: Any) -> bool:
    if not isinstance(base, (str, Path)):
        return hasattr(base, "get_input_embeddings")
    folder = Path(base).expanduser()
    language = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    return language or (data is not None and (not isinstance(data, (str, Path)) or holds_texts(data)))


def frozen(lora: Lora) -> Lora:
    """The LoRA with tensors that no gradient reaches."""

    def still(part: Any) -> Any:
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        held = {n: t.detach() for n, t in fields.items() if isinstance(t, Tensor)}
        # What was made in inference mode cannot be part of a graph; a copy outside of it can.
        return dataclasses.replace(part, **{n: t.clone() if t.is_inference() else t for n, t in held.items()})

    return Lora({key: still(part) for key, part in lora.items()}, lora.card)


def read_set(loras: Sequence[Any], pipe: Any) -> tuple[list[Lora], list[Any]]:
    """Paths, library names or Loras as frozen Loras that fit the pipeline, and the library's entry of each or None."""
    found, entries = [], []
    for lora in loras:
        entry = None
        if isinstance(lora, Lora):
            files.fits(lora, pipe)
        else:
            path, entry = find_lora(lora)
            lora = files.load(path, base=pipe, name=entry["name"] if entry else None)
        found.append(frozen(lora))
        entries.append(entry)
    return found, entries


class Pictures:
    """What a gate learns from on a diffusion pipeline: predictions at fixed noisy latents, and what they should be.

    The captions are encoded with every LoRA at weight 1 in the text encoders, as the route method has it.
    """

    def __init__(self, loras: Sequence[Any], base: Any, data: Any, prompts: Any, settings: dict[str, Any]) -> None:
        s = settings
        if s["token"] and s["per"] != "linear":
            raise ValueError(f"token with per={s['per']!r}: layers of a denoiser differ in their tokens, use 'linear'")
        s["token"] = bool(s["token"])
        if data is not None and prompts is not None:
            raise ValueError("data and prompts: captions come with the pictures; give one of the two")
        self.pipe = load_pipeline(str(base)) if isinstance(base, (str, Path)) else base
        self.family = family_of_pipeline(self.pipe)
        self.component, self.model = self.family.denoiser, getattr(self.pipe, self.family.denoiser)
        self.loras, entries = read_set(loras, self.pipe)
        drawn = {"draws": s["draws"], "size": s["size"], "seed": s["seed"]}
        if data is not None:
            self.what, self.cases = "noisy reference pictures", reference_loss(self.pipe, data, **drawn).cases
        else:
            self.what = "predictions of one LoRA"
            prompts = own_prompts(entries, self.loras, OWN_PROMPTS) if prompts is None else prompts
            self.cases = own_predictions(self.pipe, self.loras, prompts, **drawn).cases
        encoders = {n: getattr(self.pipe, n) for n in self.family.encoders if getattr(self.pipe, n, None) is not None}
        with weighed(encoders, self.loras) as put:
            put([1.0] * len(self.loras))
            self.texts = encode_texts(self.pipe, self.family, [case.caption for case in self.cases])
        loss = self.family.loss(self.pipe)
        scale = loss.scale if isinstance(loss, Flow) else float(len(loss.alphas_cumprod))
        self.time_scale = scale if s["timestep"] else None

    def __len__(self) -> int:
        return len(self.cases)

    def loss(self, numbers: Sequence[int], put: Callable[[Tensor | None, Tensor | None], None]) -> Tensor:
        """Mean squared error [] of some cases; `put(time [B], mask)` places the gate before the model runs."""
        cases = [self.cases[i] for i in numbers]
        noisy, time = torch.stack([c.noisy for c in cases]), torch.stack([c.time for c in cases])
        found = [self.texts[c.caption] for c in cases]
        text = {key: torch.stack([one[key] for one in found]).to(noisy.device, noisy.dtype) for key in found[0]}
        put(time if self.time_scale is not None else None, None)
        predicted = self.family.predict(self.pipe, noisy, time, text).float()
        return (predicted - torch.stack([c.target for c in cases])).square().mean()

    def digest(self) -> str:
        """sha256 of all that is learned from."""
        digest = hashlib.sha256()
        for case in self.cases:
            digest.update(repr((case.caption, float(case.time))).encode())
            for tensor in (case.noisy, case.target):
                digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class Texts:
    """What a gate learns from on a language model: prompts and completions, by the loss of their answers."""

    component, time_scale, what = None, None, "examples"

    def __init__(self, loras: Sequence[Any], base: Any, tokenizer: Any, data: Any, settings: dict[str, Any]) -> None:
        if data is None:
            raise ValueError("data is missing: a language model's gate is trained on prompts and completions (.jsonl)")
        if settings["token"] is False:
            raise ValueError("token=False: on texts a share per sample would look at the words to come")
        settings["token"], settings["timestep"] = True, False
        examples = read_texts(data)
        if isinstance(base, (str, Path)):
            base, own = load_text(base)
            tokenizer = own if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("a loaded language model comes with its tokenizer; tokenizer is missing")
        check_tokenizer(base, tokenizer)
        self.model, self.pad = base, padding(tokenizer)
        self.loras = [frozen(text_lora(base, lora)) for lora in loras]
        self.tokens = tokenised(examples, tokenizer, seq2seq=is_seq2seq(base), length=settings["length"])

    def __len__(self) -> int:
        return len(self.tokens)

    def loss(self, numbers: Sequence[int], put: Callable[[Tensor | None, Tensor | None], None]) -> Tensor:
        """Mean cross-entropy [] of the counted tokens of some examples."""
        own, device = [self.tokens[i] for i in numbers], next(self.model.parameters()).device
        batch = {key: value.to(device) for key, value in padded(own, self.pad).items()}
        put(None, batch["attention_mask"])
        return answer_losses(self.model, batch).sum() / max(1, sum(one.counted for one in own))

    def digest(self) -> str:
        """sha256 of all that is learned from."""
        return hashlib.sha256(repr([(one.ids, one.labels) for one in self.tokens]).encode()).hexdigest()


class _Listening:
    """A router that adds nothing and notes which layers run, in order: (path, LoRAs with a part, output width)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def group(self, path: str) -> str:
        return path

    def head(self, group: str) -> None:
        return None

    def shares(self, layer: Layer) -> Tensor:
        site = layer.branch.site
        parts = sum(part is not None for part in site.parts)
        self.seen.append((site.path, parts, layer.y.shape[site.channels]))
        return torch.zeros(len(site.parts), dtype=layer.y.dtype, device=layer.y.device)


def heads_of(
    bank: Bank, per: str, run: Callable[[Callable[..., None]], Any], kind: str = ""
) -> dict[str, tuple[str, int]]:
    """Group -> (path, width) of the layer that its gate looks at: the first to run of those that most LoRAs have.

    kind  "linear" and so on: layers of other kinds are no heads; width is that of the output
    """
    listening, kinds = _Listening(), {site.path: site.kind for site in bank.sites}

    def put(time: Tensor | None, mask: Tensor | None) -> None:
        bank.gate = Asked(listening)

    with torch.no_grad():
        run(put)
    best: dict[str, tuple[int, str, int]] = {}
    for path, parts, width in listening.seen:
        group = group_of(path, per)
        if kind and kinds[path] != kind:
            continue
        if group not in best or parts > best[group][0]:
            best[group] = (parts, path, width)
    return {group: (path, width) for group, (_, path, width) in best.items()}


class GateRun(Steps):
    """One training run, built by `train`."""

    def __init__(
        self, job: Any, gate: MoleGate, bank: Bank, settings: dict[str, Any], bound: dict[str, Any], accelerator: Any,
        out: Path,
    ) -> None:  # fmt: skip
        parameters = [t.requires_grad_(True) for t in gate.tensors.values()]
        super().__init__([{"params": parameters, "base_lr": settings["lr"]}], settings, bound, accelerator, out)
        self.job, self.gate, self.bank = job, gate, bank
        self.order = Order(len(job), settings["seed"], "gate")

    def batch_loss(self, call: int) -> Tensor:
        size, asked, padded_out = self.settings["batch"], [], []

        def put(time: Tensor | None, mask: Tensor | None) -> None:
            asked.append(self.gate.asked(time=time))
            padded_out.append(mask)
            self.bank.gate = asked[-1]

        loss = self.job.loss([self.order[g] for g in range(call * size, (call + 1) * size)], put)
        k = self.bank.k
        return loss + self.settings["balance"] * (balance_loss(asked[-1].shares, padded_out[-1]) - k * math.log(k))


def recipe_of(
    settings: dict[str, Any], job: Any, base: Any, losses: list[float], trainer: str = __name__
) -> dict[str, Any]:
    """What the file says about its making."""
    last = losses[-20:]
    packages = ("torch", "diffusers", "transformers", "accelerate")
    return {
        "trainer": trainer,
        "base": str(base) if isinstance(base, (str, Path)) else type(job.model).__name__,
        "settings": settings,
        "learned_from": f"{len(job)} {job.what}",
        "final_loss": round(sum(last) / len(last), 5) if last else None,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
