"""Scores: CLIP equals clip-anytorch's own model, the embedded scorer and the recognisers see held-out renders."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from multilora.lab.journal import Journal
from multilora.lab.score import clip as score_clip
from multilora.lab.score.presence import (
    ARCHITECTURES,
    Recogniser,
    load_recogniser,
    pixels,
    presence,
)
from multilora.lab.world import eyes, report, tables
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.render import render
from multilora.lab.world.scene import sample_scene
from multilora.method import UnknownName
from multilora.pipelines.load import assets

HEADS = {"character": ["cat", "zib"], "style": ["flat", "neon", "gamo"]}


# -- CLIP ------------------------------------------------------------------------------------------------------------


def tiny_clip(vocabulary=49408):
    from clip.model import CLIP

    torch.manual_seed(0)
    return CLIP(32, 32, 1, 64, 8, 77, vocabulary, 64, 1, 1).eval()


def test_a_file_in_openais_layout_equals_clip_anytorchs_model(tmp_path):
    import clip

    model = tiny_clip()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half().float())  # build_model goes through half precision
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    scorer = score_clip.load_clip(str(tmp_path / "model.safetensors"))
    images = [Image.effect_noise((40, 50), 90).convert("RGB"), Image.new("RGB", (32, 32), (200, 30, 90))]
    x = torch.stack([clip.clip._transform(32)(image) for image in images])
    with torch.no_grad():
        torch.testing.assert_close(scorer.model.encode_image(x), model.encode_image(x), rtol=1e-5, atol=1e-6)
        tokens = clip.tokenize(["a fox", "a robe"])
        torch.testing.assert_close(scorer.model.encode_text(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-6)
        a, b = model.encode_image(x), model.encode_text(tokens)
    want = torch.nn.functional.cosine_similarity(a, b).clamp(min=0) * 100
    assert scorer.score(images, ["a fox", "a robe"]) == pytest.approx(want.tolist(), abs=1e-3)
    assert "32 px" in scorer.name
    assert next(scorer.model.parameters()).dtype == torch.float32


def test_compressed_token_rows_expand_to_the_table():
    rows = torch.arange(8.0).view(4, 2)
    full = score_clip.expand({"token_embedding.rows": rows, "token_embedding.ids": torch.tensor([5, 9, 49407])})
    weight = full["token_embedding.weight"]
    assert weight.shape == (49408, 2)
    assert weight[5].tolist() == [2.0, 3.0]
    assert weight[49407].tolist() == [6.0, 7.0]
    assert weight[[0, 6, 49406]].tolist() == [[0.0, 1.0]] * 3


def test_image_score_of_a_picture_with_itself_is_100(tmp_path):
    save_file(tiny_clip().state_dict(), tmp_path / "m.safetensors")
    scorer = score_clip.load_clip(str(tmp_path / "m.safetensors"))
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    assert scorer.image_score([image, image], [image]) == pytest.approx([100.0, 100.0], abs=1e-3)
    with pytest.raises(ValueError, match="2 pictures but 3 texts"):
        scorer.score([image, image], ["a", "b", "c"])


def test_unknown_scorers_say_what_there_is(tmp_path):
    with pytest.raises(ValueError, match="ViT-B/32"):
        score_clip.load_clip("ViT-B/33")
    with pytest.raises(ValueError, match="missing"):
        score_clip.load_clip(str(tmp_path / "no.safetensors"))
    save_file({"x": torch.zeros(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="OpenAI's layout"):
        score_clip.load_clip(str(tmp_path / "bad.safetensors"))


# -- recognisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", sorted(ARCHITECTURES))
def test_recogniser_file_round_trip(tmp_path, which):
    torch.manual_seed(1)
    net = ARCHITECTURES[which](HEADS).eval()
    save_file(net.state_dict(), tmp_path / "r.safetensors")
    facts = {"name": "r", "architecture": which, "heads": HEADS}
    (tmp_path / "r.json").write_text(json.dumps(facts))
    loaded = load_recogniser(tmp_path / "r.safetensors")
    images = [Image.effect_noise((128, 128), 90).convert("RGB") for _ in range(3)]
    with torch.no_grad():
        want = {head: logits.softmax(1) for head, logits in net(pixels(images)).items()}
    got = loaded.probabilities(images)
    for head in HEADS:
        torch.testing.assert_close(got[head], want[head])
    assert presence(images, {"style": "gamo pixel"}, loaded)["style"] == (want["style"].argmax(1) == 2).tolist()
    torch.testing.assert_close(loaded.probability(images, {"character": "zib"})["character"], want["character"][:, 1])


def test_unknown_names_are_refused_with_the_nearest():
    recogniser = Recogniser(ARCHITECTURES["a"](HEADS), HEADS, "x")
    image = Image.new("RGB", (128, 128))
    with pytest.raises(UnknownName, match="neon"):
        presence([image], {"style": "neonn"}, recogniser)
    with pytest.raises(UnknownName, match="character"):
        presence([image], {"charactr": "cat"}, recogniser)


def test_missing_recogniser_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"q\.safetensors is missing"):
        load_recogniser(tmp_path / "q.safetensors")


def test_pixels_of_any_size_and_tensor():
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    assert pixels([image]).shape == (1, 3, 128, 128)
    assert pixels([image, Image.new("RGB", (128, 128))]).shape == (2, 3, 128, 128)
    assert pixels(torch.zeros(1, 3, 128, 128)).max() == 0


def test_the_two_recognisers_differ_in_architecture():
    a, b = (ARCHITECTURES[n](eyes.HEADS) for n in "ab")
    kinds = [{type(m).__name__ for m in net.modules()} for net in (a, b)]
    assert "BatchNorm2d" in kinds[0] - kinds[1]
    assert "GroupNorm" in kinds[1] - kinds[0]


# -- the eyes' data --------------------------------------------------------------------------------------------------


def test_heads_have_every_design_and_truth_is_the_label():
    for design in DESIGNS.values():
        assert design.name in eyes.HEADS[design.category]
    for i in range(200):
        scene = eyes.mixed_scene("test", i)
        found = eyes.truth(scene)
        for category, name in scene.designs.items():
            assert found[category] == name
        assert len(eyes.targets(scene)) == len(eyes.HEADS)
        for number, known in zip(eyes.targets(scene), eyes.HEADS.values(), strict=True):
            assert number == eyes.IGNORED or 0 <= number < len(known)


def test_training_and_held_out_scenes_are_disjoint():
    streams = [{eyes.mixed_scene(s, i).seed for i in range(500)} for s in ("a/1", "b/2", "clip/0", "held out")]
    for i, one in enumerate(streams):
        for other in streams[i + 1 :]:
            assert len(one & other) == 0


def test_worn_pictures_keep_shape_and_range():
    x = torch.rand(3, 3, 64, 64)
    y = eyes.worn(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    assert 0 <= float(y.min()) <= float(y.max()) <= 1
    assert not torch.equal(x, y)
    assert torch.equal(y, eyes.worn(x, torch.Generator().manual_seed(0)))


# -- the shipped ones ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["a", "b"])
def test_shipped_recognisers_read_held_out_renders(which):
    for head, (right, asked) in eyes.recogniser_accuracy(load_recogniser(which), 300).items():
        assert right / asked >= 0.95, (head, right, asked)


def test_shipped_facts_say_97_percent_per_head():
    for which in "ab":
        facts = json.loads((assets() / f"recogniser_{which}.json").read_text())
        assert facts["architecture"] == which
        for head, (right, asked) in facts["held_out"].items():
            assert right / asked >= 0.97, (which, head)


def test_shipped_clip_picks_the_caption_among_32():
    right, asked = eyes.clip_top1(assets() / "clip" / "model.safetensors", 256)
    assert right / asked >= 0.85


def test_shipped_clip_is_build_models_own_model():
    import clip

    state = score_clip.expand(load_file(assets() / "clip" / "model.safetensors"))
    want = clip.model.build_model(dict(state)).float()
    scorer = score_clip.load_clip()
    tokens = clip.tokenize(["a zib alien in a forest", "zebra crossing unknown words"])
    x = torch.stack([scorer.preprocess(render(sample_scene(i))) for i in range(2)])
    with torch.no_grad():
        assert torch.equal(scorer.model.encode_text(tokens), want.encode_text(tokens))
        assert torch.equal(scorer.model.encode_image(x), want.encode_image(x))


def test_sizes_of_the_eyes():
    assert sum(f.stat().st_size for f in (assets() / "clip").iterdir()) <= 8e6
    assert sum((assets() / f"recogniser_{w}.safetensors").stat().st_size for w in "ab") <= 2e6


# -- the report ------------------------------------------------------------------------------------------------------


def test_wilson_is_the_known_interval():
    low, high = tables.wilson(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert tables.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert tables.wilson(0, 0) == (0.0, 1.0)


def test_sets_follow_composlora_and_chunks_reach_the_count():
    for k, expected in ((2, 10), (3, 18), (4, 14), (5, 4)):
        found = report.sets("test", k)
        assert len(found) == expected
        for chosen in found:
            assert len({DESIGNS[n].category for n in chosen}) == k
            assert any(DESIGNS[n].category == "character" for n in chosen)
        drawn = list(report.batches(found, 100))
        assert sum(size for *_, size in drawn) >= 100
        assert len({(chosen, index) for chosen, index, _ in drawn}) == len(drawn)


def test_requested_elements_are_those_the_caption_names():
    for i in range(100):
        scene = sample_scene(5000 + i)
        text = caption(scene, 1)
        for head, label in report.requested(scene, text).items():
            if head in ("character", "object", "garment"):
                assert any(noun in text for noun in ("bunny", label))
            elif head.endswith("_colour"):
                assert label in text
    scene = sample_scene(1, character="cat", garment="none", object="none", background="plain", style="flat",
                         character_colour="red")  # fmt: skip
    assert report.requested(scene, "a red cat") == {"character": "cat", "character_colour": "red"}


def test_journal_goes_on_and_tables_are_written(tmp_path):
    journal = Journal(tmp_path / "report.jsonl")
    journal.add("base/0", heads={"character": [9, 10], "style": [1, 2]})
    journal.add("alone/zib/on/10", name="zib", on=True, found=9, asked=10)
    facts = {"cell": "switch", "k": 2, "found": 5, "asked": 8, "complete": 1, "pictures": 4, "clip": [20.0, 22.0]}
    journal.add("composition/switch/pandu+raio/0+4", **facts)
    again = Journal(tmp_path / "report.jsonl")
    assert again.lines == journal.lines
    readme = tables.write(again, tmp_path / "README.md")
    text = readme.read_text()
    assert "0.90 (0.60 to 0.98), 9 of 10" in text
    assert "0.62 (0.31 to 0.86), all 0.25, CLIP 21.0, n 4" in text
    tables.write(again, readme)
    assert readme.read_text() == text
