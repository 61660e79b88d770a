"""Files: every format round-trips bit-exactly, what we write loads in diffusers and PEFT."""

import copy

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from multilora import files, keys, writing
from multilora.lora import Card, Dense, Lora, LowRank
from tests import tiny


@pytest.fixture(scope="module")
def pipes():
    return {name: getattr(tiny, name)() for name in ("sd15", "sdxl", "sd3", "flux")}


@pytest.fixture(scope="module")
def sd15(pipes):
    return pipes["sd15"]


def every_rank(lora: Lora) -> Lora:
    """The same layers with ranks 2, 3, 4 in turn."""
    ranks = {k: 2 + i % 3 for i, k in enumerate(lora)}
    parts = {k: LowRank(p.down[: ranks[k]], p.up[:, : ranks[k]], None, p.kind) for k, p in lora.items()}
    return Lora(parts, lora.card)


def same(a: Lora, b: Lora) -> None:
    assert set(a) == set(b)
    for key in a:
        for name in ("down", "up", "weight", "bias"):
            x, y = getattr(a[key], name, None), getattr(b[key], name, None)
            assert (x is None) == (y is None), (key, name)
            assert x is None or (x.dtype == y.dtype and torch.equal(x, y)), (key, name)
        assert a[key].kind == b[key].kind


def close(a: Lora, b: Lora, tolerance: float = 1e-6) -> None:
    assert set(a) == set(b)
    for key in a:
        x, y = a[key].delta(torch.float64), b[key].delta(torch.float64)
        assert float((x - y).norm()) <= tolerance * float(y.norm()), key


# -- round trips --------------------------------------------------------------------


@pytest.mark.parametrize("format", writing.FORMATS)
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_a_saved_lora_comes_back_bit_for_bit_with_and_without_its_base(pipes, family, format, tmp_path):
    pipe = pipes[family]
    lora = every_rank(tiny.lora_for(pipe, text_encoder=True, conv=True))
    lora = lora.replace(card=Card("fox", "character", ("fx",), family))
    path = tmp_path / ("fox" if format == "peft" else "fox.safetensors")
    assert files.save(lora, path, format=format, metadata={"recipe": {"a": 1}}, base=pipe) == path
    for base in (None, pipe):
        back = files.load(path, base=base)
        same(back, lora)
        assert (back.card.name, back.card.category, back.card.triggers) == ("fox", "character", ("fx",))
        assert back.card.family == files.family_of(lora) == files.family_of_model(pipe) == family
        assert len(back.card.sha256) == 64
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.parametrize("dtype", ["fp16", torch.bfloat16, "float32"])
def test_dtype_casts_and_what_overflows_is_refused(sd15, dtype, tmp_path):
    lora = tiny.lora_for(sd15)
    back = files.load(files.save(lora, tmp_path / "a.safetensors", dtype=dtype))
    stored = writing.DTYPES.get(dtype, dtype)
    assert {p.up.dtype for p in back.values()} == {stored}
    same(back, lora.to(stored))
    if dtype == "fp16":
        with pytest.raises(ValueError, match=r"big\.safetensors: key unet\..*do not fit torch\.float16"):
            files.save(lora * 1e9, tmp_path / "big.safetensors", dtype=dtype)
        assert not (tmp_path / "big.safetensors").exists()


def test_kohya_holds_dense_updates_and_biases_and_the_others_say_that_they_cannot(sd15, tmp_path):
    key = "unet.down_blocks.0.resnets.0.conv1"
    shape = files.base_of(sd15).shapes[key]
    norm = "unet.down_blocks.0.resnets.0.norm1"
    parts = dict(tiny.lora_for(sd15, modules=[".to_q"]))
    parts[key] = Dense(torch.randn(shape), torch.randn(shape[0]), "conv")
    parts[norm] = Dense(torch.randn(files.base_of(sd15).shapes[norm]))
    path = files.save(Lora(parts), tmp_path / "a.safetensors", format="kohya")
    same(files.load(path, sd15), Lora(parts))
    for format in ("diffusers", "peft"):
        with pytest.raises(ValueError, match=rf"key {key}: the {format} format cannot hold a dense.*kohya"):
            files.save(Lora(parts), tmp_path / "b", format=format)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_files_input_is_never_written_over(sd15, tmp_path):
    path = files.save(tiny.lora_for(sd15), tmp_path / "a.safetensors")
    lora = files.load(path)
    before = path.read_bytes()
    for derived in (lora, 0.5 * lora, (lora + tiny.lora_for(sd15, seed=1)).truncate(rank=2)):
        with pytest.raises(ValueError, match=r"a\.safetensors: an input"):
            files.save(derived, path, format="kohya")
    assert path.read_bytes() == before


def test_a_failing_disk_leaves_the_old_file_and_no_other(sd15, tmp_path, monkeypatch):
    path = files.save(tiny.lora_for(sd15), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.save(tiny.lora_for(sd15, seed=5), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


# -- read by diffusers and PEFT ------------------------------------------------------


def adapters(pipe) -> dict[str, torch.Tensor]:
    """canonical key -> the update that the layers put in by diffusers make."""
    found = {}
    for component, module in pipe.components.items():
        if isinstance(module, nn.Module):
            for path, layer in module.named_modules():
                if hasattr(layer, "lora_A") and layer.lora_A:
                    (name,) = layer.lora_A
                    found[keys.plain(component, path)] = layer.get_delta_weight(name).detach()
    return found


@pytest.mark.parametrize(
    ("family", "format"),
    [("sd15", "diffusers"), ("sd15", "kohya"), ("sdxl", "diffusers"), ("sdxl", "kohya"), ("sd3", "diffusers"),
     ("flux", "diffusers")],
)  # fmt: skip
def test_plain_diffusers_loads_every_layer_of_a_file_we_wrote(pipes, family, format, tmp_path):
    pipe = copy.deepcopy(pipes[family])
    whole = tiny.lora_for(pipe, text_encoder=True, conv=family.startswith("sd") and family != "sd3")
    # diffusers loads no LoRA of a T5, and for FLUX none of text_encoder_2
    lora = Lora({k: p for k, p in whole.items() if ".block." not in k})
    lora = every_rank(lora) if format == "diffusers" else lora
    files.save(lora, tmp_path / "a.safetensors", format=format)
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    made = adapters(pipe)
    assert set(made) == set(lora)
    for key, part in lora.items():
        torch.testing.assert_close(made[key], part.delta(), rtol=1e-4, atol=1e-6, msg=key)


def test_text_encoder_layers_that_diffusers_does_not_list_load_too(sd15, tmp_path):
    pipe = copy.deepcopy(sd15)
    lora = tiny.lora_for(pipe, text_encoder=True, modules=[".fc1", ".fc2"])
    assert lora.components == ("text_encoder",)
    files.save(lora, tmp_path / "a.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    assert set(adapters(pipe)) == set(lora)


@pytest.mark.parametrize("conv", [False, True])
def test_files_that_diffusers_writes_are_read(sd15, conv, tmp_path):
    pipe = copy.deepcopy(sd15)
    targets = ["to_q", "to_out.0", "ff.net.2"] + (["conv1", "conv_shortcut", "proj_in"] if conv else [])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, rank_pattern={"ff.net.2": 3}, alpha_pattern={"to_q": 2},
        init_lora_weights=False, use_rslora=conv,
    )  # fmt: skip
    pipe.unet.add_adapter(config)
    text = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(text)
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    want = adapters(pipe)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder)),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict() | {"target_modules": targets},
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict()
        | {"target_modules": ["q_proj"]},
    )
    lora = files.load(tmp_path / "pytorch_lora_weights.safetensors", base=sd15)
    assert set(lora) == set(want)
    for key, part in lora.items():
        torch.testing.assert_close(part.delta(), want[key], rtol=1e-5, atol=1e-7, msg=key)
    assert lora.card.family == "sd15"


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(7, 11), "v": nn.Linear(7, 5)}) for _ in range(2)])
        self.conv = nn.Conv2d(3, 5, 3)
        self.point = nn.Conv2d(5, 6, 1)
        self.tokens = nn.Embedding(13, 7)

    def forward(self, x):
        return self.layers[0]["q"](x)


def toy_adapter(**options) -> nn.Module:
    torch.manual_seed(0)
    model = peft.get_peft_model(Toy(), peft.LoraConfig(r=4, lora_alpha=6, **options))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q", "v", "conv", "point", "tokens"], "rank_pattern": {"layers.1.q": 3}},
        {"target_modules": ["q", "conv"], "use_rslora": True, "alpha_pattern": {"conv": 5}},
        {"target_modules": ["q", "point"], "lora_bias": True},
    ],
)
def test_peft_folders_are_read_as_peft_merges_them_and_ours_load_in_peft(options, tmp_path):
    model = toy_adapter(**options)
    torch.manual_seed(0)
    base = Toy()
    model.save_pretrained(tmp_path / "theirs")
    lora = files.load(tmp_path / "theirs", base=base)
    merged = dict(model.merge_and_unload().named_modules())
    for key, part in lora.items():
        before = dict(base.named_modules())[key]
        torch.testing.assert_close(part.delta(), merged[key].weight - before.weight, rtol=1e-5, atol=1e-6)
        if part.bias is not None:
            torch.testing.assert_close(part.bias, merged[key].bias - before.bias, rtol=1e-5, atol=1e-6)
    files.save(lora, tmp_path / "ours", format="peft")
    same(files.load(tmp_path / "ours", base=base), lora)
    ours = peft.PeftModel.from_pretrained(Toy(), str(tmp_path / "ours"))
    found = {p.removeprefix("base_model.model."): m for p, m in ours.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(found) == set(lora)
    for key, part in lora.items():
        torch.testing.assert_close(found[key].get_delta_weight("default"), part.delta(), rtol=1e-5, atol=1e-6)


def test_a_trained_bias_becomes_the_difference_to_its_base(tmp_path):
    model = toy_adapter(target_modules=["q"], bias="lora_only")
    with torch.no_grad():
        model.base_model.model.layers[0]["q"].bias.add_(0.5)
    model.save_pretrained(tmp_path / "a")
    torch.manual_seed(0)
    base = Toy()
    torch.testing.assert_close(files.load(tmp_path / "a", base)["layers.0.q"].bias, torch.full((11,), 0.5))
    with pytest.raises(ValueError, match=r"a: key .*layers\.\d\.q.*whole trained bias needs its base"):
        files.load(tmp_path / "a")


# -- spellings -----------------------------------------------------------------------

D, U = "lora_down.weight", "lora_up.weight"


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
         "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("lora_unet_up_blocks_1_resnets_2_time_emb_proj", "unet.up_blocks.1.resnets.2.time_emb_proj"),
        ("lora_unet_up_blocks_1_resnets_2_conv_shortcut", "unet.up_blocks.1.resnets.2.conv_shortcut"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj",
         "unet.down_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj"),
        ("lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_input_blocks_7_0_skip_connection", "unet.down_blocks.2.resnets.0.conv_shortcut"),
        ("lora_unet_input_blocks_0_0", "unet.conv_in"),
        ("lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k",
         "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"),
        ("lora_unet_middle_block_2_in_layers_2", "unet.mid_block.resnets.1.conv1"),
        ("lora_unet_output_blocks_2_2_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_2_1_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_5_1_proj_out", "unet.up_blocks.1.attentions.2.proj_out"),
        ("lora_unet_output_blocks_8_0_emb_layers_1", "unet.up_blocks.2.resnets.2.time_emb_proj"),
        ("lora_unet_time_embed_2", "unet.time_embedding.linear_2"),
        ("lora_unet_label_emb_0_0", "unet.add_embedding.linear_1"),
        ("lora_unet_out_2", "unet.conv_out"),
        ("lora_te_text_model_encoder_layers_3_self_attn_q_proj", "text_encoder.encoder.layers.3.self_attn.q_proj"),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "text_encoder.encoder.layers.3.mlp.fc1"),
        ("lora_te2_text_projection", "text_encoder_2.text_projection"),
        ("lora_transformer_single_transformer_blocks_7_proj_mlp", "transformer.single_transformer_blocks.7.proj_mlp"),
        ("lora_transformer_time_text_embed_guidance_embedder_linear_1",
         "transformer.time_text_embed.guidance_embedder.linear_1"),
        ("unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc2", "text_encoder.encoder.layers.0.mlp.fc2"),
        ("down_blocks.0.attentions.0.proj_in", "unet.down_blocks.0.attentions.0.proj_in"),
        ("base_model.model.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ],
)  # fmt: skip
def test_names_are_found_without_a_base(name, want):
    assert keys.locate(name) == (want,)


@pytest.mark.parametrize(
    ("key", "layer", "role"),
    [
        ("unet.a.attn1.processor.to_q_lora.down.weight", "unet.a.attn1.to_q", "down"),
        ("unet.a.attn1.processor.to_out_lora.up.weight", "unet.a.attn1.to_out.0", "up"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight",
         "text_encoder.text_model.encoder.layers.0.self_attn.out_proj", "up"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q", "down"),
        ("unet.a.to_q.lora_B.weight", "unet.a.to_q", "up"),
        ("text_encoder.a.q_proj.lora_linear_layer.up.weight", "text_encoder.a.q_proj", "up"),
        ("lora_unet_a.alpha", "lora_unet_a", "alpha"),
        ("lora_unet_a.diff_b", "lora_unet_a", "bias"),
    ],
)  # fmt: skip
def test_ends_of_keys(key, layer, role):
    assert keys.split(key) == (layer, role)


def test_every_underscored_name_of_every_family_resolves_to_its_layer(pipes):
    for pipe in pipes.values():
        base = files.base_of(pipe)
        for key in base.shapes:
            component, _, path = key.partition(".")
            prefix = {v: k for k, v in keys.PREFIXES.items()}[component]
            assert base.locate(prefix + path.replace(".", "_")) == (key,)
            if not component.startswith("text_encoder_"):
                assert keys.locate(prefix + path.replace(".", "_")) == (key,)


def test_kohya_alpha_and_fused_flux_projections(pipes):
    base = files.base_of(pipes["flux"])
    out, wide = base.shapes["transformer.single_transformer_blocks.0.attn.to_q"]
    mlp = base.shapes["transformer.single_transformer_blocks.0.proj_mlp"][0]
    down, qkv, one = torch.randn(4, wide), torch.randn(3 * out, 4), torch.randn(3 * out + mlp, 4)
    tensors = {}
    for name, up in (("double_blocks_0_img_attn_qkv", qkv), ("single_blocks_0_linear1", one)):
        name = f"lora_unet_{name}"
        tensors |= {f"{name}.{D}": down, f"{name}.{U}": up, f"{name}.alpha": torch.tensor(1.0)}
    lora = files.read(tensors, base=base)
    leaves = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    single = [f"transformer.single_transformer_blocks.0.{p}" for p in leaves]
    got = torch.cat([lora[k].delta() for k in single])
    torch.testing.assert_close(got, one @ down / 4)
    double = [f"transformer.transformer_blocks.0.attn.{p}" for p in ("to_q", "to_k", "to_v")]
    torch.testing.assert_close(torch.cat([lora[k].delta() for k in double]), qkv @ down / 4)
    assert len(lora) == 7


def test_pointwise_convolutions_fit_linears_and_back(sd15):
    key = "unet.mid_block.attentions.0.proj_in"
    shape = files.base_of(sd15).shapes[key]
    assert shape[2:] == (1, 1)
    flat = {key + ".lora_A.weight": torch.randn(2, shape[1]), key + ".lora_B.weight": torch.randn(shape[0], 2)}
    lora = files.read(flat, base=sd15)
    assert lora[key].shape == shape
    torch.testing.assert_close(lora[key].delta().flatten(1), files.read(flat)[key].delta())


def test_adapters_in_the_base_do_not_hide_its_layers(sd15):
    pipe = copy.deepcopy(sd15)
    lora = tiny.lora_for(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    files.fits(lora, pipe)
    assert files.base_of(pipe).shapes == files.base_of(sd15).shapes


def test_a_saved_pipelines_folder_is_a_base_by_its_headers_alone(sd15, tmp_path):
    sd15.save_pretrained(tmp_path)
    base = files.base_of(tmp_path)
    live = files.base_of(sd15)
    assert base.family == "sd15"
    missing = set(live.shapes) - set(base.shapes)
    assert not missing
    assert all(base.shapes[k] == live.shapes[k] for k in live.shapes)
    files.fits(tiny.lora_for(sd15, text_encoder=True), tmp_path)
