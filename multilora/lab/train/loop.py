"""The optimisation loop of a LoRA training: steps, gradient averaging, checkpoints, samples."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from multilora.lab.train import checkpoint
from multilora.lab.train.cache import Store
from multilora.lab.train.loss import Family, Flow, Noise, Text
from multilora.lab.train.seeds import mixed_seed


def lr_at(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at 0-based `step`: a linear warm-up, then a cosine to zero."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def forget(accelerator: Any) -> None:
    """Accelerate keeps one precision per process; a later training may want another."""
    from accelerate.state import AcceleratorState, GradientState

    accelerator.free_memory()
    if accelerator.num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


class Order:
    """Which picture is sample number g: a fresh permutation an epoch, computable at any g."""

    def __init__(self, count: int, seed: int, stream: str) -> None:
        self.count, self.seed, self.stream = count, seed, stream
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, g: int) -> int:
        epoch, place = divmod(g, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.stream, epoch))
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return int(self._order[place])


class Steps:
    """Steps of AdamW on a few parameters, with checkpoints; what a batch's loss is, a subclass says.

    groups      [{"params": [...], "base_lr": ...}]
    settings    "steps", "warmup", "lr", "batch", "accumulate", "seed" and "weight_decay"
    bound       what a checkpoint must share with this run
    checkpoint  beside `out`; a resumed run gives the bits of an uninterrupted one
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        settings: dict[str, Any],
        bound: dict[str, Any],
        accelerator: Any,
        out: Path,
    ) -> None:
        self.settings, self.bound, self.accelerator, self.out = settings, bound, accelerator, out
        self.parameters = [p for group in groups for p in group["params"]]
        self.lrs = [group["base_lr"] for group in groups]
        self.device = self.parameters[0].device
        fused = self.device.type == "cpu" and accelerator.mixed_precision != "fp16"
        optimiser = torch.optim.AdamW(
            [{"params": group["params"]} for group in groups], settings["lr"], betas=(0.9, 0.99),
            weight_decay=settings["weight_decay"], fused=fused,
        )  # fmt: skip
        self.optimiser = accelerator.prepare(optimiser)
        self.checkpoint = out.with_name(out.stem + ".checkpoint")

    def batch_loss(self, call: int) -> torch.Tensor:
        """The loss [] of the `batch` samples of model call number `call`, counted over all steps and processes."""
        raise NotImplementedError(type(self).__name__)

    def sample(self, done: int, prompts: Sequence[str]) -> list[Path]:
        """Files that show the LoRA after `done` steps; none here."""
        return []

    def steps(
        self,
        resume: bool,
        checkpoint_every: int,
        sample_every: int,
        sample_prompts: Sequence[str],
        progress: Callable[[int, int, dict[str, float]], None] | None,
        cancel: Any,
        say: Callable[[str], None],
    ) -> tuple[list[float], list[Path]]:
        """Run all steps that no checkpoint holds; the loss of each and the sample pictures drawn."""
        s, main = self.settings, self.accelerator.is_main_process
        done = checkpoint.restore(self.checkpoint, self.parameters, self.optimiser.optimizer, self.bound,
                                  self.accelerator.scaler) if resume else 0  # fmt: skip
        if done:
            say(f"resumed after step {done} from {self.checkpoint}")
        losses, samples, began = [], [], time.monotonic()
        try:
            for step in range(done, s["steps"]):
                if cancel is not None and cancel.is_set():
                    from multilora.pipelines.denoise import Cancelled

                    raise Cancelled(f"training cancelled after step {done} of {s['steps']}")
                losses.append(self.step(step))
                done = step + 1
                if progress is not None and main:
                    lr = s["lr"] * lr_at(step, s["steps"], s["warmup"])
                    progress(done, s["steps"], {"loss": losses[-1], "lr": lr, "seconds": time.monotonic() - began})
                if main and checkpoint_every and done % checkpoint_every == 0 and done < s["steps"]:
                    self.save(done)
                if sample_every and (done % sample_every == 0 or done == s["steps"]):
                    if main:
                        samples += self.sample(done, sample_prompts)
                    self.accelerator.wait_for_everyone()
        except BaseException:
            if main and checkpoint_every and done and self.finite():
                self.save(done)
            raise
        return losses, samples

    def save(self, done: int) -> None:
        checkpoint.save(self.checkpoint, done, self.parameters, self.optimiser.optimizer, self.bound,
                        self.accelerator.scaler)  # fmt: skip

    def finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.parameters)

    def step(self, step: int) -> float:
        """One optimiser step; the mean loss over all processes. Raises ValueError when it is not finite."""
        s, accelerator = self.settings, self.accelerator
        share = lr_at(step, s["steps"], s["warmup"])
        for group, lr in zip(self.optimiser.param_groups, self.lrs, strict=True):
            group["lr"] = lr * share
        self.optimiser.zero_grad()
        total = 0.0
        for part in range(s["accumulate"]):
            call = (step * s["accumulate"] + part) * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(mixed_seed(s["seed"], "dropout", call))
            with accelerator.autocast():
                loss = self.batch_loss(call)
            accelerator.backward(loss / s["accumulate"])
            total += float(loss.detach()) / s["accumulate"]
        if accelerator.num_processes > 1:
            total = float(accelerator.reduce(torch.tensor(total, device=self.device), "mean"))
            self.average_gradients()
        if not math.isfinite(total):
            raise ValueError(f"the loss is {total} at step {step + 1}: training diverged; lower lr (now {s['lr']:g})")
        accelerator.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        return total

    def average_gradients(self) -> None:
        """All gradients of all processes in one reduction: a LoRA is small, a launch per tensor is not."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        for p, piece in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = piece.view_as(p).clone()


class Run(Steps):
    """One training run, built by `multilora.lab.train.lora.train`: it puts the LoRA layers in and takes them off."""

    def __init__(
        self,
        pipe: Any,
        family: Family,
        store: Store,
        prior: Store | None,
        groups: Sequence[dict[str, Any]],
        settings: dict[str, Any],
        bound: dict[str, Any],
        accelerator: Any,
        out: Path,
    ) -> None:
        super().__init__(groups, settings, bound, accelerator, out)
        self.pipe, self.family, self.store, self.prior = pipe, family, store, prior
        self.denoiser = getattr(pipe, family.denoiser)
        self.device = next(self.denoiser.parameters()).device
        self.loss: Noise | Flow = family.loss(pipe)
        self.loss.weights(torch.zeros(1, dtype=torch.long), settings["min_snr"])  # refuse min_snr on a flow now
        self.orders = {name: Order(len(data), settings["seed"], name)
                       for name, data in (("data", store), ("prior", prior)) if data is not None}  # fmt: skip

    def batch_loss(self, call: int) -> torch.Tensor:
        loss = self.part_loss("data", self.store, call)
        if self.prior is not None:
            loss = loss + self.settings["prior_weight"] * self.part_loss("prior", self.prior, call)
        return loss

    def part_loss(self, stream: str, store: Store, call: int) -> torch.Tensor:
        """The mean loss of the `batch` samples of model call number `call`."""
        s, order = self.settings, self.orders[stream]
        numbers = range(call * s["batch"], (call + 1) * s["batch"])
        picked = [order[g] for g in numbers]
        shape = store.latents.mean.shape[1:]
        noise, u, jitter, captions = [], [], [], []
        for g, i in zip(numbers, picked, strict=True):
            generator = torch.Generator().manual_seed(mixed_seed(s["seed"], stream, "noise", g))
            u.append(torch.rand(3, generator=generator))
            noise.append(torch.randn(shape, generator=generator))
            if store.latents.deviation is not None:
                jitter.append(torch.randn(shape, generator=generator))
            captions.append("" if float(u[-1][2]) < s["caption_dropout"] else store.captions[i])
        x = store.latents.mean[picked].to(self.device)
        if store.latents.deviation is not None:
            x = x + store.latents.deviation[picked].to(self.device) * torch.stack(jitter).to(self.device)
        noise = torch.stack(noise).to(self.device)
        t = self.loss.draw(torch.stack(u)[:, :2], s["high_noise"]).to(self.device)
        text = self.texts(store, captions)
        dtype = next(p.dtype for p in self.denoiser.parameters() if not p.requires_grad)
        text = {key: value.to(self.device, dtype) for key, value in text.items()}
        noisy = self.loss.noisy(x, noise, t)
        found = self.family.predict(self.pipe, noisy.to(dtype), self.loss.time(t).to(self.device), text)
        error = (found.float() - self.loss.target(x, noise, t)).square().flatten(1).mean(1)
        weights = self.loss.weights(t, s["min_snr"])
        return (error if weights is None else error * weights.to(error)).mean()

    def texts(self, store: Store, captions: list[str]) -> Text:
        if store.texts is None:
            return self.family.text(self.pipe, captions)
        found = [store.texts[caption] for caption in captions]
        return {key: torch.stack([one[key] for one in found]) for key in found[0]}

    @torch.no_grad()
    def sample(self, done: int, prompts: Sequence[str]) -> list[Path]:
        """Sample pictures of the LoRA as it is, into `<out>.samples`, on the same noise every time."""
        folder = self.out.with_name(self.out.stem + ".samples")
        folder.mkdir(parents=True, exist_ok=True)
        prompts = list(prompts) or self.store.captions[:2]
        size, made = self.settings["size"], []
        for i, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(mixed_seed(self.settings["seed"], "sample", i) % 2**32)
            picture = self.pipe(
                prompt, generator=generator, height=size, width=size, num_inference_steps=20
            ).images[0]
            made.append(folder / f"step-{done:06d}-{i}.png")
            picture.save(made[-1])
        return made
