"""Every format of every family, by its real writer, against updates computed by hand in float64."""


import copy
import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from multilora import files, lycoris
from tests import tiny_more, writers

TOLERANCE = 1e-6  # of an update's Frobenius norm


def check(lora, want: dict, tolerance: float = TOLERANCE) -> None:
    assert set(lora) == set(want)
    for key, hand in want.items():
        delta = lora[key].delta(torch.float64)
        assert tuple(delta.shape) == hand.shape, key
        error = np.linalg.norm((delta.numpy() - hand).ravel()) / np.linalg.norm(hand.ravel())
        assert error <= tolerance, (key, error)


@pytest.mark.parametrize(("fmt", "family"), writers.CELLS)
def test_matrix(fmt, family, tmp_path):
    path, want, base = writers.write(fmt, family, tmp_path / "made")
    lora = files.load(path, base=base)
    check(lora, want)
    assert lora.card.family == files.family_of_model(base) == ("" if family == "llama" else family)
    _, label, algorithms = writers.FORMATS[fmt]
    provenance = lora.card.provenance
    assert algorithms <= set(provenance["algorithms"]) <= algorithms | {"locon", "norm"}
    assert provenance["format"] == label or not label
    assert provenance["trainer"]


# -- extremes -------------------------------------------------------------------------------------------------------

EXTREME_FAMILIES = ("sd15", "flux", "zimage")


@pytest.mark.parametrize("family", EXTREME_FAMILIES)
@pytest.mark.parametrize(
    ("fmt", "more"),
    [
        ("kohya", {"rank": 1}),
        ("kohya", {"rank": 100}),  # above every layer
        ("kohya", {"alphas": False}),
        ("kohya", {"dtype": torch.bfloat16}),
        ("kohya", {"dtype": torch.float16}),
        ("kohya", {"dtype": torch.float64}),
        ("locon", {"rank": 1}),
        ("locon", {"rank": 40}),
        ("locon", {"dtype": torch.bfloat16}),
        ("lokr", {"dtype": torch.bfloat16}),
        ("loha_tucker", {"rank": 40, "dtype": torch.bfloat16}),
        ("loha", {"rank": 1}),
        ("peft", {"rank": 100}),
        ("peft", {"dtype": torch.bfloat16}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items()),
)
def test_extremes(fmt, family, more, tmp_path):
    path, want, base = writers.write(fmt, family, tmp_path / "made", **more)
    lora = files.load(path, base=base)
    check(lora, want, 1e-14 if more.get("dtype") == torch.float64 else TOLERANCE)
    if more.get("rank") == 100:
        assert max(part.rank for part in lora.values()) >= 100


@pytest.mark.parametrize("missing", ["lokr", "loha", "locon"])
def test_alpha_absent_is_scale_one(missing, tmp_path):
    path, want, base = writers.write(missing, "sd15", tmp_path / "made")
    tensors = load_file(path)
    alphas = {k.rpartition(".")[0]: float(tensors.pop(k)) for k in list(tensors) if k.endswith(".alpha")}
    assert set(alphas.values()) >= {writers.ALPHA}
    lora = files.read(tensors, base=base)
    whole = files.load(path, base=base)
    for key in want:
        assert float(lora[key].norm()) > 0
        ratio = whole[key].norm() / lora[key].norm()
        assert ratio == pytest.approx(writers.ALPHA / 2, rel=1e-5) or (missing == "lokr" and ratio == pytest.approx(1))


def test_products_stay_low_rank_where_that_is_smaller():
    """FLUX-size linears: a LoHa of rank 8 has 64 terms, a LoKr of factor 8 at most 8 times its rank."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 768, 8, generator=g), torch.randn(2, 8, 640, generator=g)
    part, rank = lycoris.loha({"hada_w1_a": a[0], "hada_w1_b": b[0], "hada_w2_a": a[1], "hada_w2_b": b[1]})
    assert (part.rank, rank) == (64, 8)
    want = (a[0].double() @ b[0].double()) * (a[1].double() @ b[1].double())
    assert float((part.delta(torch.float64) - want).norm() / want.norm()) < 1e-6
    w1, left, right = torch.randn(8, 8, generator=g), torch.randn(96, 4, generator=g), torch.randn(4, 80, generator=g)
    part, rank = lycoris.lokr({"lokr_w1": w1, "lokr_w2_a": left, "lokr_w2_b": right})
    assert (part.rank, rank) == (32, 4)
    want = torch.kron(w1.double(), left.double() @ right.double())
    assert float((part.delta(torch.float64) - want).norm() / want.norm()) < 1e-6
    part, rank = lycoris.lokr({"lokr_w1": w1, "lokr_w2": left @ right})
    assert (part.rank, rank) == (None, None)


@pytest.mark.parametrize("model", ["qwen2", "t5"])
@pytest.mark.parametrize("dora", [False, True])
def test_peft_adapters_of_language_models(model, dora, tmp_path):
    base = getattr(tiny_more, model)()
    targets = ["q_proj", "v_proj"] if model == "qwen2" else ["q", "v", "wo"]
    made = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora)
    )
    writers.randomise([p for n, p in made.named_parameters() if ".default" in n], 0)
    made.save_pretrained(tmp_path / "a")
    lora = files.load(tmp_path / "a", base=base)
    merged = dict(made.merge_and_unload().named_modules())
    plain = dict(base.named_modules())
    assert len(lora) == 2 * len(targets)
    for key, part in lora.items():
        real = key if key in plain else next(p for p in plain if p.endswith(key))
        torch.testing.assert_close(part.delta(), merged[real].weight - plain[real].weight, rtol=1e-4, atol=1e-6)


def test_embeddings_of_language_models(tmp_path):
    base = tiny_more.llama()
    made = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"])
    )
    writers.randomise([p for n, p in made.named_parameters() if ".default" in n], 0)
    made.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    lora = files.load(tmp_path / "a", base=base)
    merged = made.merge_and_unload().get_submodule("model.embed_tokens").weight
    part = lora["model.embed_tokens"]
    torch.testing.assert_close(part.delta(), merged - base.model.embed_tokens.weight, rtol=1e-5, atol=1e-6)


# -- DoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["dora_out", "dora_in", "peft_dora"])
def test_dora_needs_its_live_base(fmt, tmp_path):
    path, _, base = writers.write(fmt, "sd15", tmp_path / "made")
    with pytest.raises(ValueError, match=r"key .*: this is DoRA, .*got no base given: load it with base="):
        files.load(path)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"this is DoRA, .*got a folder's headers: load it with base= a pipeline"):
        files.load(path, base=tmp_path / "base")
    other = copy.deepcopy(base)
    for p in (*other.unet.parameters(), *other.text_encoder.parameters()):
        p.data.mul_(1.5)
    mine, theirs = files.load(path, base=base), files.load(path, base=other)
    assert all(float((mine[k].delta() - theirs[k].delta()).norm()) > 0.01 * mine[k].norm() for k in mine)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, k: t.pop(k), r"an incomplete DoRA, 1 of 11 layers of unet have no magnitude"),
        (lambda t, k: t.update({k: t[k].flatten()[:-1]}), r"its DoRA magnitude has shape \[\d+\], wanted \d+ values"),
        (lambda t, k: t.update({k: t[k] * float("nan")}), r"values that are NaN"),
        (lambda t, k: t.pop(k.replace("dora_scale", "lora_up.weight")), "has no partner: its up factor is missing"),
        (lambda t, k: [t.pop(n) for n in list(t) if n.startswith(k[:-10]) and n != k], "magnitude without its"),
    ],
)
def test_incomplete_dora_is_refused(change, words, tmp_path):
    path, _, base = writers.write("dora_out", "sd15", tmp_path / "made")
    tensors = load_file(path)
    change(tensors, next(k for k in tensors if k.startswith("lora_unet") and k.endswith("dora_scale")))
    with pytest.raises(ValueError, match=rf"^state dict: key lora_unet.*{words}"):
        files.read(tensors, base=base)


# -- fused, split, swapped; spellings that a trainer adds -----------------------------------------------------------


def test_xlabs_names(tmp_path):
    base = writers.base_of("flux")
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rows in (("double_blocks.0.processor.qkv_lora1", 96), ("double_blocks.0.processor.proj_lora2", 32),
                       ("single_blocks.1.processor.qkv_lora", 96)):  # fmt: skip
        tensors |= {f"{name}.down.weight": torch.randn(2, 32, generator=g)}
        tensors |= {f"{name}.up.weight": torch.randn(rows, 2, generator=g)}
    for against in (base, None):
        lora = files.read(tensors, base=against)
        for block, name in (("transformer_blocks.0", "double_blocks.0.processor.qkv_lora1"),
                            ("single_transformer_blocks.1", "single_blocks.1.processor.qkv_lora")):  # fmt: skip
            want = tensors[f"{name}.up.weight"] @ tensors[f"{name}.down.weight"]
            got = [lora[f"transformer.{block}.attn.{x}"].delta() for x in ("to_q", "to_k", "to_v")]
            torch.testing.assert_close(torch.cat(got), want)
        assert "transformer.transformer_blocks.0.attn.to_add_out" in lora
        assert len(lora) == 7
    assert lora.card.provenance["trainer"] == "XLabs"


@pytest.mark.parametrize("family", ["sd3", "flux", "qwenimage", "zimage"])
@pytest.mark.parametrize("fmt", ["kohya", "comfyui", "lokr"])
def test_names_are_found_without_a_base(fmt, family, tmp_path):
    path, want, _ = writers.write(fmt, family, tmp_path / "made")
    lora = files.load(path)
    check(lora, want)
    assert lora.card.family in (family, "sd3")  # tiny joint blocks of Qwen-Image look like SD3's


# -- partial files, odd alphas --------------------------------------------------------------------------------------


def test_unknown_keys_are_an_error_and_can_be_left_out(tmp_path):
    path, want, base = writers.write("kohya", "sd15", tmp_path / "made")
    good = load_file(path)
    odd = {f"lora_unet_nowhere_{i}.oft_blocks": torch.ones(2) for i in range(8)}
    odd |= {f"strange.{i}.thing": torch.ones(2) for i in range(8)}
    gone = "lora_unet_gone_to_q"
    lost = {f"{gone}.lora_down.weight": torch.ones(2, 4), f"{gone}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=r"key lora_unet_nowhere_0.* is OFT.*and 6 more; allow_partial=True") as error:
        files.read({**good, **odd}, base=base)
    assert str(error.value).count("nowhere_") + str(error.value).count("strange.") == 11
    with pytest.raises(ValueError, match=r"Key unet\.gone\.to_q: the base has no such layer"):
        files.read({**good, **lost}, base=base)
    wrong = next(k for k in good if k.endswith("attn1_to_q.lora_down.weight"))
    bent = {**good, wrong: good[wrong][:, :-1]}
    with pytest.warns(UserWarning, match=r"state dict: 18 keys left out"):
        lora = files.read({**good, **odd, **lost}, base=base, allow_partial=True)
    check(lora, want)
    assert set(lora.card.provenance["left_out"]) == {*odd, *lost}
    with pytest.warns(UserWarning, match=r"3 keys left out"):
        lora = files.read(bent, base=base, allow_partial=True)
    assert set(want) - set(lora) == {k for k in want if k.endswith("attn1.to_q")}
    with pytest.raises(ValueError, match=r"key strange\.0\.thing: no name of a LoRA tensor"):
        files.read({k: v for k, v in odd.items() if "strange" in k}, base=base, allow_partial=True)
    with pytest.raises(ValueError, match="nothing in it fits"):
        files.read(lost, base=base, allow_partial=True)
    with pytest.raises(ValueError, match="NaN or infinite"):
        files.read({**good, wrong: good[wrong] * float("inf")}, base=base, allow_partial=True)


@pytest.mark.parametrize("fmt", ["kohya", "loha", "lokr"])
@pytest.mark.parametrize(
    ("alpha", "words"),
    [
        (torch.tensor(1e9), "a scale of .*, the limit is 10000"),
        (torch.tensor(-1e9), "a scale of .*, the limit is 10000"),
        (torch.ones(3), r"its alpha has shape \[3\]"),
        (torch.tensor(float("inf")), "NaN or infinite"),
        (torch.tensor(float("nan")), "NaN or infinite"),
    ],
)
def test_alphas_that_are_refused(fmt, alpha, words, tmp_path):
    path, _, base = writers.write(fmt, "sd15", tmp_path / "made")
    tensors = load_file(path)
    tensors[next(k for k in tensors if k.endswith("to_q.alpha"))] = alpha
    with pytest.raises(ValueError, match=rf"^state dict: key lora_unet\S*to_q\..*{words}"):
        files.read(tensors, base=base)


def test_describe_says_what_a_file_is(tmp_path):
    path, want, base = writers.write("dora_lokr", "sdxl", tmp_path / "made")
    tags = {"10_fox": {"fox": 10, "red, \u202efur": 4, "bad\x00tag": 1}, "reg": {"fox": 2, "tree": 11}}
    save_file(load_file(path), path, {
        "ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_tag_frequency": json.dumps(tags),
        "ss_base_model_version": "sdxl_base_v1-0", "modelspec.title": "<b>Fox</b>\n" + "x" * 5000, "ignored": "x",
    })  # fmt: skip
    said = files.describe(path, base=base)
    assert (said["family"], said["base"], said["format"]) == ("sdxl", "SDXL", "lycoris")
    assert said["trainer"] == "LyCORIS in kohya sd-scripts"
    assert said["algorithms"] == ["dora", "lokr"]
    assert said["modules"] == len(want) == said["dense"] == sum(said["components"].values())
    assert said["alphas"] == [2.0, 5.0] or said["alphas"] == [5.0]
    assert said["metadata"]["tags"].startswith("fox, tree, red, fur")
    assert said["metadata"]["ss_base_model_version"] == "sdxl_base_v1-0"
    assert len(said["metadata"]["modelspec.title"]) <= 200
    assert "ignored" not in said["metadata"]
    assert json.loads(json.dumps(said)) == said
    assert files.describe(files.load(path, base=base)) == said
    for broken in ("{", "[1]", "[" * 100_000, json.dumps({"a": {"b": "c"}})):
        tensors = load_file(path)
        assert "tags" not in files.read(tensors, {"ss_tag_frequency": broken}, base=base).card.provenance["metadata"]
