"""The reference for any family and task: the pipeline's own loop around dense models, none of multilora's code.

    compare(pipe, loras, weights, method, call)    our predictions against the reference's, call by call, same inputs
    reference(pipe, loras, weights, method, call)  what the pipeline makes with the reference in its denoiser's place
    encodings(pipe, loras, weights, row, call)     the prompt's tensors of every call, by dense text encoders

`call` is a function of a pipeline that makes a picture, with its own seeded generator:

    lambda pipe: pipe("a fox", generator=torch.Generator().manual_seed(0), output_type="latent").images

The reference stands where the denoiser stood. At each call it runs deep copies of the denoiser with weights
W + sum_i row_i up_i @ down_i (added in float64), one after the other on copied arguments, each with the prompt as text
encoders with such weights encode it, and hands the mean of the raw predictions back: what the pipeline makes of it,
linear guidance or not, is the pipeline's own. The prompt's tensors are taken from whole runs of the pipeline with
dense text encoders, so halves, lists and repeats for several pictures are the pipeline's too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from multilora.lora import Lora
from multilora.pipelines.composing import composing
from tests import handloop

METHODS = ("merge", "switch", "composite", "sum_of_differences")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# The denoisers' arguments that hold what the text encoders said.
TEXT = ("encoder_hidden_states", "pooled_projections", "added_cond_kwargs.text_embeds", "cap_feats")

Call = Callable[[Any], Any]
Row = tuple[float, ...]


def formula(method: str, step: int, weights: Sequence[float], every: int) -> list[tuple[float, Row]]:
    """(share of the prediction, row) of each run at a step, by the papers' formulas.

    Switch: LoRA number floor(((t - 1) mod (k tau)) / tau) + 1 at step t = 1, 2, ... (arXiv:2402.16843, 3.2).
    """
    k = len(weights)

    def row(*used: int) -> Row:
        return tuple(weights[i] if i in used else 0.0 for i in range(k))

    if method == "base":
        return [(1.0, row())]
    if method == "merge":
        return [(1.0, row(*range(k)))]
    if method == "switch":
        return [(1.0, row(step % (k * every) // every))]
    if method == "composite":
        return [(1.0 / k, row(i)) for i in range(k)]
    if method == "sum_of_differences":  # base + sum_i (e_i - base)
        return [(1.0 - k, row()), *((1.0, row(i)) for i in range(k))]
    raise KeyError(method)


def denoiser_name(pipe: Any) -> str:
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


class Stand:
    """Stands in a pipeline where its denoiser stood: attributes are the denoiser's, calls go to `answer`."""

    def __init__(self, module: Any, answer: Callable[[tuple, dict], Any]):
        self._module, self._answer = module, answer

    def __getattr__(self, name: str) -> Any:
        if name in ("_module", "_answer"):  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(args, kwargs)


@contextmanager
def standing(pipe: Any, name: str, stand: Any) -> Iterator[None]:
    """`stand` in the place of a pipeline's component, past diffusers' bookkeeping."""
    own = pipe.__dict__[name]
    pipe.__dict__[name] = stand
    try:
        yield
    finally:
        pipe.__dict__[name] = own


def _processors(model: Any) -> list[type]:
    return [type(p) for p in getattr(model, "attn_processors", {}).values()]


def by_name(module: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by the name that the denoiser gives them."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def texts_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt's tensors of one call, copied: {"arg" or "arg.key": tensor or list of tensors}."""
    found = {}
    for path in TEXT:
        name, _, key = path.partition(".")
        value = arguments.get(name)
        value = value.get(key) if key and value is not None else None if key else value
        if value is not None:
            found[path] = copy.deepcopy(value)
    return found


def with_texts(arguments: dict[str, Any], texts: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the arguments with other tensors for the prompt."""
    arguments = copy.deepcopy(arguments)
    for path, value in texts.items():
        name, _, key = path.partition(".")
        place = arguments[name] if key else arguments
        old = place[key or name]
        same = [list(t.shape) for t in tensors(old)] == [list(t.shape) for t in tensors(value)]
        assert same, f"{path}: another prompt than the call's"
        place[key or name] = copy.deepcopy(value)
    return arguments


def tensors(prediction: Any) -> list[Tensor]:
    return list(prediction) if isinstance(prediction, (list, tuple)) else [prediction]


def relative(a: Any, b: Any) -> float:
    """|a - b| / |b| over all tensors of two predictions, Frobenius norms."""
    one, two = (torch.cat([t.double().flatten() for t in tensors(p)]) for p in (a, b))
    return float((one - two).norm() / two.norm())


class Dense:
    """The reference's models of one LoRA set on one pipeline, made when first needed, and its prompt encodings."""

    def __init__(self, pipe: Any, loras: Sequence[Lora], weights: Sequence[float], call: Call, every: int = 1):
        self.pipe, self.call, self.every = pipe, call, every
        self.weights = tuple(float(w) for w in weights)
        self.factors = [handloop.factors(lora) for lora in loras]
        self.name = denoiser_name(pipe)
        self.own = getattr(pipe, self.name)
        self.has_text = any(key.startswith("text_encoder") for lora in loras for key in lora)
        self._models: dict[Row, Any] = {}
        self._texts: dict[Row, list[dict[str, Any]]] = {}
        self._outputs: dict[tuple[Row, Row], Any] = {}  # of the call last advanced to
        self.begin()

    def begin(self) -> None:
        """A picture begins."""
        self.calls, self.step, self._t = 0, -1, None
        self._outputs.clear()

    def model(self, row: Row) -> Any:
        if row not in self._models:
            assert not any(m._forward_hooks for m in self.own.modules()), "call prepare() before LoRAs are attached"
            self._models[row] = handloop.dense(self.own, self.factors, row, self.name)
        model = self._models[row]
        # Perturbed-attention pipelines set processors for the length of a picture.
        if _processors(model) != _processors(self.own):
            model.set_attn_processor(dict(self.own.attn_processors))
        return model

    def texts(self, row: Row) -> list[dict[str, Any]]:
        """The prompt's tensors of each denoiser call, encoded under a row by dense text encoders."""
        if row not in self._texts:
            seen: list[dict[str, Any]] = []

            def answer(args: tuple, kwargs: dict) -> Any:
                seen.append(texts_of(by_name(self.own, args, kwargs)))
                return self.own(*args, **kwargs)

            twin = copy.copy(self.pipe)
            twin.scheduler = copy.deepcopy(self.pipe.scheduler)
            for name in TEXT_ENCODERS:
                if getattr(twin, name, None) is not None:
                    twin.__dict__[name] = handloop.dense(getattr(twin, name), self.factors, row, name)
            twin.__dict__[self.name] = Stand(self.own, answer)
            self.call(twin)
            self._texts[row] = seen
        return self._texts[row]

    def prepare(self) -> None:
        """Encode the prompt under every row that any method asks for, while the pipeline is as it was."""
        for method in ("base", *METHODS):
            for step in range(len(self.weights) * self.every):
                for _, row in formula(method, step, self.weights, self.every):
                    self.model(row)
                    if self.has_text:
                        self.texts(row)

    def advance(self, arguments: Mapping[str, Any]) -> int:
        """The step of the next call: another timestep is another step (schedulers of first order)."""
        t = arguments.get("timestep", arguments.get("t"))
        t = float(torch.as_tensor(t).flatten()[0])
        if t != self._t:
            self.step, self._t = self.step + 1, t
        self.calls += 1
        self._outputs.clear()
        return self.step

    def alone(self, row: Row, arguments: dict[str, Any], text: Row | None = None) -> Any:
        """The dense model's answer under one row, with the prompt as its own text encoders encode it (or `text`'s)."""
        text = row if text is None else text
        if (row, text) not in self._outputs:
            texts = self.texts(text)[self.calls - 1] if self.has_text else {}
            self._outputs[row, text] = self.model(row)(**with_texts(arguments, texts))
        return self._outputs[row, text]

    def run(self, method: str, arguments: dict[str, Any], text: Row | None = None) -> Any:
        """The denoiser's answer at the call last advanced to: its output, with the mean of the predictions in it.

        text  None for the prompt as each row's own text encoders encode it, else one row for all
        """
        total, output = None, None
        for share, row in formula(method, self.step, self.weights, self.every):
            output = self.alone(row, arguments, text)
            weighted = [p * share for p in tensors(output[0])]
            total = weighted if total is None else [a + b for a, b in zip(total, weighted, strict=True)]
        prediction = total if isinstance(output[0], list) else total[0]
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        return type(output)(**{**output, next(iter(output)): prediction})


@dataclass
class Comparison:
    """All calls of one picture, each at the input that the reference's trajectory has there.

    differences  [calls] relative difference of our prediction to the reference's
    effects      [calls] how far the reference is from the base model's prediction
    texts        [calls] how far it is from itself without the LoRAs' text-encoder parts; empty where they have none
    distances    other method -> [calls] how far the reference is from that method's
    final        what the pipeline made of the reference's predictions
    runs         runs of the model per call that ours needed
    """

    differences: list[float] = field(default_factory=list)
    effects: list[float] = field(default_factory=list)
    texts: list[float] = field(default_factory=list)
    distances: dict[str, list[float]] = field(default_factory=dict)
    final: Any = None
    runs: list[int] = field(default_factory=list)

    @property
    def worst(self) -> float:
        return max(self.differences)

    @property
    def effect(self) -> float:
        """The base's distance at the call where it is nearest."""
        return min(self.effects)

    @property
    def apart(self) -> float:
        """What the nearest other method's worst call would be."""
        return min(max(each) for each in self.distances.values())

    def check(self, limit: float, effect: float = 0.02, apart: float = 0.02) -> None:
        """AssertionError when a call differs by more than `limit`, or a no-op or another method would pass too."""
        assert self.worst <= limit, f"calls differ by {self.differences}"
        assert self.effect >= effect, f"effects on the base are {self.effects}"
        assert self.apart >= apart, f"distances to other methods are {self.distances}"
        assert not self.texts or min(self.texts) >= 100 * limit, f"effects of the text encoders are {self.texts}"


@torch.no_grad()
def compare(
    pipe: Any,
    loras: Sequence[Lora],
    weights: Sequence[float],
    method: str,
    call: Call,
    *,
    every: int = 1,
    composed: Callable[..., Any] = composing,
    models: Dense | None = None,
    **options: Any,
) -> Comparison:
    """Our predictions beside the reference's. The pipeline goes on with the reference's, so both see the same inputs.

    every     of Switch, ours and the reference's; steps must be at least every * k
    composed  what to compare: a context manager as `composing`, called with (pipe, loras, method, weights=, **options)
    models    a Dense of the same pipeline, LoRAs, weights, call and every, to share its models between methods
    """
    models = models or Dense(pipe, loras, weights, call, every)
    models.prepare()
    models.begin()
    found = Comparison(distances={m: [] for m in METHODS if m != method})
    if method == "switch":
        options = {"every": every, **options}
    with composed(pipe, loras, method, weights=list(weights), **options) as ours:

        def answer(args: tuple, kwargs: dict) -> Any:
            arguments = by_name(models.own, args, kwargs)
            models.advance(arguments)
            wanted = models.run(method, arguments)
            for other, distances in found.distances.items():
                distances.append(relative(models.run(other, arguments)[0], wanted[0]))
            base = models.run("base", arguments)[0]
            found.effects.append(relative(wanted[0], base))
            if models.has_text:
                without = models.run(method, arguments, (0.0,) * len(models.weights))[0]
                found.texts.append(relative(without, wanted[0]))
            got = models.own(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            assert type(got) is type(wanted), (type(got), type(wanted))
            assert [t.shape for t in tensors(got[0])] == [t.shape for t in tensors(wanted[0])]
            found.differences.append(relative(got[0], wanted[0]))
            return wanted

        with standing(pipe, models.name, Stand(models.own, answer)):
            found.final = call(pipe)
        found.runs = list(getattr(ours, "passes", ()))
    assert found.differences, "the denoiser was never called"
    return found


@torch.no_grad()
def reference(
    pipe: Any, loras: Sequence[Lora], weights: Sequence[float], method: str, call: Call, *, every: int = 1
) -> Any:
    """What `call` makes when the reference stands in the denoiser's place.

    All else in the pipeline that reads the prompt (a ControlNet) reads it as encoded under all the LoRAs.
    """
    models = Dense(pipe, loras, weights, call, every)
    models.prepare()
    models.begin()
    twin = copy.copy(pipe)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    for name in TEXT_ENCODERS:
        if getattr(twin, name, None) is not None:
            twin.__dict__[name] = handloop.dense(getattr(twin, name), models.factors, models.weights, name)

    def answer(args: tuple, kwargs: dict) -> Any:
        arguments = by_name(models.own, args, kwargs)
        models.advance(arguments)
        return models.run(method, arguments)

    twin.__dict__[models.name] = Stand(models.own, answer)
    return call(twin)


@torch.no_grad()
def encodings(
    pipe: Any, loras: Sequence[Lora], weights: Sequence[float], row: Row, call: Call
) -> list[dict[str, Any]]:
    """The prompt's tensors of each denoiser call under a row, from a whole run with dense text encoders."""
    return Dense(pipe, loras, weights, call).texts(tuple(row))
