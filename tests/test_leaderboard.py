"""benchmarks/better.py and leaderboard.py: what is chosen from measured lines and reviews, and the tables of them."""

import json
from pathlib import Path

import pytest

from benchmarks import better, leaderboard
from multilora.lab.journal import Journal

WORLD = leaderboard.WORLD


def line(journal, arm, k, found, pictures=10, rows=1.0, place="a+b", start=0):
    journal.add(
        f"picture/{arm}/{place}/{start}+{pictures}/25/", cell=arm, k=k, set=["pandu"] * k, elements={}, found=found,
        asked=k * pictures, pictures=pictures, complete=0, clip=[50.0] * pictures, rows=rows, seconds=0.5,
    )  # fmt: skip


def test_an_arm_says_what_is_not_usual():
    assert better.plain("arrow", 1.5, {"boost": 0.0, "top_k": 3, "temperature": 1.0}) == "arrow@1.5"
    assert better.plain("arrow", 2, {"boost": 1.25, "top_k": 2}) == "arrow@2:top_k=2,boost=1.25"
    assert better.read("arrow@2:top_k=2,boost=1.25") == ("arrow", 2.0, {"top_k": "2", "boost": "1.25"})
    with pytest.raises(ValueError, match="unknown option of arrow"):
        better.read("arrow@1:tok=2")


def test_each_way_has_its_best_setting_of_the_train_split(tmp_path):
    journal = Journal(tmp_path / "better.jsonl")
    for k, arm, found in (
        (2, "merge@1", 15), (2, "merge@0.8", 15), (2, "composite@2", 3),
        (3, "merge@1", 20), (3, "merge@0.8", 25), (3, "composite@1", 4),
        (3, "mole@1:boost=2,gate=token", 28), (3, "mole@0.8:gate=sample", 26),
    ):  # fmt: skip
        line(journal, arm, k, found)
    found = leaderboard.settings(journal)
    assert found[2]["merge"] == "merge@0.8", "of equals the one that showed most over all k"
    assert (found[2]["composite"], found[3]["composite"]) == ("composite@2", "composite@1")
    for k in (2, 3):
        assert found[k]["mole, gate per token"] == "mole@1:boost=2,gate=token"
        assert found[k]["mole, gate per sample"] == "mole@0.8:gate=sample"
        assert found[k]["auto"] == "auto@1"


def test_a_review_is_counted_by_k_and_arm(tmp_path):
    for name, content in {
        "evaluation.json": {"methods": {"a": {"method": "merge", "weight": 0.9}}},
        "sealed.json": {
            "1": {"method": "merge", "asked": {"character": "zib", "garment": "merlo"},
                  "b": {"character": True, "garment": True}},
            "2": {"method": 'guided_merge {"boost": 2.0} 0.8', "asked": {"character": "zib", "garment": "dotta"},
                  "b": {"character": False, "garment": True}},
        },
        "answers.json": {"1": {"character": "zib", "garment": "dotta"}, "2": {"character": "zib", "garment": "dotta"}},
    }.items():  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    found = better.reviewed(tmp_path, tmp_path / "sealed.json", tmp_path / "answers.json")
    assert found == {"2": {"merge@0.9": [2, 1, 2, 1], "guided_merge@0.8:boost=2.0": [2, 2, 1, 1]}}


def test_a_choice_costs_more_only_where_reviewers_saw_more(tmp_path):
    journal = Journal(tmp_path / "better.jsonl")
    for arm, rows in (("merge@1", 1), ("guided_merge@0.8:boost=1.25", 1), ("composite@1", 3), ("loratorio@1", 4)):
        line(journal, arm, 3, 20, rows=rows)
    review = {"3": {"merge@1": [30, 20, 0, 10], "guided_merge@0.8": [30, 24, 0, 10], "composite@1": [30, 22, 0, 10],
                    "loratorio@1": [30, 27, 0, 10]}}  # fmt: skip
    (cheap, dear) = better.choices(journal, review)["3"]
    assert (cheap["method"], cheap["weight"], cheap["shown"], cheap["merge"]) == ("guided_merge", 0.8, 0.8, 0.667)
    assert (dear["method"], dear["rows"], dear["shown"]) == ("loratorio", 4, 0.9)


def test_a_choice_is_by_the_pictures_of_one_lora_more_and_fewer_too(tmp_path):
    journal = Journal(tmp_path / "better.jsonl")
    for k in (2, 3, 4):
        line(journal, "guided_merge@1", k, 9, place=f"{k}")
        line(journal, "merge@1", k, 9, place=f"{k}")
    arms = ("merge@0.8", "guided_merge@0.8", "guided_merge@0.6")
    seen = {"2": (16, 15, 14), "3": (18, 27, 28), "4": (20, 35, 33)}
    review = {k: {a: [10 * int(k), n, 0, 10] for a, n in zip(arms, own, strict=True)} for k, own in seen.items()}
    found = {k: [(c["method"], c["weight"], c["shown"], c["merge"], c["ks"], c["pictures"]) for c in own]
             for k, own in better.choices(journal, review).items()}  # fmt: skip
    # At 2 Merge showed most itself, at 2 and 3 together less; at 3, 77 of 90 against 75.
    assert found["2"] == [("guided_merge", 0.8, 0.84, 0.68, [2, 3], 20)]
    assert found["3"] == [("guided_merge", 0.8, 0.856, 0.6, [2, 3, 4], 30)]
    same = {"3": {"guided_merge@0.6": [30, 20, 0, 10], "guided_merge@0.8": [30, 20, 0, 10], "merge@1": [30, 9, 0, 10]}}
    assert better.choices(journal, same)["3"][0]["weight"] == 0.8, "of equals the weights nearest the user's"
    easy = {**same, "2": {"merge@1": [20, 20, 0, 10]}}
    (one,) = better.choices(journal, easy)["3"]
    assert (one["method"], one["ks"]) == ("guided_merge", [3]), "pictures that only one arm has drawn say nothing"


def test_a_dearer_setting_that_showed_as_much_is_no_choice(tmp_path):
    journal = Journal(tmp_path / "better.jsonl")
    line(journal, "merge@1", 3, 9)
    line(journal, "guided_merge@1", 3, 9)
    line(journal, "loratorio@1", 3, 9, rows=4.0)
    review = {"3": {"merge@1": [30, 9, 0, 10], "guided_merge@0.8": [30, 20, 0, 10], "loratorio@1": [30, 20, 0, 10]}}
    assert [c["method"] for c in better.choices(journal, review)["3"]] == ["guided_merge"]


def test_what_is_chosen_no_more_is_kept_for_recipes_of_then():
    def setting(weight, **more):
        return {"method": "guided_merge", "weight": weight, "options": {}, "rows": 1.0, **more}

    old = {"choices": {"2": [setting(0.8, shown=0.9)], "3": [setting(0.7, shown=0.9)]}, "earlier": [setting(0.5)]}
    new = {"2": [setting(0.8, shown=0.8)], "3": [setting(0.6, shown=0.8)]}
    assert better.earlier(old, new) == [setting(0.5), setting(0.7)]
    assert better.earlier({**old, "earlier": []}, old["choices"]) == []


def test_the_shipped_choices_are_those_of_the_kept_review():
    review = json.loads(better.REVIEW.read_text())
    told = json.loads(better.AUTO.read_text())["choices"]
    assert told == better.choices(Journal(WORLD / "better.jsonl"), review)


def test_gains_are_of_the_same_pictures(tmp_path):
    journal = Journal(tmp_path / "leaderboard.jsonl")
    for start, ours, theirs in ((0, 180, 100), (100, 200, 120)):
        line(journal, "guided_merge@1", 2, ours, 100, start=start)
        line(journal, "merge, weight 1", 2, theirs, 100, start=start)
    line(journal, "guided_merge@1", 2, 0, 100, start=200)  # Merge has no such pictures
    line(journal, "switch@1", 2, 9)  # of too few sets to be compared
    cells = leaderboard.gathered(journal)[2]
    assert leaderboard.gain(cells["guided_merge@1"], cells["merge, weight 1"]).startswith("+0.40 ")
    text = leaderboard.page(journal)
    assert "| guided_merge@1 | 300 | 0.63" in text
    assert "| **merge, weight 1, the grid's best by B** | 200 | 0.55" in text
    assert "switch" not in text


def test_seconds_are_those_of_a_cpu(tmp_path):
    journal = Journal(tmp_path / "leaderboard.jsonl")
    for arm, device in (("guided_merge@1", "CPU"), ("arrow@1", "NVIDIA")):
        line(journal, arm, 2, 300, 200)
        (entry,) = [e for e in journal.of("picture") if e["cell"] == arm]
        journal.lines[entry["key"]]["device"] = device

    def seconds(arm):
        row = next(r for r in leaderboard.page(journal).splitlines() if r.startswith(f"| {arm} |"))
        return row.split("|")[-2].strip()

    assert (seconds("guided_merge@1"), seconds("arrow@1")) == ("0.50", "")
    assert "these pictures. NVIDIA: 200 of arrow@1." in leaderboard.page(journal)


def test_the_tables_are_those_of_their_journals():
    journal = Journal(WORLD / "leaderboard.jsonl")
    assert (Path(better.TABLE).parent / "leaderboard.md").read_text() == leaderboard.page(journal) + "\n"
    assert better.TABLE.read_text() == better.page(Journal(WORLD / "better.jsonl"))
