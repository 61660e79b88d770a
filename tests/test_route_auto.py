"""Auto: what it chooses for a number of LoRAs and a budget, that it draws just that, and that it says so."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch

from multilora.method import resolve
from multilora.pipelines.composing import composing
from multilora.pipelines.text import composing_text
from multilora.plan import Moment
from multilora.route import auto as home
from tests import families, scene, tiny, tiny_text


def rows(*settings):
    return [{"method": m, "weight": w, "options": o, "rows": r, "shown": s, "merge": 0.5, "merge_weight": 0.8,
             "ks": [2, 3], "pictures": 12}
            for m, w, o, r, s in settings]  # fmt: skip


@pytest.fixture
def known(monkeypatch):
    """A table in which a budget matters."""
    found = {
        2: rows(("guided_merge", 0.8, {"boost": 3.0}, 1.0, 0.8), ("composite", 1.0, {}, 2.0, 0.9)),
        3: rows(("guided_merge", 1.0, {"boost": 2.0}, 1.0, 0.7)),
    }
    monkeypatch.setattr(home, "table", lambda: found)
    return found


def test_the_shipped_table_has_settings_that_earn_their_price():
    assert set(home.table()) == {2, 3, 4, 5}
    for found in home.table().values():
        assert found[0]["rows"] == 1.0
        for one in found:
            assert resolve("route", one["method"], **one["options"])
            assert one["shown"] >= one["merge"], "a setting that shows less than Merge is no choice"
        for cheap, dear in itertools.pairwise(found):
            assert cheap["rows"] < dear["rows"]
            assert cheap["shown"] < dear["shown"]


def test_the_budget_buys_what_showed_most(known):
    assert home.choice(2, 1.0)["method"] == "guided_merge"
    assert home.choice(2, 1.9)["method"] == "guided_merge"
    assert home.choice(2, 2.0)["method"] == "composite"
    assert home.choice(1, 9.0) is None
    assert home.choice(7, 1.0)["k"] == 3
    with pytest.raises(ValueError, match="budget"):
        resolve("route", "auto", budget=0.5)


@pytest.mark.parametrize(("budget", "method", "factor", "options"), [(1.0, "guided_merge", 0.8, {"boost": 3.0}),
                                                                     (2.0, "composite", 1.0, {})])  # fmt: skip
def test_it_draws_what_it_has_chosen_and_says_so(known, budget, method, factor, options):
    pipe, loras = families.pipe("sd15"), families.loras("sd15")
    make = families.call("sd15", steps=3)
    with composing(pipe, loras, "auto", weights=families.WEIGHTS, budget=budget) as conductor:
        ours = make(pipe)
    with composing(pipe, loras, method, weights=[w * factor for w in families.WEIGHTS], **options):
        assert torch.equal(make(pipe), ours)
    with composing(pipe, loras, "merge", weights=families.WEIGHTS):
        assert scene.apart(make(pipe), ours) > 0.01
    assert conductor.explains.startswith(method)
    assert "of 2 to 3 LoRAs" in conductor.explains
    assert "with merge, weights x 0.8, 50%" in conductor.explains


def test_without_guidance_it_is_merge(known):
    pipe, loras = families.pipe("sd15"), families.loras("sd15")
    make = families.call("sd15", guided=False)
    with composing(pipe, loras, "auto", weights=families.WEIGHTS) as conductor:
        ours = make(pipe)
    assert conductor.explains == "merge: there is no guidance"
    with composing(pipe, loras, "merge", weights=families.WEIGHTS):
        assert torch.equal(make(pipe), ours)
    (one,) = resolve("route", "auto")([object()])(Moment(0, 4, 9.0, None, (0.7,), guidance=5.0))
    assert (one.row, one.negative) == ((0.7,), 1.0)


def test_on_a_family_whose_guidance_is_off_it_is_merge_at_the_users_weights(known):
    """FLUX.1 without true_cfg_scale has one call a step, and says no scale."""
    pipe, loras = families.pipe("flux"), families.loras("flux")
    for guided in (False, True):
        make = families.call("flux", guided=guided)
        with composing(pipe, loras, "auto", weights=families.WEIGHTS) as conductor:
            ours = make(pipe)
        with composing(pipe, loras, "merge", weights=families.WEIGHTS):
            apart = scene.apart(make(pipe), ours)
        assert (apart == 0.0, conductor.explains.startswith("merge")) == (not guided, not guided)


def test_where_one_lora_acts_it_keeps_its_weight(known):
    plan = resolve("route", "auto")([object()] * 2)

    def at(weights):
        (one,) = plan(Moment(0, 4, 9.0, None, weights, guidance=5.0))
        return one.row, one.negative

    assert at((1.0, 0.0)) == ((1.0, 0.0), 1.0)
    row, negative = at((1.0, 0.5))
    assert row == (0.8, 0.4)
    assert negative < 1.0
    assert at((0.0, 0.5)) == ((0.0, 0.5), 1.0)


def test_the_recipe_tells_the_choice():
    from multilora.pipelines.image import Composer

    composer = Composer(tiny.sd15())
    for i, lora in enumerate(scene.loras(composer.pipe)):
        composer.add(lora, name=f"lora{i}")
    recipe = composer("a fox", method="auto", num_inference_steps=2, guidance_scale=4.0, height=32, width=32).recipe
    assert recipe.method == "auto"
    assert recipe.resolved.choice.startswith("guided_merge")
    assert type(recipe).model_validate_json(recipe.json).resolved.choice == recipe.resolved.choice


@pytest.mark.parametrize(
    "line",
    ["", "auto: x", "guided_merge, weights x 1000: x", "guided_merge, weights x nan: x", "merge: there is no guidance",
     "mole, gate=/etc/passwd: x", "merge, kind=x: y", "loratorio: x", "guided_merge, boost=3.0, weights x 0.8 : x"],
)  # fmt: skip
def test_words_that_name_no_known_setting_choose_nothing(known, line):
    assert home.chosen_before(line) is None


def test_a_setting_of_the_table_or_of_an_earlier_one_is_known_by_its_words(known, monkeypatch):
    gone = {"method": "arrow", "weight": 1.5, "options": {"top_k": 2}, "rows": 1.0}
    monkeypatch.setattr(home, "earlier", lambda: [gone])
    assert home.chosen_before("arrow, top_k=2, weights x 1.5: whatever follows") is gone
    for found in known.values():
        for one in found:
            assert home.named(home.chosen_before(f"{home.named(one)}: x")) == home.named(one)


def test_a_recipe_is_made_again_with_what_was_chosen_then(known, monkeypatch):
    from multilora.pipelines.image import Composer

    composer = Composer(tiny.sd15())
    for i, lora in enumerate(scene.loras(composer.pipe)):
        composer.add(lora, name=f"lora{i}", weight=2.0)
    call = {"method": "auto", "num_inference_steps": 3, "guidance_scale": 4.0, "height": 32, "width": 32, "seed": 3}
    made = composer("a fox", **call)
    assert made.recipe.resolved.choice.startswith("guided_merge, boost=")
    assert composer.compose(made.recipe).recipe == made.recipe
    gone = [one for found in known.values() for one in found]
    monkeypatch.setattr(home, "earlier", lambda: gone)
    for k in known:
        known[k] = rows(("composite", 1.0, {}, 1.0, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = composer.compose(made.recipe)
    assert again.recipe.resolved.choice == f"{home.named(gone[0])}: as when this recipe was made"
    assert composer.compose(again.recipe).recipe.resolved.choice == again.recipe.resolved.choice
    assert again.images[0].tobytes() == made.images[0].tobytes()
    new = composer("a fox", **call)
    assert new.recipe.resolved.choice.startswith("composite"), "a picture that is no repetition is chosen for anew"
    assert new.images[0].tobytes() != made.images[0].tobytes()

    without = composer.compose(made.recipe.model_copy(update={"guidance_scale": 1.0}))
    assert without.recipe.resolved.choice == "merge: there is no guidance"
    odd = made.recipe.resolved.model_copy(update={"choice": "some other program's words"})
    with pytest.warns(UserWarning, match=r"chose otherwise.*some other program's words.*composite"):
        composer.compose(made.recipe.model_copy(update={"resolved": odd}))


def test_a_changed_recipe_is_chosen_for_anew(known):
    from multilora.cli.order import _changed
    from multilora.pipelines.image import Composer

    composer = Composer(tiny.sd15())
    for i, lora in enumerate(scene.loras(composer.pipe)):
        composer.add(lora, name=f"lora{i}")
    recipe = composer("a fox", method="auto", num_inference_steps=2, guidance_scale=4.0, height=32, width=32).recipe
    assert recipe.resolved.choice
    assert _changed(recipe, {"seed": 9}, None, []).resolved.choice == recipe.resolved.choice
    assert _changed(recipe, {"guidance_scale": 2.0}, None, []).resolved.choice == ""
    assert _changed(recipe, {}, None, ["budget=2"]).resolved.choice == ""


def test_the_page_says_what_is_chosen():
    text = " ".join((Path(__file__).parents[1] / "docs" / "ideas" / "guided_merge.md").read_text().split())
    chosen = {k: [(one["method"], one["weight"]) for one in found] for k, found in home.table().items()}
    assert chosen == {k: [("guided_merge", 0.8 if k < 5 else 0.65)] for k in (2, 3, 4, 5)}
    assert "a guided Merge at the weights times .8, with five LoRAs and more times .65" in text


@pytest.mark.parametrize("method", ["auto", "guided_merge"])
def test_on_a_language_model_it_is_merge(method):
    model, loras = tiny_text.model("llama"), tiny_text.loras("llama", 3)
    ids = tiny_text.tokenizer()("abc 12", return_tensors="pt")["input_ids"]

    def logits(used):
        with composing_text(model, loras, used, weights=[0.9, 0.6, 1.1]), torch.no_grad():
            made = model.generate(
                ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        return torch.stack(made.logits)

    assert torch.equal(logits(method), logits("merge"))
    assert scene.apart(logits(method), logits("composite")) > 0.01
