"""Any transformers causal or seq2seq language model, LoRAs and a method -> tokens.

    with composing_text(model, ["rude", "sort"], "merge", weights=[0.5, 1.0]):
        tokens = model.generate(**tokenizer(prompt, return_tensors="pt"))

    composer = TextComposer.from_pretrained("embedded")
    composer.add("sort")
    composer(["sort: 3 1 2", "reverse: abc"], weights=[{"sort": 1.0}, {}])

`generate` keeps all its arguments. A step of a method is a token: Switch moves on every few tokens, Composite averages
the logits of one pass per LoRA, each with a KV cache of its own. Experimental: no paper has measured either on text.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multilora.attach import attached, loaded
from multilora.lora import Lora
from multilora.method import Bound, Method, resolve, unknown
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.intercept import intercepted
from multilora.pipelines.lanes import lane
from multilora.pipelines.load import EMBEDDED
from multilora.pipelines.members import Member
from multilora.pipelines.text_load import (
    check_known,
    check_tokenizer,
    is_seq2seq,
    left_padded,
    load_text,
    text_lora,
)
from multilora.pipelines.text_passes import TextConductor
from multilora.schedule import Schedule
from multilora.sites import block_factors, canonical

__all__ = ["Cancelled", "TextComposer", "composing_text"]


def language_model(model: Any) -> nn.Module:
    """The transformers model inside `model`, which may be wrapped by PEFT. Raises ValueError when it is none."""
    if type(getattr(model, "base_model", None)).__name__ == "XLoraModel":
        raise ValueError("an X-LoRA weighs its own LoRAs: call it as it is, or give the base, loaded anew, for others")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, "_orig_mod"):
        raise ValueError(
            "a torch.compile wrapper has no `generate` of its own: give the model itself, or model.compile()"
        )
    if not isinstance(inner, nn.Module) or not callable(getattr(inner, "get_input_embeddings", None)):
        raise ValueError(f"wanted a transformers causal or seq2seq model, got {type(inner).__name__}")
    return inner


def text_member(
    model: nn.Module,
    lora: Any,
    name: str | None = None,
    weight: Any = None,
    blocks: Mapping[str, float] | None = None,
) -> Member:
    """A Member from a Lora, a path, a name of the embedded text library, or of an adapter that PEFT put on the model.

    Raises ValueError naming the LoRA and what does not fit, before anything is attached.
    """
    if isinstance(lora, Member):
        return lora
    reference = "" if isinstance(lora, Lora) else str(lora)
    adapters = loaded(model) if reference else {}
    if reference in adapters:
        lora, own = adapters[reference]
        weight, name = own if weight is None else weight, name or reference
    lora = text_lora(model, lora, name)
    name = name or lora.card.name or Path(reference).stem or "lora"
    factors = {canonical(k): v for k, v in (blocks or {}).items()}
    block_factors([canonical(path) for path in lora], factors, f"LoRA {name!r}")
    return Member(lora, name, _schedule(weight, name), blocks=factors, reference=reference)


def _schedule(weight: Any, name: str) -> Schedule:
    try:
        return Schedule.parse(1.0 if weight is None else weight)
    except ValueError as error:
        raise ValueError(f"weight of LoRA {name!r}: {error}") from None


def text_members(model: nn.Module, loras: Any) -> list[Member]:
    """Members from a list or a dict of LoRAs; None takes over the adapters that PEFT put on the model."""
    if loras is None:
        loras = list(loaded(model))
        if not loras:
            raise ValueError("no LoRAs given, and none are on the model; pass a list of LoRAs or paths")
    if isinstance(loras, (Lora, Member, str, Path)):
        loras = [loras]
    if isinstance(loras, Mapping):
        return [text_member(model, lora, name) for name, lora in loras.items()]
    return [text_member(model, lora) for lora in loras]


def requests_of(members: Sequence[Member], weights: Any) -> list[list[Schedule]]:
    """[rows of a batch][loras] schedules from None (the members' own), one weight per LoRA, or a list of such lists.

    Raises ValueError naming row and LoRA.
    """
    if weights is None:
        return [[m.weight for m in members]]
    if isinstance(weights, (str, Mapping)) or not isinstance(weights, (Sequence, torch.Tensor)):
        raise ValueError(f"weights={weights!r}: wanted one number or schedule per LoRA, or a list of them per row")
    weights = weights.tolist() if isinstance(weights, torch.Tensor) else list(weights)
    per_row = [isinstance(row, (list, tuple)) for row in weights]
    if any(per_row) and not all(per_row):
        raise ValueError("weights: some entries are lists and some are not; wanted a list for every row of the batch")
    rows = [list(row) for row in weights] if per_row and per_row[0] else [weights]
    for r, row in enumerate(rows):
        if len(row) != len(members):
            where = f" in row {r}" if any(per_row) else ""
            raise ValueError(f"weights: {len(row)} values{where} for {len(members)} LoRAs, wanted one each")
    return [[_schedule(v, m.name) for v, m in zip(row, members, strict=True)] for row in rows]


@contextlib.contextmanager
def composing_text(
    model: Any,
    loras: Any = None,
    method: str | Method | Bound = "merge",
    *,
    weights: Any = None,
    form: str = "side",
    cancel: Any = None,
    **options: Any,
) -> Iterator[TextConductor | None]:
    """All that `model` says in the block is composed of the LoRAs by the method.

    model    a causal or seq2seq transformers model, also inside PEFT's wrapper
    loras    Loras, Members, paths or library names; a dict gives names; None takes over the adapters that PEFT holds
    weights  one number or schedule (over the tokens) per LoRA; or a list of such lists, one per row of the batch
    form     "side" (two thin matmuls beside each adapted layer), "rebuilt" (the weights are rebuilt when the row
             changes: LoRA-Switch's merge per token), "bank" (rebuilt weights are kept), "auto": see multilora.attach.
             The prompt of a `generate` runs on the side in all of them
    cancel   an object with `is_set()`; when set, the next token raises Cancelled
    options  of the method

    Outside `generate` a call is a step of its own, or the next one of the KV cache that it gets. Calls from several
    threads wait for each other. Yields the conductor, or None when every weight is 0: then the model is untouched.
    Everything is undone when the block ends, however it ends.

    Raises ValueError for bad arguments before anything is attached; within, for beam search and assisted decoding
    under several passes, and for a batch that does not have the rows that `weights` has.
    """
    model = language_model(model)
    bound = resolve("route", method, **options)
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise ValueError(f"cancel={cancel!r}: wanted an object with is_set(), such as a threading.Event")
    members = text_members(model, loras)
    requests = requests_of(members, weights)
    used = [i for i in range(len(members)) if not all(row[i].is_zero for row in requests)]
    members, requests = [members[i] for i in used], [[row[i] for i in used] for row in requests]
    with contextlib.ExitStack() as stack:
        stack.enter_context(lane(model))
        if not members:
            yield None
            return
        bank = stack.enter_context(
            attached(
                model,
                [m.lora for m in members],
                form=form,
                blocks=[dict(m.blocks) or None for m in members],
                # a router may leave out an expert
                optional=[path for m in members for path in map(canonical, m.lora) if ".experts." in path],
                dozing=True,
            )
        )
        conductor = TextConductor(model, bank, members, requests, bound, cancel)
        if is_seq2seq(model):
            stack.enter_context(intercepted(model.get_encoder(), conductor.encode))
        stack.enter_context(intercepted(model, conductor))
        stack.enter_context(conductor.listening())
        yield conductor


class TextComposer:
    """A language model and its tokenizer with a list of LoRAs.

    composer = TextComposer.from_pretrained("folder")
    composer.add("rude/", weight=0.8)
    composer("2+3=", max_new_tokens=8)
    """

    def __init__(self, model: Any, tokenizer: Any, base: str = ""):
        self.model = language_model(model)
        check_tokenizer(self.model, tokenizer)
        self.tokenizer = tokenizer
        self.base = base or str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)
        self.loras: dict[str, Member] = {}
        for name in loaded(self.model):
            self.add(name)

    @classmethod
    def from_pretrained(
        cls, base: str | Path = EMBEDDED, *, torch_dtype: Any = None, device: str | None = None, **kwargs: Any
    ) -> TextComposer:
        """From "embedded", a folder or a hub id; see load_text."""
        return cls(*load_text(base, torch_dtype=torch_dtype, device=device, **kwargs), base=str(base))

    def add(
        self, lora: Any, name: str | None = None, weight: Any = None, blocks: Mapping[str, float] | None = None
    ) -> Member:
        """Add a LoRA: a path, a name of the embedded text library, or a Lora. weight: a number or schedule, default 1.

        Raises ValueError when the LoRA does not fit this model, or the name is taken.
        """
        new = text_member(self.model, lora, name, weight, blocks)
        if new.name in self.loras:
            raise ValueError(f"a LoRA named {new.name!r} is in the composition already; give another name")
        self.loras[new.name] = new
        return new

    def remove(self, name: str) -> None:
        """Take a LoRA out again. Raises UnknownName."""
        if name not in self.loras:
            raise unknown("LoRA", name, self.loras)
        del self.loras[name]

    def __call__(
        self,
        prompts: str | Sequence[str],
        method: str | Method | Bound = "merge",
        options: Mapping[str, Any] | None = None,
        *,
        weights: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        seed: int | None = None,
        form: str = "side",
        cancel: Any = None,
        **generate: Any,
    ) -> Any:
        """What the model answers: a text for a text, a list for a list (num_return_sequences to a prompt in a row).

        weights   of this request: {name: weight}, LoRAs that it does not name are off; or a list of such, one per
                  prompt, which share one batch. None: the weights that the LoRAs were added with
        seed      of sampling (do_sample=True); the global random numbers are left as they were
        generate  arguments of `generate`: max_new_tokens, do_sample, temperature, streamer, stopping_criteria, ...

        Raises ValueError naming the argument, UnknownName for a LoRA that was not added.
        """
        single = isinstance(prompts, str)
        texts = [prompts] if single else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"prompts={prompts!r:.80}: wanted a text or a list of texts, not empty")
        members = list(self.loras.values())
        rows = self._rows(members, weights, len(texts))
        seq2seq = is_seq2seq(self.model)
        device = self.model.get_input_embeddings().weight.device
        with lane(self.model), left_padded(self.tokenizer, seq2seq) as tokenizer:
            inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
            ids = inputs["input_ids"]
            if not ids.shape[1]:
                raise ValueError(f"prompts={prompts!r:.80}: no tokens in it")
            check_known(tokenizer, texts, ids.tolist())
            given = {"pad_token_id": tokenizer.pad_token_id, **generate}
            with (
                _composed(self.model, members, method, rows, form, cancel, options),
                _seeded(seed, device),
            ):
                made = self.model.generate(**{k: v.to(device) for k, v in inputs.items()}, **given)
        made = made if isinstance(made, torch.Tensor) else made.sequences
        answers = self.tokenizer.batch_decode(made[:, 0 if seq2seq else ids.shape[1] :], skip_special_tokens=True)
        return answers[0] if single and len(answers) == 1 else answers

    def stream(self, prompt: str, method: str | Method | Bound = "merge", **arguments: Any) -> Iterator[str]:
        """The answer piece by piece, as it is made; arguments as of a call, for one prompt.

        A caller who stops early (or closes the iterator) stops the model at its next token. Errors of the call are
        raised here.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r:.80}: one text is streamed at a time")
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=not is_seq2seq(self.model), skip_special_tokens=True
        )
        stop, failed = _Either(arguments.pop("cancel", None)), []

        def work() -> None:
            try:
                self(prompt, method, cancel=stop, streamer=streamer, **arguments)
            except BaseException as error:
                failed.append(error)
            finally:
                streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            closed = not failed and worker.is_alive()
            stop.own.set() if closed else None
            worker.join()
        if failed:
            raise failed[0]

    @staticmethod
    def _rows(members: Sequence[Member], weights: Any, count: int) -> list[list[Any]] | None:
        """[prompts][loras] weights, or one row for all."""
        if weights is None:
            return None
        requests = [weights] if isinstance(weights, Mapping) else list(weights)
        if len(requests) not in (1, count):
            raise ValueError(f"weights: {len(requests)} entries for {count} prompts, wanted one each")
        names = [m.name for m in members]
        for request in requests:
            if not isinstance(request, Mapping):
                raise ValueError(f"weights: {request!r} is no mapping of LoRA name -> weight")
            for name in request:
                if name not in names:
                    raise unknown("LoRA", name, names)
        return [[request.get(name, 0.0) for name in names] for request in requests]


class _Either:
    """A cancel flag that is set when its own or the caller's is."""

    def __init__(self, other: Any):
        self.own, self.other = threading.Event(), other

    def is_set(self) -> bool:
        return self.own.is_set() or (self.other is not None and self.other.is_set())


def _composed(
    model: nn.Module, members: list[Member], method: Any, rows: Any, form: str, cancel: Any, options: Any
) -> Any:
    if not members:
        resolve("route", method, **dict(options or {}))
        return contextlib.nullcontext()
    return composing_text(model, members, method, weights=rows, form=form, cancel=cancel, **dict(options or {}))


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sampling's random numbers from a seed, the global ones put back afterwards."""
    if seed is None:
        yield
        return
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: wanted a whole number from 0 to {2**63 - 1}")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
