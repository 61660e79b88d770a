"""The denoiser, conducted: one call of the pipeline's denoiser becomes the plan's passes and their mean."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multilora.method import Bound
from multilora.pipelines import inputs
from multilora.pipelines.caching import Caches
from multilora.pipelines.families import TABLE
from multilora.pipelines.members import Member, fit_mask
from multilora.pipelines.outputs import answer, prediction, split
from multilora.pipelines.prompt import Encodings
from multilora.pipelines.steady import Steady
from multilora.plan import Moment, Pass, shares
from multilora.predictions import each, mean
from multilora.routing import Asked


class Cancelled(RuntimeError):
    """The run was cancelled; there is no picture."""


@dataclass(frozen=True)
class _Run:
    """One run of the model: the row (or gate) and the text-encoder row that it takes; both times `negative` in the
    negative half."""

    row: Any
    text: tuple[float, ...]
    negative: float = 1.0


class Conductor:
    """Runs a bound route method on a denoiser with an attached bank. State lives for one composition.

    passes_per_call  how many passes may run as one batch; None for all of them
    cancel           an object with `is_set()`, read before every run
    guided           whether the pipeline's calls hold a negative half; None where it does not say
    guidance         scale of the guidance; None where the pipeline does not say
    half             "negative" or "positive" where each has its own call (a guider's conditions), else None
    """

    def __init__(
        self,
        denoiser: nn.Module,
        bank: Any,
        members: Sequence[Member],
        bound: Bound,
        clock: Any,
        encodings: Encodings,
        *,
        passes_per_call: int | None = None,
        cancel: Any = None,
        guided: Callable[[], bool | None] = lambda: None,
        half: Callable[[], str | None] = lambda: None,
        guidance: Callable[[], float | None] = lambda: None,
    ):
        inner = getattr(denoiser, "_orig_mod", denoiser)
        self.forward = inner.forward
        self.table = inputs.inputs_of(denoiser)
        self.family = inputs.class_name(denoiser)
        self.denoiser, self.alone = denoiser, True
        self.bank, self.members, self.bound, self.clock, self.encodings = bank, list(members), bound, clock, encodings
        self.passes_per_call, self.cancel, self.guided, self.half = passes_per_call, cancel, guided, half
        self.guidance = guidance
        self.caches = Caches(
            denoiser, lambda: (clock.advances, clock.step), lambda: len(clock.calls), [s.module for s in bank.sites]
        )
        self.calls = 0
        self.passes: list[int] = []  # model runs per step of the current picture
        self._plan: Any = None
        self._masks: dict[int, Tensor] = {}
        self._steady = Steady()
        self._told = False
        self._where = (-1, -1)
        if self.table is None:
            self._refuse_options()

    def _refuse_options(self) -> None:
        for m in self.members:
            for option, used, what in (
                ("positive_only", m.positive_only, "its negative half"),
                ("mask", m.mask is not None, "the layout of its predictions"),
            ):
                if used:
                    raise ValueError(
                        f"{option} of LoRA {m.name!r}: {self.family} is not in the table of denoiser arguments, so "
                        f"{what} is unknown; known are {', '.join(sorted(TABLE))}"
                    )

    @property
    def explains(self) -> str:
        """What the method has chosen in the picture drawn last, in a line; "" for methods that choose nothing."""
        says = getattr(self._plan, "explains", None)
        return says() if says is not None else ""

    def __call__(self, model: Callable, args: tuple, kwargs: dict) -> Any:
        arguments = inputs.bound_arguments(self.forward, args, kwargs)
        self._check_cancel()
        step = self.clock.call(arguments.get(self.table.time if self.table else "timestep"))
        new_picture = len(self.clock.calls) == 1 or self._plan is None
        if new_picture:
            self._plan = self.bound([m.lora for m in self.members])
            self._masks.clear()
            self._steady.clear()
            self.passes.clear()
            self._where = (-1, -1)
            self.alone = inputs.alone(self.denoiser, self.bank.paths)  # pipelines set processors for one picture
            self.caches.new_picture()
            self.bank.reset_calls()
        self.encodings.begins(new_picture)
        # Position of this call among the calls between two scheduler steps: 1 is the separate negative call.
        key, seen = self._where
        self._where = (self.clock.advances, seen + 1 if key == self.clock.advances else 0)
        moment = Moment(
            step,
            self.clock.steps,
            self.clock.t,
            self.clock.sigma,
            tuple(m.weight.at(step, self.clock.steps, self.clock.sigma) for m in self.members),
            tuple(m.lora.card for m in self.members),
            self.encodings,
            self._guidance(arguments),
        )
        passes = self._plan(moment)
        result = self._perform(model, arguments, passes, moment)
        self.calls += 1
        if new_picture:
            self.bank.check_called()
        return result

    def _guidance(self, arguments: dict) -> float | None:
        """The scale of the guidance, 1 where this call has no negative half; None where nobody says."""
        if self.table is None:
            return self.guidance()
        if self.table.negative == "second":  # in a call of its own, where the pipeline encoded a prompt for it
            return 1.0 if len(self.encodings.calls) == 1 else self.guidance()
        whole = self.half() is None and inputs.batch_of(self.table, arguments) == self.encodings.pictures
        return 1.0 if whole or self.guided() is False else self.guidance()

    def _check_cancel(self) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled(f"cancelled before call {self.calls + 1} of the denoiser")

    # -- from passes to runs ------------------------------------------------------------------------------------

    def _perform(self, model: Callable, arguments: dict, passes: Sequence[Pass], moment: Moment) -> Any:
        runs: list[_Run] = []
        parts = [self._runs_of(p, moment, runs) for p in passes]
        outputs = self._run_all(model, arguments, runs)
        self.passes.append(len(runs))
        predictions = [self._masked(outputs, part, arguments) for part in parts]
        combine = getattr(self._plan, "combine", None)
        if combine is not None:
            mixed = combine(predictions, moment)
        else:
            mixed = mean(predictions, shares(passes))
        return answer(outputs[parts[0][0]], mixed)

    def _runs_of(self, p: Pass, moment: Moment, runs: list[_Run]) -> list[Any]:
        """Index of the pass's run without masked LoRAs, then (members' mask, index) for each distinct mask."""
        gate = p.row if isinstance(p.row, Asked) else None
        if callable(p.row) and gate is None:
            if p.negative != 1.0 or any(m.mask is not None or m.positive_only for m in self.members):
                raise ValueError(
                    "mask, positive_only and another row in the negative half need rows of weights; "
                    f"{self.bound.record.name} has a gate"
                )
            return [_index(runs, _Run(p.row, self._text(p, moment.weights, moment)))]
        row = tuple(float(v) for v in (gate.reach(moment.weights) if gate else p.row))
        if len(row) != len(self.members):
            raise ValueError(
                f"method {self.bound.record.name}: a pass's row has {len(row)} entries for {len(self.members)} LoRAs"
            )
        groups: dict[int, list[int]] = {}
        for i, m in enumerate(self.members):
            if m.mask is not None and row[i] != 0.0:
                groups.setdefault(self._same_mask(i), []).append(i)
        masked = {i for group in groups.values() for i in group}
        plain = tuple(0.0 if i in masked else v for i, v in enumerate(row))
        rows = [plain, *(tuple(v if i in group or i not in masked else 0.0 for i, v in enumerate(row))
                         for group in groups.values())]  # fmt: skip
        at = [_index(runs, _Run(gate.at(r) if gate else r, self._text(p, r, moment), p.negative)) for r in rows]
        return [at[0], *zip(groups, at[1:], strict=True)]

    def _same_mask(self, i: int) -> int:
        mask = self.members[i].mask
        for j in range(i):
            other = self.members[j].mask
            if other is not None and other.shape == mask.shape and torch.equal(other, mask):
                return j
        return i

    def _text(self, p: Pass, row: Sequence[float], moment: Moment) -> tuple[float, ...]:
        if not self.encodings.swaps or p.text == "base":
            return self.encodings.row([0.0] * len(self.members))
        return self.encodings.row([r / w if w else 0.0 for r, w in zip(row, moment.weights, strict=True)])

    def _masked(self, outputs: list[Any], part: list[Any], arguments: dict) -> Any:
        base = prediction(outputs[part[0]])
        result = base
        for owner, index in part[1:]:
            mask = self._mask(owner, arguments)
            inside = prediction(outputs[index])
            result = each(
                lambda r, b, x, m=mask: torch.where(m.to(r) == 0, r, r + m.to(r) * (x - b)), result, base, inside
            )
        return result

    def _mask(self, owner: int, arguments: dict) -> Tensor:
        if owner not in self._masks:
            size = inputs.grid(self.table, arguments)
            fitted = fit_mask(self.members[owner].mask, size, self.members[owner].name)
            self._masks[owner] = inputs.spread(self.table, fitted, arguments)
        return self._masks[owner]

    # -- running the model --------------------------------------------------------------------------------------

    def _run_all(self, model: Callable, arguments: dict, runs: list[_Run]) -> list[Any]:
        gates = any(callable(r.row) for r in runs)
        if gates or not inputs.batchable(self.table, arguments):
            outputs = []
            for i, run in enumerate(runs):
                self._check_cancel()
                own = arguments if i == len(runs) - 1 else inputs.copied(arguments)
                outputs.append(self._run_batch(model, own, [run])[0])
            return outputs
        size = 1 if self.alone else self.passes_per_call or len(runs)
        outputs = []
        for start in range(0, len(runs), size):
            self._check_cancel()
            outputs += self._run_batch(model, arguments, runs[start : start + size])
        return outputs

    def _run_batch(self, model: Callable, arguments: dict, runs: list[_Run]) -> list[Any]:
        halves = self._halves(arguments, any(r.negative != 1.0 for r in runs))
        texts = [self._texts(arguments, run, halves) for run in runs]
        if any(inputs.shapes(t) != inputs.shapes(texts[0]) for t in texts) and self.table.layout != "list":
            return [self._run_batch(model, arguments, [run])[0] for run in runs]
        times = len(runs)
        if self.table is not None:
            arguments = self._steady.repeated(self.table, arguments, times, texts[0])
        for path in texts[0]:
            parts = [t[path] for t in texts]
            inputs.put(arguments, path, self._steady.same(path, parts, lambda parts=parts: inputs.joined(parts)))
        if callable(runs[0].row):
            self.bank.gate = gate = runs[0].row
            if runs[0].negative != 1.0 or any(m.positive_only for m in self.members):
                rows = [self._in_half(gate.weights, h, runs[0].negative) for h in halves]
                if self.alone and self.table is not None and len(set(rows)) > 1:
                    return [self._run_parts(model, arguments, runs, rows)]
                gate.by_sample(rows)
            with self.caches.running(runs):
                return [model(**arguments)]
        self.bank.gate = None
        rows = [self._in_half(r.row, h, r.negative) for r in runs for h in halves]
        if self.alone and self.table is not None and len(set(rows)) > 1:
            return [self._run_parts(model, arguments, runs, rows)]
        self.bank.row = rows[0] if len(set(rows)) == 1 else torch.tensor(rows, dtype=torch.float64)
        with self.caches.running(runs):
            output = model(**arguments)
        return [output] if times == 1 else split(output, times)

    def _run_parts(self, model: Callable, arguments: dict, runs: list[_Run], rows: list[tuple]) -> Any:
        """One run whose samples have different rows, on a model that takes one row a call: row by row."""
        outputs, start, gate = [], 0, runs[0].row if callable(runs[0].row) else None
        for row, same in itertools.groupby(rows):
            stop = start + len(list(same))
            if gate is None:
                self.bank.row = row
            else:
                self.bank.gate = gate.at(row)
            with self.caches.running([*runs, start]):
                outputs.append(model(**inputs.part(self.table, arguments, start, stop)))
            start = stop
        return answer(outputs[0], inputs.joined([prediction(o) for o in outputs]))

    def _in_half(self, row: Sequence[float], half: str, negative: float) -> tuple[float, ...]:
        if half != "negative":
            return tuple(row)
        return tuple(0.0 if m.positive_only else v * negative for v, m in zip(row, self.members, strict=True))

    def _halves(self, arguments: dict, differ: bool) -> list[str]:
        """[B] "negative" or "positive" for each sample of this call; "" where that is not known.

        differ  whether the method has other rows in the negative half
        """
        if self.table is None:
            return self._unknown_halves(1, f"{self.family} is not in the table of denoiser arguments", differ)
        batch = inputs.batch_of(self.table, arguments)
        half = self.half()
        if half is not None:
            return [half] * batch
        if self.table.negative == "second":
            negative = self._where[1] % 2 == 1 and len(self.encodings.calls) != 1
            return ["negative" if negative else "positive"] * batch
        if not differ and not self.encodings.swaps and not any(m.positive_only for m in self.members):
            return [""] * batch  # nobody asks
        pictures, said = self.encodings.pictures, self.guided()
        called = f"{self.family} is called with {batch} samples for {pictures} pictures"
        if pictures:
            guided = batch == 2 * pictures
            # Without guidance, twice the batch is something else (perturbed attention).
            if batch not in (pictures, 2 * pictures) or (guided and said is not None and not said):
                return self._unknown_halves(batch, called, differ)
        else:
            guided = said and inputs.same_halves(self.table, arguments)
            if said and not guided and self.table.layout != "list":  # Z-Image's late calls have no negative half
                return self._unknown_halves(batch, called, differ)
        if not guided:
            return ["positive"] * batch
        order = ("negative", "positive") if self.table.negative == "first" else ("positive", "negative")
        return [half for half in order for _ in range(batch // 2)]

    def _unknown_halves(self, batch: int, why: str, differ: bool) -> list[str]:
        positive = [m.name for m in self.members if m.positive_only]
        if positive:
            raise ValueError(f"positive_only of LoRA {positive[0]!r}: {why}, so its negative part is unknown")
        if differ and not self._told:
            self._told = True
            warnings.warn(
                f"method {self.bound.record.name}: {why}, so its negative part is unknown. The LoRAs act on all of it "
                "alike.",
                stacklevel=2,
            )
        if self.table is not None and self.encodings.swaps:
            self.encodings.fall_back(why)
        return [""] * batch

    def _texts(self, arguments: dict, run: _Run, halves: list[str]) -> dict[str, Any]:
        """The run's own prompt encoding by argument, for all samples; empty when all runs take the call's."""
        if self.table is None or not self.encodings.swaps:
            return {}
        groups = [(half, len(list(same))) for half, same in itertools.groupby(halves)]
        found = {}
        for path, name in self.table.text.items():
            parts, sources = [], []
            for half, samples in groups:
                row, second = self._in_half(run.text, half, run.negative), self.table.negative == "second"
                encoding = self.encodings.get(row, 1 if second and half == "negative" else 0)
                value = encoding.get(name if second or half != "negative" else f"negative_{name}")
                sources.append(value)
                parts.append(None if value is None else inputs.fitted(value, samples))
            like = inputs.get(arguments, path)
            if like is not None or parts[0] is not None:
                sample = arguments[self.table.sample]
                key = (path, *groups, *((sample.dtype, sample.device) if isinstance(sample, Tensor) else ()))
                found[path] = self._steady.same(
                    key, sources, lambda parts=parts, sample=sample: inputs.alike(inputs.joined(parts), sample)
                )
        return found


def _index(runs: list[_Run], run: _Run) -> int:
    if run not in runs:
        runs.append(run)
    return runs.index(run)
