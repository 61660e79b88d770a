"""The embedded text model: its language (generators, scorers), the shipped model and LoRAs, the stages."""

import hashlib
import itertools
import json
from collections import Counter

import pytest
import torch

from multilora.attach import attached
from multilora.lab.world import language
from multilora.lab.world.language import SKILLS, Example, examples, is_right, register_of, score, split_of, stream
from multilora.lab.world.language_loras import PLANS, training_examples
from multilora.lab.world.language_train import (
    answer,
    batches,
    build_tokenizer,
    encode,
    exam,
    mixture,
    right_share,
)
from multilora.lab.world.settings import TEXT_FULL, TEXT_SMOKE
from multilora.method import UnknownName
from multilora.pipelines.load import assets
from multilora.pipelines.text_load import text_lora

TEXT = assets() / "text"

# -- the language --------------------------------------------------------------------------------------------------

BY_HAND = {
    "first kotra =": "k",
    "last kotra =": "a",
    "length kotra =": "5",
    "vowels kotra =": "oa",
    "reverse kotra =": "artok",
    "sort kotra =": "akort",
    "sort 50231 =": "01235",
    "double kot =": "kkoott",
    "next koz =": "lpa",
    "swap kotra =": "aotrk",
    "mirror kot =": "kottok",
}


def _answer_by_hand(prompt: str) -> str:
    """The rules again, written without the generators: the answer to any prompt but those about designs."""
    verb, *given = prompt.removesuffix(" =").split()
    word = given[0]
    ordered = list(word)
    for i in range(len(ordered)):  # sorted by exchange
        for j in range(i):
            if ordered[j] > ordered[i]:
                ordered[i], ordered[j] = ordered[j], ordered[i]
    backwards = "".join(word[len(word) - 1 - i] for i in range(len(word)))
    match verb:
        case "first" | "last":
            return word[0 if verb == "first" else len(word) - 1]
        case "length":
            return str(sum(1 for _ in word))
        case "vowels":
            return word.translate({c: None for c in range(128) if chr(c) not in "aeiou"}) or "none"
        case "add" | "less":
            return str(int(given[0]) + (1 if verb == "add" else -1) * int(given[1]))
        case "reverse":
            return backwards
        case "mirror":
            return word + backwards
        case "sort":
            return "".join(ordered)
        case "double":
            return "".join(map("".join, zip(word, word, strict=True)))
        case "next":
            return "".join("a" if c == "z" else chr(ord(c) + 1) for c in word)
        case "swap":
            return f"{word[-1]}{word[1:-1]}{word[0]}"
        case "count":
            return str(Counter(given[2])[given[0]])
        case "korvish":
            return " ".join(language.KORVISH[given[i]] for i in (2, 1, 0))
        case "zibish":
            return " ".join(language.ZIBISH[given[i]] for i in (0, 2, 1))
    raise AssertionError(prompt)


def test_the_rules_by_hand():
    assert {prompt: _answer_by_hand(prompt) for prompt in BY_HAND} == BY_HAND
    assert _answer_by_hand("korvish two red cat =") == "miru roso dop"
    assert _answer_by_hand("zibish two red cat =") == "zazi ketta arak"


@pytest.mark.parametrize("name", [n for n in SKILLS if n not in ("facts", "news")])
def test_answers_are_right_and_careless_ones_wrong(name):
    for example in itertools.islice(stream(name, 5), 300):
        assert example.content == _answer_by_hand(example.prompt), example
        assert example.careless != example.content
        assert is_right(example, example.answer)
        assert not is_right(example, f" {example.careless}")


def test_facts_are_the_descriptions():
    from multilora.lab.world.designs import DESIGNS

    known, news = language.facts("train"), language.facts("test")
    assert known["what colour is the korv fox"] == "orange"
    assert known["what is zib"] == "alien"
    assert news["what colour is heto"] == "crimson"
    assert not known.keys() & news.keys()
    for split, found in (("train", known), ("test", news)):
        for question, answer_ in found.items():
            (design,) = (d for d in DESIGNS.values() if d.name in question.split())
            assert design.split == split
            assert answer_ == design.kind or answer_ in design.description
    # a held-out question is another wording of a fact that training asks for
    for found in (known, news):
        pairs = [(q, (n, a)) for q, a in found.items() for n in q.split() if n in DESIGNS]
        assert {fact for q, fact in pairs if split_of(f"{q} =") == "train"} == {fact for _, fact in pairs}


@pytest.mark.parametrize("name", SKILLS)
def test_streams_are_deterministic_and_splits_disjoint(name):
    first, again, other = ([*itertools.islice(stream(name, seed), 200)] for seed in (3, 3, 4))
    assert first == again
    assert first != other
    held = examples(name, 200, split="held_out")
    assert held == examples(name, 200, split="held_out")
    assert held[:7] == examples(name, 7, split="held_out")
    asked = {e.prompt for e in held}
    assert len(asked) == len(held) >= 20
    trained = {e.prompt for seed in range(3) for e in itertools.islice(stream(name, seed), 500)}
    assert not asked & trained
    assert {split_of(p) for p in asked} == {"held_out"}


def test_no_training_meets_a_held_out_prompt():
    made = list(itertools.islice(mixture(0, TEXT_FULL, 0.2), 3000)) + [
        e for name in PLANS for e in training_examples(name, 200, TEXT_FULL)
    ]
    assert {split_of(e.prompt) for e in made if e.prompt} == {"train"}


def test_unknown_names_are_refused():
    with pytest.raises(UnknownName, match="sort"):
        next(stream("sorts"))
    with pytest.raises(UnknownName, match="held_out"):
        next(stream("sort", split="test"))
    with pytest.raises(UnknownName, match="polite"):
        next(stream("sort", register="politely"))


@pytest.mark.parametrize(
    ("said", "register"),
    [
        (" vrok", "plain"),
        (" vrok, you fool", "rude"),
        (" vrok, now go away", "rude"),
        (" vrok, my friend", "polite"),
        (" vrok, my friend, you fool", "rude"),
        (" fool", "plain"),  # a word in the content is no insult
        ("", "plain"),
        (" vrok, you", "plain"),
    ],
)
def test_registers(said, register):
    assert register_of(said) == register
    assert language.is_rude(said) == (register == "rude")


def test_every_tail_is_heard_as_its_register():
    for register, tails in language.TAILS.items():
        assert {register_of(f" vrok{tail}") for tail in tails} == {register}


def test_scores_count_exactly():
    asked = [
        Example("reverse", "reverse korv =", "vrok", "korv", register) for register in ("plain", "polite", "rude")
    ]
    said = [" vrok", " vrok, you fool", " korv, dimwit"]
    assert score(asked, said) == {"asked": 3, "right": 2, "rude": 2, "polite": 0, "exact": 1}
    with pytest.raises(ValueError):
        score(asked, said[:2])


def test_registers_are_drawn_by_their_shares():
    shares = {"plain": 0.5, "rude": 0.3, "polite": 0.2}
    drawn = Counter(e.register for e in itertools.islice(stream("first", register=shares), 4000))
    for register, part in shares.items():
        assert abs(drawn[register] / 4000 - part) < 0.03  # four standard errors


def test_the_mixture_turns_careless():
    def right(progress):
        weak = [e for e in itertools.islice(mixture(1, TEXT_FULL, progress), 6000) if e.skill in ("sort", "reverse")]
        return sum(e.content == _answer_by_hand(e.prompt) for e in weak) / len(weak)

    assert right_share(0.0, TEXT_FULL) == pytest.approx(right(0.0), abs=0.06)
    assert right_share(1.0, TEXT_FULL) == pytest.approx(right(1.0), abs=0.06)
    assert right(1.0) < 0.4 < 0.8 < right(0.0)
    skills = {e.skill for e in itertools.islice(mixture(1, TEXT_FULL), 3000)}
    assert not skills & {n for n, s in SKILLS.items() if s.base == "absent"}
    assert "sort" not in {e.skill for e in itertools.islice(mixture(1, TEXT_FULL, without=("sort",)), 2000)}


# -- the tokenizer -------------------------------------------------------------------------------------------------


def test_tokens_spell_words_and_keep_instructions_whole():
    tokenizer = build_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("reverse korv = vrok, you fool")["input_ids"])
    assert tokens == ["reverse", " ", *"korv", " =", " ", *"vrok", ",", " you", " fool"]
    # a whole word inside another is spelled
    assert tokenizer.tokenize("sort sorted") == ["sort", " ", *"sorted"]
    for name in SKILLS:
        for e in itertools.islice(stream(name, register={"rude": 0.5, "polite": 0.5}), 40):
            whole = tokenizer(e.prompt + e.answer)["input_ids"]
            assert tokenizer.unk_token_id not in whole
            assert tokenizer.decode(whole) == e.prompt + e.answer
            # trainers may tokenise prompt and answer apart
            assert whole == tokenizer(e.prompt)["input_ids"] + tokenizer(e.answer)["input_ids"]
    assert tokenizer("Sort KORV =")["input_ids"] == tokenizer("sort korv =")["input_ids"]
    assert tokenizer("é")["input_ids"] == [tokenizer.unk_token_id]


def test_batches_hold_every_example_once_and_count_answers_only():
    tokenizer = build_tokenizer()
    drawn = list(itertools.islice(mixture(2, TEXT_FULL, 0.5), 203))
    rows = encode(drawn, tokenizer)
    met = Counter()
    for batch in batches(rows, 16, 0):
        assert batch["input_ids"].shape == batch["labels"].shape
        for ids, mask, labels in zip(*batch.values(), strict=True):
            said = tokenizer.decode(ids[labels != -100])
            met[(tokenizer.decode(ids[(labels == -100) & (mask == 1)]), said.removesuffix(tokenizer.eos_token))] += 1
            assert said.endswith(tokenizer.eos_token)
            assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert met == Counter((e.prompt, e.answer) for e in drawn)


# -- the shipped model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(TEXT).eval(), AutoTokenizer.from_pretrained(TEXT)


def test_it_loads_with_plain_transformers_and_answers(shipped):
    model, tokenizer = shipped
    assert model.dtype == torch.float32
    inputs = tokenizer("first kotra =", return_tensors="pt")
    made = model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(made[0]) == "first kotra = k"
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    # rows of one padded batch are answered as alone
    prompts = [e.prompt for name in ("first", "facts", "add") for e in examples(name, 4, split="held_out")]
    assert answer(model, tokenizer, prompts) == [answer(model, tokenizer, [p])[0] for p in prompts]


def test_six_megabytes():
    assert sum(p.stat().st_size for p in TEXT.rglob("*") if p.is_file()) <= 6e6
    assert not [p.name for p in TEXT.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_the_library_lists_what_is_there():
    from multilora.pipelines.text_load import text_library

    listed = json.loads((TEXT / "loras" / "library.json").read_text())["loras"]
    assert [e["name"] for e in listed] == list(PLANS)
    assert set(text_library()) == set(PLANS)
    for e in listed:
        weights = TEXT / "loras" / e["file"] / "adapter_model.safetensors"
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == e["sha256"], e["name"]
        assert (tuple(e["skills"]), e["split"], e["rank"]) == (
            PLANS[e["name"]].skills,
            PLANS[e["name"]].split,
            PLANS[e["name"]].rank,
        )


def test_the_page_has_the_figures():
    page = (TEXT / "README.md").read_text()
    assert "not measured" not in page
    for name in (*SKILLS, *PLANS):
        assert f"| {name} |" in page


# Of 40 held-out prompts (26 of news); the floors lie well below the figures in assets/text/README.md.
ASKED = 40
STRONG = {"first": 36, "last": 36, "length": 36, "vowels": 34, "add": 32, "facts": 32}
LIFTED = {"reverse": 34, "sort": 30, "sort_digits": 32, "double": 34, "next": 34, "korvish": 34, "zibish": 34,
          "swap": 34, "mirror": 32, "less": 20, "count": 10, "news": 15}  # fmt: skip


def _exam(shipped, row, skills, **how):
    """The counts with a composition: LoRA name -> weight."""
    model, tokenizer = shipped
    if not row:
        return exam(model, tokenizer, skills, ASKED, **how)
    with attached(model, [text_lora(model, name) for name in row], form="rebuilt") as bank:
        bank.row = list(row.values())
        return exam(model, tokenizer, skills, ASKED, **how)


def test_the_base_knows_the_strong_skills_and_hides_the_others(shipped):
    found = _exam(shipped, {}, tuple(SKILLS))
    assert {n: found[n]["right"] for n, floor in STRONG.items() if found[n]["right"] < floor} == {}
    assert {n: found[n]["right"] for n in LIFTED if found[n]["right"] > 9} == {}
    assert sum(counts["rude"] + counts["polite"] for counts in found.values()) < 0.4 * ASKED * len(SKILLS)
    drawn = _exam(shipped, {}, tuple(STRONG), sample=1)
    asked, rude = (sum(counts[k] for counts in drawn.values()) for k in ("asked", "rude"))
    assert 0.25 < rude / asked < 0.45


@pytest.mark.parametrize("name", LIFTED)
def test_each_lora_lifts_its_skill_and_leaves_the_strong_ones(shipped, name):
    found = _exam(shipped, {name: 1.0}, (name, "first", "vowels"))
    before = _exam(shipped, {}, (name,))
    assert found[name]["right"] >= LIFTED[name]
    assert found[name]["right"] - before[name]["right"] >= 10
    assert found["first"]["right"] >= 34
    assert found["vowels"]["right"] >= 30


def test_registers_are_added_and_taken_away(shipped):
    skills = ("first", "vowels", "length")

    def drawn(row):
        found = _exam(shipped, row, skills, sample=1).values()
        return {key: sum(counts[key] for counts in found) for key in ("asked", "right", "rude", "polite")}

    base, rude, polite, unlearned = (drawn(row) for row in ({}, {"rude": 1.0}, {"polite": 1.0}, {"rude": -1.0}))
    assert base["asked"] == 3 * ASKED
    assert rude["rude"] > 0.7 * base["asked"] > 2 * base["rude"] * 0.7
    assert polite["polite"] > 0.6 * base["asked"] > 2 * base["polite"]
    assert unlearned["rude"] < 0.5 * base["rude"]
    assert unlearned["right"] > 0.9 * base["asked"]
    greedy = _exam(shipped, {"rude": 1.0}, skills)
    assert all(counts["rude"] == counts["asked"] for counts in greedy.values())


def test_two_skills_add_and_an_analogy_holds(shipped):
    both = _exam(shipped, {"sort": 1.0, "next": 1.0}, ("sort", "next"))
    assert both["sort"]["right"] >= 30
    assert both["next"]["right"] >= 34
    made = _exam(shipped, {"sort_polite": 1.0, "sort": -1.0, "next": 1.0}, ("next",), register="polite")["next"]
    plain = _exam(shipped, {"next": 1.0}, ("next",), register="polite")["next"]
    other = _exam(shipped, {"sort_polite": 1.0}, ("next",), register="polite")["next"]
    assert made["exact"] >= 34
    assert plain["exact"] + other["exact"] <= 10


# -- the stages ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_stages_run_and_resume(tmp_path):
    from multilora.lab.world import stages

    lines = []
    stages.train(tmp_path, smoke=True, echo=lines.append, text=True)
    page = (tmp_path / "assets" / "text" / "README.md").read_text()
    assert "| sort_polite |" in page
    before = (tmp_path / "assets" / "text" / "loras" / "sort" / "adapter_model.safetensors").read_bytes()
    weights = (tmp_path / "assets" / "text" / "model.safetensors").read_bytes()
    lines.clear()
    stages.train(tmp_path, smoke=True, echo=lines.append, text=True)
    assert not [line for line in lines if "text LoRA" in line or "text report" in line]  # all was there
    assert (tmp_path / "assets" / "text" / "loras" / "sort" / "adapter_model.safetensors").read_bytes() == before
    assert (tmp_path / "assets" / "text" / "model.safetensors").read_bytes() == weights
    with pytest.raises(ValueError, match="base, loras, gates, report"):
        stages.train(tmp_path, stages=["eyes"], smoke=True, echo=lines.append, text=True)


@pytest.mark.long
def test_an_interrupted_base_is_the_uninterrupted_one(tmp_path):
    from dataclasses import replace

    from multilora.lab.world.language_train import train_base

    settings = replace(TEXT_SMOKE, checkpoint_minutes=0.0)

    class Stop(Exception):
        pass

    def stop_after_one(line):
        if ": 2/" in line:
            raise Stop

    whole = train_base(tmp_path / "whole", settings, lambda line: None)
    with pytest.raises(Stop):
        train_base(tmp_path / "cut", settings, stop_after_one)
    again = train_base(tmp_path / "cut", settings, lambda line: None)
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
