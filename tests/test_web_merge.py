"""The Merge page: its files are the library's own merges, its numbers right, refusals in words, and in a browser."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch

import multilora
from multilora.method import methods
from multilora.pipelines.load import find_lora
from multilora.web import said
from multilora.web.merge import _options
from multilora.web.merging import heat_maps, merged, overlap, previews, summary, triggers
from multilora.web.service import Merge, Refused, Share
from tests.service_here import browsing, here, served, told

NAMES = ["zib", "dotta", "inka"]
WEIGHTS = [0.7, -0.4, 1.1]


@pytest.fixture(scope="module")
def service():
    with pytest.MonkeyPatch.context() as patch, here(patch) as made:
        yield made


@pytest.fixture(scope="module")
def sources():
    return [multilora.load(find_lora(name)[0], base="embedded") for name in NAMES]


def dense(lora) -> dict[str, torch.Tensor]:
    """The update of each layer, float64."""
    found = {}
    for key, part in lora.items():
        matrix = part.weight if part.rank is None else part.up.double() @ part.down.double().flatten(1)
        found[key] = matrix.double().flatten(1) if matrix.ndim > 1 else matrix.double()
    return found


def apart(a, b) -> float:
    """Largest relative difference of two LoRAs' updates over their layers."""
    one, other = dense(a), dense(b)
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).norm() / other[k].norm().clamp(min=1e-12)) for k in other)


@pytest.mark.parametrize(
    ("method", "options", "tolerance"),
    [("linear", {}, 1e-6), ("ties", {"density": 0.31}, 1e-6), ("np", {"mu": 2.5, "protect": 3}, 1e-6)],
)
def test_the_file_is_the_librarys_own_merge(service, sources, method, options, tolerance):
    session = service.session(f"ann {method}")
    lines, (facts, output) = told(merged(service, session, NAMES, WEIGHTS, method, options))
    made = multilora.load(output.path, base="embedded")
    assert apart(made, multilora.merge(sources, WEIGHTS, method=method, **options)) < tolerance
    assert facts["method"] == method
    assert [i["weight"] for i in facts["inputs"]] == WEIGHTS
    assert output.reference in session.outputs
    assert lines


def test_a_cut_keeps_the_energy_that_it_says(service, sources):
    session = service.session("bob")
    _, (facts, output) = told(merged(service, session, NAMES, WEIGHTS, "linear", {}, rank=3))
    whole, kept = dense(multilora.merge(sources, WEIGHTS)), dense(multilora.load(output.path, base="embedded"))
    lost = sum(float((whole[k] - kept[k]).square().sum()) for k in whole)
    assert facts["ranks"] == [3]
    assert facts["energy_kept"] == pytest.approx(
        1 - lost / sum(float(w.square().sum()) for w in whole.values()), abs=1e-5
    )
    assert 0.3 < facts["energy_kept"] < 0.95
    by_method, _ = told(merged(service, session, NAMES, WEIGHTS, "svd", {}, rank=3))[1]
    assert by_method["energy_kept"] == pytest.approx(facts["energy_kept"], abs=1e-5)
    assert by_method["options"]["rank"] == 3


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_other_formats_hold_the_same_update(service, sources, form, tmp_path):
    _, (facts, output) = told(merged(service, service.session("cid"), NAMES, WEIGHTS, "linear", {}, format=form))
    path = output.path
    if form == "peft":
        zipfile.ZipFile(path).extractall(tmp_path)
        (path,) = tmp_path.iterdir()
    assert apart(multilora.load(path, base="embedded"), multilora.merge(sources, WEIGHTS)) < 1e-6
    assert facts["format"] == form


@pytest.mark.long
def test_fisher_estimates_each_lora_once_with_progress(service):
    session, estimate = service.session("dan"), {"examples": 4, "pictures": 1, "steps": 2}
    lines, (_, output) = told(merged(service, session, NAMES[:2], [1.0, 0.5], "fisher", {}, estimate=estimate))
    assert [line for line in lines if line.startswith("estimate for zib, 1 of 2: 4 of 4")]
    assert [line for line in lines if line.startswith("estimate for dotta, 2 of 2: 4 of 4")]
    again, (_, second) = told(merged(service, session, NAMES[:2], [1.0, 0.5], "fisher", {}, estimate=estimate))
    assert not [line for line in again if "estimate" in line]
    files = [str(o.path) for o in session.outputs.values() if "fisher" in o.name]
    sources = [multilora.load(find_lora(name)[0], base="embedded") for name in NAMES[:2]]
    own = multilora.merge(sources, [1.0, 0.5], method="fisher", fishers=",".join(files))
    plain = multilora.merge(sources, [0.5, 0.25])
    made = multilora.load(output.path, base="embedded")
    assert apart(made, own) < 1e-5
    assert apart(made, plain) > 0.05
    assert apart(multilora.load(second.path, base="embedded"), own) < 1e-5


@pytest.mark.long
def test_regmean_gets_its_gram_matrices(service):
    session = service.session("eve")
    estimate = {"examples": 4, "pictures": 1, "steps": 1}
    lines, (facts, _) = told(merged(service, session, ["zib"], [1.0], "regmean", {}, estimate=estimate))
    assert [line for line in lines if line.startswith("estimate for zib, 1 of 1")]
    assert facts["inputs"][0]["share"] == pytest.approx(1.0, abs=1e-3)  # one LoRA is that LoRA


def test_pictures_before_and_after_are_those_of_the_loras(service, sources):
    from multilora.pipelines.image import Composer

    session = service.session("flo")
    _, (_, output) = told(merged(service, session, NAMES[:2], [0.9, 0.8], "linear", {}))
    uses = [(name, name, weight) for name, weight in zip(NAMES, [0.9, 0.8], strict=False)]
    shown, _ = told(previews(service, session, uses, output.reference, "zib alien and dotta poncho", 5))
    pictures, line = shown[-1]
    assert [caption for _, caption in pictures] == ["zib alone, weight 0.9", "dotta alone, weight 0.8", "merged"]
    assert "seed 5" in line
    composer = Composer.from_pretrained("embedded", device="cpu")
    for lora, weight in ((sources[0], 0.9), (multilora.merge(sources[:2], [0.9, 0.8]), 1.0)):
        composer.loras.clear()
        composer.add(lora, name="only", weight=weight)
        alone = composer("zib alien and dotta poncho", seed=5, num_inference_steps=2).images[0]
        image = pictures[0 if weight == 0.9 else 2][0]
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1
    assert np.abs(np.asarray(pictures[0][0], int) - np.asarray(pictures[2][0], int)).max() > 20


def test_the_overlap_is_that_of_the_updates(service, sources):
    _, facts = told(overlap(service, service.session("gus"), NAMES))
    flat = [torch.cat([m.flatten() for m in dense(lora).values()]) for lora in sources]
    cosine = float(flat[0] @ flat[2] / flat[0].norm() / flat[2].norm())
    assert facts["cosine"][0][2] == pytest.approx(cosine, abs=1e-6)
    page = heat_maps(facts)
    assert f"{cosine:+.2f}" in page
    assert all(f'<th scope="col">{name}</th>' in page for name in NAMES)
    assert "unet.mid_block" in page


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loras": []}, "no LoRA is chosen"),
        ({"weights": [1.0]}, "weights: 1 numbers for 3 LoRAs"),
        ({"weights": [1.0, "x", 2.0]}, "one number per LoRA"),
        ({"weights": [1.0, float("nan"), 2.0]}, "finite"),
        ({"weights": [0.0, 0.0, 0.0]}, "nothing is left of the merge"),
        ({"method": "tis"}, "unknown merge method 'tis'. Nearest: ties"),
        ({"method": "ties", "options": {"density": 4}}, "density=4"),
        ({"method": "ties", "options": {"dens": 0.4}}, "Nearest: dense, density"),
        ({"method": "fisher", "options": {"fishers": ["/etc/passwd"]}}, "not by a path"),
        ({"loras": ["zib", "../secret", "inka"]}, "'../secret' is not in your library"),
        ({"energy": 2.0}, "energy"),
        ({"rank": 0}, "rank"),
        ({"form": "gguf"}, "format"),
    ],
)
def test_what_cannot_be_merged_is_said_in_words_and_leaves_nothing(service, changed, words):
    session = service.session("hal")
    asked = {"loras": NAMES, "weights": WEIGHTS, "method": "linear", "options": {}, **changed}
    form = {"format": asked.pop("form")} if "form" in asked else {}
    asked = {**asked, **form}
    with pytest.raises(ValueError, match=words.replace("'", ".").replace("(", ".")):
        told(merged(service, session, asked.pop("loras"), asked.pop("weights"), asked.pop("method"),
                    asked.pop("options"), **asked))  # fmt: skip
    assert not session.outputs


def test_a_merge_left_early_stops(service):
    session = service.session("ida")
    going = merged(service, session, NAMES, WEIGHTS, "ties", {})
    next(going)
    going.close()
    assert service._line.wait_idle(30)
    assert not session.outputs


def test_a_file_that_is_gone_is_not_drawn(service):
    with pytest.raises(Refused, match="not a file that one of your requests made"):
        told(previews(service, service.session("joe"), [("zib", "zib", 1.0)], "file:0123", "zib alien", 1))


def test_the_page_speaks_of_what_a_merge_made_and_escapes_names(service):
    session = service.session("kim")
    job = service.submit(Merge(loras=(Share(reference="zib"),), name="<img src=x onerror=alert(1)>"), session)
    text = summary(job.result(60).facts)
    assert "<img" not in text
    assert "&lt;img src=x" in text
    assert "100.00%" in text
    assert "<b>" not in said.said("<b>bold</b>")


def test_options_come_from_the_chosen_methods_controls():
    records = methods("merge")
    taken = [(name, [o for o in records[name].options if o.name != "rank"]) for name in ("dare", "ties")]
    values = [0.4, "ties", "peft", "total", 3, False] + [0.9, "peft", "total", False]
    assert _options("ties", taken, tuple(values)) == {"density": 0.9}
    assert _options("dare", taken, tuple(values)) == {"density": 0.4, "consensus": "ties", "seed": 3}
    assert _options("linear", taken, tuple(values)) == {}


def test_a_prompt_of_triggers(service):
    known = {e.name: e for e in service.library(service.session("lea"))}
    assert triggers([known["zib"], known["dotta"]]) == "zib alien and dotta poncho"


@pytest.mark.long
def test_a_browser_merges_and_downloads_and_plain_diffusers_draws_with_the_file(service, sources, tmp_path):
    from multilora.pipelines.composing import composing
    from multilora.pipelines.load import load_pipeline

    path = tmp_path / "down.safetensors"
    with served(service) as (_, url), browsing(f"{url}?tab=merge") as tab:
        shelf = tab.locator(".ml-shelf button:visible")
        for name in NAMES[:2]:
            shelf.filter(has_text=name).first.click()
            tab.get_by_label(f"weight of {name}").first.wait_for()
        tab.get_by_label("number input for weight of zib").fill("0.7")
        tab.get_by_label("number input for weight of zib").press("Tab")
        tab.get_by_role("button", name="Merge", exact=True).click()
        ready = tab.get_by_text("Download zib-dotta.safetensors")
        ready.wait_for()
        with tab.expect_download() as waited:
            ready.click()
        waited.value.save_as(path)
        assert tab.get_by_text("Where they overlap").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1440
    pipe = load_pipeline("embedded", device="cpu")

    def draw():
        options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
        return pipe("zib alien in dotta poncho", generator=torch.Generator().manual_seed(3), **options).images[0]

    base = draw()
    with composing(pipe, [multilora.merge(sources[:2], [0.7, 1.0])]):
        own = draw()
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert np.abs(draw() - own).max() < 1e-3
    assert np.abs(base - own).max() > 0.1


@pytest.mark.long
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_a_phone(service, theme):
    with served(service) as (_, url), browsing(f"{url}?tab=merge&__theme={theme}", 390, 844, theme) as tab:
        tab.get_by_role("button", name="Merge", exact=True).click()
        tab.get_by_role("alert").filter(has_text="no LoRA is chosen").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
