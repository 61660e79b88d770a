"""What LoRAs keep of their own effect when they run together: the objective of weigh/balanced.py.

    r_i = <e - e_0, d_i> / <d_i, d_i>,   d_i = e_i - e_0

with e the prediction under all LoRAs at the row's weights, e_0 the base's, e_i that of LoRA i alone at weight 1. Sums
go over samples and steps, or over the tokens of answers. NaN for a LoRA that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multilora.lab.objectives import weighed
from multilora.lab.objectives_text import AnswerLoss
from multilora.lab.train.text import answer_logits
from multilora.lab.train.text_data import IGNORED, padded
from multilora.lab.world.loras import pictures
from multilora.lora import Lora
from multilora.method import Bound, Method
from multilora.pipelines.lanes import lane
from multilora.plan import Moment, Pass, one_hot


class _Kept:
    """Sums of products with the LoRAs' own changes, in float64 on the CPU."""

    def __init__(self, row: Sequence[float], who: str) -> None:
        if not all(row):
            raise ValueError(f"{who}: weights {list(row)}: a LoRA at weight 0 is not there to keep anything")
        self.row, self.who = list(row), who
        self.along, self.own = torch.zeros(2, len(row), dtype=torch.float64)

    def add(self, base: Any, own: Sequence[Any], together: Any) -> None:
        """Predictions, tensors or lists with one tensor per sample."""
        if isinstance(base, list):
            for each in zip(base, together, *own, strict=True):
                self.add(each[0], each[2:], each[1])
            return
        base = _wide(base)
        change = _wide(together) - base
        for i, one in enumerate(own):
            d = _wide(one) - base
            self.along[i] += (change * d).sum()
            self.own[i] += d.square().sum()

    def shares(self) -> list[float]:
        if not (torch.isfinite(self.along).all() and torch.isfinite(self.own).all()):
            raise ValueError(f"{self.who}: the model's predictions are not finite at the weights {self.row} or for a "
                             "LoRA alone: lower the weights' mean, or load the model in a wider dtype")  # fmt: skip
        return (self.along / self.own).tolist()


def _wide(prediction: Tensor) -> Tensor:
    return prediction.detach().cpu().double()


class KeptEffects:
    """Shares of their own effects that LoRAs keep while a pipeline draws with all of them.

    Every prompt with every seed is drawn with the row's weights; on the way each step also runs the base and every
    LoRA alone, k + 2 runs. Few steps will do.

    batch  pictures in one run of the pipeline, None: as many as make 16 samples a run of the model

    Raises ValueError without prompts or seeds, for a weight of 0, and where a prediction is not finite.
    """

    name = "kept effects"

    def __init__(
        self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = 8, guidance: float = 3.0,
        batch: int | None = None, cancel: Any = None,
    ) -> None:  # fmt: skip
        self.pipe, self.steps, self.guidance, self.batch, self.cancel = pipe, steps, guidance, batch, cancel
        self.asked = [(prompt, seed) for prompt in prompts for seed in seeds]
        if not self.asked:
            raise ValueError(f"{self.name}: {len(prompts)} prompts and {len(seeds)} seeds, wanted 1 of each")

    def __call__(self, loras: Sequence[Lora], rows: Sequence[Sequence[float]]) -> list[list[float]]:
        return [self._row(loras, row) for row in rows]

    def _row(self, loras: Sequence[Lora], row: Sequence[float]) -> list[float]:
        kept = _Kept(row, self.name)
        bound = Bound(Method("merge", "route", "", "", "k + 2", (), (), lambda loras: _probe(len(loras), kept)), {})
        size = self.batch or max(1, 8 // (len(loras) + 2))  # two samples a picture where there is guidance
        for first in range(0, len(self.asked), size):
            part = self.asked[first : first + size]
            pictures(self.pipe, [p for p, _ in part], [s for _, s in part], loras, bound, steps=self.steps,
                     guidance=self.guidance, weights=list(row), cancel=self.cancel, output="latent")  # fmt: skip
        return kept.shares()


def _probe(k: int, kept: _Kept) -> Any:
    """The plan of a merge that measures on its way."""

    def plan(moment: Moment) -> list[Pass]:
        alone = [Pass(one_hot((1.0,) * k, i), mix=0.0) for i in range(k)]
        return [Pass((0.0,) * k, mix=0.0), *alone, Pass(moment.weights, mix=1.0)]

    def combine(outputs: Sequence[Any], moment: Moment) -> Any:
        kept.add(outputs[0], outputs[1:-1], outputs[-1])
        return outputs[-1]

    plan.combine = combine
    return plan


class KeptAnswers:
    """The same of a language model: changes of the log probabilities at the tokens of the examples' answers.

    Arguments as of objectives_text.AnswerLoss. Raises ValueError as KeptEffects does, and BadData as AnswerLoss does.
    """

    name = "kept effects"

    def __init__(
        self, model: nn.Module, tokenizer: Any, data: str | Path | Sequence[Mapping[str, str]], *, batch: int = 32,
        length: int = 512,
    ) -> None:  # fmt: skip
        self.of = AnswerLoss(model, tokenizer, data, batch=batch, length=length)

    @torch.no_grad()
    def __call__(self, loras: Sequence[Lora], rows: Sequence[Sequence[float]]) -> list[list[float]]:
        k = len(loras)
        alone = [one_hot((1.0,) * k, i) for i in range(k)]
        found = [_Kept(row, self.name) for row in rows]
        with lane(self.of.model), weighed({None: self.of.model}, loras) as put:
            for first in range(0, len(self.of.tokens), self.of.batch):
                batch = padded(self.of.tokens[first : first + self.of.batch], self.of.pad)
                base, *own = [self._said(put, row, batch) for row in ((0.0,) * k, *alone)]
                for kept, row in zip(found, rows, strict=True):
                    kept.add(base, own, self._said(put, row, batch))
        return [kept.shares() for kept in found]

    def _said(self, put: Any, row: Sequence[float], batch: Mapping[str, Tensor]) -> Tensor:
        """[counted tokens, vocabulary] log probabilities."""
        put(list(row))
        device = self.of.model.get_input_embeddings().weight.device
        logits, labels = answer_logits(self.of.model, {key: value.to(device) for key, value in batch.items()})
        return logits[labels != IGNORED].log_softmax(-1)
