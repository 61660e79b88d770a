"""What a model answers, as a density: the objectives whose squared gradients are its Fisher information.

    F = E_x E_{y ~ p(y | x)} (d log p(y | x) / d W) ** 2        entry by entry

Gaussian answers (diffusion models, any module): y = f(x) + n with unit variance makes F = E diag(J^T J), J = df / dW,
and one backward pass through v^T f with v ~ N(0, I) is an unbiased estimate of it, without labels. Answers over
classes or a vocabulary: y is drawn from the model, or the expectation is exact, or over the k likeliest y with their
own probabilities (a lower bound).

A source has `objectives(numbers)`: for the examples of those numbers, (objective [B], weight, keep) for Squares.add.
Every random number belongs to (seed, example), so that neither batches nor a restart change what an example gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multilora.lab.train.cache import Store, encode_texts
from multilora.lab.train.loop import Order
from multilora.lab.train.loss import Family, Text
from multilora.lab.train.seeds import mixed_seed

Objective = tuple[Tensor, Any, bool]
MOST_EXACT = 1024  # classes up to which an exact expectation is not a mistake


def generator_of(seed: int, example: int, *more: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(seed, "fisher", example, *more))


class Denoised:
    """A diffusion pipeline's prediction at noisy latents.

    estimator  "probe": v^T prediction. "empirical": half the squared error of the prediction, whose gradient squared
               is the cheaper and biased estimate; it is the probe's where the error is N(0, I)
    store      latents and captions; texts None has the captions encoded with gradients
    """

    def __init__(self, pipe: Any, family: Family, store: Store, estimator: str, draws: int, seed: int) -> None:
        self.pipe, self.family, self.store = pipe, family, store
        self.estimator, self.draws, self.seed = estimator, draws, seed
        self.loss, self.order = family.loss(pipe), Order(len(store), seed, "fisher")
        denoiser = next(getattr(pipe, family.denoiser).parameters())
        self.device, self.dtype = denoiser.device, denoiser.dtype

    def objectives(self, numbers: Sequence[int]) -> Iterator[Objective]:
        latents = self.store.latents
        generators = [generator_of(self.seed, g) for g in numbers]
        picked = [self.order[g] for g in numbers]
        shape = latents.mean.shape[1:]
        u = torch.stack([torch.rand(2, generator=g) for g in generators])
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        x = latents.mean[picked].to(self.device)
        if latents.deviation is not None:
            jitter = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
            x = x + latents.deviation[picked].to(self.device) * jitter
        t = self.loss.draw(u, 0.0).to(self.device)
        noisy, time = self.loss.noisy(x, noise, t).to(self.dtype), self.loss.time(t).to(self.device)
        found = self.family.predict(self.pipe, noisy, time, self._texts(picked)).float()
        if self.estimator == "empirical":
            yield (found - self.loss.target(x, noise, t)).square().flatten(1).sum(1) / 2, 1.0, False
            return
        yield from _probed(found, generators, self.draws)

    def _texts(self, picked: Sequence[int]) -> Text:
        captions = [self.store.captions[i] for i in picked]
        if self.store.texts is None:
            found = self.family.text(self.pipe, captions)
        else:
            own = [self.store.texts[c] for c in captions]
            found = {key: torch.stack([one[key] for one in own]) for key in own[0]}
        return {key: value.to(self.device, self.dtype) for key, value in found.items()}


def _probed(found: Tensor, generators: Sequence[torch.Generator], draws: int) -> Iterator[Objective]:
    """v^T f per example, v ~ N(0, I), `draws` times."""
    for i in range(draws):
        v = torch.stack([torch.randn(found.shape[1:], generator=g) for g in generators])
        yield (found * v.to(found)).flatten(1).sum(1), 1.0 / draws, i + 1 < draws


@torch.no_grad()
def self_drawn(
    pipe: Any, family: Family, prompts: Sequence[str], count: int, steps: int, size: int, seed: int
) -> tuple[Tensor, list[str]]:
    """(latents [count, c, h, w], captions): what the model itself draws, without guidance, so by its own density."""
    captions = [prompts[i % len(prompts)] for i in range(count)]
    found = []
    for i, prompt in enumerate(captions):
        latents = pipe(
            prompt, generator=torch.Generator().manual_seed(mixed_seed(seed, "fisher picture", i)), height=size,
            width=size, num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
        ).images  # fmt: skip
        if latents.ndim == 3:  # FLUX keeps them packed
            latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
        found.append(latents.float())
    return torch.cat(found), captions


def caption_texts(pipe: Any, family: Family, captions: Sequence[str], trained: bool) -> dict[str, Text] | None:
    """Encodings of the captions, or None where the encoders' own layers are looked at."""
    return None if trained else encode_texts(pipe, family, captions)


class Answered:
    """A module's outputs: of one [B, out] for Gaussian answers, logits [B, classes] or [B, positions, vocabulary].

    data       examples, each a mapping of keyword inputs with a batch dimension of 1, or a tensor [...] that becomes
               the one input; or a tensor [n, ...] of them
    estimator  "probe", "sampled", "exact" or "topk"
    positions  None, or how many positions of a sequence are looked at (drawn per example), for "exact" and "topk"; the
               squares are scaled up to all of them

    The density of a sequence's answers is the product over its positions, each given the tokens of the data before it.
    Positions with an attention mask of 0 do not count. A model with a decoder and no decoder inputs gets an answer
    drawn from itself.
    """

    def __init__(
        self, model: nn.Module, data: Any, estimator: str, draws: int, topk: int, positions: int | None, seed: int,
        length: int,
    ) -> None:  # fmt: skip
        self.model, self.data, self.estimator, self.draws = model, data, estimator, draws
        self.topk, self.positions, self.seed, self.length = topk, positions, seed, length
        self.order = Order(len(data), seed, "fisher")
        self.device = next(model.parameters()).device
        self.mass: list[float] = []  # per example: probability that the chosen answers hold

    def objectives(self, numbers: Sequence[int]) -> Iterator[Objective]:
        found, mask = self._run([self.order[g] for g in numbers], numbers)
        generators = [generator_of(self.seed, g) for g in numbers]
        if self.estimator == "probe":
            yield from _probed(found, generators, self.draws)
            return
        if found.ndim not in (2, 3):
            raise ValueError(f"the model's answer has shape {list(found.shape)}, wanted logits [B, classes] or "
                             "[B, positions, vocabulary]")  # fmt: skip
        log = found.log_softmax(-1)
        log = log[:, None] if log.ndim == 2 else log
        mask = torch.ones(log.shape[:2], device=log.device) if mask is None else mask.to(log)
        if mask.shape != log.shape[:2]:
            raise ValueError(f"the mask {list(mask.shape)} does not fit the model's answer {list(log.shape)}")
        p = log.detach().exp()
        if self.estimator == "sampled":
            for i in range(self.draws):
                pairs = zip(p.cpu(), generators, strict=True)
                drawn = torch.stack([torch.multinomial(q, 1, generator=g) for q, g in pairs])
                picked = log.gather(-1, drawn.to(log.device))[..., 0]
                yield (picked * mask).sum(1), 1.0 / self.draws, i + 1 < self.draws
            return
        yield from self._expected(log, p, mask, generators)

    def _expected(
        self, log: Tensor, p: Tensor, mask: Tensor, generators: Sequence[torch.Generator]
    ) -> Iterator[Objective]:
        """sum over positions and answers of p (d log p) ** 2, a backward pass each."""
        classes, length = log.shape[-1], log.shape[1]
        count = classes if self.estimator == "exact" else min(self.topk, classes)
        if self.estimator == "exact" and classes > MOST_EXACT:
            raise ValueError(
                f"an exact expectation over {classes} answers takes as many backward passes a position; use "
                "estimator='topk' or 'sampled'"
            )
        best, which = p.topk(count, -1)
        if self.positions is not None and self.positions < length:
            # Places of the padding are drawn like any other and count 0, which keeps the mean right.
            where = [torch.randperm(length, generator=g)[: self.positions] for g in generators]
            where, scale = torch.stack(where).to(log.device), length / self.positions
        else:
            where, scale = torch.arange(length, device=log.device).expand(len(log), -1), 1.0
        rows = torch.arange(len(log), device=log.device)
        held = (best.sum(-1) * mask).sum(1) / mask.sum(1).clamp(min=1)
        self.mass += held.tolist()
        steps = [(j, c) for j in range(where.shape[1]) for c in range(count)]
        for j, c in steps:
            place = where[:, j]
            weight = best[rows, place, c] * mask[rows, place] * scale
            last = (j, c) == steps[-1]
            yield log[rows, place, which[rows, place, c]], weight.double().cpu(), not last

    def _run(self, picked: Sequence[int], numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(output, mask [B, positions] or None) of the model for some examples."""
        if isinstance(self.data, Tensor):
            found = self.model(self.data[list(picked)].to(self.device))
            return _output(found), None
        if len(picked) > 1:
            raise ValueError("examples that are not rows of one tensor run one at a time; use batch=1")
        example = self.data[picked[0]]
        if isinstance(example, Tensor):
            return _output(self.model(example[None].to(self.device))), None
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in example.items() if k != "labels"}
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            found = _output(self.model(**inputs))
            return found, inputs.get("attention_mask") if found.ndim == 3 else None
        mask = inputs.get("decoder_attention_mask")
        if "decoder_input_ids" not in inputs:
            answer = example.get("labels")
            answer = self._answer(inputs, numbers[0]) if answer is None else answer.to(self.device)
            # A label of -100 is left out by transformers' losses.
            mask = (answer != -100).float()
            inputs["decoder_input_ids"] = self._shifted(answer)
        return _output(self.model(**inputs)), mask

    def _shifted(self, answer: Tensor) -> Tensor:
        """Decoder inputs for an answer [1, n]: the start token, then the answer without its last token."""
        config = self.model.config
        start, pad = config.decoder_start_token_id, getattr(config, "pad_token_id", None)
        first = torch.full_like(answer[:, :1], start)
        return torch.cat([first, answer[:, :-1].masked_fill(answer[:, :-1] == -100, pad or 0)], dim=1)

    @torch.no_grad()
    def _answer(self, inputs: Mapping[str, Any], number: int) -> Tensor:
        """An answer [1, n] drawn from the model itself, without its start token."""
        with torch.random.fork_rng():
            torch.manual_seed(mixed_seed(self.seed, "fisher answer", number))
            drawn = self.model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=self.length)
        return drawn[:, 1:]


def _output(found: Any) -> Tensor:
    found = getattr(found, "logits", found)
    found = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor):
        raise ValueError(f"the model answers with a {type(found).__name__}, wanted a tensor or something with .logits")
    return found if found.dtype == torch.float64 else found.float()
