"""Denoisers' arguments beside latents and text: residuals, image prompts, lists, what is consumed; unknown classes."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import nn

from multilora.lora import Lora, LowRank
from multilora.pipelines import inputs
from multilora.pipelines.composing import composing, member
from multilora.pipelines.families import TABLE
from tests import dense, families, handloop, scene, tiny

ONE = 1e-5


def arguments_of(family, pipe):
    """What the pipeline hands its denoiser in the first call for two pictures, by name."""
    seen = []
    own = scene.denoiser(pipe)

    def answer(args, kwargs):
        seen.append(copy.deepcopy(dense.by_name(own, args, kwargs)))
        return own(*args, **kwargs)

    with dense.standing(pipe, scene.name_of(pipe), dense.Stand(own, answer)):
        families.call(family, False, 1, 2, 1)(pipe)
    return seen[0]


def noise(*shape, seed=0, scale=0.3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def unchanged(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(unchanged(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(unchanged, a, b))
    return a == b


@torch.no_grad()
def check(family, extra, pipe=None, batched=True, loras=None):
    """Composite with these arguments too, batched and in turn; the arguments matter, and the caller keeps them."""
    pipe = pipe or families.pipe(family)
    arguments = {**arguments_of(family, pipe), **extra}
    loras = loras or families.loras(family, False)
    known = dense.Dense(pipe, loras, families.WEIGHTS, call=None)
    known.prepare()
    known.advance(arguments)
    wanted, merged = (known.run(m, arguments)[0] for m in ("composite", "merge"))
    without = known.own(**{n: copy.deepcopy(v) for n, v in arguments.items() if n not in extra})[0] if extra else None
    base = known.run("base", arguments)[0]
    assert dense.relative(merged, wanted) > 0.01
    assert without is None or without[0].shape != base[0].shape or dense.relative(without, base) > 0.01
    for passes in (None, 1):
        given = copy.deepcopy(arguments)
        with (
            scene.listening(known.own) as runs,
            composing(pipe, list(loras), "composite", weights=families.WEIGHTS, passes_per_call=passes),
        ):
            got = known.own(**given)[0]
        assert dense.relative(got, wanted) <= ONE
        assert unchanged(given, arguments)
        assert len(runs) == (1 if batched and passes is None else 2)


def test_residuals_of_a_controlnet_unet():
    down = [noise(2, c, s, s, seed=i) for i, (c, s) in enumerate([(16, 8), (16, 8), (16, 4), (32, 4)])]
    extra = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": noise(2, 32, 4, 4)}
    check("sd15", extra)


def test_features_that_the_unet_consumes():
    """A T2I-Adapter's list is popped by the U-Net; every run has its own."""
    check("sd15", {"down_intrablock_additional_residuals": [noise(2, 16, 8, 8), noise(2, 32, 4, 4, seed=1)]})


def test_image_prompts_of_the_unet():
    pipe = tiny.sdxl()
    width, processors = pipe.unet.config.cross_attention_dim, {}
    for name, processor in pipe.unet.attn_processors.items():
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        processors[name] = IPAdapterAttnProcessor2_0(hidden, width, (3,)) if ".attn2." in name else processor
    pipe.unet.set_attn_processor(processors)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, width, 3)])
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    tiny.seeded(pipe.unet, 3, 1.4)
    text = arguments_of("sdxl", tiny.sdxl())["added_cond_kwargs"]
    pictures = {**text, "image_embeds": [noise(2, 1, 8, scale=3.0)]}
    arguments = {**arguments_of("sdxl", tiny.sdxl()), "added_cond_kwargs": pictures}
    blank = {**arguments, "added_cond_kwargs": {**text, "image_embeds": [torch.zeros(2, 1, 8)]}}
    with torch.no_grad():
        assert dense.relative(pipe.unet(**arguments)[0], pipe.unet(**blank)[0]) > 0.01
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "arguments_of", lambda family, pipe: arguments)
        check("sdxl", {}, pipe)


def test_residuals_of_sd3():
    check("sd3", {"block_controlnet_hidden_states": [noise(2, 16, 32)]})


def test_residuals_of_flux():
    blocks = {"controlnet_block_samples": [noise(2, 16, 32)], "controlnet_single_block_samples": [noise(2, 16, 32)]}
    check("flux", blocks)


def test_image_prompts_that_flux_pops():
    pipe = tiny.flux()
    model = pipe.transformer
    model.set_attn_processor(
        {
            name: FluxIPAdapterAttnProcessor(32, 32, (3,)) if name.startswith("transformer_blocks") else processor
            for name, processor in model.attn_processors.items()
        }
    )
    model.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 32, 3)])
    tiny.seeded(model, 3, 1.2)
    # Its own pipeline cannot draw without a picture now.
    arguments = arguments_of("flux", tiny.flux())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "arguments_of", lambda family, pipe: {
            **arguments, "joint_attention_kwargs": {"ip_adapter_image_embeds": [noise(2, 1, 8, scale=3.0)]}
        })  # fmt: skip
        check("flux", {}, pipe)


def test_residuals_and_masked_text_of_qwen():
    mask = torch.ones(2, arguments_of("qwen", families.pipe("qwen"))["encoder_hidden_states"].shape[1]).long()
    mask[1, -6:] = 0
    check("qwen", {"controlnet_block_samples": [noise(2, 16, 32)], "encoder_hidden_states_mask": mask})


def test_qwen_that_doubles_the_batch_inside_runs_in_turn():
    """Qwen-Image-Edit-2511's zero_cond_t: the time embedding has two entries per sample."""
    pipe = copy.copy(families.pipe("qwen"))
    config = {n: v for n, v in pipe.transformer.config.items() if not n.startswith("_")}
    model = tiny.seeded(QwenImageTransformer2DModel(**{**config, "zero_cond_t": True}), 3, 1.2)
    pipe.__dict__["transformer"] = model
    loras = [tiny.lora_for(pipe, seed=i, modules=["img_mod.1", "to_q", "to_v"]) for i in range(2)]
    arguments = {**arguments_of("qwen", families.pipe("qwen")), "img_shapes": [[(1, 4, 4), (1, 2, 4)]] * 2}
    arguments["hidden_states"] = torch.cat([arguments["hidden_states"], noise(2, 8, 16, scale=1.0)], dim=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "arguments_of", lambda family, pipe: arguments)
        check("qwen", {}, pipe, batched=False, loras=loras)


def test_residuals_of_zimage():
    arguments = arguments_of("zimage", families.pipe("zimage"))
    tokens = 32 + -(-len(arguments["cap_feats"][0]) // 32) * 32
    check("zimage", {"controlnet_block_samples": {0: noise(2, tokens, 32)}})


def test_what_the_table_does_not_know_is_not_batched():
    unet, zimage = TABLE["UNet2DConditionModel"], TABLE["ZImageTransformer2DModel"]
    plain = {
        "sample": torch.zeros(2, 4, 8, 8),
        "timestep": torch.tensor(1),
        "encoder_hidden_states": torch.zeros(2, 7, 4),
    }
    assert inputs.batchable(unet, plain)
    assert inputs.batchable(unet, {**plain, "cross_attention_kwargs": {"scale": 0.5}, "class_labels": None})
    for wrong in (
        {"cross_attention_kwargs": {"gligen": {"boxes": torch.zeros(2, 3)}}},
        {"encoder_hidden_states": torch.zeros(3, 7, 4)},
        {"added_cond_kwargs": {"something": torch.zeros(2, 3)}},
        {"new_argument": 1},
    ):
        assert not inputs.batchable(unet, {**plain, **wrong}), wrong
    lists = {"x": [torch.zeros(4, 1, 8, 8)] * 2, "t": torch.zeros(2), "cap_feats": [torch.zeros(9, 4)] * 2}
    assert inputs.batchable(zimage, lists)
    assert not inputs.batchable(zimage, {**lists, "x": [[torch.zeros(4, 1, 8, 8)]] * 2})  # Z-Image Omni
    assert not inputs.batchable(None, plain)


# -- a class that nobody knows --------------------------------------------------------------------------------------


class Loom(nn.Module):
    """A denoiser that no table knows: threads [L, B, 6] with the batch in dimension 1, and it consumes its list."""

    def __init__(self):
        super().__init__()
        self.warp, self.weft = nn.Linear(6, 8), nn.Linear(8, 6)
        self.seen = []

    def forward(self, threads, moment, dyes):
        self.seen.append((tuple(threads.shape), len(dyes)))
        hidden = torch.tanh(self.warp(threads) + moment / 1000)
        while dyes:
            hidden = hidden + dyes.pop()
        threads.mul_(0.5)  # what it is given is its own
        return self.weft(hidden) + threads, "kept"


class Weaving:
    """A pipeline around it, with guidance of its own."""

    def __init__(self):
        self.transformer = tiny.seeded(Loom(), 3)
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.answers = []

    @torch.no_grad()
    def __call__(self, steps=4):
        self.scheduler.set_timesteps(steps)
        threads, dyes = noise(5, 2, 6, scale=1.0), [noise(1, 2, 8, seed=1), noise(1, 1, 8, seed=2)]
        for t in self.scheduler.timesteps:
            answer, extra = self.transformer(threads.clone(), t, dyes=list(dyes))
            assert extra == "kept"
            self.answers.append(answer)
            threads = self.scheduler.step(answer, t, threads, return_dict=False)[0]
        return threads


def woven(k=3):
    generator = torch.Generator().manual_seed(7)
    shapes = {"transformer.warp": (8, 6), "transformer.weft": (6, 8)}
    return [
        Lora({
            key: LowRank(torch.randn(r, i, generator=generator), 0.3 * torch.randn(o, r, generator=generator))
            for key, (o, i) in shapes.items()
        })
        for r in range(1, k + 1)
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["merge", "switch", "composite"])
def test_an_unknown_class_runs_in_turn_and_is_right(method):
    pipe, loras, weights = Weaving(), woven(), (0.9, -0.7, 1.1)
    factors = [handloop.factors(lora) for lora in loras]
    base = pipe()

    def expected():
        twin = Weaving()
        step = -1

        def answer(args, kwargs):
            nonlocal step
            step += 1
            total = 0
            for share, row in dense.formula(method, step, weights, 1):
                model = handloop.dense(pipe.transformer, factors, row, "transformer")
                total = total + share * model(*copy.deepcopy(args), **copy.deepcopy(kwargs))[0]
            return total, "kept"

        twin.transformer = dense.Stand(twin.transformer, answer)
        return twin()

    wanted = expected()
    pipe.transformer.seen.clear()
    with composing(pipe, loras, method, weights=weights, **({"every": 1} if method == "switch" else {})):
        picture = pipe()
    assert scene.apart(picture, wanted) < ONE
    assert scene.apart(picture, base) > 0.02
    # Never a larger batch, and nothing was consumed before its turn.
    assert pipe.transformer.seen == [((5, 2, 6), 2)] * (12 if method == "composite" else 4)


@pytest.mark.parametrize(("option", "value"), [("positive_only", True), ("mask", torch.ones(4, 4))])
def test_an_unknown_class_refuses_what_needs_its_layout(option, value):
    pipe, loras = Weaving(), woven(2)
    before = copy.deepcopy(pipe.transformer.state_dict())
    members = [member(pipe, loras[0], name="fox"), member(pipe, loras[1], name="robe", **{option: value})]
    with (
        pytest.raises(ValueError, match=rf"{option} of LoRA 'robe': Loom is not in the table"),
        composing(pipe, members),
    ):
        pipe()
    assert not pipe.answers  # before the first call
    assert all(torch.equal(v, before[n]) for n, v in pipe.transformer.state_dict().items())
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


def test_a_subclass_of_a_known_class_is_unknown():
    """It may take its arguments another way."""
    pipe = copy.copy(families.pipe("sd15"))
    own = pipe.unet
    other = type("OtherUNet", (type(own),), {})
    pipe.__dict__["unet"] = copy.deepcopy(own)
    pipe.unet.__class__ = other
    loras = families.loras("sd15", False)
    with scene.listening(pipe.unet) as runs, composing(pipe, list(loras), "composite"):
        families.call("sd15", steps=1)(pipe)
    assert [len(run["sample"]) for run in runs] == [2, 2]


def test_masks_end_where_the_picture_ends():
    """FLUX Kontext and Qwen-Image-Edit hand over reference pictures after the picture; masks are for that alone."""
    mask = torch.arange(6.0).reshape(2, 3)
    ids = torch.tensor([[0, i // 3, i % 3] for i in range(6)] + [[1, i // 4, i % 4] for i in range(16)])
    for name, known in (
        ("FluxTransformer2DModel", {"img_ids": ids}),
        ("QwenImageTransformer2DModel", {"img_shapes": [[(1, 2, 3), (1, 4, 4)]] * 2}),
    ):
        arguments = {"hidden_states": torch.zeros(2, 22, 5), **known}
        assert inputs.grid(TABLE[name], arguments) == (2, 3)
        spread = inputs.spread(TABLE[name], mask, arguments)
        assert spread.shape == (1, 22, 1)
        assert spread.flatten().tolist() == [*range(6), *[0] * 16]
