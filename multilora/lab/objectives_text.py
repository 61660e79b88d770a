"""Objectives on a language model: the loss of a few answers, and a user's score of what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multilora.chosen import Row
from multilora.lab.objectives import gradients, weighed
from multilora.lab.train.text import answer_losses
from multilora.lab.train.text_data import padded, read_texts, tokenised
from multilora.lora import Lora
from multilora.pipelines.lanes import lane
from multilora.pipelines.text import TextComposer
from multilora.pipelines.text_load import is_seq2seq


class AnswerLoss:
    """Mean cross-entropy of the counted tokens of a few examples; differentiable in rows that are tensors.

    data   a folder of .jsonl files, a file, or {"prompt", "completion"} mappings: see text_data.read_texts
    batch  examples in one run of the model. Rows of numbers share runs: each sample of a batch has its own row

    Raises BadData (a ValueError) for bad data, naming file and line.
    """

    name = "few-shot loss"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        data: str | Path | Sequence[Mapping[str, str]],
        *,
        batch: int = 32,
        length: int = 512,
    ) -> None:
        self.model, self.batch = model, batch
        self.tokens = tokenised(read_texts(data), tokenizer, seq2seq=is_seq2seq(model), length=length)
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in ends if token is not None)
        self.counted = sum(one.counted for one in self.tokens)

    def __call__(self, loras: Sequence[Lora], rows: Sequence[Row]) -> list[Any]:
        learning = gradients(rows)
        # Of a row with gradients every layer wants its own or one for all: no two rows share a run.
        groups = [[(r, e) for e in range(len(self.tokens))] for r in range(len(rows))]
        pairs = groups if learning else [[pair for group in groups for pair in group]]
        totals: list[Any] = [0.0] * len(rows)
        grad = torch.enable_grad() if learning else torch.no_grad()
        with lane(self.model), grad, weighed({None: self.model}, loras) as put:
            for group in pairs:
                for first in range(0, len(group), self.batch):
                    part = group[first : first + self.batch]
                    put(rows[part[0][0]] if learning else [list(rows[r]) for r, _ in part])
                    for (r, _), loss in zip(part, self._losses([e for _, e in part]), strict=True):
                        totals[r] = totals[r] + (loss if learning else float(loss))
        return [total / self.counted for total in totals]

    def _losses(self, examples: Sequence[int]) -> torch.Tensor:
        """[B] summed cross-entropy of each example's answer."""
        device = self.model.get_input_embeddings().weight.device
        batch = padded([self.tokens[e] for e in examples], self.pad)
        return answer_losses(self.model, {key: value.to(device) for key, value in batch.items()}).sum(1)


class AnswerScore:
    """Minus the mean of `score(answers, prompts, completions)` over a few prompts answered greedily.

    score  (answers, prompts, completions), lists of texts, -> numbers, higher is better
    """

    def __init__(
        self,
        composer: TextComposer,
        data: str | Path | Sequence[Mapping[str, str]],
        score: Callable[..., Any],
        *,
        name: str = "",
        max_new_tokens: int = 64,
    ) -> None:
        self.composer, self.score, self.new = composer, score, max_new_tokens
        self.name = name or getattr(score, "__name__", "score")
        self.examples = [e for e in read_texts(data) if e.prompt is not None]
        if not self.examples:
            raise ValueError(f"score {self.name!r} wants examples with a 'prompt' and a 'completion'; there are none")

    def __call__(self, loras: Sequence[Lora], rows: Sequence[Row]) -> list[Any]:
        prompts, wanted = [e.prompt for e in self.examples], [e.completion for e in self.examples]
        found = []
        with self._with(loras) as names:
            for row in rows:
                weights = dict(zip(names, row, strict=True))
                asked = {"max_new_tokens": self.new, "do_sample": False}
                answers = self.composer(prompts, weights=weights, **asked)
                found.append(negated_mean(self.score(answers, prompts, wanted)))
        return found

    @contextlib.contextmanager
    def _with(self, loras: Sequence[Lora]) -> Any:
        """The composer holding these LoRAs, under numbered names, for a block."""
        before, self.composer.loras = self.composer.loras, {}
        try:
            yield [self.composer.add(lora, name=f"candidate {i}").name for i, lora in enumerate(loras)]
        finally:
            self.composer.loras = before


def negated_mean(values: Any) -> Any:
    """A loss out of a score's number or numbers; what is neither comes back as it is, for the search to refuse."""
    try:
        numbers = [float(v) for v in values] if isinstance(values, (list, tuple, torch.Tensor)) else [float(values)]
        return -sum(numbers) / len(numbers)
    except (TypeError, ValueError, ZeroDivisionError):
        return values
