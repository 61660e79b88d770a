"""Train the router of a token switch for frozen LoRAs on a language model (arXiv 2405.17741).

    from multilora.lab.train.token_switch import train
    train(["sort", "reverse", "next"], "embedded", "gate.safetensors", data="examples.jsonl")

The loss is that of the answers, as in the paper's supervised fine-tuning; its notes name no balancing loss, so
`balance` is 0 unless asked for. In the first `explore` of the steps every LoRA takes part by its softmax share: with
only the top_k from the start, a LoRA that is not picked would get no gradient and stay unpicked. Only the router is
trained; what a step draws belongs to (seed, step), so a resumed run gives the bits of an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from multilora.attach import Bank, attached
from multilora.gate_token_switch import TokenSwitchGate
from multilora.gates import Gate, named, write_gate
from multilora.lab.train.gates import GateRun, Texts, checked, heads_of, recipe_of
from multilora.lab.train.lora import Trained
from multilora.lab.train.text import borrowed
from multilora.method import unknown
from multilora.pipelines.lanes import lane
from multilora.pipelines.text_load import is_seq2seq
from multilora.sites import shape_of


def train(
    loras: Sequence[Any],
    base: Any = "embedded",
    out: str | Path = "gate.safetensors",
    *,
    data: str | Path | Sequence[Mapping[str, str]] | None = None,
    tokenizer: Any = None,
    top_k: int = 2,
    per: str = "network",
    head: str | None = None,
    balance: float = 0.0,
    explore: float = 0.5,
    steps: int = 200,
    batch: int = 16,
    accumulate: int = 1,
    lr: float = 1e-2,
    warmup: int = 10,
    weight_decay: float = 0.0,
    length: int = 512,
    seed: int = 0,
    mixed_precision: str | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    cancel: Any = None,
) -> Trained:
    """Train a gate and write it to `out`, a .safetensors file; see multilora.gate_token_switch for what it computes.

    loras    paths, library names or Loras; they stay as they are
    base     "embedded", a folder or hub id of a decoder language model, or a loaded one with its tokenizer
    data     .jsonl file or folder, or {"prompt", "completion"} mappings
    top_k    LoRAs that share a token, at most
    per      "network": one route for all layers (the paper's); else "block", "layer" or "linear", a router each
    head     path of the linear whose input is routed by, with per="network"; None: the first to run, the paper's. One
             further up has read the words before; the layers before it give every LoRA the same share
    balance  weight of MoLE's balancing loss
    explore  share of the steps in which all LoRAs take part

    Raises BadData (a ValueError) naming bad data, ValueError for settings out of range, an encoder-decoder, a
    checkpoint of other settings, or a loss that is not finite; Cancelled when `cancel` is set.
    """
    settings = {
        "kind": "token_switch", "per": per, "head": head, "top_k": top_k, "balance": balance, "explore": explore,
        "steps": steps, "batch": batch, "accumulate": accumulate, "lr": lr, "warmup": warmup, "token": None,
        "weight_decay": weight_decay, "length": length, "seed": seed, "mixed_precision": mixed_precision,
    }  # fmt: skip
    out = Path(out).expanduser()
    settings = checked(settings, out, len(loras), kinds=("token_switch",))
    began, say = time.monotonic(), echo or (lambda line: None)
    job = Texts(loras, base, tokenizer, data, settings)
    if is_seq2seq(job.model):
        raise ValueError(
            f"{type(job.model).__name__}: an encoder-decoder reads two texts, a token switch routes one's"
        )
    with lane(job.model), borrowed(job.model, seed, mixed_precision) as accelerator:
        for parameter in job.model.parameters():
            parameter.requires_grad_(False)
        with attached(job.model, job.loras, form="side") as bank:
            gate = TokenSwitchGate.fresh(
                linear_heads(bank, per, lambda put: job.loss([0], put), head), bank.k, top_k=top_k, per=per, seed=seed,
                device=next(job.model.parameters()).device,
            )  # fmt: skip
            count = sum(t.numel() for t in gate.tensors.values())
            say(f"{bank.k} LoRAs, {len(gate.heads)} routers, {count:,} parameters; {len(job)} examples")
            bound = settings | {"loras": [one["sha256"] for one in named(job.loras)], "data": job.digest(),
                                "processes": accelerator.num_processes}  # fmt: skip
            run = SwitchRun(job, gate, bank, settings, bound, accelerator, out)
            losses, _ = run.steps(resume, checkpoint_every, 0, (), progress, cancel, say)
        if accelerator.is_main_process:
            gate.top_k = top_k
            tensors = {name: t.detach().cpu().clone() for name, t in gate.tensors.items()}
            made = recipe_of(settings, job, base, losses, __name__)
            write_gate(Gate("token_switch", named(job.loras), tensors, gate.settings(), made), out)
            run.checkpoint.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    seconds = time.monotonic() - began
    say(f"wrote {out} after {seconds:.0f} s")
    return Trained(out, steps, tuple(losses), len(gate.heads), seconds)


def linear_heads(
    bank: Bank, per: str, run: Callable[[Callable[..., None]], Any], head: str | None = None
) -> dict[str, tuple[str, int]]:
    """Group -> (path, input width) of its first linear to run; an adapted embedding has no input to route by.

    head  that linear for all layers. Raises ValueError when it is no adapted linear, or with per other than "network"
    """
    widths = {site.path: shape_of(site.module)[1] for site in bank.sites if site.kind == "linear"}
    if head is None:
        return {group: (path, widths[path]) for group, (path, _) in heads_of(bank, per, run, kind="linear").items()}
    if head not in widths:
        raise unknown("head, a linear that the LoRAs adapt", head, widths)
    if per != "network":
        raise ValueError(f"head={head!r} with per={per!r}: one linear is the head of one route; use per='network'")
    return {"network": (head, widths[head])}


class SwitchRun(GateRun):
    """One training run, built by `train`."""

    def batch_loss(self, call: int) -> Tensor:
        s = self.settings
        early = call < s["explore"] * s["steps"] * s["accumulate"] * self.accelerator.num_processes
        self.gate.top_k = self.bank.k if early else s["top_k"]
        return super().batch_loss(call)
