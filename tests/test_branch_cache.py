"""The branch cache of U-Nets against a split forward by hand on dense copies of the model; its cost by FLOPs."""

import contextlib
import types

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from multilora.attach import attached
from multilora.pipelines.branch_cache import BranchCache
from multilora.pipelines.caching import read_cache
from multilora.pipelines.composing import composing
from tests import handloop, tiny

STEPS = 7
WEIGHTS = (0.8, 0.6)
# method -> (options, rows at a step)
METHODS = {
    "merge": ({}, lambda step: [WEIGHTS]),
    "switch": ({"every": 3}, lambda step: [[(0.8, 0.0), (0.0, 0.6)][step // 3 % 2]]),
    "composite": ({}, lambda step: [(0.8, 0.0), (0.0, 0.6)]),
}
PIPES = {"sd15": tiny.sd15, "sdxl": tiny.sdxl}


def draw(pipe, steps=STEPS, **changes):
    given = {"prompt": "a fox", "negative_prompt": "blurry", "guidance_scale": 3.0, "output_type": "latent", **changes}
    return pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(5), **given).images


def pair(pipe):
    return [tiny.lora_for(pipe, seed=i, rank=3 + i, conv=True, name=name) for i, name in enumerate(("fox", "robe"))]


class ByHand:
    """Stands for the U-Net's forward: every row has a dense copy of the model and the feature of its last full run."""

    def __init__(self, unet, loras, rows, every):
        self.rows, self.every, self.step = rows, every, 0
        self.models, self.kept = {}, {}
        for step in range(STEPS):
            for row in rows(step):
                if row not in self.models:
                    self.models[row] = handloop.dense(unet, [handloop.factors(x) for x in loras], row, "unet")
        self.whole = []

    def __call__(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **_):
        rows, outputs = self.rows(self.step), []
        self.kept = {row: kept for row, kept in self.kept.items() if row in rows}
        for row in rows:
            model = self.models[row]
            arguments = (sample, timestep, encoder_hidden_states, added_cond_kwargs)
            if row in self.kept and self.step - self.kept[row][1] < self.every:
                outputs.append(self.short(model, self.kept[row][0], *arguments))
            else:
                feature, output = self.full(model, *arguments)
                self.kept[row] = (feature, self.step)
                outputs.append(output)
                self.whole.append((self.step, row))
        self.step += 1
        return (sum(outputs) / len(outputs),)

    @staticmethod
    def full(model, sample, t, text, added):
        seen = []
        skip = model.conv_in.out_channels
        hook = model.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda m, a: seen.append(a[0][:, :-skip]))
        output = model(sample, t, text, added_cond_kwargs=added).sample
        hook.remove()
        return seen[0], output

    @staticmethod
    def short(model, feature, sample, t, text, added):
        emb = model.time_embedding(model.get_time_embed(sample=sample, timestep=t))
        more = model.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
        emb = emb if more is None else emb + more
        last = model.up_blocks[-1]
        h = last.resnets[-1](torch.cat([feature, model.conv_in(sample)], dim=1), emb)
        if hasattr(last, "attentions"):
            h = last.attentions[-1](h, encoder_hidden_states=text, return_dict=False)[0]
        return model.conv_out(model.conv_act(model.conv_norm_out(h)))


@contextlib.contextmanager
def forward_of(unet, forward):
    unet.forward = types.MethodType(lambda self, *a, **k: forward(*a, **k), unet)
    try:
        yield
    finally:
        del unet.forward


@pytest.mark.parametrize("family", PIPES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_equals_a_forward_split_by_hand(family, method):
    pipe = PIPES[family](torch.float64)
    loras, (options, rows) = pair(pipe), METHODS[method]
    hand = ByHand(pipe.unet, loras, rows, every=2)
    with forward_of(pipe.unet, hand):
        want = draw(pipe)
    for passes_per_call in (1, None):
        with composing(
            pipe, loras, method, weights=WEIGHTS, cache=2, passes_per_call=passes_per_call, **options
        ) as conductor:
            got = draw(pipe)
        branch = conductor.caches.branch
        batched = passes_per_call is None and method == "composite"
        assert branch.full == len(hand.whole) // (2 if batched else 1) < STEPS * len(rows(0)) - 1
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with composing(pipe, loras, method, weights=WEIGHTS, **options):
        uncached = draw(pipe)
    assert (uncached - want).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("family", PIPES)
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_call_whole_is_the_picture_without_a_cache_bit_for_bit(family, method):
    pipe = PIPES[family]()
    pictures = []
    for cache in (None, 1, "branch:1"):
        with composing(pipe, pair(pipe), method, weights=WEIGHTS, cache=cache):
            pictures.append(draw(pipe, steps=4))
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])


@torch.no_grad()
def test_nothing_stays_behind_after_pictures_and_after_errors():
    pipe = tiny.sd15()
    loras = pair(pipe)
    before = {name: list(vars(m)) for name, m in pipe.unet.named_modules()}
    plain = draw(pipe)

    class Stop(Exception):
        pass

    def stop(pipe, i, t, tensors):
        raise Stop

    with composing(pipe, loras, "merge", weights=WEIGHTS, cache=3) as conductor:
        first = draw(pipe)
        with pytest.raises(Stop):
            draw(pipe, callback_on_step_end=stop)
        assert torch.equal(draw(pipe), first)  # a new picture starts with a whole run
        counts = conductor.caches.branch.full, conductor.caches.branch.short
    assert counts == (3 + 1 + 3, 4 + 0 + 4)
    assert {name: list(vars(m)) for name, m in pipe.unet.named_modules()} == before
    assert torch.equal(draw(pipe), plain)


@torch.no_grad()
def test_an_error_within_a_short_call_puts_every_module_back():
    pipe = tiny.sd15()
    cache = BranchCache(pipe.unet, 3)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    whole = pipe.unet(x, 7, text).sample
    with cache.running("a"):
        pipe.unet(x, 7, text)
    with pytest.raises(RuntimeError), cache.running("a"):
        pipe.unet(x[:, :3], 7, text)
    assert torch.equal(pipe.unet(x, 7, text).sample, whole)
    with cache.running("a"):  # same input, so the kept feature is the right one
        short = pipe.unet(x, 7, text).sample
    torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_residuals_of_a_controlnet_still_reach_the_last_layer():
    pipe = tiny.sd15(torch.float64)
    unet, cache = pipe.unet, BranchCache(pipe.unet, 2)
    x, text = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 5, 32, dtype=torch.float64)
    shapes = []
    hooks = [b.register_forward_hook(lambda m, a, o: shapes.extend(o[1])) for b in unet.down_blocks]
    hooks += [unet.mid_block.register_forward_hook(lambda m, a, o: shapes.append(o))]
    hooks += [unet.conv_in.register_forward_hook(lambda m, a, o: shapes.append(o))]
    unet(x, 7, text)
    for hook in hooks:
        hook.remove()
    residuals = [0.3 * torch.randn_like(t) for t in shapes]
    names = ("down_block_additional_residuals", "mid_block_additional_residual")
    call = dict(zip(names, (tuple(residuals[:-1]), residuals[-1]), strict=True))
    want = unet(x, 7, text, **call).sample
    with cache.running("a"):
        unet(x, 7, text, **call)
    with cache.running("a"):
        got = unet(x, 7, text, **call).sample
    assert (cache.full, cache.short) == (1, 1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    call["down_block_additional_residuals"] = (residuals[0] + 1.0, *residuals[1:-1])
    with cache.running("b"):
        unet(x, 7, text, **call)
    with cache.running("b"):
        assert (unet(x, 7, text, **call).sample - want).norm() > 0.01 * want.norm()


SIZES = {
    "sd15": ({}, {}),
    "sdxl": (
        {"block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
         "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
         "attention_head_dim": (5, 10, 20), "use_linear_projection": True, "cross_attention_dim": 2048,
         "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816},
        {"text_embeds": torch.empty(2, 1280, device="meta"), "time_ids": torch.empty(2, 6, device="meta")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_a_short_call_costs_at_most_15_percent_of_a_whole_one_at_full_size(family):
    config, added = SIZES[family]
    size, wide = (64, 768) if family == "sd15" else (128, 2048)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**{"cross_attention_dim": wide, **config}).eval()
        x, text = torch.empty(2, 4, size, size), torch.empty(2, 77, wide)
    cache, flops = BranchCache(unet, 5), []
    t = torch.tensor(7, device="meta")
    for _ in range(5):
        with FlopCounterMode(display=False) as counter, cache.running("a"):
            assert unet(x, t, text, added_cond_kwargs=added).sample.shape == x.shape
        flops.append(counter.get_total_flops())
    print(f"\n{family}: whole {flops[0] / 1e12:.3f} TFLOP, short {flops[1] / flops[0]:.4f} of it")
    assert flops[0] > {"sd15": 1.5e12, "sdxl": 13e12}[family]
    assert flops[1] <= 0.15 * flops[0]
    assert sum(flops) / 5 <= 0.32 * flops[0]


@pytest.mark.parametrize(
    ("value", "want"),
    [(None, None), ("", None), (3, ("", 3)), ("3", ("", 3)), ("branch:2", ("branch", 2)),
     ("first_block:0.1", ("first_block", 0.1)), ("taylorseer:4", ("taylorseer", 4))],
)  # fmt: skip
def test_the_option_is_read(value, want):
    assert read_cache(value) == want


@pytest.mark.parametrize("value", [0, -1, "deep:3", "branch:0", "branch:x", "first_block:-1", "branch", True, 2.5])
def test_a_bad_option_is_named_before_anything_runs(value):
    pipe = tiny.sd15()
    refused = pytest.raises(ValueError, match=r"cache=.*wanted a whole number of steps")
    with refused, composing(pipe, pair(pipe), "merge", cache=value):
        pass


def test_the_wrong_denoiser_is_refused_by_name():
    pipe, flux = tiny.sd15(), tiny.flux()
    for owner, value, message in (
        (pipe, "first_block:0.1", "first_block is for transformers, this is a UNet2DConditionModel"),
        (flux, "branch:3", "branch is for U-Nets, this is a FluxTransformer2DModel"),
        (tiny.sd3(), 3, "diffusers has no caches for a SD3Transformer2DModel"),
    ):
        with pytest.raises(ValueError, match=message), composing(owner, [tiny.lora_for(owner)], "merge", cache=value):
            pass
    with pytest.raises(ValueError, match="compiled as a whole"):
        BranchCache(types.SimpleNamespace(_orig_mod=pipe.unet), 3)
    compiled = tiny.sd15().unet
    compiled._compiled_call_impl = compiled._call_impl
    with pytest.raises(ValueError, match="the U-Net is compiled"):
        BranchCache(compiled, 3)
    with pytest.raises(ValueError, match="every=0, wanted a whole number of at least 1"):
        BranchCache(pipe.unet, 0)


@pytest.mark.parametrize("value", ["first_block:1e9", 3])
@torch.no_grad()
def test_the_option_puts_diffusers_caches_on_transformers_and_off_again(value):
    pipe = tiny.flux()
    lora = tiny.lora_for(pipe, seed=1)
    calls = []
    handle = pipe.transformer.transformer_blocks[-1].attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    call = {"prompt": "a fox", "num_inference_steps": 6, "max_sequence_length": 16, "output_type": "latent"}
    for cache in (None, value):
        calls.clear()
        with composing(pipe, [lora], "merge", cache=cache):
            pipe(**call, generator=torch.Generator().manual_seed(5))
            assert pipe.transformer.is_cache_enabled == (cache is not None)
        assert (len(calls) < 6) == (cache is not None)
    handle.remove()
    assert not pipe.transformer.is_cache_enabled


@torch.no_grad()
def test_a_row_of_the_bank_does_not_mind():
    """Hooks of the LoRAs lie within the modules that a short call leaves out: only those that run are called."""
    pipe = tiny.sd15()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    with attached(pipe.unet, [tiny.lora_for(pipe)], component="unet", form="side") as bank:
        cache = BranchCache(pipe.unet, 2)
        bank.row = [1.0]
        with cache.running("a"):
            pipe.unet(x, 7, text)
        bank.reset_calls()
        with cache.running("a"):
            pipe.unet(x, 7, text)
        called = {path for path, n in bank.calls.items() if n}
    assert called
    assert all(path.startswith(f"up_blocks.{len(pipe.unet.up_blocks) - 1}.attentions.") for path in called)


@torch.no_grad()
def test_the_command_records_its_cache_and_draws_the_same_again(tmp_path, monkeypatch, capsys):
    from PIL import Image

    from multilora import files
    from multilora.recipe import Recipe
    from tests.test_cli import call

    pipe = tiny.sd15()
    pipe.save_pretrained(tmp_path / "base")
    files.save(tiny.lora_for(pipe, seed=1, name="fox"), tmp_path / "fox.safetensors")
    monkeypatch.chdir(tmp_path)
    words = ("compose", "a fox", "--lora", "fox.safetensors", "--base", "base", "--steps", "4", "--seed", "5")
    for name, cache in (("plain.png", ()), ("a.png", ("--cache", "2"))):
        status, _, err = call(capsys, *words, *cache, "--out", name)
        assert status == 0, err
    status, _, err = call(capsys, "compose", "--from", "a.png", "--out", "b.png")
    assert status == 0, err
    assert [Recipe.from_png(name).cache for name in ("plain.png", "a.png", "b.png")] == ["", "2", "2"]
    plain, a, b = (Image.open(name).tobytes() for name in ("plain.png", "a.png", "b.png"))
    assert a == b != plain
    status, _, err = call(capsys, *words, "--cache", "often", "--out", "c.png")
    assert status != 0
    assert "cache='often': wanted a whole number of steps" in err
