"""The rows of benchmarks/parity.py, asserted; and Merge against diffusers' own LoRA loading."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import parity
from multilora.pipelines.composing import composing
from tests import handloop, tiny

# Both families, with and without guidance, first and second order; float64 once per family. The rest is `long`.
QUICK = {
    *((f, "float32", s, g) for f in ("sd15", "sd3") for s in list(parity.SCHEDULERS[f])[:1] for g in parity.GUIDANCE),
    *(("sd15", "float32", "HeunDiscreteScheduler", g) for g in parity.GUIDANCE),
    *(("sd3", "float32", "FlowMatchHeunDiscreteScheduler", g) for g in parity.GUIDANCE),
    ("sd15", "float64", "DDIMScheduler", "with"),
    ("sd3", "float64", "FlowMatchHeunDiscreteScheduler", "without"),
    ("flux", "float64", "FlowMatchEulerDiscreteScheduler", "with"),
}
SETTINGS = [pytest.param(*s, marks=() if s in QUICK else pytest.mark.long, id="-".join(s)) for s in parity.settings()]


def check(rows):
    rows = list(rows)
    base = rows[0]
    assert base.method == "base"
    # The reference itself draws what the pipeline draws: else the rows below would compare with something else.
    assert max(base.per_call, base.after) <= parity.LIMITS[base.dtype], parity.line(base)
    assert [r.method for r in rows[1:]] == list(parity.METHODS)
    bad = [f"{parity.line(r)} {failure}" for r in rows[1:] for failure in r.failures()]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(("family", "dtype", "scheduler", "guidance"), SETTINGS)
def test_equals_the_hand_loop(family, dtype, scheduler, guidance):
    check(parity.rows(family, dtype, scheduler, guidance))


def test_table_covers_what_was_promised():
    covered = {(f, parity.SCHEDULERS[f][s], g, d) for f, d, s, g in parity.settings()}
    wanted = {
        (f, order, g, d)
        for f in ("sd15", "sd3")
        for order in (1, 2)
        for g in ("with", "without")
        for d in ("float32", "float64")
    }
    assert wanted <= covered
    assert set(parity.METHODS) == {"merge", "switch", "composite", "sum_of_differences"}


@pytest.mark.parametrize(
    ("family", "form", "passes"),
    [
        ("sd3", "side", 1),
        ("sd3", "bank", None),
        pytest.param("sd15", "side", 2, marks=pytest.mark.long),
        pytest.param("sd15", "rebuilt", 1, marks=pytest.mark.long),
        pytest.param("sd15", "bank", 1, marks=pytest.mark.long),
        pytest.param("flux", "side", 1, marks=pytest.mark.long),
    ],
)
def test_every_form_equals_the_hand_loop(family, form, passes):
    """The same rows with another form of the adapted layer, and with passes in turn instead of batched."""
    scheduler = next(iter(parity.SCHEDULERS[family]))
    check(parity.rows(family, "float64", scheduler, "with", form=form, passes_per_call=passes))


# -- plain diffusers --------------------------------------------------------------------------------------------------


def diffusers_state(pipe, lora):
    """A LoRA spelled as diffusers writes it, by hand."""
    state = {}
    for key, part in lora.items():
        component, path = key.split(".", 1)
        if component == "text_encoder_3":
            continue  # diffusers does not load LoRAs into T5
        names = dict(getattr(pipe, component).named_modules())
        live = path if path in names else f"text_model.{path}"
        up = part.up[..., None, None] if part.down.ndim == 4 else part.up
        state[f"{component}.{live}.lora_A.weight"] = part.down.clone()
        state[f"{component}.{live}.lora_B.weight"] = up.clone()
    return state


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_merge_equals_plain_diffusers(family, tmp_path):
    """Three files: through load_lora_weights and set_adapters, through us, and through us from the loaded adapters."""
    _, loras, _ = parity.setting(family, "float32")
    pipe, plain = getattr(tiny, family)(), getattr(tiny, family)()
    names = [f"lora{i}" for i in range(len(loras))]
    paths = []
    for name, lora in zip(names, loras, strict=True):
        path = tmp_path / f"{name}.safetensors"
        save_file(diffusers_state(pipe, lora), path)
        plain.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=name)
        paths.append(path)
    plain.set_adapters(names, list(parity.WEIGHTS))
    latents = parity.start(pipe, "float32")
    base, _ = parity.draw(pipe, latents, 5.0)
    expected, expected_latents = parity.draw(plain, latents, 5.0)
    assert min(handloop.relative(a, b) for a, b in zip(expected, base, strict=True)) >= 0.05
    with composing(pipe, paths, "merge", weights=parity.WEIGHTS):
        from_files = parity.draw(pipe, latents, 5.0)
    with composing(plain, None, "merge"):
        taken_over = parity.draw(plain, latents, 5.0)
    for calls, final in (from_files, taken_over):
        assert max(handloop.relative(a, b) for a, b in zip(calls, expected, strict=True)) <= 1e-5
        assert handloop.relative(final, expected_latents) <= 1e-5
    # What diffusers had set is as it was.
    assert all(torch.equal(a, b) for a, b in zip(parity.draw(plain, latents, 5.0)[0], expected, strict=True))
