"""Evaluations: whose LoRAs are drawn together, on which noise, in which order; what is read; what a stop leaves."""

import itertools
import json
import math
import threading
from functools import partial

import pytest
from PIL import Image

from multilora.lab.evaluate import settings as settings_module
from multilora.lab.evaluate.batch import BatchError
from multilora.lab.evaluate.combinations import Entry, LibraryError, combinations, read_library
from multilora.lab.evaluate.evaluation import (
    CountingRenderer,
    Plan,
    arm,
    evaluate,
    prompt_of,
    training_free,
)
from multilora.lab.evaluate.readings import Kept, Readers
from multilora.lab.evaluate.settings import PRESETS, TESTBED, Settings, preset
from multilora.lab.world.caption import caption
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.report import composed_scene
from multilora.lab.world.report import sets as world_sets
from multilora.method import UnknownName, methods
from multilora.recipe import Recipe
from tests.eval_standin import StandIn


@pytest.fixture(scope="module")
def library():
    return read_library("embedded").of("test")


def plan_of(library, *names, count=3, **options):
    return Plan(library, [arm(n) for n in names], ks=options.pop("ks", (2, 3)), count=count, **options)


# -- which LoRAs -----------------------------------------------------------------------------------------------------


def test_the_published_testbed_has_the_published_number_of_sets():
    """ComposLoRA, section 4: 48, 144, 192 and 96 sets of 2 to 5, of two styles."""
    entries = [Entry(f"{c}_{i}", "", c, (c,)) for c, n in TESTBED.items() for i in range(n)]
    assert 2 * len(entries) == 22
    assert [2 * len(combinations(entries, k)) for k in (2, 3, 4, 5)] == [48, 144, 192, 96]


def test_sets_have_a_character_no_category_twice_and_the_published_order(library):
    for k in (1, 2, 3, 4, 5):
        found = combinations(library.entries, k)
        names = [frozenset(e.name for e in chosen) for chosen in found]
        by_hand = {
            frozenset(e.name for e in chosen)
            for chosen in itertools.combinations(library.entries, k)
            if sum(e.category == "character" for e in chosen) == 1 and len({e.category for e in chosen}) == k
        }
        assert len(set(names)) == len(names)
        assert set(names) == by_hand
        assert set(names) == {frozenset(s) for s in world_sets("test", k)}
        assert all(chosen[0].category == "character" for chosen in found)


def test_a_library_without_characters_has_sets_too():
    entries = [Entry(n, "", c, (n,)) for n, c in (("a", "style"), ("b", "style"), ("c", "object"), ("d", "light"))]
    found = {tuple(e.name for e in chosen) for chosen in combinations(entries, 2)}
    assert found == {("a", "c"), ("b", "c"), ("a", "d"), ("b", "d"), ("c", "d")}


def test_too_many_loras_say_what_the_library_has(library):
    with pytest.raises(ValueError, match=r"k = 6: no set of 6 .*2 character.*the largest k is 5"):
        combinations(library.entries, 6)
    with pytest.raises(ValueError, match="k = 0"):
        combinations(library.entries, 0)


def test_splits(library):
    whole = read_library("embedded")
    assert whole.world
    assert {e.name for e in library.entries} == {n for n, d in DESIGNS.items() if d.split == "test"} & {
        e.name for e in whole.entries
    }
    assert whole.of("all") is whole
    with pytest.raises(UnknownName, match="tset"):
        whole.of("tset")


def test_the_published_listing_is_read_and_missing_files_are_named_at_once(tmp_path):
    listing = {
        "character": [{"id": "character_1", "name": "Someone", "trigger": ["someone", "red hat"], "url": "..."}],
        "style": [{"id": "style_1", "name": "Ink", "trigger": ["ink"]}, {"id": "style_2", "trigger": ["oil"]}],
    }
    path = tmp_path / "anime_lora_info.json"
    path.write_text(json.dumps(listing))
    with pytest.raises(LibraryError, match=r"3 LoRAs are missing[\s\S]*character_1[\s\S]*style_1[\s\S]*style_2"):
        read_library(tmp_path)
    files = tmp_path / "elsewhere"
    files.mkdir()
    for name in ("character_1", "style_1", "style_2"):
        (files / f"{name}.safetensors").write_bytes(b"")
    found = read_library(path, files)
    assert [(e.name, e.category, e.triggers) for e in found.entries] == [
        ("character_1", "character", ("someone", "red hat")),
        ("style_1", "style", ("ink",)),
        ("style_2", "style", ("oil",)),
    ]
    assert not found.world
    chosen = combinations(found.entries, 2)[0]
    assert prompt_of(found, chosen, 4, Settings(prompt="best, {triggers}")) == "best, someone, red hat, ink"


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "wanted an object"),
        ('{"loras": [{"name": "a", "file": "a.safetensors"}]}', r"LoRA 'a': category: wanted a text, got None"),
        ('{"loras": [{"name": "a", "file": "a.safetensors", "category": "style"}]}', "LoRA 'a': trigger"),
        ('{"loras": ["a"]}', "LoRA 'a': file"),
        ('{"loras": []}', "lists no LoRAs"),
        ('{"style": 3}', "style: wanted a list"),
    ],
)
def test_a_bad_listing_says_where(tmp_path, listing, words):
    (tmp_path / "library.json").write_text(listing)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(LibraryError, match=rf"library\.json[\s\S]*{words}"):
        read_library(tmp_path)


def test_other_folders_say_what_is_wanted(tmp_path):
    with pytest.raises(LibraryError, match=r"no library\.json"):
        read_library(tmp_path)
    with pytest.raises(LibraryError, match="wanted 'embedded'"):
        read_library(tmp_path / "nowhere")
    (tmp_path / "anime_lora_info.json").write_text("{}")
    (tmp_path / "reality_lora_info.json").write_text("{}")
    with pytest.raises(LibraryError, match="several listings"):
        read_library(tmp_path)


# -- what is drawn ---------------------------------------------------------------------------------------------------


def test_methods_share_prompt_and_noise_and_rounds_are_balanced(library):
    plan = plan_of(library, "none", "merge", "merge@1/k", "merge@-0.5", "switch", count=4)
    wanted = plan.wanted
    assert len(wanted) == 5 * 2 * 4
    assert len({w.item.id for w in wanted}) == len(wanted)
    for place in {w.place for w in wanted}:
        same = [w for w in wanted if w.place == place]
        assert {w.arm for w in same} == {a.name for a in plan.arms}
        assert len({(w.item.recipe.seed, w.item.recipe.prompt) for w in same}) == 1
        weights = {w.arm: [use.weight for use in w.item.recipe.loras] for w in same}
        k = place[0]
        assert weights["none"] == []
        assert weights["merge at 1/k"] == [1 / k] * k
        assert weights["merge at -0.5"] == [-0.5] * k
    seeds = {w.place: w.item.recipe.seed for w in wanted}
    assert len(set(seeds.values())) == len(seeds)
    for done in range(0, len(wanted), 10):  # however many rounds are done, each cell has as many pictures
        counts = {(w.arm, w.k): 0 for w in wanted}
        for w in wanted[:done]:
            counts[w.arm, w.k] += 1
        assert set(counts.values()) == {done // 10}


def test_the_worlds_prompts_are_those_of_its_own_report(library):
    plan = plan_of(library, "merge", count=40, ks=(5,))
    assert len({w.place for w in plan.wanted}) == 40
    for w in plan.wanted[::7]:
        names = sorted((e.name for e in w.entries), key=list(DESIGNS).index)
        assert w.item.recipe.prompt == caption(composed_scene(names, w.index), 1)
        assert all(DESIGNS[n].trigger in w.item.recipe.prompt for n in names)
    counts = {}
    for w in plan.wanted:
        counts[w.place[1]] = counts.get(w.place[1], 0) + 1
    assert set(counts.values()) == {10}  # four sets, drawn from in turn


def test_a_larger_count_begins_with_the_same_pictures(library):
    few, many = (plan_of(library, "merge", "switch", count=n).wanted for n in (2, 5))
    assert [w.item.id for w in few] == [w.item.id for w in many[: len(few)]]


def test_settings_reach_the_recipes(library):
    plan = plan_of(library, "switch", count=1, ks=(2,), settings=preset("anime").with_(base="embedded", steps=40))
    recipe = plan.wanted[0].item.recipe
    got = (recipe.steps, recipe.guidance_scale, recipe.width, recipe.height, recipe.scale, recipe.options["every"])
    assert got == (40, 10.0, 512, 512, 0.8, 5)
    assert recipe.scheduler == "DPMSolverMultistepScheduler"
    reality = PRESETS["reality"]
    assert (reality.steps, reality.guidance, reality.width, reality.height) == (100, 7.0, 768, 1024)
    with pytest.raises(ValueError, match="--base"):
        plan_of(library, "merge", settings=preset("anime"))
    with pytest.raises(ValueError, match="triggers"):
        Settings().with_(prompt="a fox")
    with pytest.raises(UnknownName, match="anime"):
        preset("animé")


@pytest.mark.parametrize("text", ["merge@", "merge@x", "merge@0", "merge@nan", "none@1", "merg"])
def test_bad_arms_are_refused(text):
    with pytest.raises(ValueError, match=r"merg|none"):
        arm(text)


def test_bad_plans_are_refused(library):
    with pytest.raises(ValueError, match="named twice"):
        plan_of(library, "merge", "merge")
    with pytest.raises(ValueError, match="count 0"):
        plan_of(library, "merge", count=0)
    with pytest.raises(BatchError, match="twice"):
        plan_of(library, "merge", "merge@1.0", count=1).wanted  # noqa: B018 (another name, the same pictures)


def test_training_free_methods_are_those_without_a_gate():
    found = training_free()
    assert {"merge", "switch", "composite", "sum_of_differences"} <= set(found)
    assert all("gate" not in {o.name for o in methods("route")[n].options} for n in found)


# -- drawing and reading ---------------------------------------------------------------------------------------------


def test_readings_are_those_of_the_pictures_and_a_second_run_draws_and_reads_nothing(library, tmp_path, monkeypatch):
    plan = plan_of(library, "none", "merge", "composite", count=2)
    results = evaluate(plan, tmp_path, make=StandIn)
    assert len(results.shown) == len(plan.wanted)
    assert not results.stopped
    right = 0
    for s in results.shown:
        recipe = Recipe.from_png(s.path)
        assert recipe.prompt == s.wanted.item.recipe.prompt
        assert set(s.reading.seen) == {e.category for e in s.wanted.entries}
        assert s.runs == (s.k if s.arm == "composite" else 1.0)
        right += sum(seen == (DESIGNS_BY[c, s.wanted] in recipe.extra["shown"]) for c, seen in s.reading.seen.items())
        assert s.reading.presence == pytest.approx(sum(s.reading.seen.values()) / s.k)
        assert s.reading.complete == float(all(s.reading.seen.values()))
    asked = sum(s.k for s in results.shown)
    assert right / asked > 0.9  # the recogniser reads renders well, and none at all would be about a third
    readers = Readers.load()
    alone = readers.read(
        [Image.open(s.path) for s in results.shown[:3]], [s.wanted.item.recipe.prompt for s in results.shown[:3]],
        [{e.category: e.name for e in s.wanted.entries} for s in results.shown[:3]],
    )  # fmt: skip
    for a, s in zip(alone, results.shown, strict=False):
        assert a.seen == s.reading.seen
        assert a.clip == pytest.approx(s.reading.clip, abs=1e-3)
    monkeypatch.setattr(Readers, "read", lambda *_: pytest.fail("read again"))
    again = evaluate(plan, tmp_path, make=partial(pytest.fail, "drawn again"))
    assert [(s.wanted.item.id, s.reading, s.seconds) for s in again.shown] == [
        (s.wanted.item.id, s.reading, s.seconds) for s in results.shown
    ]
    assert json.loads((tmp_path / "evaluation.json").read_text())["read by"] == readers.names


class _Category:
    def __getitem__(self, key):
        category, wanted = key
        return next(e.name for e in wanted.entries if e.category == category)


DESIGNS_BY = _Category()


def test_a_stop_leaves_a_balanced_table_and_the_next_call_goes_on(library, tmp_path):
    plan = plan_of(library, "merge", "switch", count=3)
    stop = threading.Event()

    def enough(now):
        if now.done >= 8:
            stop.set()

    half = evaluate(plan, tmp_path / "out", make=StandIn, stop=stop, progress=enough)
    assert half.stopped
    assert {len(half.of(a, k)) for a in ("merge", "switch") for k in (2, 3)} == {2}
    assert len(half.paired("merge", "switch")) == 4
    whole = evaluate(plan, tmp_path / "out", make=StandIn)
    straight = evaluate(plan, tmp_path / "other", make=StandIn)
    assert [(s.wanted.item.id, s.reading) for s in whole.shown] == [
        (s.wanted.item.id, s.reading) for s in straight.shown
    ]


def test_pairs_are_of_one_prompt_and_noise(library, tmp_path):
    results = evaluate(plan_of(library, "merge", "switch", count=3), tmp_path, make=StandIn)
    pairs = results.paired("merge", "switch", 3)
    assert len(pairs) == 3
    for a, b in pairs:
        assert (a.arm, b.arm, a.k, b.k) == ("merge", "switch", 3, 3)
        assert a.wanted.item.recipe.seed == b.wanted.item.recipe.seed


def test_failures_are_told_and_the_rest_goes_on(library, tmp_path):
    class Failing(StandIn):
        def __call__(self, recipe, cancel=None):
            if recipe.method == "switch":
                raise ArithmeticError("too few steps")
            return super().__call__(recipe, cancel)

    results = evaluate(plan_of(library, "merge", "switch", count=1), tmp_path, make=Failing)
    assert len(results.of("merge")) == 2
    assert [name for name, _ in results.failed] == ["switch"] * 2
    assert "too few steps" in results.failed[0][1]


def test_torn_readings_are_read_again(tmp_path):
    readers, path = Readers.load(None, "embedded"), tmp_path / "readings.jsonl"
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    Kept(path, readers).read(["a", "b"], [image, image], ["a fox", "a robe"], [{}, {}])
    path.write_bytes(path.read_bytes()[:-9])
    kept = Kept(path, readers)
    assert "a" in kept
    assert "b" not in kept
    kept.read(["b"], [image], ["a robe"], [{}])
    again = Kept(path, readers)
    assert again["b"].clip == pytest.approx(kept["b"].clip)
    assert math.isnan(again["b"].presence)
    assert "a" not in Kept(path, Readers())  # read by another: read again


def test_one_real_picture_counts_its_model_runs(library, tmp_path):
    plan = plan_of(library, "composite", "none", count=1, ks=(2,), settings=Settings(steps=2))
    results = evaluate(plan, tmp_path, make=partial(CountingRenderer, "cpu", 1))
    assert {s.arm: s.runs for s in results.shown} == {"composite": 2.0, "none": 1.0}
    a, b = (Image.open(s.path).tobytes() for s in results.shown)
    assert a != b
    assert settings_module.PRESETS["world"].steps == 25
