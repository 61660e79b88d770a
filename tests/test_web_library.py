"""The Library page: uploads are admitted or refused in words, belong to their session; cards, bases, the shelf."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import multilora
from multilora.detect import description
from multilora.lora import Card, Lora, LowRank
from multilora.pipelines.load import find_lora
from multilora.web.library import ALL, MINE, base_card, card, inspected, loaded, matching, previewed, report, retitled
from multilora.web.service import Refused
from multilora.web.text import KINDS
from tests import bad_files, tiny
from tests.service_here import browsing, here, served, told


@pytest.fixture(scope="module")
def service():
    with pytest.MonkeyPatch.context() as patch, here(patch, open_bases=True) as made:
        yield made


@pytest.fixture
def file(tmp_path):
    """A LoRA of the embedded base under another name, half as strong."""
    lora = 0.5 * multilora.load(find_lora("korv")[0], base="embedded")
    path = tmp_path / "half.safetensors"
    multilora.save(lora.replace(card=Card(name="half", triggers=("korv fox",))), path, format="kohya")
    return path


def test_an_upload_is_its_sessions_alone(service, file):
    ann, bob = service.session("ann"), service.session("bob")
    entry = service.upload(ann, file, None, "my <b>half</b>")
    assert [e.reference for e in matching(service.library(ann), "half", MINE)] == [entry.reference]
    assert not matching(service.library(bob), "", MINE)
    for forbidden in (
        lambda: told(inspected(service, bob, entry.reference)),
        lambda: service.remove(bob, entry.reference),
        lambda: retitled(bob, entry.reference, "x", "y"),
        lambda: told(previewed(service, bob, entry)),
    ):
        with pytest.raises(Refused, match=r"your library|you have uploaded|who uploaded it"):
            forbidden()
    assert "<b>" not in card(entry)
    service.remove(ann, entry.reference)
    assert not entry.path.exists()
    assert not matching(service.library(ann), "", MINE)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 a pickle of old", "evil.safetensors: not safetensors, this is a zip or a PyTorch pickle"),
        (bad_files.good_bytes()[:-7], "evil.safetensors"),
        (b"<html><script>alert(1)</script>", "evil.safetensors"),
        (b"", "evil.safetensors"),
    ],
)
def test_a_bad_upload_is_refused_with_the_reason_and_nothing_is_kept(service, tmp_path, content, words):
    session, path = service.session("eve"), tmp_path / "evil.safetensors"
    path.write_bytes(content)
    with pytest.raises(Refused, match=words) as refused:
        service.upload(session, path)
    assert "Traceback" not in str(refused.value)
    assert not session.uploads
    assert not list(session.folder.rglob("*.safetensors"))


def test_a_lora_with_a_number_that_is_none_is_refused_by_key(service, tmp_path):
    lora = multilora.load(find_lora("korv")[0], base="embedded")
    key, part = next(iter(lora.items()))
    up = part.up.clone().float()
    up.flatten()[3] = float("nan")
    path = tmp_path / "nan.safetensors"
    save_file({f"{key}.lora_A.weight": part.down.float().contiguous(), f"{key}.lora_B.weight": up.contiguous()}, path)
    with pytest.raises(Refused, match=r"nan\.safetensors.*(finite|NaN|nan)"):
        service.upload(service.session("eve"), path)


def test_a_lora_of_another_base_is_refused(service, tmp_path):
    own = Lora({"unet.mid_block.nothing": LowRank(torch.ones(2, 7), torch.ones(5, 2))}, Card(name="x"))
    path = tmp_path / "other.safetensors"
    multilora.save(own, path)
    with pytest.raises(Refused, match=r"other\.safetensors"):
        service.upload(service.session("eve"), path)


def test_inspect_tells_what_the_library_knows(service, file):
    session = service.session("cid")
    entry = service.upload(session, file, None, "half")
    _, facts = told(inspected(service, session, entry.reference))
    lora = multilora.load(file, base="embedded")
    own = description(lora)
    assert {k: facts[k] for k in ("base", "format", "modules", "ranks")} == {
        k: own[k] for k in ("base", "format", "modules", "ranks")
    }
    squares = [float((p.up.double() @ p.down.double().flatten(1)).square().sum()) for p in lora.values()]
    assert facts["norm"] == pytest.approx(sum(squares) ** 0.5, rel=1e-6)
    assert sum(facts["energy_by_block"].values()) == pytest.approx(sum(squares), rel=1e-6)
    page = report(facts)
    assert "unet.mid_block" in page
    assert "rank 4" in page
    assert "SD 1.5" in page


def test_an_upload_gets_a_preview_of_its_own_picture(service, file):
    from multilora.pipelines.image import Composer

    session = service.session("dan")
    entry = retitled(session, service.upload(session, file, None, "half").reference, " korv fox ", "half a fox")
    assert (entry.trigger, entry.description) == ("korv fox", "half a fox")
    lines, drawn = told(previewed(service, session, entry))
    assert [line for line in lines if "2 of 2" in line]
    assert drawn == service.entry(session, entry.reference)
    composer = Composer.from_pretrained("embedded", device="cpu")
    composer.add(multilora.load(file, base="embedded"), name="half")
    alone = composer("korv fox", seed=7, num_inference_steps=2).images[0]
    with Image.open(drawn.preview) as image:
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1


def test_the_shelf_is_searched_by_words_and_category(service):
    entries = service.library(service.session("flo"))
    assert [e.name for e in matching(entries, "KORV fox")] == ["korv"]
    assert {e.category for e in matching(entries, "", "style")} == {"style"}
    assert matching(entries, "", ALL) == entries
    assert not matching(entries, "korv poncho")


def test_a_base_by_folder_is_loaded_and_its_family_detected(service, tmp_path):
    folder = tmp_path / "base"
    tiny.sd15().save_pretrained(folder)
    session = service.session("gus")
    lines, facts = told(loaded(service, session, f" {folder} "))
    assert (facts["base"], facts["family"]) == (str(folder), "sd15")
    assert session.base == str(folder)
    assert service.known(str(folder))["family"] == "sd15"
    assert "SD 1.5" in base_card(facts)
    assert lines
    told(loaded(service, session, "embedded"))
    assert session.base == ""


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("", "no base is named"),
        ("/nowhere/at/all", "no such folder"),
        ("nobody/nothing-at-all", "nobody/nothing-at-all.*could not be loaded"),
    ],
)
def test_a_base_that_cannot_be_is_said_in_words_and_changes_nothing(service, base, words):
    session = service.session("hal")
    with pytest.raises(ValueError, match=words):
        told(loaded(service, session, base))
    assert session.base == ""
    assert base not in service.bases


def test_others_than_the_owner_of_a_server_name_no_base(service, monkeypatch):
    monkeypatch.setattr(service, "open_bases", False)
    with pytest.raises(Refused, match="not served here"):
        told(loaded(service, service.session("ida"), "/etc"))


def test_words_on_a_card_have_a_length(service, file):
    session = service.session("joe")
    entry = service.upload(session, file)
    with pytest.raises(Refused, match="trigger: 201 characters"):
        retitled(session, entry.reference, "x" * 201, "")
    assert service.entry(session, entry.reference) == entry
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    assert service.set_preview(session, entry.reference, stream.getvalue()).preview.is_file()


@pytest.mark.long
def test_a_browser_is_told_in_words_why_an_upload_is_refused(service, file, tmp_path):
    bad = tmp_path / "evil.safetensors"
    bad.write_bytes(b"PK\x03\x04 not what it says")
    with served(service) as (_, url), browsing(f"{url}?tab=library") as tab:
        check = tab.get_by_role("button", name="Check and add")
        check.click()
        tab.get_by_role("alert").filter(has_text="No file is chosen").wait_for()
        field = tab.locator("#ml-upload")
        field.locator("input[type=file]").set_input_files(bad)
        field.locator("a[href*=evil]").wait_for()
        check.click()
        told_of = tab.get_by_role("alert").filter(has_text="Not added. evil.safetensors: not safetensors")
        told_of.wait_for()
        assert "Traceback" not in tab.content()
        field.locator("input[type=file]").set_input_files(file)  # once the refused one has left the field
        field.locator("a[href*=half]").wait_for()
        check.click()
        tab.get_by_role("status").filter(has_text="half is among your LoRAs now").wait_for()
        tab.get_by_role("button", name="Inspect").click()
        tab.get_by_text("Where it acts").wait_for()
        tab.get_by_role("button", name="Remove", exact=True).click()
        tab.get_by_role("status").filter(has_text="half is removed").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1440


@pytest.mark.long
def test_a_phone_asks_the_language_model(service):
    with served(service) as (_, url), browsing(f"{url}?tab=text", 390, 844, "dark") as tab:
        tab.get_by_role("button", name="Answer", exact=True).click()
        tab.get_by_role("status").filter(has_text="answered:").wait_for()
        answers = [tab.locator(f"#ml-answer-{kind} textarea").input_value() for kind in KINDS]
        assert answers == ["korv", "vrok", "vrok"]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
