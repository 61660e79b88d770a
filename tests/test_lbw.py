"""lbw= strings: which modules a block has, presets, users' files; pictures against dense weights by hand."""

import pytest
import torch

from multilora import lbw
from multilora.lora import Lora
from multilora.method import UnknownName
from multilora.pipelines.composing import composing, member
from multilora.pipelines.image import Composer
from multilora.pipelines.shelf import asked_for
from tests import handloop, tiny

# Written out by hand from SD 1.5's, SDXL's and FLUX.1's own layer lists: block -> starts of diffusers' module paths.
SD15 = {
    "IN00": ["conv_in"],
    "IN01": ["down_blocks.0.resnets.0.", "down_blocks.0.attentions.0."],
    "IN02": ["down_blocks.0.resnets.1.", "down_blocks.0.attentions.1."],
    "IN03": ["down_blocks.0.downsamplers.0."],
    "IN04": ["down_blocks.1.resnets.0.", "down_blocks.1.attentions.0."],
    "IN05": ["down_blocks.1.resnets.1.", "down_blocks.1.attentions.1."],
    "IN06": ["down_blocks.1.downsamplers.0."],
    "IN07": ["down_blocks.2.resnets.0.", "down_blocks.2.attentions.0."],
    "IN08": ["down_blocks.2.resnets.1.", "down_blocks.2.attentions.1."],
    "IN09": ["down_blocks.2.downsamplers.0."],
    "IN10": ["down_blocks.3.resnets.0."],
    "IN11": ["down_blocks.3.resnets.1."],
    "M00": ["mid_block."],
    "OUT00": ["up_blocks.0.resnets.0."],
    "OUT01": ["up_blocks.0.resnets.1."],
    "OUT02": ["up_blocks.0.resnets.2.", "up_blocks.0.upsamplers.0."],
    "OUT03": ["up_blocks.1.resnets.0.", "up_blocks.1.attentions.0."],
    "OUT04": ["up_blocks.1.resnets.1.", "up_blocks.1.attentions.1."],
    "OUT05": ["up_blocks.1.resnets.2.", "up_blocks.1.attentions.2.", "up_blocks.1.upsamplers.0."],
    "OUT06": ["up_blocks.2.resnets.0.", "up_blocks.2.attentions.0."],
    "OUT07": ["up_blocks.2.resnets.1.", "up_blocks.2.attentions.1."],
    "OUT08": ["up_blocks.2.resnets.2.", "up_blocks.2.attentions.2.", "up_blocks.2.upsamplers.0."],
    "OUT09": ["up_blocks.3.resnets.0.", "up_blocks.3.attentions.0."],
    "OUT10": ["up_blocks.3.resnets.1.", "up_blocks.3.attentions.1."],
    "OUT11": ["up_blocks.3.resnets.2.", "up_blocks.3.attentions.2."],
    "": ["time_embedding.", "conv_out"],
}
SDXL = {
    **{block: starts for block, starts in SD15.items() if block[:3] != "OUT"},
    "OUT00": ["up_blocks.0.resnets.0.", "up_blocks.0.attentions.0."],
    "OUT01": ["up_blocks.0.resnets.1.", "up_blocks.0.attentions.1."],
    "OUT02": ["up_blocks.0.resnets.2.", "up_blocks.0.attentions.2.", "up_blocks.0.upsamplers.0."],
    "OUT03": ["up_blocks.1.resnets.0."],
    "OUT04": ["up_blocks.1.resnets.1."],
    "": ["time_embedding.", "conv_out", "add_embedding."],
}
FLUX = {
    "IN": ["x_embedder", "context_embedder", "time_text_embed."],
    "D00": ["transformer_blocks.0."],
    "D01": ["transformer_blocks.1."],
    "S00": ["single_transformer_blocks.0."],
    "S01": ["single_transformer_blocks.1."],
    "OUT": ["proj_out", "norm_out."],
}
# The presets of the extension's lbwpresets.txt and script, as numbers.
PUBLISHED = {
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "MID": "0,0,0,0,0,0,0,1,0,0,0,0,0,0,0,0,0",
    "OUT04": "0,0,0,0,0,0,0,0,0,1,0,0,0,0,0,0,0",
}
NAMES17 = ["BASE", *(f"IN{i:02}" for i in (1, 2, 4, 5, 7, 8)), "M00", *(f"OUT{i:02}" for i in range(3, 12))]


def everything(pipe):
    """A LoRA on every linear and convolution of a pipeline."""
    return tiny.lora_for(pipe, rank=2, seed=1, text_encoder=True, modules=lambda key: True, conv=True)


def by_hand(path, table):
    found = [block for block, starts in table.items() if any(path.startswith(s) for s in starts)]
    assert len(found) == 1, path
    return found[0]


@pytest.fixture(scope="module")
def sd15():
    pipe = tiny.sd15_topology(0.05)
    return pipe, everything(pipe)


@pytest.fixture(scope="module")
def flux():
    pipe = tiny.flux()
    return pipe, everything(pipe)


def test_every_module_of_sd15_is_in_its_block(sd15):
    pipe, lora = sd15
    assert lbw.layout_of(pipe.unet) == "sd15"
    seen = set()
    for path in lora.part("unet"):
        block = by_hand(path, SD15)
        seen.add(block)
        assert lbw.block_of(path, "sd15")[0] == block, path
    assert seen == set(SD15)
    assert lbw.LAYOUTS[26] == ("BASE", *(b for b in SD15 if b))


def test_every_module_of_sdxl_and_flux_is_in_its_block(flux):
    pipe = tiny.sdxl()
    assert lbw.layout_of(pipe.unet) == "sdxl"
    for path in everything(pipe).part("unet"):
        assert lbw.block_of(path, "sdxl")[0] == by_hand(path, SDXL), path
    pipe, lora = flux
    for path in lora.part("transformer"):
        assert lbw.block_of(path, lbw.layout_of(pipe.transformer))[0] == by_hand(path, FLUX), path
    assert len(lbw.LAYOUTS[61]) == 3 + 19 + 38 + 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_numbers(name, sd15):
    pipe, lora = sd15
    both = [lbw.expanded({"lbw": text}, lora, pipe.unet, "unet", "fox") for text in (name, PUBLISHED[name])]
    assert both[0] == both[1]
    assert both[0][1] == float(PUBLISHED[name][0])


def factors_by_hand(text, names, table, paths):
    """path -> factor, by the extension's rules: blocks that the list does not name are 0, modules in no block 1."""
    given = dict(zip(names, (float(v) for v in text.split(",")), strict=True))
    return {p: given.get(by_hand(p, table), 0.0) if by_hand(p, table) else 1.0 for p in paths}


def dense_latents(pipe, component, lora, factors, text_factor, run):
    """What the pipeline draws with W + factor * up @ down in every module, in the text encoders too."""
    own = {}
    for name in {key.split(".", 1)[0] for key in lora}:
        scaled = {}
        for path, part in lora.part(name).items():
            by = factors[path] if name == component else text_factor
            scaled[f"{name}.{path}"] = (part.down, part.up * by)
        own[name] = getattr(pipe, name)
        setattr(pipe, name, handloop.dense(own[name], [scaled], [0.8], name))
    try:
        return run(pipe)
    finally:
        for name, module in own.items():
            setattr(pipe, name, module)


def one_step(pipe):
    channels = 16 if hasattr(pipe, "transformer") else 4
    shape = (1, 16, channels) if channels == 16 else (1, channels, 8, 8)
    extra = {"max_sequence_length": 16} if channels == 16 else {}
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return pipe(
        "a fox", guidance_scale=2.0, height=32, width=32, num_inference_steps=1, latents=latents,
        output_type="latent", **extra,
    ).images  # fmt: skip


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("sd15", "0.5,0,1,0.25,0,1,0,2,0,-1,0.5,1,0,0,0.75,0,1"),
        ("sdxl", "1,0.5,1,0,1,2,0,1,0.25,1,0,0.5"),
        ("flux", ",".join(["0.5", "0.5", "0", "2", *["1"] * 18, "0.25", "-1", *["1"] * 36, "0.5"])),
    ],
)
def test_numbers_act_on_their_blocks_only(family, text):
    pipe = tiny.sd15_topology(0.05, torch.float64) if family == "sd15" else getattr(tiny, family)(torch.float64)
    lora, component = everything(pipe), "transformer" if family == "flux" else "unet"
    table = {"sd15": SD15, "sdxl": SDXL, "flux": FLUX}[family]
    names = NAMES17 if family == "sd15" else lbw.LAYOUTS[12 if family == "sdxl" else 61]
    factors = factors_by_hand(text, names, table, lora.part(component))
    wanted = dense_latents(pipe, component, lora, factors, float(text.split(",")[0]), one_step)
    whole = dense_latents(pipe, component, lora, dict.fromkeys(factors, 1.0), 1.0, one_step)
    with composing(pipe, [member(pipe, lora, weight=0.8, blocks=text)]):
        found = one_step(pipe)
    assert handloop.relative(found, wanted) < 1e-9
    assert handloop.relative(found, whole) > 1e-3


@pytest.mark.parametrize("block", ["IN04", "OUT05"])
def test_one_block_alone_is_a_lora_of_its_modules_alone(block):
    pipe = tiny.sd15_topology(0.05, torch.float64)
    lora = everything(pipe)
    mine = {k: p for k, p in lora.items() if k.startswith("unet.") and by_hand(k[5:], SD15) in (block, "")}
    with composing(pipe, [member(pipe, lora, blocks=block)]):
        found = one_step(pipe)
    with composing(pipe, [Lora(mine)]):
        assert handloop.relative(found, one_step(pipe)) < 1e-9
    assert handloop.relative(found, one_step(pipe)) > 1e-6


def test_all_none_and_their_factor(sd15):
    pipe, lora = sd15
    assert lbw.expanded("ALL", lora, pipe.unet, "unet", "fox") == ({}, 1.0)
    globs, text = lbw.expanded("ALL0.5", lora, pipe.unet, "unet", "fox")
    assert text == 0.5
    assert set(globs.values()) == {0.5}
    globs, text = lbw.expanded("NONE", lora, pipe.unet, "unet", "fox")
    assert text == 0.0
    assert set(globs.values()) == {0.0}
    some, _ = lbw.expanded("NOUT04", lora, pipe.unet, "unet", "fox")
    assert some == {"up_blocks.1.resnets.1.*": 0.0, "up_blocks.1.attentions.1.*": 0.0}


def test_keys_stand_in_their_order_beside_globs(sd15):
    pipe, lora = sd15
    globs, _ = lbw.expanded({"*attn2*": 0.5, "lbw": "NM00", "mid_block.*": 2.0}, lora, pipe.unet, "unet", "fox")
    assert list(globs.items()) == [("*attn2*", 0.5), ("mid_block.*", 2.0)]
    thirds, text = lbw.expanded({"in": 0.5, "mid": 0.0, "out": 1.5}, lora, pipe.unet, "unet", "fox")
    assert text == 1.0
    assert thirds == {
        "conv_in": 0.5, "time_embedding.*": 0.5, "down_blocks.*": 0.5, "conv_out": 0.5, "mid_block.*": 0.0,
        "up_blocks.*": 1.5,
    }  # fmt: skip


def test_text_part_follows_base(sd15):
    pipe, lora = sd15
    assert member(pipe, lora, weight=0.8, blocks="OUTALL").text_weight == 0.8
    assert member(pipe, lora, weight=0.8, blocks="OUT04").text_weight == 0.0
    numbers = "0.5" + ",1" * 16
    assert member(pipe, lora, weight=0.8, blocks=numbers).text_weight == pytest.approx(0.4)
    assert member(pipe, lora, weight=0.8, text_encoder_weight=0.6, blocks=numbers).text_weight == pytest.approx(0.3)


def test_presets_of_a_users_file(tmp_path):
    file = tmp_path / "presets.txt"
    file.write_text("# mine\n\nSOFT: 1,0.5,0.5,0.5,0.5,0.5,0.5,1,1,1,1,1,1,1,1,1,1\nTINY:1,0,0,0,0,0,0,0,0,0,0,1\n")
    presets = lbw.read_presets(file)
    assert list(presets) == ["SOFT", "TINY"]
    assert lbw.checked("SOFT", presets).startswith("1,0.5")
    assert lbw.checked("OUTALL", presets) == "OUTALL"
    for text, words in (
        ("SOFT 1,2", "line 1: wanted NAME:1,0,0"),
        ("A:1,2", "line 1: 2 values, wanted 12, 17"),
        ("A:1,x,0,0,0,0,0,0,0,0,0,0", "IN04='x': wanted a number"),
        ("A:1,0,0,0,0,0,0,0,0,0,0,0\nA:1,0,0,0,0,0,0,0,0,0,0,0", "line 2: 'A' is there already"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words) as caught:
            lbw.read_presets(file)
        assert str(file) in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        lbw.read_presets(tmp_path / "none.txt")


def test_wrong_strings_name_the_lora_and_what_was_wanted(sd15, flux):
    (pipe, lora), (other, flux_lora) = sd15, flux
    for blocks, words in (
        ("OUTAL", "lbw=OUTAL of LoRA 'fox': unknown lbw preset 'OUTAL'. Nearest: OUTALL"),
        ("1,0", "2 values, wanted 12, 17, 20, 26 or 61"),
        (",".join("1" * 61), "61 values are for another model, wanted 12 or 17 or 20 or 26"),
        ("R" + ",1" * 16, "BASE=R: random and inherited values are not supported"),
        ("nan" + ",1" * 16, "BASE='nan': wanted a finite number"),
    ):
        with pytest.raises(ValueError) as caught:
            member(pipe, lora, name="fox", blocks=blocks)
        assert words in str(caught.value)
        assert "LoRA 'fox'" in str(caught.value)
    with pytest.raises(UnknownName):
        lbw.checked("LOUD")
    with pytest.raises(ValueError, match="17 values are for another model, wanted 61"):
        member(other, flux_lora, name="fox", blocks=PUBLISHED["INS"])
    with pytest.raises(ValueError, match="CLIP=1, T5=0: wanted one factor for both"):
        member(other, flux_lora, name="fox", blocks="1,0" + ",1" * 59)
    with pytest.raises(ValueError, match="FluxTransformer2DModel has no down, mid and up blocks"):
        member(other, flux_lora, name="fox", blocks={"in": 0.5})
    sd3 = tiny.sd3()
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no blocks of lbw=; give its modules as globs"):
        member(sd3, tiny.lora_for(sd3), name="fox", blocks="ALL")


def test_a_prompts_tag_gives_its_options_to_the_member():
    composer = Composer(tiny.sd15())
    lora = tiny.lora_for(composer.pipe, rank=2, text_encoder=True)
    composer.add(lora, name="fox", weight=0.3, positive_only=True)
    clean, members = asked_for(composer, "a fox <lora:fox:0.5:0.8:lbw=IN01:start=0.5>", None)
    assert clean == "a fox"
    (found,) = members
    assert str(found.weight) == "0@0.5,0.8@0.5"
    assert found.positive_only
    assert found.text_weight == 0.0  # 0.5 times IN01's factor of BASE
    assert found.blocks
    assert set(found.blocks.values()) == {0.0}
    assert not any(glob.startswith("down_blocks.0.attentions.0") for glob in found.blocks)
    assert composer.loras["fox"].text_weight == 0.3
