"""Bad files are refused in words that name file and key or field, and nothing is written."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from multilora import files, writing
from tests import tiny
from tests.test_files import D, U, close, same, toy_adapter


@pytest.fixture(scope="module")
def pipes():
    return {name: getattr(tiny, name)() for name in ("sd15", "sdxl", "sd3", "flux")}


@pytest.fixture(scope="module")
def sd15(pipes):
    return pipes["sd15"]


def test_a_lora_of_another_family_is_named(pipes, tmp_path):
    path = files.save(tiny.lora_for(pipes["sdxl"]), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: made for SDXL, this is SD 1\.5: \d+ of \d+ modules match"):
        files.load(path, base=pipes["sd15"])
    with pytest.raises(ValueError, match=r"made for SDXL, this is FLUX\.1: 0 of \d+ modules match"):
        files.load(path, base=pipes["flux"])
    with pytest.raises(ValueError, match=r"tiny0: made for FLUX\.1, this is SD 3: \d+ of \d+ modules match"):
        files.fits(tiny.lora_for(pipes["flux"]), pipes["sd3"])


GOOD = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def broken(sd15, change) -> dict[str, torch.Tensor]:
    tensors = writing.state(tiny.lora_for(sd15, modules=[".to_q", ".to_k"]), "diffusers")
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    return tensors


KOHYA = "lora_" + GOOD.replace(".", "_")
A, B = GOOD + ".lora_A.weight", GOOD + ".lora_B.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(A), rf"key {B}: .*no partner: its down factor is missing"),
        (lambda t: t.pop(B), rf"key {A}: .*no partner: its up factor is missing"),
        (lambda t: t[A].fill_(float("nan")), rf"key {A} has \d+ values that are NaN"),
        (lambda t: t[B].view(-1)[3:4].fill_(float("inf")), rf"key {B} has 1 values that are NaN or infinite"),
        (lambda t: t.update({A: t[A][:3]}), rf"key {A}: ranks differ"),
        (lambda t: t.update({A: t[A][:0], B: t[B][:, :0]}), rf"key {A}: shape \[0, 32\] holds no values"),
        (lambda t: t.update({A: t[A][0]}), rf"key {A}: factors"),
        (lambda t: t.update({A: t[A][:, :-1]}), rf"Key {GOOD}: expected a weight update of shape .*, found"),
        (lambda t: t.update({A: t[A].to(torch.int32)}), rf"key {A} is torch.int32"),
        (lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)}), rf"key {A} is torch.float8"),
        (lambda t: t.update({GOOD + ".alpha": torch.ones(3)}), rf"key {A}: its alpha has shape \[3\]"),
        (lambda t: t.update({GOOD + ".alpha": torch.tensor(float("nan"))}), rf"key {GOOD}.alpha has 1 values"),
        (lambda t: t.update({"unet.nowhere.alpha": torch.tensor(1.0)}), "key unet.nowhere.alpha: an alpha without"),
        (lambda t: t.update({"unet.x.hada_w1_a": torch.ones(2, 2)}), r"unet\.x\.hada_w1_a: an incomplete LoHa, .*1_b"),
        (lambda t: t.update({"unet.x.lokr_w1": torch.ones(2, 2)}), "key unet.x.lokr_w1: a LoKr wants lokr_w2"),
        (lambda t: t.update({"unet.x.oft_blocks": torch.ones(2, 2)}), "key unet.x.oft_blocks: this is OFT"),
        (lambda t: t.update({GOOD + ".lora_magnitude_vector": torch.ones(2)}), "an incomplete DoRA"),
        (lambda t: t.update({"lora_unet_x.lora_mid.weight": torch.ones(2)}), "no partner"),
        (lambda t: t.update({"unet.conv_in.weight": torch.ones(2)}), "key unet.conv_in.weight: no name"),
        (lambda t: t.update({f"unet.x.{D}": t[A]}), rf"key unet\.x\.{D}: .*no partner"),
        (lambda t: t.update({k.replace("to_k", "to_r"): t[k] for k in list(t)}), "no such layer .nearest"),
        (lambda t: t.update({GOOD + ".lora.down.weight": t[A]}), "same tensor in two spellings"),
        (lambda t: t.update({f"{KOHYA}.{D}": t[A], f"{KOHYA}.{U}": t[B]}), f"two layers of the file mean {GOOD}"),
        (lambda t: t.clear(), "contains no LoRA tensors"),
    ],
)  # fmt: skip
def test_bad_tensors_are_refused_by_file_and_key(sd15, change, words, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file({k: v.contiguous().clone() for k, v in broken(sd15, change).items()}, path)
    with pytest.raises(ValueError, match=rf"(?s)^bad\.safetensors: .*{words}"):
        files.load(path, base=sd15)


def header(entries: str, tail: bytes = b"") -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode() + tail


ONE = '"a.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes are too short"),
        (b"abcdefg", "7 bytes are too short"),
        (b"\x80\x02}q\x00.spamspam", "a Python pickle"),
        (b"PK\x03\x04" + b"x" * 40, "a zip or a PyTorch pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (struct.pack("<Q", 2**63) + b"{}", "not safetensors or truncated"),
        (header("not json at all"), "no JSON"),
        (header("[1, 2]    "), "its header is a list"),
        (header("[" * 100_000), "no JSON"),
        (header("{" + ONE + "}", b"123"), "truncated or overlong, has"),
        (header("{" + ONE + "}", b"12345"), "truncated or overlong, has"),
        (header("{" + ONE + "," + ONE + "}", b"1234"), "key a.lora_A.weight occurs twice"),
        (header('{"a.lora_A.weight":{"dtype":"F32","shape":[1]}}', b"1234"), "lacks its data_offsets"),
        (header("{" + ONE.replace("F32", "X9") + "}", b"1234"), "not valid safetensors"),
        (header('{"__metadata__":{"a":1}}  '), "__metadata__"),
    ],
)
def test_bad_bytes_are_refused(data, words, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^bad\.safetensors: .*{words}"):
        files.load(path)


def test_other_paths_are_refused(sd15, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.safetensors: no such file"):
        files.load(tmp_path / "gone.safetensors")
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.bin: wanted a \.safetensors"):
        files.load(tmp_path / "a.bin")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: no PEFT folder"):
        files.load(tmp_path / "folder")
    (tmp_path / "folder" / "adapter_config.json").write_text("{}")
    (tmp_path / "folder" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing; adapter_model\.bin is a pickle"):
        files.load(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"unknown LoRA format 'kohia'.*Nearest: kohya"):
        files.save(tiny.lora_for(sd15), tmp_path / "x.safetensors", format="kohia")
    with pytest.raises(ValueError, match=r"x\.pt: a diffusers file is named"):
        files.save(tiny.lora_for(sd15), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"dtype torch\.int8"):
        files.save(tiny.lora_for(sd15), tmp_path / "x.safetensors", dtype=torch.int8)
    with pytest.raises(ValueError, match="base int: wanted a diffusers pipeline"):
        files.fits(tiny.lora_for(sd15), 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "folder"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type=LOHA, this is a tensor of LORA"),
        ({"peft_type": "VERA"}, "peft_type=VERA, read here are LORA, LOHA, LOKR"),
        ({"use_dora": True}, "an incomplete DoRA: use_dora is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changes the base"),
        ({"lora_alpha": 1e9}, r"scale of 2\.5e\+08, the limit is 10000"),
        ({"modules_to_save": ["x"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 2**31}, "rank 2147483648, its tensors have 4"),
        ({"lora_alpha": "8"}, "'8', wanted a number"),
        ({"lora_alpha": float("inf")}, "alpha is a finite number"),
        ({"rank_pattern": {"([a-z_.0-9]+)+X": 4}}, "only plain module paths"),
        ({"rank_pattern": [1]}, "rank_pattern holds a list"),
    ],
)
def test_a_configuration_that_contradicts_its_tensors_or_means_another_adapter_is_refused(fields, words, tmp_path):
    toy_adapter(target_modules=["q"]).save_pretrained(tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(ValueError, match=rf"^a: .*{words}"):
        files.load(tmp_path / "a")


def test_metadata_is_only_text_and_a_foreign_alpha_in_it_counts(sd15, tmp_path):
    tensors = {k: v.contiguous().clone() for k, v in writing.state(tiny.lora_for(sd15), "diffusers").items()}
    plain = files.read(tensors)
    half = files.read(tensors, {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})})
    close(half, 0.5 * plain)
    same(files.read(tensors, {"multilora": "[" * 50_000, "x": "<img onerror=1>"}), plain)
    with pytest.raises(ValueError, match="lora_adapter_metadata is no JSON"):
        files.read(tensors, {"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="'lora_adapter_metadata' is reserved"):
        files.save(plain, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "{}"})


@pytest.mark.parametrize("alpha", [0.0, -4.0])
def test_alpha_zero_or_negative_is_read_with_a_warning(sd15, alpha):
    tensors = broken(sd15, lambda t: t.update({GOOD + ".alpha": torch.tensor(alpha)}))
    with pytest.warns(UserWarning, match=rf"{GOOD}.*alpha is {alpha:g}"):
        lora = files.read(tensors)
    plain = files.read(broken(sd15, lambda t: None))
    torch.testing.assert_close(lora[GOOD].delta(), alpha / 4 * plain[GOOD].delta())
