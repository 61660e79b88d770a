"""Train LoRAMoE: experts and routers together on a frozen language model (arXiv 2312.09979).

    from multilora.lab.train.loramoe import train
    train("examples.jsonl", "embedded", "moe.safetensors", experts=6, balance=0.1)

writes the routers to moe.safetensors and the experts, a PEFT folder each, to moe_experts/0 ... Examples are those of
multilora.lab.train.text; with `balance` they say their type, {"prompt", "completion", "type": "knowledge" or "task"}.
What a step draws belongs to (seed, step), so a resumed run gives the bits of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora import files
from multilora.attach import Bank, attached
from multilora.gate_loramoe import NO_TYPE, TYPES, LoramoeGate, experts_folder, experts_of, halves, localised_balance
from multilora.gates import Gate, named, write_gate
from multilora.lab.train import adapt
from multilora.lab.train.gates import Texts, recipe_of
from multilora.lab.train.loop import Order, Steps
from multilora.lab.train.lora import Trained
from multilora.lab.train.seeds import mixed_seed
from multilora.lab.train.text import borrowed
from multilora.lab.train.text_data import BadData, TextExample, read_texts
from multilora.lora import Card, Lora, LowRank
from multilora.pipelines.lanes import lane
from multilora.pipelines.text_load import is_seq2seq, text_family, text_lora
from multilora.routing import Asked


def train(
    data: str | Path | Sequence[Mapping[str, str]],
    base: Any = "embedded",
    out: str | Path = "loramoe.safetensors",
    *,
    tokenizer: Any = None,
    experts: int = 6,
    rank: int = 4,
    modules: str | Sequence[str] = "feed_forward",
    balance: float = 0.0,
    delta: float = 0.1,
    steps: int = 300,
    batch: int = 16,
    accumulate: int = 1,
    lr: float = 3e-4,
    warmup: int = 10,
    weight_decay: float = 0.01,
    length: int = 512,
    seed: int = 0,
    mixed_precision: str | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    cancel: Any = None,
) -> Trained:
    """Train routers and experts; the routers are written to `out`, a .safetensors file, the experts beside it.

    data      a folder of .jsonl files, one file, or a list of mappings
    base      "embedded", a folder, a hub id, or a loaded language model with its tokenizer, left as it was
    experts   their number; rank of each. alpha is the rank: the paper's 32 / 4 is a larger lr of `up`
    modules   as of multilora.lab.train.text.train; the paper's are the feed-forward linears, each with its own router
    balance   the paper's beta, the weight of the balancing constraint; 0 trains without it, as its run script does
    delta     its strength, -1 to 1; see multilora.gate_loramoe.localised_balance

    Raises BadData (a ValueError) naming bad data, ValueError for settings that are out of range or do not go together,
    a checkpoint of other settings, or a loss that is not finite; Cancelled when `cancel` is set.
    """
    given = {k: v for k, v in locals().items() if k in _SETTINGS}
    out = Path(out).expanduser()
    settings = _checked(given, out)
    began, say = time.monotonic(), echo or (lambda line: None)
    if left := experts_of(out)[experts:]:
        raise ValueError(f"{left[0]}: of an earlier training with more experts; remove {experts_folder(out).name}")
    examples = read_texts(data)  # before the model: bad data should not wait for gigabytes
    types = types_of(examples)
    if balance and set(types) == {NO_TYPE}:
        raise BadData(f"balance={balance:g} wants samples that say their 'type', {' or '.join(TYPES)}; none does")
    job = Texts([], base, tokenizer, data, {"token": None, "length": length})
    if balance and is_seq2seq(job.model):
        raise ValueError("balance with an encoder-decoder: its tokens are two texts; use balance=0")
    adapt.refuse_adapters(job.model)
    with lane(job.model), borrowed(job.model, seed, mixed_precision) as accelerator:
        job.model.requires_grad_(False)
        device = next(job.model.parameters()).device
        paths = adapt.chosen(job.model, modules, adapt.TEXT_GROUPS)
        fresh, widths = fresh_experts(job.model, paths, experts, rank, seed)
        gate = LoramoeGate.fresh(widths, experts, device=device)
        with attached(job.model, fresh, form="side") as bank:
            count = sum(t.numel() for lora in fresh for p in lora.values() for t in (p.down, p.up))
            routing = sum(t.numel() for t in gate.tensors.values())
            say(f"{len(job)} examples, {experts} experts in {len(widths)} layers, {count:,} parameters, and "
                f"{routing:,} of routers")  # fmt: skip
            bound = settings | {"data": job.digest(), "types": hashlib.sha256(repr(types).encode()).hexdigest(),
                                "processes": accelerator.num_processes}  # fmt: skip
            run = LoramoeRun(job, gate, bank, fresh, types, settings, bound, accelerator, out)
            losses, _ = run.steps(resume, checkpoint_every, 0, (), progress, cancel, say)
    if accelerator.is_main_process:
        _write(job, gate, fresh, out, recipe_of(settings, job, base, losses, __name__))
        run.checkpoint.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    seconds = time.monotonic() - began
    say(f"wrote {out} and {experts_folder(out)} after {seconds:.0f} s")
    return Trained(out, steps, tuple(losses), len(widths), seconds)


_SETTINGS = ("experts", "rank", "modules", "balance", "delta", "steps", "batch", "accumulate", "lr", "warmup",
             "weight_decay", "length", "seed", "mixed_precision")  # fmt: skip


def _checked(given: dict[str, Any], out: Path) -> dict[str, Any]:
    """The settings in range, as JSON-able values."""
    s = dict(given)
    if out.suffix != ".safetensors":
        raise ValueError(f"out={str(out)!r}: a gate is a .safetensors file")
    s["modules"] = s["modules"] if isinstance(s["modules"], str) else list(s["modules"])
    limits = {"experts": (1, 1024), "rank": (1, 4096), "balance": (0, 1e4), "delta": (-0.999, 0.999),
              "steps": (1, 10**7), "batch": (1, 4096), "accumulate": (1, 4096), "lr": (0, 1), "warmup": (0, 10**6),
              "weight_decay": (0, 10), "length": (2, 10**6)}  # fmt: skip
    for key, (low, high) in limits.items():
        if not (low <= s[key] <= high and math.isfinite(s[key])):
            raise ValueError(f"{key}={s[key]!r}: wanted {low} to {high}")
    if s["balance"]:
        halves(s["experts"])
    return s


def types_of(examples: Sequence[TextExample]) -> list[int]:
    """The place of each example's type in TYPES, NO_TYPE where it says none. Raises BadData for another type."""
    for example in examples:
        if example.type not in ("", *TYPES):
            raise BadData(f"{example.where}: 'type' is {example.type!r:.40}, wanted {' or '.join(TYPES)}")
    return [TYPES.index(e.type) if e.type else NO_TYPE for e in examples]


def fresh_experts(
    model: nn.Module, paths: Sequence[str], count: int, rank: int, seed: int
) -> tuple[list[Lora], dict[str, int]]:
    """(experts, path -> input width): LoRA's start, down uniform in +-1 / sqrt(in) and up zero; leaves of autograd."""
    found, widths = [], {}
    for i in range(count):
        parts = {}
        for path in paths:
            module = model.get_submodule(path)
            wide, high = module.weight.shape if type(module).__name__ == "Conv1D" else module.weight.shape[::-1]
            widths[path] = int(wide)
            generator = torch.Generator().manual_seed(mixed_seed(seed, "expert", i, path))
            down = (2 * torch.rand(rank, wide, generator=generator) - 1) / wide**0.5
            own = [t.to(module.weight.device).requires_grad_(True) for t in (down, torch.zeros(high, rank))]
            parts[path] = LowRank(*own)
        found.append(Lora(parts, Card(f"expert {i}")))
    return found, widths


class LoramoeRun(Steps):
    """One training run, built by `train`, which attaches the experts."""

    def __init__(
        self, job: Texts, gate: LoramoeGate, bank: Bank, experts: Sequence[Lora], types: Sequence[int],
        settings: dict[str, Any], bound: dict[str, Any], accelerator: Any, out: Path,
    ) -> None:  # fmt: skip
        parameters = [t.requires_grad_(True) for t in gate.tensors.values()]
        parameters += [t for lora in experts for part in lora.values() for t in (part.down, part.up)]
        super().__init__([{"params": parameters, "base_lr": settings["lr"]}], settings, bound, accelerator, out)
        self.job, self.gate, self.bank, self.types = job, gate, bank, types
        self.order = Order(len(job), settings["seed"], "data")

    def batch_loss(self, call: int) -> Tensor:
        size = self.settings["batch"]
        picked = [self.order[g] for g in range(call * size, (call + 1) * size)]
        asked: list[tuple[Asked, Tensor]] = []

        def put(time: Tensor | None, mask: Tensor) -> None:
            asked.append((self.gate.asked(), mask))
            self.bank.gate = asked[-1][0]

        loss = self.job.loss(picked, put)
        if not self.settings["balance"]:
            return loss
        shares, mask = asked[-1][0].shares, asked[-1][1]
        kinds = [self.types[i] for i in picked]
        return loss + self.settings["balance"] * localised_balance(shares, kinds, mask, self.settings["delta"])


def _write(job: Texts, gate: LoramoeGate, experts: Sequence[Lora], out: Path, recipe: dict[str, Any]) -> None:
    """The experts first: a gate names them by what their files hold."""
    folder, loaded = experts_folder(out), []
    for i, lora in enumerate(experts):
        still = {k: LowRank(p.down.detach().cpu(), p.up.detach().cpu()) for k, p in lora.items()}
        for key, part in still.items():
            if not (part.down.isfinite().all() and part.up.isfinite().all()):
                raise ValueError(f"training diverged: {key} holds values that are not finite; lower lr")
        card = Card(f"{out.stem} {i}", family=text_family(job.model))
        path = folder / str(i)
        # without the loss: a resumed run knows the last part of it only, and its experts are the same files
        files.save(Lora(still, card), path, format="peft", dtype=torch.float32, base=job.model,
                   metadata={"recipe": {k: v for k, v in recipe.items() if k != "final_loss"}})  # fmt: skip
        loaded.append(text_lora(job.model, path))
    tensors = {name: t.detach().cpu().clone() for name, t in gate.tensors.items()}
    write_gate(Gate("loramoe", named(loaded), tensors, gate.settings(), recipe), out)
