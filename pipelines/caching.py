"""Feature caches under composition: every row keeps a state of its own.

diffusers has caches for transformers (FirstBlockCache and kin); U-Nets have pipelines.branch_cache. A cache skips
blocks where what it stored at an earlier step is close enough. diffusers keeps one store for each cache context of the
pipeline ("cond", "uncond"). Under composition several rows pass through one such context, and a residual of one LoRA
would serve another: wrong in the very first step of Composite, and after each change of Switch. Here the context is
the pipeline's own, together with the call's place in the step and the runs of the batch. So rows in turn decide each
for itself, and rows in one batch share one store and one decision.

A store lives from one step to the next. One that a step left unused is dropped: a row that comes back later starts
anew, whatever it stored before, and stores never outnumber the rows of two steps. A new picture starts empty.

`cached` puts on the cache that one option asks for, `--cache 3` or `--cache first_block:0.1`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from torch import nn

from multilora.pipelines.branch_cache import BranchCache

# diffusers' stateful hooks. A hook keeps its state in StateManagers, by context, or in its attribute `state`, one for
# all contexts.
SUPPORTED = {
    "FBCHeadBlockHook": "FirstBlockCache",
    "MagCacheHeadHook": "MagCache",
    "TaylorSeerCacheHook": "TaylorSeer",
    "PyramidAttentionBroadcastHook": "PyramidAttentionBroadcast",
    "FasterCacheBlockHook": "FasterCache",
    "FasterCacheDenoiserHook": "FasterCache",
}
REFUSED = {
    "SeaCacheRootHook": (
        "SeaCache",
        "it follows video models step by step, and no composition was ever tested on one",
    ),
    "TextKVCacheTransformerHook": (
        "TextKVCache",
        "it knows a prompt by its place in memory, where a composition puts another prompt at the next call",
    ),
}
REFUSED["TextKVCacheBlockHook"] = REFUSED["TextKVCacheTransformerHook"]


def stateful_hooks(denoiser: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """(path, module, hook) of every hook of diffusers in the model that keeps something from call to call."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    return [
        (path, module, hook)
        for path, module in inner.named_modules()
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        if hook._is_stateful or hasattr(hook, "is_tail")
    ]


def check_caches(denoiser: nn.Module, adapted: Sequence[nn.Module] = ()) -> list[Any]:
    """The model's stateful hooks. `adapted` are the modules that LoRAs act on.

    Raises ValueError, with the cache's name and the reason, for one that cannot be right under composition.
    """
    found = stateful_hooks(denoiser)
    for path, module, hook in found:
        kind = type(hook).__name__
        name, why = REFUSED.get(kind, (SUPPORTED.get(kind, kind), ""))
        if not why:
            why = _unfit(path, module, hook, any(module is m for m in adapted))
        if why:
            name = "FirstBlockCache" if kind == "FBCBlockHook" else name
            raise ValueError(f"{name} cannot run under composition: {why}. Call disable_cache(), or change it")
    return [hook for _, _, hook in found if hook._is_stateful]


def _unfit(path: str, module: nn.Module, hook: Any, adapted: bool) -> str:
    """Why this hook, of a supported cache, cannot be right; or an empty string."""
    kind = type(hook).__name__
    if not hook._is_stateful:
        if kind == "FBCBlockHook" and hook.is_tail and getattr(module, "context_pre_only", False):
            return f"diffusers' own fails on this model, whose last block {path} returns no text to store"
        return ""
    if kind not in SUPPORTED:
        return "it is unknown here what it keeps from call to call"
    if kind == "FasterCacheDenoiserHook" and not hook.is_guidance_distilled:
        return (
            "inside the model it drops the negative half of the batch, and rows and prompts per sample no longer fit; "
            "is_guidance_distilled=True leaves the batch whole and works"
        )
    if kind == "MagCacheHeadHook" and hook.config.calibrate:
        return "calibrate=True measures one model's steps; calibrate on the plain pipeline and pass mag_ratios"
    if kind in ("FBCHeadBlockHook", "MagCacheHeadHook"):
        wanted = hook._metadata.hidden_states_argument_name if kind == "MagCacheHeadHook" else "hidden_states"
        if wanted not in inspect.signature(module.forward).parameters:
            return f"diffusers' own fails on this model, whose blocks take no {wanted}"
    if adapted:
        return f"it stores the output of {path}, a layer that a LoRA adapts; exclude that layer from the cache"
    return ""


# -- the option ------------------------------------------------------------------------------------------------------

# name -> (what its number is, whole numbers only, the denoisers it is for)
KINDS = {
    "branch": ("every", True, "U-Nets"),
    "taylorseer": ("every", True, "transformers"),
    "first_block": ("threshold", False, "transformers"),
}


def read_cache(value: Any) -> tuple[str, float] | None:
    """(name, number) of a cache asked for: 3, "3", "branch:3", "taylorseer:3", "first_block:0.1"; None or "": none.

    The name is empty where a number alone was given: run the whole model at every this many steps. Raises ValueError.
    """
    if value is None or value == "":
        return None
    name, _, number = str(value).rpartition(":")
    _, whole, _ = KINDS.get(name, ("every", True, ""))
    try:
        if isinstance(value, bool) or (name and name not in KINDS):
            raise ValueError
        found = int(number) if whole else float(number)
        if not (found >= 1 if whole else 0.0 <= found < float("inf")):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"cache={value!r}: wanted a whole number of steps from one run of the whole model to the next, such as 3, "
            f"or one of branch:EVERY (U-Nets), taylorseer:EVERY and first_block:THRESHOLD (transformers)"
        ) from None
    return name, found


@contextlib.contextmanager
def cached(denoiser: nn.Module, value: Any) -> Iterator[BranchCache | None]:
    """The cache that `value` asks for (see read_cache) on the denoiser, for the length of the block.

    Yields a U-Net's branch cache, which belongs into Caches.branch, and None for every other. Raises ValueError when
    the denoiser cannot have it, or has one already.
    """
    asked = read_cache(value)
    if asked is None:
        yield None
        return
    name, number = asked
    unet = hasattr(getattr(denoiser, "_orig_mod", denoiser), "up_blocks")
    name = name or ("branch" if unet else "taylorseer")
    what = type(denoiser).__name__
    if unet != (name == "branch"):
        raise ValueError(f"cache={value!r}: {name} is for {KINDS[name][2]}, this is a {what}")
    if unet:
        yield BranchCache(denoiser, int(number))
        return
    if not hasattr(denoiser, "enable_cache"):
        raise ValueError(f"cache={value!r}: diffusers has no caches for a {what}; docs/caches.md has a way by hand")
    if denoiser.is_cache_enabled:
        raise ValueError(f"cache={value!r}: this {what} has a cache already; call disable_cache() first")
    import diffusers

    configs = {"taylorseer": ("TaylorSeerCacheConfig", "cache_interval"),
               "first_block": ("FirstBlockCacheConfig", "threshold")}  # fmt: skip
    cls, field = configs[name]
    try:
        denoiser.enable_cache(getattr(diffusers, cls)(**{field: number}))
        yield None
    finally:
        if denoiser.is_cache_enabled:
            denoiser.disable_cache()


class Caches:
    """The stores of one composition.

    advances  how many steps of the scheduler the picture has made
    calls     how many calls the pipeline has made of the denoiser in the picture
    adapted   the modules that LoRAs act on
    branch    the branch cache of a U-Net, or None
    """

    def __init__(
        self,
        denoiser: nn.Module,
        advances: Callable[[], Hashable],
        calls: Callable[[], int],
        adapted: Sequence[nn.Module] = (),
    ):
        self.denoiser, self.advances, self.calls, self.adapted = denoiser, advances, calls, list(adapted)
        self.branch: BranchCache | None = None
        self._managers: list[tuple[Any, Any]] = []  # (hook, one of its StateManagers)
        self._single: list[Any] = []  # hooks with one state for all contexts
        self._own: list[Any] = []  # what those had before
        self._forget()
        self._find()

    def new_picture(self) -> None:
        """Forget everything; look again which caches the model has. Raises as check_caches."""
        self.close()
        self._find()

    def close(self) -> None:
        """Drop every store, and leave the caches as if they had never run."""
        if self.branch is not None:
            self.branch.clear()
        for _, manager in self._managers:
            manager._state_cache.clear()
        for hook, state in zip(self._single, self._own, strict=True):
            hook.state = state
            state.reset()
        self._forget()

    def _find(self) -> None:
        hooks = check_caches(self.denoiser, self.adapted)
        self._managers = [(h, v) for h in hooks for v in vars(h).values() if hasattr(v, "_state_cache")]
        self._single = [h for h in hooks if "state" in vars(h)]
        self._own = [h.state for h in self._single]

    def _forget(self) -> None:
        self._names: dict[Hashable, str] = {}
        self._used: dict[str, int] = {}  # context -> the step that used it last
        self._states: dict[str, list[Any]] = {}  # context -> states of the hooks in _single
        self._made = 0
        self._moment: Hashable = None
        self._step, self._call, self._position = -1, -1, 0

    @contextlib.contextmanager
    def running(self, runs: Sequence[Hashable]) -> Iterator[None]:
        """Around one call of the model: its stores are those of these runs, at this place of the step."""
        if not self._managers and not self._single and self.branch is None:
            yield
            return
        self._tick()
        own = next((manager._context for _, manager in self._managers if manager._context is not None), None)
        key = (getattr(own, "name", None), self._position, tuple(runs))
        if key in self._names and self._cooling():
            self._drop(key)
        if key not in self._names:
            self._made += 1
            self._names[key] = f"{key[0] or 'call'}/{self._position}/{self._made}"
            self._states[self._names[key]] = [self._fresh(hook) for hook in self._single]
        name = self._names[key]
        new, self._used[name] = name not in self._used, self._step
        with self._within(own, name, new), self.branch.running(name) if self.branch else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _within(self, own: Any, name: str, new: bool) -> Iterator[None]:
        from diffusers.hooks.hooks import CacheContext

        context = CacheContext(name) if own is None else dataclasses.replace(own, name=name)
        before = [manager._context for _, manager in self._managers]
        try:
            for hook, manager in self._managers:
                manager.set_context(context)
                if new and type(hook).__name__ == "MagCacheHeadHook":
                    # Its ratios belong to steps of the picture; a row that comes late must not read the first ones.
                    manager.get_state().step_index = self._step
            for hook, state in zip(self._single, self._states[name], strict=True):
                hook.state = state
            yield
        finally:
            for (_, manager), context in zip(self._managers, before, strict=True):
                manager.set_context(context)

    def _tick(self) -> None:
        """Which step this is and which call in it; at a new step, the stores that the last one left unused go."""
        moment, call = self.advances(), self.calls()
        if moment != self._moment:
            for key in [k for k, name in self._names.items() if self._used[name] != self._step]:
                self._drop(key)
            self._moment, self._step, self._position = moment, self._step + 1, 0
        elif call != self._call:
            self._position += 1
        self._call = call

    def _drop(self, key: Hashable) -> None:
        name = self._names.pop(key)
        self._used.pop(name)
        self._states.pop(name)
        if self.branch is not None:
            self.branch.drop(name)
        for _, manager in self._managers:
            manager._state_cache.pop(name, None)

    def _cooling(self) -> bool:
        """TaylorSeer counts the steps of a store; its end of caching is meant in steps of the picture."""
        ends = [getattr(hook, "disable_cache_after_step", None) for hook, _ in self._managers]
        return any(end is not None and self._step >= end for end in ends)

    @staticmethod
    def _fresh(hook: Any) -> Any:
        state = type(hook.state)()
        if type(hook).__name__ == "FasterCacheBlockHook":
            state.iteration = hook.block_skip_range  # at 0 it skips within its range of timesteps, with nothing stored
        return state
