"""One exact test per option of a LoRA, on a U-Net and on a transformer."""

import pytest
import torch

from multilora.lora import Lora
from multilora.method import Method
from multilora.pipelines.composing import composing, member
from multilora.plan import Pass
from tests import scene, tiny

ONE = 1e-5


@pytest.fixture(scope="module")
def pipes():
    return {family: getattr(tiny, family)() for family in scene.FAMILIES}


def recording(plan):
    """A route method made of a plain function."""
    return Method("recording", "route", "", "", "1", (), (), lambda loras: plan)


# -- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["side", "rebuilt"])
def test_glob_of_block_1_is_neither_block_10_nor_a_single_block(form):
    pipe = tiny.flux(layers=11, single_layers=2)
    lora = tiny.lora_for(pipe, seed=0, name="fox")
    assert any(".transformer_blocks.10." in k for k in lora)
    assert any("single_transformer_blocks.1." in k for k in lora)
    rest = Lora({k: p for k, p in lora.items() if not k.startswith("transformer.transformer_blocks.1.")}, lora.card)
    assert len(rest) < len(lora)
    off = member(pipe, lora, blocks={"transformer_blocks.1.*": 0.0})
    only = member(pipe, lora, blocks={"*": 0.0, "transformer_blocks.1.*": 0.5})
    pictures = {}
    for name, chosen in {"off": off, "rest": rest, "only": only, "all": lora}.items():
        with composing(pipe, [chosen], form=form), scene.conducted(pytest.MonkeyPatch()) as calls:
            scene.draw(pipe, steps=1, guidance=1.0)
        pictures[name] = calls[0]["out"]
    assert scene.apart(pictures["off"], pictures["rest"]) < 1e-6
    inside = Lora({k: p * 0.5 for k, p in lora.items() if k not in rest}, lora.card)
    with composing(pipe, [inside], form=form), scene.conducted(pytest.MonkeyPatch()) as calls:
        scene.draw(pipe, steps=1, guidance=1.0)
    assert scene.apart(pictures["only"], calls[0]["out"]) < 1e-6
    assert scene.apart(pictures["off"], pictures["all"]) > 1e-3


def test_glob_changes_the_weights_of_its_block_and_of_no_other():
    pipe = tiny.flux(layers=11, single_layers=2)
    before = {n: p.detach().clone() for n, p in pipe.transformer.named_parameters()}
    lora = tiny.lora_for(pipe, seed=0)
    chosen = member(pipe, lora, blocks={"*": 0.0, "transformer_blocks.1.*": 1.0})
    changed = set()

    def look(module, args):
        changed.update(n for n, p in module.named_parameters() if not torch.equal(p, before[n]))

    handle = pipe.transformer.register_forward_pre_hook(look)
    with composing(pipe, [chosen], form="rebuilt"):
        scene.draw(pipe, steps=1, guidance=1.0)
    handle.remove()
    wanted = {k for k in lora if k.startswith("transformer.transformer_blocks.1.")}
    assert {f"transformer.{n.removesuffix('.weight')}" for n in changed} == wanted


def test_blocks_of_the_unet_by_exact_path_and_by_glob(pipes):
    pipe = pipes["sd15"]
    lora = tiny.lora_for(pipe)
    path = next(k for k in lora if "attn2.to_k" in k)
    relative = path.removeprefix("unet.")
    with composing(pipe, [member(pipe, lora, blocks={"*": 0.5, relative: 2.0})]):
        ours = scene.draw(pipe)
    with composing(pipe, [Lora({k: p * (2.0 if k == path else 0.5) for k, p in lora.items()})]):
        wanted = scene.draw(pipe)
    assert scene.apart(ours, wanted) < ONE


# -- positive only --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", scene.FAMILIES)
@pytest.mark.parametrize("method", ["merge", "composite"])
def test_positive_only_leaves_the_negative_prediction_of_the_base(pipes, family, method, monkeypatch):
    """With text-encoder parts too: at the first call everything but the LoRA is equal."""
    pipe = pipes[family]
    sets = [member(pipe, lora, positive_only=True) for lora in scene.loras(pipe, text=True)]
    with scene.listening(scene.denoiser(pipe)) as base:
        scene.draw(pipe, steps=1)
    with composing(pipe, sets, method), scene.conducted(monkeypatch) as calls:
        scene.draw(pipe, steps=1)
    if family == "flux":
        assert len(base) == len(calls) == 2
        ours, plain = (calls[1]["out"], calls[0]["out"]), (base[1]["out"], base[0]["out"])
    else:
        ours, plain = calls[0]["out"].chunk(2), base[0]["out"].chunk(2)
    # Composite runs the equal passes as one batch, whose matmuls may round otherwise than those of one sample: by how
    # much depends on the processor.
    unlike = scene.apart(ours[0], plain[0])
    assert torch.equal(ours[0], plain[0]) if method == "merge" else unlike < 1e-5, unlike
    assert scene.apart(ours[1], plain[1]) > 0.01


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_positive_only_at_every_step_on_the_same_latents(pipes, family, monkeypatch):
    pipe = pipes[family]
    fox = scene.loras(pipe, 1)[0]
    with composing(pipe, [member(pipe, fox, positive_only=True)]), scene.conducted(monkeypatch) as calls:
        scene.draw(pipe)
    for i, call in enumerate(calls):
        given = {n: v for n, v in call.items() if n not in ("out", "row", "clock")}
        with torch.no_grad():
            plain = scene.denoiser(pipe)(**given)[0]
        if family == "sd15":
            assert torch.equal(call["out"][:1], plain[:1])
            assert not torch.equal(call["out"][1:], plain[1:])
        else:
            assert torch.equal(call["out"], plain) == (i % 2 == 1)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_positive_only_beside_a_lora_that_acts_on_both_halves(pipes, family, monkeypatch):
    pipe = pipes[family]
    fox, robe = scene.loras(pipe)
    both = [member(pipe, fox, positive_only=True), robe]
    with composing(pipe, both), scene.conducted(monkeypatch) as ours:
        scene.draw(pipe, steps=1)
    with composing(pipe, [robe]), scene.conducted(monkeypatch) as robed:
        scene.draw(pipe, steps=1)
    with composing(pipe, [fox, robe]), scene.conducted(monkeypatch) as merged:
        scene.draw(pipe, steps=1)
    pairs = [(1, robed), (0, merged)] if family == "flux" else [(0, robed), (1, merged)]
    for half, wanted in pairs:
        ours_, wanted_ = (
            (ours[half]["out"], wanted[half]["out"])
            if family == "flux"
            else (ours[0]["out"][half], wanted[0]["out"][half])
        )
        assert scene.apart(ours_, wanted_) < ONE


def test_positive_only_without_guidance_acts_on_everything(pipes):
    pipe = pipes["sd15"]
    fox = scene.loras(pipe, 1)[0]
    with composing(pipe, [member(pipe, fox, positive_only=True)]):
        ours = scene.draw(pipe, guidance=1.0)
    with composing(pipe, [fox]):
        wanted = scene.draw(pipe, guidance=1.0)
    assert scene.apart(ours, wanted) < ONE


# -- masks ----------------------------------------------------------------------------------------------------------


def halves(left: int = 16, size: int = 32) -> torch.Tensor:
    mask = torch.zeros(size, size)
    mask[:, :left] = 1.0
    return mask


def picture(family: str, prediction: torch.Tensor) -> torch.Tensor:
    """A prediction as [B, channels, h, w], so that columns are columns."""
    if family != "flux":
        return prediction
    b, _, c = prediction.shape
    return prediction.reshape(b, 4, 4, c).permute(0, 3, 1, 2)


@pytest.mark.parametrize("family", scene.FAMILIES)
@pytest.mark.parametrize("method", ["merge", "switch"])
def test_outside_its_mask_a_lora_has_no_effect(pipes, family, method, monkeypatch):
    """Bit-equal to the pass without it that ran in the same call, inside bit-equal to the pass with it."""
    pipe = pipes[family]
    fox, robe = scene.loras(pipe)
    members = [member(pipe, fox, weight=0.8), member(pipe, robe, mask=halves())]
    options = {"every": 1} if method == "switch" else {}
    inner, outer = scene.listening(scene.denoiser(pipe)), scene.conducted(monkeypatch)
    with inner as runs, outer as calls, composing(pipe, members, method, passes_per_call=1, **options):
        scene.draw(pipe, steps=2)
    masked = 0
    for call in calls:
        own = [runs.pop(0)]
        if method == "merge" or call["clock"] == 1:
            own.append(runs.pop(0))
        out, without = picture(family, call["out"]), picture(family, own[0]["out"])
        half = out.shape[-1] // 2
        assert torch.equal(out[..., half:], without[..., half:])
        if len(own) == 2:
            masked += 1
            inside = picture(family, own[1]["out"])
            assert scene.apart(out[..., :half], inside[..., :half]) < 1e-6
            assert scene.apart(out[..., :half], without[..., :half]) > 0.01
    assert masked
    assert not runs


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_masks_that_overlap_add_up(pipes, family, monkeypatch):
    pipe = pipes[family]
    fox, robe, ink = scene.loras(pipe, 3)
    a, b = halves(24), 0.5 * (1 - halves(8))
    members = [member(pipe, fox, mask=a), member(pipe, robe, mask=b), member(pipe, ink, weight=0.5)]
    with composing(pipe, members), scene.conducted(monkeypatch) as calls:
        scene.draw(pipe, steps=1)
    alone = []
    for chosen in ([], [fox], [robe]):
        with composing(pipe, [*chosen, member(pipe, ink, weight=0.5)]), scene.conducted(monkeypatch) as found:
            scene.draw(pipe, steps=1)
        alone.append([picture(family, c["out"]) for c in found])
    for i, call in enumerate(calls):
        base, foxed, robed = (found[i] for found in alone)
        grid = base.shape[-1]
        ma, mb = (torch.nn.functional.avg_pool2d(m[None], 32 // grid)[0] for m in (a, b))
        wanted = base + ma * (foxed - base) + mb * (robed - base)
        assert scene.apart(picture(family, call["out"]), wanted) < ONE


def test_equal_masks_share_a_pass_and_a_mask_of_ones_is_no_mask(pipes):
    pipe = pipes["sd15"]
    fox, robe = scene.loras(pipe)
    members = [member(pipe, fox, mask=halves()), member(pipe, robe, mask=halves())]
    with composing(pipe, members) as conductor:
        scene.draw(pipe, steps=2)
    assert conductor.passes == [2, 2]
    with composing(pipe, [member(pipe, fox, mask=torch.ones(8, 8))]):
        ours = scene.draw(pipe)
    with composing(pipe, [fox]):
        wanted = scene.draw(pipe)
    assert scene.apart(ours, wanted) < ONE
    with composing(pipe, [member(pipe, fox, mask=torch.zeros(32, 32))]):
        ours = scene.draw(pipe)
    assert scene.apart(ours, scene.draw(pipe)) < ONE


@pytest.mark.parametrize(("family", "grid"), [("sd15", "8 x 8"), ("flux", "4 x 4")])
def test_mask_of_the_wrong_shape_names_the_sizes(pipes, family, grid):
    pipe = pipes[family]
    fox = scene.loras(pipe, 1)[0]
    witness = scene.Witness(pipe)
    for wrong in (torch.ones(30, 32), torch.ones(64, 32), torch.ones(3, 3)):
        shape = " x ".join(map(str, wrong.shape))
        masked = member(pipe, fox, mask=wrong)
        with pytest.raises(ValueError, match=rf"mask of LoRA 'fox'.*{shape}.*{grid}"), composing(pipe, [masked]):
            scene.draw(pipe)
    with pytest.raises(ValueError, match=r"mask of LoRA 'fox'.*\[1, 32, 32\]"):
        member(pipe, fox, mask=torch.ones(1, 32, 32))
    with pytest.raises(ValueError, match=r"mask of LoRA 'fox'.*0 and 1.*255"):
        member(pipe, fox, mask=torch.full((32, 32), 255.0))
    with pytest.raises(ValueError, match=r"mask of LoRA 'fox'"):
        member(pipe, fox, mask=torch.full((32, 32), float("nan")))
    witness.check()


# -- weight and schedule --------------------------------------------------------------------------------------------

SIGMAS = "1@3sigma,0@1sigma"
CURVES = {
    "0.7": lambda i, n, s: 0.7,
    "0@0,1@0.5": lambda i, n, s: min(1.0, 2 * i / (n - 1)),
    "1@2s,0@4s": lambda i, n, s: [1, 1, 1, 0.5, 0, 0][i],
    "1@0.4,0@0.4": lambda i, n, s: 1.0 if i < 2 else 0.0,
    SIGMAS: lambda i, n, s: min(1.0, max(0.0, (s - 1) / 2)),
}


@pytest.mark.parametrize("schedule", CURVES)
def test_a_schedule_is_its_curve_at_every_step(pipes, schedule, monkeypatch):
    """In the method's Moment, and in the row that the adapted layers run with."""
    pipe = pipes["sd15"]
    fox, robe = scene.loras(pipe)
    seen = []

    def plan(moment):
        seen.append(moment)
        return [Pass(moment.weights)]

    with (
        composing(pipe, [fox, robe], recording(plan), weights=[schedule, -0.3]),
        scene.conducted(monkeypatch) as calls,
    ):
        scene.draw(pipe, steps=6)
    alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    sigmas = ((1 - alphas) / alphas).sqrt().tolist()
    wanted = [(CURVES[schedule](i, 6, s), -0.3) for i, s in enumerate(sigmas)]
    assert [m.step for m in seen] == list(range(6))
    assert {m.steps for m in seen} == {6}
    for moment, call, row, sigma in zip(seen, calls, wanted, sigmas, strict=True):
        assert moment.weights == pytest.approx(row, abs=1e-5)
        assert tuple(call["row"]) == moment.weights
        assert moment.sigma == pytest.approx(sigma, rel=1e-5)
    if schedule == SIGMAS:
        assert any(0 < w < 1 for w, _ in wanted)


def test_a_schedule_acts_like_the_weights_of_its_steps(pipes, monkeypatch):
    pipe = pipes["flux"]
    fox = scene.loras(pipe, 1)[0]
    with composing(pipe, [fox], weights=["1@0.4,0@0.4"]), scene.conducted(monkeypatch) as calls:
        scene.draw(pipe, steps=4)
    for call in calls:
        given = {n: v for n, v in call.items() if n not in ("out", "row", "clock")}
        on = call["clock"] < 2
        with torch.no_grad():
            plain = pipe.transformer(**given)[0]
        assert torch.equal(plain, call["out"]) != on


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_weight_is_the_weight_of_plain_addition(pipes, family):
    pipe = pipes[family]
    sets = scene.loras(pipe, text=True)
    with composing(pipe, sets, weights=[0.6, -0.4]):
        ours = scene.draw(pipe)
    assert scene.apart(ours, scene.draw(scene.baked(pipe, sets, [0.6, -0.4]))) < ONE
    assert scene.apart(ours, scene.draw(pipe)) > 0.02


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_text_encoder_weight(pipes, family):
    pipe = pipes[family]
    sets = scene.loras(pipe, text=True, strength=2.0)
    members = [member(pipe, sets[0], weight=0.8, text_encoder_weight=0.3), member(pipe, sets[1], weight=0.5)]
    with composing(pipe, members):
        ours = scene.draw(pipe)
    assert scene.apart(ours, scene.draw(scene.baked(pipe, sets, [0.8, 0.5], [0.3, 0.5]))) < ONE
    assert scene.apart(ours, scene.draw(scene.baked(pipe, sets, [0.8, 0.5]))) > 1e-3
    with composing(pipe, [member(pipe, sets[0], text_encoder_weight=0.0)]):
        ours = scene.draw(pipe)
    assert scene.apart(ours, scene.draw(scene.baked(pipe, sets[:1], [1.0], [0.0]))) < ONE
