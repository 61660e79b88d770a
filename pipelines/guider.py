"""A guider for modular pipelines: LoRAs, a method and an inner guidance as one component that is saved by its config.

    guider = MultiLoraGuider(["fox.safetensors", "robe.safetensors"], "composite", weights=[0.8, 0.6])
    pipe.update_components(guider=guider)
    image = pipe(prompt=prompt, output="images")[0]

A modular denoising loop runs the model once per condition (with the prompt, without it, ...) and asks the guider to
mix the predictions. In the place of each of these runs comes the plan: its passes, their mean. The inner guidance then
acts on the means (DESIGN section 1). Plan, passes and batching are the hook's (pipelines.denoise.Conductor).

A guider sees the denoiser, and neither the scheduler nor the text encoders. `with guider.on(pipe):` shows it both.
"""

from __future__ import annotations

import contextlib
import json
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers.guiders
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from torch import nn

from multilora.attach import Bank, attached
from multilora.bases import component_of
from multilora.method import Bound, Method, resolve, unknown
from multilora.pipelines.clock import Clock
from multilora.pipelines.composing import DENOISERS, check_run, denoiser_of, guidance_of, warned
from multilora.pipelines.denoise import Conductor
from multilora.pipelines.intercept import intercepted
from multilora.pipelines.lanes import lane
from multilora.pipelines.members import Member
from multilora.pipelines.prompt import MODES, Encodings
from multilora.pipelines.references import Reference, references

__all__ = ["MultiLoraGuider"]


class _StepClock(Clock):
    """The hook's clock, told by the guider's `set_state` instead of by the scheduler's calls."""

    position, total, now = 0, 1, None

    def call(self, t: Any = None) -> int:
        if self.scheduler is not None:
            self.advances = self.position
            return super().call(self.now)
        if self.position >= self.total:
            raise ValueError(
                f"call {self.position + 1} of a picture of {self.total} steps: its scheduler calls the model more "
                "than once per step, which a guider cannot see; draw inside `with guider.on(pipe):`"
            )
        self.step, self.steps, self.advances, self.t = self.position, self.total, self.position, float(self.now)
        self.calls.append((len(self.calls), self.step))
        return self.step


class _Picture:
    """What one picture holds: the denoiser with its bank (attached during calls only), the conductor and its clock."""

    def __init__(self, denoiser: nn.Module, bank: Bank, conductor: Conductor, clock: _StepClock):
        self.denoiser, self.bank, self.conductor, self.clock = denoiser, bank, conductor, clock

    def close(self) -> None:
        self.conductor.caches.close()
        self.bank.close()


class MultiLoraGuider(BaseGuidance):
    """Composes LoRAs in a modular pipeline, with any diffusers guider as the guidance on top.

    loras            list of paths, library names, Loras, or dicts with the fields of multilora.recipe.LoraUse
                     (reference, sha256, name, weight, text_encoder_weight, blocks, positive_only, mask); a dict of
                     these gives names
    method, options  a route method and its options
    weights          one number or schedule string per LoRA, over those in the dicts
    guidance         a diffusers guider or its config; None for ClassifierFreeGuidance with its defaults
    text_encoder     "per_row" (which runs as "all" here, with a warning), "all", "first", "none"; the LoRAs' parts for
                     text encoders act inside `with guider.on(pipe):` only
    scale, form, passes_per_call    as in multilora.pipelines.composing

    `cancel`, an attribute, is None or an object with is_set(): when set, the next run raises Cancelled. `passes` is
    the number of model runs of each call in the last picture. Between its calls the model's weights and hooks are its
    own, so nothing stays behind after a picture, an error or a cancel.

    Saved by `save_pretrained(folder)`, read by `from_pretrained(folder)`, changed by `new(method="switch")`. Raises
    ValueError naming the LoRA for a missing file, one that is not the file of the config (sha256), or one that is in
    memory only when the config is saved; UnknownName for an unknown method or guidance.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]  # the base class wants some

    @register_to_config
    def __init__(
        self,
        loras: Any = (),
        method: str | Method | Bound = "merge",
        options: Mapping[str, Any] | None = None,
        weights: Sequence[Any] | None = None,
        guidance: BaseGuidance | Mapping[str, Any] | None = None,
        text_encoder: str = "per_row",
        scale: float = 1.0,
        form: str = "auto",
        passes_per_call: int | None = None,
    ):
        self.inner = _guidance(guidance)
        super().__init__()
        self.bound = resolve("route", method, **(options or {}))
        if text_encoder not in MODES:
            raise unknown("text_encoder mode", text_encoder, MODES)
        check_run(scale, passes_per_call, None)
        self.loras: list[Reference] = references(loras, weights)
        self.cancel: Any = None
        self.passes: list[int] = []
        self._halves: list[str] = []
        self._pipe: Any = None
        self._encodings: Encodings | None = None
        self._picture: _Picture | None = None
        self._scope = contextlib.ExitStack()  # what one call of the denoiser holds
        self._called = False
        self._members: list[Member] = []
        self._members_of: Callable[[], Any] = lambda: None
        self._warned = False
        self._diffusers_load_id = "null"  # as on components that diffusers makes from a config
        self.register_to_config(
            loras=[r.use.model_dump() for r in self.loras],
            method=self.bound.record.name,
            options=self.bound.options,
            weights=None,
            guidance=json.loads(self.inner.to_json_string()),
            scale=float(scale),
            _use_default_values=[],  # diffusers takes positional arguments for defaults, and forgets them
        )

    # -- the inner guidance ----------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """What a pipeline's block asks of its guider (guidance_scale, ...) is the inner guidance's."""
        inner = self.__dict__.get("inner")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)

    def enable(self) -> None:
        super().enable()
        self.inner.enable()

    def disable(self) -> None:
        super().disable()
        self.inner.disable()

    @property
    def num_conditions(self) -> int:
        return self.inner.num_conditions

    @property
    def is_conditional(self) -> bool:
        return self.inner.is_conditional

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.inner.set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._forget()

    def prepare_inputs(self, data: Any) -> list[Any]:
        return self._batches(self.inner.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return self._batches(self.inner.prepare_inputs_from_block_state(data, input_fields))

    def _batches(self, batches: list[Any]) -> list[Any]:
        names = [getattr(b, self._identifier_key) for b in batches]
        self._halves = ["negative" if name.startswith("pred_uncond") else "positive" for name in names]
        # A block does not tell its guider of an error between `prepare_models` and the denoiser's call (a ControlNet
        # runs there); but the batches die with the failed step.
        self._scope = contextlib.ExitStack()
        weakref.finalize(batches[0], self._scope.close).atexit = False
        return batches

    def __call__(self, data: list[Any]) -> Any:
        output = self.inner(data)
        picture = self._picture
        if picture is not None and picture.clock.step + 1 == picture.clock.steps:
            picture.bank.close()  # a second-order scheduler may come back once more: its hooks are placed at each call
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)

    # -- around one call of the denoiser ---------------------------------------------------------------------------

    def prepare_models(self, denoiser: nn.Module) -> None:
        self._scope.close()
        super().prepare_models(denoiser)
        self._called = False
        try:
            self._scope.enter_context(lane(denoiser))
            self.inner.prepare_models(denoiser)
            self._scope.callback(self.inner.cleanup_models, denoiser)
            picture = self._begin(denoiser)
            if picture is not None:
                self._scope.enter_context(intercepted(denoiser, self._conduct))
        except BaseException:
            self._scope.close()
            raise

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._scope.close()
        if self._picture is not None and not self._called:
            raise RuntimeError(f"{type(denoiser).__name__} was prepared and never called; nothing was composed")

    def _conduct(self, model: Callable, args: tuple, kwargs: dict) -> Any:
        picture, self._called = self._picture, True
        try:
            with picture.bank.again():
                return picture.conductor(model, args, kwargs)
        except BaseException:
            self._scope.close()
            self._forget()
            raise

    def _begin(self, denoiser: nn.Module) -> _Picture | None:
        """The picture that the denoiser is drawing now, or None when no LoRA has a weight other than 0."""
        picture = self._picture
        if picture is not None and picture.denoiser is not denoiser:
            raise RuntimeError("the pipeline runs two denoisers in one picture; this guider composes for one")
        if picture is None:
            members = self.members(self._pipe, denoiser)
            if not members:
                return None
            picture = self._picture = self._new_picture(denoiser, members)
        clock = picture.clock
        clock.position, clock.total, clock.now = self._step, self._num_inference_steps, self._timestep
        return picture

    def _new_picture(self, denoiser: nn.Module, members: list[Member]) -> _Picture:
        with attached(
            denoiser,
            [m.lora for m in members],
            component=_component(denoiser),
            form=self.config.form,
            blocks=[dict(m.blocks) or None for m in members],
        ) as bank:
            pass  # built and checked; `again` puts it on for each call
        encodings = self._encodings
        if encodings is None:
            encodings = Encodings(SimpleNamespace(), denoiser, members, self.config.text_encoder)
            self._warn_of_text(members)
        clock = _StepClock(getattr(self._pipe, "scheduler", None))
        conductor = Conductor(
            denoiser,
            bank,
            members,
            warned(self.bound, denoiser, _component(denoiser), members),
            clock,
            encodings,
            passes_per_call=self.config.passes_per_call,
            cancel=self.cancel,
            half=lambda: self._halves[min(self._count_prepared, len(self._halves)) - 1],
            guidance=lambda: guidance_of(SimpleNamespace(guider=self.inner)),
        )
        self.passes = conductor.passes
        return _Picture(denoiser, bank, conductor, clock)

    def _warn_of_text(self, members: list[Member]) -> None:
        texted = [m.name for m in members if any(c.startswith("text_encoder") for c in m.lora.components)]
        if texted and self.config.text_encoder != "none" and not self._warned:
            self._warned = True
            warnings.warn(
                f"LoRA {texted[0]!r} has a part for the text encoders, which a guider cannot reach: it does not act. "
                "Draw inside `with guider.on(pipe):`, or say text_encoder='none'.",
                stacklevel=3,
            )

    def _forget(self) -> None:
        picture, self._picture = self._picture, None
        if picture is not None:
            picture.close()

    # -- LoRAs and pipelines ---------------------------------------------------------------------------------------

    def members(self, pipe: Any, denoiser: nn.Module) -> list[Member]:
        """The LoRAs with a weight other than 0, loaded for this denoiser and, when given, its pipeline's encoders."""
        base = pipe if pipe is not None else SimpleNamespace(**{_component(denoiser): denoiser})
        if self._members_of() is not (denoiser if pipe is None else pipe):
            members = [r.member(base).scaled(self.config.scale) for r in self.loras]
            self._members = [m for m in members if not m.weight.is_zero]
            self._members_of = weakref.ref(denoiser if pipe is None else pipe)
        return self._members

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[MultiLoraGuider]:
        """This guider in a modular pipeline for the length of a block, with the pipeline's scheduler and encoders.

            with guider.on(pipe):
                image = pipe(prompt=prompt, output="images")[0]

        Schedules by sigma and schedulers of second order need it, and so do parts of LoRAs for text encoders: they act
        as text_encoder="all" (or "first"), since a modular text block encodes the prompt once. The pipeline's own
        guider is back after the block. Raises ValueError when the pipeline has no guider or no denoiser.
        """
        before = getattr(pipe, "guider", None)
        if not isinstance(before, BaseGuidance):
            raise ValueError(
                f"{type(pipe).__name__} has no guider (a distilled model runs without); use multilora.pipelines."
                "composing, which works on every pipeline"
            )
        if self._pipe is not None:
            raise RuntimeError("this guider is in use on a pipeline; leave that block first, or take guider.new()")
        _, denoiser = denoiser_of(pipe)
        encodings = Encodings(pipe, denoiser, self.members(pipe, denoiser), self.config.text_encoder)
        try:
            self._forget()
            self._pipe, self._encodings = pipe, encodings
            pipe.update_components(guider=self)
            with lane(denoiser), encodings.listening():
                yield self
        finally:
            self._scope.close()
            self._forget()
            self._pipe = self._encodings = None
            pipe.update_components(guider=before)

    # -- config ----------------------------------------------------------------------------------------------------

    def new(self, **changes: Any) -> MultiLoraGuider:
        """A copy, with changed arguments where given; another method has its own options."""
        if "method" in changes:
            changes = {"options": None, **changes}
        return super().new(**{"loras": self.loras, **changes})

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write guider_config.json. Raises ValueError for a LoRA, a mask or a guidance that no config can name."""
        for reference in self.loras:
            reference.check_saved()
        if getattr(diffusers.guiders, type(self.inner).__name__, None) is not type(self.inner):
            name = type(self.inner).__name__
            raise ValueError(f"guidance {name}: only diffusers' own guiders can be saved by config")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


def _component(denoiser: nn.Module) -> str:
    found = component_of(getattr(denoiser, "_orig_mod", denoiser))
    return found if found in DENOISERS else DENOISERS[-1]


def _guidance(given: Any) -> BaseGuidance:
    """The inner guider from a guider, its config, or None. Raises UnknownName for a class that diffusers lacks."""
    if given is None:
        return ClassifierFreeGuidance()
    if isinstance(given, MultiLoraGuider):
        raise ValueError("guidance: a MultiLoraGuider inside another; give all LoRAs to one")
    if isinstance(given, BaseGuidance):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"guidance={given!r}: wanted a diffusers guider or its config")
    known = {n: c for n, c in vars(diffusers.guiders).items() if isinstance(c, type) and issubclass(c, BaseGuidance)}
    name = given.get("_class_name", ClassifierFreeGuidance.__name__)
    if name not in known or known[name] is BaseGuidance:
        raise unknown("guidance", name, set(known) - {BaseGuidance.__name__})
    arguments = {k: v for k, v in given.items() if not k.startswith("_")}
    try:
        return known[name](**arguments)
    except TypeError as error:
        raise ValueError(f"guidance {name}: {error}") from None
