"""The parity table: multilora against a hand loop with dense W + delta weights and none of our code.

    python benchmarks/parity.py [--family sd15] [--dtype float64]

Per row: the largest relative difference of a denoiser call over 8 steps, and that of the latents after them; beside
them how far the method's latents are from the base's and from those of the nearest other method, so that a method that
does nothing, or does another one's work, shows. tests/test_parity.py asserts these very rows.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import diffusers

from multilora.pipelines.composing import composing
from tests import handloop, tiny

METHODS = ("merge", "switch", "composite", "sum_of_differences")
OPTIONS = {"switch": {"every": 2}}
RANKS, WEIGHTS, STEPS = (2, 4, 7), (0.9, 0.6, 1.1), 8
GUIDANCE = {"with": 5.0, "without": None}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# What a row must keep: differences at most, effect on the base and distance between methods at least.
LIMITS = {"float32": 1e-5, "float64": 1e-12}
EFFECT, APART = 0.05, 0.02

FAMILIES = {"sd15": handloop.HandSD15, "sd3": handloop.HandSD3, "flux": handloop.HandFlux}
SCHEDULERS = {
    "sd15": {"DDIMScheduler": 1, "EulerDiscreteScheduler": 1, "HeunDiscreteScheduler": 2, "KDPM2DiscreteScheduler": 2},
    "sd3": {"FlowMatchEulerDiscreteScheduler": 1, "FlowMatchHeunDiscreteScheduler": 2},
    # diffusers' FLUX pipeline refuses FlowMatchHeun, which takes no sigmas of its own.
    "flux": {"FlowMatchEulerDiscreteScheduler": 1},
}
# LoRA strengths at which all effects are clear in the family.
STRENGTH = {"sd15": 1.25, "sd3": 1.0, "flux": 1.0}


@dataclass(frozen=True)
class Row:
    """One method in one setting; differences are relative (Frobenius norms)."""

    family: str
    scheduler: str
    order: int
    guidance: str
    dtype: str
    method: str
    form: str
    per_call: float
    after: float
    effect: float
    apart: float

    def failures(self) -> list[str]:
        """What this row does not keep, in words."""
        # A prediction is sum mix_p e_p: the rounding of the passes counts sum |mix_p| times, here 2k - 1, elsewhere 1.
        limit = LIMITS[self.dtype] * (2 * len(WEIGHTS) - 1 if self.method == "sum_of_differences" else 1)
        return [
            *([f"a call differs by {self.per_call:.2e} > {limit:g}"] if not self.per_call <= limit else []),
            *([f"latents differ by {self.after:.2e} > {limit:g}"] if not self.after <= limit else []),
            *([f"effect on the base {self.effect:.3f} < {EFFECT}"] if not self.effect >= EFFECT else []),
            *([f"distance to another method {self.apart:.3f} < {APART}"] if not self.apart >= APART else []),
        ]


@functools.cache
def setting(family: str, dtype: str):
    """(pipeline, LoRAs, hand loop): three LoRAs of different ranks; the first and last have text-encoder parts."""
    pipe = getattr(tiny, family)(DTYPES[dtype])
    loras = [
        tiny.lora_for(pipe, rank=r, seed=i, strength=STRENGTH[family], text_encoder=i != 1, conv=i == 2)
        for i, r in enumerate(RANKS)
    ]
    hand = FAMILIES[family](pipe, [handloop.factors(lora) for lora in loras], WEIGHTS)
    return pipe, loras, hand


def start(pipe, dtype: str) -> torch.Tensor:
    """Starting noise in the pipeline's own layout, the same in both dtypes."""
    generator = torch.Generator().manual_seed(11)
    if hasattr(pipe, "_unpack_latents"):
        shape = (1, 16, pipe.transformer.config.in_channels)
    else:
        shape = (1, (getattr(pipe, "unet", None) or pipe.transformer).config.in_channels, 8, 8)
    return torch.randn(shape, generator=generator).to(DTYPES[dtype])


def draw(pipe, latents: torch.Tensor, guidance: float | None, steps: int = STEPS) -> tuple[list, torch.Tensor]:
    """The pipeline as a user calls it: (what each denoiser call returned, latents)."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    own = getattr(pipe, name)
    recorder = pipe.__dict__[name] = handloop.Recorder(own)
    extra = {} if name == "unet" else {"max_sequence_length": handloop.T5_LENGTH}
    if hasattr(pipe, "_unpack_latents"):
        extra |= {"true_cfg_scale": guidance or 1.0}
    else:
        extra |= {"guidance_scale": guidance or 1.0}
    try:
        final = pipe(
            handloop.PROMPT,
            negative_prompt=handloop.NEGATIVE if guidance else None,
            height=32,
            width=32,
            num_inference_steps=steps,
            latents=latents.clone(),
            output_type="latent",
            **extra,
        ).images
    finally:
        pipe.__dict__[name] = own
    return recorder.calls, final


@functools.cache
def by_hand(family: str, dtype: str, scheduler: str, guidance: str, method: str):
    pipe, _, hand = setting(family, dtype)
    own = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    order = SCHEDULERS[family][scheduler]
    return hand.method(method, own, order, GUIDANCE[guidance], start(pipe, dtype))


def rows(family: str, dtype: str, scheduler: str, guidance: str, form: str = "auto", **kwargs) -> Iterator[Row]:
    """The base and the four methods in one setting; `kwargs` go to `composing`."""
    pipe, loras, _ = setting(family, dtype)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    drawn = {"base": draw(pipe, start(pipe, dtype), GUIDANCE[guidance])}
    for method in METHODS:
        options = {**OPTIONS.get(method, {}), **kwargs}
        with composing(pipe, loras, method, weights=WEIGHTS, form=form, **options):
            drawn[method] = draw(pipe, start(pipe, dtype), GUIDANCE[guidance])
    for method, (calls, latents) in drawn.items():
        expected_calls, expected = by_hand(family, dtype, scheduler, guidance, method)
        pairs = list(zip(calls, expected_calls, strict=True))
        others = [m for m in drawn if m != method]
        distances = [handloop.relative(latents, drawn[m][1]) for m in others if m != "base"]
        yield Row(
            family,
            scheduler,
            SCHEDULERS[family][scheduler],
            guidance,
            dtype,
            method,
            form,
            max(handloop.relative(a, b) for a, b in pairs),
            handloop.relative(latents, expected),
            float("nan") if method == "base" else handloop.relative(latents, drawn["base"][1]),
            min(distances),
        )


HEADER = (
    "| family | scheduler | order | guidance | dtype | method | worst call | after 8 steps | effect | apart |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(r: Row) -> str:
    return (
        f"| {r.family} | {r.scheduler} | {r.order} | {r.guidance} | {r.dtype} | {r.method} | {r.per_call:.1e} | "
        f"{r.after:.1e} | {r.effect:.3f} | {r.apart:.3f} |"
    )


def settings() -> list[tuple[str, str, str, str]]:
    """(family, dtype, scheduler, guidance) of every group of rows."""
    return [(f, d, s, g) for f in FAMILIES for d in DTYPES for s in SCHEDULERS[f] for g in GUIDANCE]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES))
    parser.add_argument("--dtype", choices=list(DTYPES))
    asked = parser.parse_args()
    print(HEADER)
    bad, began = 0, time.perf_counter()
    for family, dtype, scheduler, guidance in settings():
        if asked.family not in (None, family) or asked.dtype not in (None, dtype):
            continue
        for row in rows(family, dtype, scheduler, guidance):
            print(line(row), flush=True)
            failures = row.failures() if row.method != "base" else []
            bad += bool(failures)
            for failure in failures:
                print(f"  FAILS: {failure}")
    print(f"\n{time.perf_counter() - began:.1f} s; {bad} rows fail")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
