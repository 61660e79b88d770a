"""The strength of a stack against full matrices in float64, and the warning before a run."""

import re
import time
import warnings
from dataclasses import replace

import pytest
import torch

from multilora.compare import inner
from multilora.lora import Lora
from multilora.method import methods, resolve
from multilora.pipelines.composing import composing, member
from multilora.pipelines.image import Composer
from multilora.strength import LIMIT, TooStrong, stack_of
from tests import tiny


def relative_update(model, loras, row, factors=None):
    """Root mean square over the layers of ||sum w up down|| / ||W||, from full matrices."""
    paths = {key.split(".", 1)[1] for lora in loras for key in lora if key.startswith("unet.")}
    total = 0.0
    for path in paths:
        weight = model.get_submodule(path).weight.double()
        delta = torch.zeros_like(weight).flatten(1)
        for i, lora in enumerate(loras):
            part = lora.get(f"unet.{path}")
            if part is not None:
                by = row[i] * (factors(i, path) if factors else 1.0)
                delta += by * (part.delta(torch.float64).flatten(1))
        total += float(delta.norm() / weight.norm()) ** 2
    return (total / len(paths)) ** 0.5


@pytest.fixture(scope="module")
def three():
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, rank=r, seed=i, conv=i == 1, strength=s) for i, (r, s) in
             enumerate(((3, 1.0), (5, 0.6), (2, 1.4)))]  # fmt: skip
    mixed = {k: p.dense() if "attn1" in k else p for k, p in (0.5 * loras[0] + loras[2]).items()}
    return pipe, [loras[0], loras[1], Lora(mixed, loras[2].card)]


@pytest.mark.parametrize("row", [(1.0, 1.0, 1.0), (0.7, -1.3, 0.2), (0.0, 2.0, 0.0), (0.0, 0.0, 0.0)])
def test_update_and_strength_are_those_of_full_matrices(three, row):
    pipe, loras = three
    stack = stack_of(pipe.unet, loras, "unet")
    wanted = relative_update(pipe.unet, loras, row)
    assert stack.update(row) == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    single = max(relative_update(pipe.unet, loras, [float(i == j) for j in range(3)]) for i in range(3))
    assert stack.strength(row) == pytest.approx(wanted / single, rel=1e-4, abs=1e-9)
    assert stack.strength(row) <= sum(abs(w) for w in row) * (1 + 1e-6)


def test_block_factors_count(three):
    pipe, loras = three
    blocks = [{"mid_block.*": 3.0}, None, {"*attn2*": 0.0}]
    found = stack_of(pipe.unet, loras, "unet", blocks=blocks).update((1.0, 1.0, 1.0))

    def factor(i, path):
        if i == 0 and path.startswith("mid_block."):
            return 3.0
        return 0.0 if i == 2 and "attn2" in path else 1.0

    assert found == pytest.approx(relative_update(pipe.unet, loras, (1, 1, 1), factor), rel=1e-4)


def test_one_lora_has_its_weight_and_equal_ones_add_up(three):
    pipe, loras = three
    assert stack_of(pipe.unet, loras[:1], "unet").strength([1.7]) == pytest.approx(1.7)
    assert stack_of(pipe.unet, loras[:1] * 4, "unet").strength([1.0] * 4) == pytest.approx(4.0, rel=1e-5)
    assert stack_of(pipe.unet, [loras[0] * 0.0], "unet").strength([1.0]) == 0.0


def test_a_changed_weight_is_measured_anew(three):
    pipe, loras = tiny.sd15(), three[1]
    before = stack_of(pipe.unet, loras, "unet").update((1, 1, 1))
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.mul_(2.0)
    assert stack_of(pipe.unet, loras, "unet").update((1, 1, 1)) == pytest.approx(before / 2, rel=1e-4)


def messages(pipe, loras, method, weights, steps=2, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with composing(pipe, loras, method, weights=weights, **options):
            for _ in range(2):  # each picture warns, not each step
                pipe("a fox", num_inference_steps=steps, height=32, width=32, output_type="latent")
    return [str(w.message) for w in caught if w.category is TooStrong]


def test_who_adds_up_is_warned_of_and_who_does_not_is_not():
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, seed=i, name=name) for i, name in enumerate(("fox", "robe", "hat", "night"))]
    weights = [1.5] * 4  # random directions: 1.5 * sqrt(4) = 3
    found = messages(pipe, loras, "merge", weights)
    assert len(found) == 2
    stack = "fox at 1.5, robe at 1.5, hat at 1.5, night at 1.5: together 3.0 times as strong as one LoRA at weight 1"
    assert found[0].startswith(f"{stack} (method merge, step 0)")
    assert "'composite' or 'switch'" in found[0]
    proposed = float(re.search(r"\(fox at (1\.2\d?), robe at \1, hat at \1, night at \1\)", found[0]).group(1))
    assert messages(pipe, loras, "merge", [proposed] * 4) == []
    assert len(messages(pipe, loras, "merge", [proposed + 0.04] * 4)) == 2
    assert messages(pipe, loras, "merge", [1.0] * 4) == []
    for name in sorted(set(methods("route")) - {"merge"}):
        if "mean_of_equals" in methods("route")[name].laws or name in (
            "auto", "boosted_merge", "composite_then_merge", "guided_merge"
        ):
            continue  # has passes with all at once
        assert messages(pipe, loras, name, weights, steps=4) == [], name
    assert messages(pipe, loras[:1], "merge", [2.4]) == []
    (alone, _) = messages(pipe, loras[:1], "composite", [3.0])
    assert "composite' or" not in alone
    assert "fox at 3: together 3.0 times" in alone


def test_nothing_is_measured_where_weights_cannot_add_up_to_the_limit(monkeypatch):
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, seed=i) for i in range(4)]

    def refused(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr("multilora.strength.stack_of", refused)
    assert messages(pipe, loras[:2], "merge", [1.2, 1.2]) == []
    assert messages(pipe, loras, "composite", [2.0] * 4) == []
    with pytest.raises(AssertionError, match="measured"):
        messages(pipe, loras, "merge", [1.0] * 4)


def test_the_strongest_step_of_a_schedule_counts_and_the_scale():
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, seed=i, name=name) for i, name in enumerate(("fox", "robe"))]
    found = messages(pipe, loras, "merge", ["0@0,2@1", "2@0,0@1"], steps=5)
    assert found == []  # 2 at both ends, less in between
    found = messages(pipe, loras, "merge", ["0@0,2@1", "0@0,2@1"], steps=5)
    assert "step 4" in found[0]
    assert messages(pipe, loras, "merge", [2.0, 2.0], scale=0.5) == []


def test_loras_in_regions_of_their_own_do_not_add_up():
    pipe = tiny.sd15()
    left = torch.zeros(8, 8)
    left[:, :4] = 1.0
    two = [tiny.lora_for(pipe, seed=i) for i in range(2)]
    masked = [member(pipe, lora, weight=2.0, mask=m) for lora, m in zip(two, (left, 1 - left), strict=True)]
    assert messages(pipe, masked, "merge", None) == []
    assert len(messages(pipe, [replace(m, mask=None) for m in masked], "merge", None)) == 2


def test_the_guard_changes_nothing(monkeypatch):
    pipe = tiny.sd15()
    loras = [tiny.lora_for(pipe, seed=i, text_encoder=True) for i in range(3)]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def draw():
        with composing(pipe, loras, "sum_of_differences", weights=[3.0, 2.0, 1.0]):
            return pipe(
                "a fox", num_inference_steps=3, height=32, width=32, latents=latents, output_type="latent"
            ).images

    with pytest.warns(TooStrong):
        guarded = draw()
    monkeypatch.setattr("multilora.strength.LIMIT", float("inf"))
    assert torch.equal(guarded, draw())


def test_embedded_sets_of_four_at_weight_1_are_quiet_and_at_2_are_not():
    composer = Composer.from_pretrained("embedded")
    for name in ("korv", "merlo", "sunno", "palma"):
        composer.add(name)
    loras = [m.lora for m in composer.loras.values()]
    began = time.process_time()
    stack = stack_of(composer.denoiser, loras, "unet")
    spent = time.process_time() - began
    print(f"strength of four LoRAs: {1000 * spent:.0f} ms of CPU")
    assert 1.2 < stack.strength([1.0] * 4) < LIMIT < stack.strength([2.0] * 4)
    gram = sum(inner(loras[0][key], loras[1][key]) for key in loras[0] if key in loras[1])
    assert (gram > 0) == (stack.gram[0][1] > 0)
    assert resolve("route", "merge").record.cost == "1"
