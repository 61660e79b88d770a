"""Folders of training pictures: captions, pixels upright and square; bad folders refused with file and reason."""

import json

import pytest
import torch
from PIL import Image

from multilora.lab.train.data import BadData, class_caption, pixels, read_folder, with_trigger
from tests.small_training import _pipe, folder, small

__all__ = ["folder"]  # a fixture


def test_reads_captions_beside_pictures_in_order(folder):
    found = read_folder(folder)
    assert [e.picture.name for e in found] == [f"{i}.png" for i in range(6)]
    assert found[3].caption == "zib alien number 3"


def test_reads_metadata_jsonl(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    Image.new("RGB", (32, 32)).save(tmp_path / "b.png")
    lines = [{"file_name": "b.png", "text": "second"}, {"file_name": "a.jpg", "caption": "first"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(e.picture.name, e.caption) for e in read_folder(tmp_path)] == [("b.png", "second"), ("a.jpg", "first")]


def break_nothing_there(d):
    for path in d.iterdir():
        path.unlink()


def break_truncated(d):
    (d / "1.png").write_bytes((d / "1.png").read_bytes()[:60])


def break_wrong_ending(d):
    Image.new("RGB", (32, 32)).save(d / "6.jpg", "PNG")
    (d / "6.txt").write_text("x")


BROKEN = {
    "no pictures": (break_nothing_there, ("no pictures", ".png")),
    "no caption": (lambda d: (d / "2.txt").unlink(), ("2.png", "no caption", "2.txt")),
    "empty caption": (lambda d: (d / "2.txt").write_text(" \n"), ("2.txt", "empty")),
    "caption not text": (lambda d: (d / "2.txt").write_bytes(b"\xff\xfe\x00a"), ("2.txt", "UTF-8")),
    "caption alone": (lambda d: (d / "9.txt").write_text("x"), ("9.txt", "without a picture")),
    "truncated": (break_truncated, ("1.png", "unreadable")),
    "empty picture": (lambda d: (d / "1.png").write_bytes(b""), ("1.png", "empty")),
    "no picture inside": (lambda d: (d / "1.png").write_text("hello"), ("1.png", "unreadable")),
    "wrong ending": (break_wrong_ending, ("6.jpg", "holds a PNG")),
    "unknown ending": (lambda d: Image.new("RGB", (32, 32)).save(d / "7.gif"), ("7.gif", ".gif is not read")),
    "two of a name": (lambda d: Image.new("RGB", (32, 32)).save(d / "1.jpg"), ("1.jpg", "share this name")),
    "too small": (lambda d: Image.new("RGB", (40, 15)).save(d / "1.png"), ("1.png", "40 x 15", "too small", "16")),
    "listed, missing": (
        lambda d: (d / "metadata.jsonl").write_text('{"file_name": "q.png", "text": "x"}'), ("q.png", "no such"),
    ),
    "listed, no caption": (
        lambda d: (d / "metadata.jsonl").write_text('{"file_name": "1.png"}'), ("line 1", "no caption"),
    ),
    "listed outside": (
        lambda d: (d / "metadata.jsonl").write_text('{"file_name": "../x.png", "text": "x"}'), ("outside",),
    ),
    "not JSON": (lambda d: (d / "metadata.jsonl").write_text("{nope"), ("line 1", "not JSON")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_bad_folder_is_refused_with_file_and_reason_and_nothing_is_written(folder, case):
    change, words = BROKEN[case]
    change(folder)
    out = folder.parent / "out" / "lora.safetensors"
    with pytest.raises(BadData) as refused:
        small(folder, _pipe(), out)
    for word in (str(folder), *words):
        assert word in str(refused.value)
    assert not out.parent.exists()


def test_missing_folder(tmp_path):
    with pytest.raises(BadData, match="no such folder"):
        read_folder(tmp_path / "nowhere")


def test_many_problems_are_counted(folder):
    for i in range(6):
        (folder / f"{i}.txt").unlink()
    with pytest.raises(BadData, match=r"6 problems.*and 1 more"):
        read_folder(folder)


def test_pixels_are_upright_flattened_and_square(tmp_path):
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert torch.equal(pixels(tmp_path / "clear.png", 4), torch.ones(3, 4, 4))
    turned = Image.new("RGB", (4, 4), (255, 255, 255))
    turned.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    found = pixels(tmp_path / "turned.png", 4)
    assert found[0, 3, 3] < -0.9
    assert found[0, 0, 0] > 0.9


def test_trigger_and_class_captions(folder):
    assert with_trigger(read_folder(folder), "zib alien")[0].caption == "zib alien number 0"
    assert with_trigger(read_folder(folder), "korv fox")[0].caption == "korv fox, zib alien number 0"
    assert class_caption("a ZIB alien in a hat", "zib alien") == "a alien in a hat"
    with pytest.raises(ValueError, match="class word"):
        class_caption("a zib", "zib")
