"""A language model, conducted: one call of it becomes the plan's passes and the mean of their logits.

A step is a token. Each pass keeps its own KV cache, so that a pass reads what it wrote itself, and the encoder of an
encoder-decoder runs once per pass. What the passes of a token are, says pipelines.text_requests.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from multilora.method import Bound
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.inputs import bound_arguments
from multilora.pipelines.members import Member
from multilora.pipelines.text_requests import Passes, Requests, combines
from multilora.schedule import Schedule

CACHES = ("cache", "past_key_values")  # what transformers calls a KV cache since 5.24, and before
DEFAULT_TOKENS = 20  # that `generate` makes when nothing says how many
TOKEN_BY_TOKEN = ("greedy_search", "sample")


@dataclass(eq=False)
class Generation:
    """One call of `generate`: its mode, how many tokens it may make, the length of its prompt where that is known."""

    mode: str
    new_tokens: int | None
    max_length: int | None
    prompt: int | None = None
    run: Run | None = None

    def steps(self, start: int) -> int:
        """Tokens at most, after a prompt of `start` tokens."""
        if self.new_tokens is not None:
            return max(1, self.new_tokens)
        return max(1, DEFAULT_TOKENS if self.max_length is None else self.max_length - start)


@dataclass(eq=False)
class Run:
    """One batch of texts: the plans of its rows, and what its passes carry from token to token.

    start    tokens in sight at the first call: step = tokens in sight - start
    others   the KV caches of all passes but the first, whose cache is the caller's
    rows     [passes][requests] rows of the first call; `count` passes in every later one
    checked  whether the adapted modules were seen to be called
    """

    plans: list[Any]
    generation: Generation | None
    start: int | None = None
    others: list[Any] = field(default_factory=list)
    rows: list[Any] | None = None
    checked: bool = False


class TextConductor:
    """Runs a bound route method on a language model with an attached bank. One call at a time: others wait.

    requests  [rows of a batch][loras] schedules; a single one serves every batch. With n of them a batch has n rows,
              or a multiple (several sequences per prompt, side by side)
    calls     model calls that were conducted; passes: model runs of each of them in the last batch
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Any,
        members: Sequence[Member],
        requests: Sequence[Sequence[Schedule]],
        bound: Bound,
        cancel: Any = None,
    ):
        self.model, self.bank, self.bound, self.cancel = model, bank, bound, cancel
        self.requests = Requests(members, requests, bound)
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        self.calls = 0
        self.passes: list[int] = []
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()  # by the first pass's cache
        self._encoded: list[Any] = []  # [passes] encoder outputs
        self._generation: Generation | None = None
        self._inside = False
        self._lock = threading.RLock()

    # -- calls that come in -----------------------------------------------------------------------------------------

    def __call__(self, model: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of the model."""
        arguments = bound_arguments(self.model.forward, args, kwargs)
        with self._lock:
            tokens = self._tokens(arguments)
            name = next((n for n in CACHES if arguments.get(n) is not None), None)
            cache = arguments[name] if name else None
            past = 0 if cache is None else int(cache.get_seq_length())
            total = past + (1 if tokens is None else tokens.shape[1])
            run = self._run(cache, past)
            if run.start is None:
                run.start = run.generation.prompt or total if run.generation else total
            samples = self._samples(arguments, tokens)
            passes = self._planned(run, max(0, total - run.start))
            self._check_passes(run, passes, arguments, cache, past)
            output = self._perform(model, arguments, run, passes, samples, name, total - past)
            self.calls += 1
            made = next((output.get(n) for n in CACHES if output.get(n) is not None), None)
            if made is not None:
                self._runs[made] = run
            return output if arguments.get("return_dict", True) is not False else output.to_tuple()

    def encode(self, model: Callable, args: tuple, kwargs: dict) -> Any:
        """A call of an encoder-decoder's encoder: one run per pass; the first pass's output is handed out."""
        if self._inside:  # the model itself calls it, under the row of a pass
            return model(*args, **kwargs)
        arguments = bound_arguments(self.model.get_encoder().forward, args, kwargs)
        with self._lock:
            run = self._run(None, 0)
            passes = self._planned(run, 0)
            self._check_mode(run, passes)
            tokens = arguments["input_ids" if arguments.get("input_ids") is not None else "inputs_embeds"]
            self._encoded = []
            for rows in passes.rows:
                self._check_cancel(0)
                self._put(rows, tokens.shape[0], prefill=run.generation is not None)
                self._encoded.append(model(**arguments))
            return self._encoded[0]

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Learn from each call of `model.generate` how it decodes and how many tokens it may make."""
        model, own = self.model, self.model.__dict__.get("generate")

        def generate(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self._generation = self._announced(args, kwargs)
                try:
                    args, kwargs = _eager(args, kwargs)
                    return (own or type(model).generate.__get__(model))(*args, **kwargs)
                finally:
                    self._generation = None
                    self._encoded = []

        try:
            if hasattr(type(model), "generate"):
                model.__dict__["generate"] = generate
            yield
        finally:
            model.__dict__.pop("generate", None)
            if own is not None:
                model.__dict__["generate"] = own

    def _announced(self, args: tuple, kwargs: dict) -> Generation:
        from transformers import GenerationConfig

        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        config = copy.deepcopy(given) if given is not None else GenerationConfig()
        config.update(**self.model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        config.update(**{k: v for k, v in kwargs.items() if hasattr(config, k)})
        mode = str(getattr(config.get_generation_mode(kwargs.get("assistant_model")), "value", ""))
        prompt = None
        if config.prefill_chunk_size is not None and not self.seq2seq:
            whole = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            prompt = None if whole is None else whole.shape[1]
        return Generation(mode, config.max_new_tokens, config.max_length, prompt)

    # -- from a call to passes ---------------------------------------------------------------------------------------

    def _tokens(self, arguments: dict) -> Tensor | None:
        """The tokens [B, T] (or embeddings [B, T, d]) whose successors this call predicts."""
        names = ("input_ids", "inputs_embeds")
        if self.seq2seq:
            names = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
        return next((arguments[n] for n in names if arguments.get(n) is not None), None)

    def _samples(self, arguments: dict, tokens: Tensor | None) -> int:
        if tokens is None:
            tokens = next(v for v in arguments.values() if isinstance(v, Tensor))
        return tokens.shape[0]

    def _run(self, cache: Any, past: int) -> Run:
        """The run that a call belongs to: its `generate`'s, that of its cache, or a new one."""
        generation = self._generation
        if generation is not None and generation.run is not None:
            return generation.run
        known = self._runs.get(cache) if cache is not None and past else None
        if generation is None and known is not None:
            return known
        run = Run(self.requests.plans(), generation, others=known.others if known else [])
        if generation is not None:
            generation.run = run
        self.passes = []
        self.bank.reset_calls()
        return run

    def _planned(self, run: Run, step: int) -> Passes:
        steps = run.generation.steps(run.start or 1) if run.generation else step + 1
        return self.requests.passes(run.plans, step, steps)

    def _check_passes(self, run: Run, passes: Passes, arguments: dict, cache: Any, past: int) -> None:
        name, count = self.bound.record.name, len(passes.rows)
        self._check_mode(run, passes)
        if count == 1 and not combines(run.plans):
            return
        if arguments.get("labels") is not None:
            raise ValueError(f"labels: {name} averages {count} passes; take the loss from the averaged logits instead")
        lengths = [int(other.get_seq_length()) for other in run.others]
        if cache is not None and past and lengths != [past] * (count - 1):
            raise ValueError(
                f"method {name}: {count} passes need a KV cache each, and this cache of {past} tokens was filled "
                f"elsewhere; start from the whole prompt"
            )
        given = arguments.get("encoder_outputs")
        if given is not None and not (self._encoded and given is self._encoded[0]):
            raise ValueError(
                f"method {name}: {count} passes need the encoder's output of each; give the prompt (input_ids) "
                f"instead of encoder_outputs"
            )

    def _check_mode(self, run: Run, passes: Passes) -> None:
        """Refuse what cannot follow the plan: beams with several passes, and drafts with rows that change."""
        name, count, g = self.bound.record.name, len(passes.rows), run.generation
        if run.rows is None:
            run.rows = passes.rows
        if len(run.rows) != count:
            raise ValueError(f"method {name}: {count} passes after a step of {len(run.rows)}; their number must stay")
        if g is None or not g.mode or g.mode in TOKEN_BY_TOKEN:
            return
        mode = g.mode.replace("_", " ")
        if count > 1:
            raise ValueError(
                f"{mode} under {name}: the averaged logits of {count} passes go with greedy decoding and sampling "
                f"only; use num_beams=1 and no assistant, or method 'merge'"
            )
        if "beam" not in g.mode and run.rows != passes.rows:
            raise ValueError(
                f"{mode} under {name}: its row changes from token to token; use greedy decoding or sampling"
            )

    # -- running the model -------------------------------------------------------------------------------------------

    def _perform(
        self, model: Callable, arguments: dict, run: Run, passes: Passes, samples: int, name: str | None, length: int
    ) -> Any:
        count = len(passes.rows)
        if name is not None and len(run.others) < count - 1:  # the first cache is still empty
            run.others = [copy.deepcopy(arguments[name]) for _ in range(count - 1)]
        given = arguments.get("encoder_outputs")
        ours = given is not None and bool(self._encoded) and given is self._encoded[0]
        prefill = run.generation is not None and length > 1
        first, logits, made = None, [], []
        for j, rows in enumerate(passes.rows):
            self._check_cancel(passes.moments[0].step)
            own = {**arguments, "return_dict": True}
            if j and name is not None:
                own[name] = run.others[j - 1]
            if j and ours:
                own["encoder_outputs"] = _as_many(self._encoded[j], given)
            self._put(rows, samples, prefill)
            output = self._inner(model, own)
            first = output if first is None else first
            logits.append(output.logits)
            made.append(next((output.get(n) for n in CACHES if output.get(n) is not None), None))
        run.others = [c for c in made[1:] if c is not None]
        self.passes.append(count)
        if not run.checked and (given is None or ours):
            self.bank.check_called()
            run.checked = True
        mixed = self.requests.mixed(logits, run.plans, passes)
        return first if mixed is first.logits else type(first)(**{**first, "logits": mixed})

    def _inner(self, model: Callable, arguments: dict) -> Any:
        self._inside = True
        try:
            return model(**arguments)
        finally:
            self._inside = False

    def _put(self, rows: Sequence[Any], samples: int, prefill: bool) -> None:
        """The bank's row (or gate) for a pass: one for all samples where they agree, else one per sample."""
        if callable(rows[0]):
            self.bank.gate = rows[0]
            return
        times, left = divmod(samples, len(rows))
        if left or not times:
            raise ValueError(
                f"weights for {len(rows)} rows of a batch, and the batch has {samples}: give one list of weights for "
                f"all, or one per row"
            )
        self.bank.gate = None
        same = all(row == rows[0] for row in rows)
        # A prompt runs on the side: one call is no reason to rebuild every weight. A row per sample does that.
        beside = prefill and self.bank.form != "side"
        self.bank.row = rows[0] if same and not beside else [row for row in rows for _ in range(times)]

    def _check_cancel(self, step: int) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled(f"cancelled before token {step + 1}")


def _eager(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """`generate`'s arguments without its own torch.compile, which would compile the composition into a graph."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    if given is None:
        return args, {"disable_compile": True, **kwargs}
    eager = copy.deepcopy(given)
    eager.disable_compile = True
    if len(args) > 1:
        return (args[0], eager, *args[2:]), kwargs
    return args, {**kwargs, "generation_config": eager}


def _as_many(encoded: Any, like: Any) -> Any:
    """An encoder's output with as many rows as `like`, which `generate` may have repeated side by side."""
    times = like[0].shape[0] // encoded[0].shape[0]
    if times == 1:
        return encoded
    wider = {k: v.repeat_interleave(times, 0) if isinstance(v, Tensor) else v for k, v in encoded.items()}
    return type(encoded)(**wider)
