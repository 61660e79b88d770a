"""Schedules of weights: curves by hand, spellings, refusals; tags in prompts."""

import pickle

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from multilora.schedule import Schedule
from multilora.tags import LoraTag, parse_prompt


def curve(value, steps, sigmas=None):
    schedule = Schedule.parse(value)
    return [schedule.at(i, steps, sigmas[i] if sigmas else None) for i in range(steps)]


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("0.8", 3, [0.8, 0.8, 0.8]),
        ("-1", 2, [-1, -1]),
        # Fractions of five steps lie at 0, 1/4, 1/2, 3/4, 1.
        ("0@0,1@1", 5, [0, 0.25, 0.5, 0.75, 1]),
        ("0@0,1@0.5", 5, [0, 0.5, 1, 1, 1]),
        ("0@0, 1@0.5 ; 0@1", 5, [0, 0.5, 1, 0.5, 0]),
        ("0.25@0.5,1@1", 5, [0.25, 0.25, 0.25, 0.625, 1]),
        ("1@0.5,0@0.5", 5, [1, 1, 0, 0, 0]),
        ("1@0.3,0@0.3", 11, [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("0@0,1@1", 1, [0]),
        # Steps: one position above 1, or the mark.
        ("0@2,1@4", 6, [0, 0, 0, 0.5, 1, 1]),
        ("0@0,1@2", 4, [0, 0.5, 1, 1]),
        ("0@0s,1@1s", 4, [0, 1, 1, 1]),
        ("1@3s,0@3s", 5, [1, 1, 1, 0, 0]),
        ("1@1s,0@3", 5, [1, 1, 0.5, 0, 0]),
    ],
)
def test_weights_per_step_equal_the_curve(text, steps, expected):
    assert curve(text, steps) == expected


def test_by_sigma_the_weight_is_linear_in_sigma():
    sigmas = [14.0, 7.0, 4.5, 2.0, 0.5]
    assert curve("1@7sigma,0@2sigma", 5, sigmas) == [1, 1, 0.5, 0, 0]
    assert curve("1@4.5sigma,0@4.5sigma", 5, sigmas) == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="goes by sigma"):
        Schedule.parse("1@7sigma,0@2sigma").at(0, 5)


def test_windows():
    assert curve(Schedule.window(0.8, 0.25, 0.75), 5) == [0, 0.8, 0.8, 0, 0]
    assert curve(Schedule.window(0.8, stop=0.5), 5) == [0.8, 0.8, 0, 0, 0]
    assert curve(Schedule.window(0.8, 0.5), 5) == [0, 0, 0.8, 0.8, 0.8]
    assert curve(Schedule.window(0.8, 0.5, 1), 5) == [0, 0, 0.8, 0.8, 0.8]
    assert curve(Schedule.window(1, "1s", "3s"), 5) == [0, 1, 1, 0, 0]
    assert curve(Schedule.window(1, 1, 3), 5) == [0, 1, 1, 0, 0]
    assert curve(Schedule.window(1, "7sigma", "2sigma"), 4, [9, 7, 4, 2]) == [0, 1, 1, 0]
    assert Schedule.window(0.8) == Schedule.parse(0.8)
    for start, stop in ((0.5, 0.2), (0.5, 0.5), ("2sigma", "7sigma"), (-1, None), ("3s", "2sigma")):
        with pytest.raises(ValueError, match="window"):
            Schedule.window(1.0, start, stop)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "nan"),
        ("nan", "not finite"),
        ("inf@0.5,1@1", "'inf' is not finite"),
        ("1@inf,1@1", "'inf' is not finite"),
        ("strong", "'strong'"),
        ("0,8", "no @position"),
        ("", "''"),
        ("  ", "not a number"),
        ("1@", "position ''"),
        ("@0.5", "weight ''"),
        ("1@0.5,", "no @position"),
        ("1@0.5@3", "'0.5@3'"),
        ("1@0.5,0@0.2", "not in order, from low to high"),
        ("1@2sigma,0@7sigma", "from high to low"),
        ("1@-0.5,0@0.5", "'-0.5' is negative"),
        ("1@2s,0@1sigma", "mixes"),
        ("1@2,0@1sigma", "mixes"),
        ("1@0.4,0@3s", "mixes steps with the fraction 0.4: write 0.4s"),
        ("1@0.4,0@5", "mixes steps with the fraction 0.4: write 0.4s"),
        ("0@0.5,1@0.5,2@0.5", "three points at 0.5"),
        ([], "empty"),
        ([1.0, 2.0], "pairs"),
        ([(1.0, 0.5), (True, 1.0)], "True"),
        (None, "None"),
        (True, "True"),
        ({"a": 1}, "'a'"),
    ],
)
def test_bad_values_are_refused_with_the_value_and_an_example(value, said):
    with pytest.raises(ValueError) as caught:
        Schedule.parse(value)
    assert said in str(caught.value)
    assert "0@0,1@0.5" in str(caught.value)


def test_other_spellings_of_the_same():
    want = Schedule.parse("0@0,1@0.5")
    assert Schedule.parse([(0, 0), (1, 0.5)]) == want == Schedule.parse(want) == Schedule.parse(" 0 @ 0 ; 1.0@.5 ")
    assert Schedule.parse([(0, "1s"), (1, "2S")]) == Schedule.parse("0@1s,1@2s") == Schedule.parse("0@1,1@2")
    assert Schedule.parse(np.float32(0.5)) == Schedule.parse(0.5) == Schedule.parse(np.array(0.5))
    assert hash(Schedule.parse("1")) == hash(Schedule.parse(1.0))
    assert Schedule.parse("0@0,1@1") != Schedule.parse("0@0s,1@1s")
    assert pickle.loads(pickle.dumps(want)) == want


def test_constants_peaks_and_products():
    assert Schedule.parse("1@0,1@1").constant == 1.0
    assert Schedule.parse("0@0,1@1").constant is None
    assert Schedule.parse(-0.0).is_zero
    assert Schedule.parse("0@0,0@5").is_zero
    assert not Schedule.parse("0@0,1@1").is_zero
    assert Schedule.parse("0.5@0,-2@0.5,1@1").peak == -2.0
    assert 2 * Schedule.parse("0@0,1@1") == Schedule.parse("0@0,2@1") == Schedule.parse("0@0,1@1") * 2
    assert Schedule.parse("0@0s,1@1s") * 0.5 == Schedule.parse("0@0s,0.5@1s")
    assert (Schedule.parse("0@0,1@1") * 0).is_zero
    assert str(Schedule.parse(1) * -0.5) == "-0.5"


@pytest.mark.parametrize(
    "text", ["0.8", "1", "-0.3", "0@0,1@0.5", "0@5,1@6", "0@0s,1@1s", "1@0.5s,0@3s", "1@7sigma,0@5sigma"]
)
def test_text_round_trips(text):
    assert str(Schedule.parse(text)) == text


_number = st.floats(-1e6, 1e6).map(lambda x: x + 0.0)


@given(
    st.lists(st.tuples(_number, st.floats(0, 40)), min_size=1, max_size=5, unique_by=lambda p: p[1]),
    st.sampled_from(["", "s", "sigma"]),
    st.integers(1, 60),
    st.floats(0, 50),
)
def test_any_schedule_round_trips_and_stays_between_its_weights(points, unit, steps, sigma):
    at = [p for _, p in points]
    assume(unit or max(at) <= 1 or not any(0 < p < 1 for p in at))  # fractions beside steps are refused
    points.sort(key=lambda p: p[1], reverse=unit == "sigma")
    schedule = Schedule.parse([(w, f"{p!r}{unit}") for w, p in points])
    again = Schedule.parse(str(schedule))
    assert again == schedule
    low, high = min(w for w, _ in points), max(w for w, _ in points)
    slack = 1e-9 * max(abs(low), abs(high))
    for step in range(steps):
        weight = schedule.at(step, steps, sigma)
        assert weight == again.at(step, steps, sigma)
        assert low - slack <= weight <= high + slack
    assert abs(schedule.peak) == max(abs(low), abs(high))


def tag(name, weight=1.0):
    return LoraTag(name, Schedule.parse(weight))


@pytest.mark.parametrize(
    ("prompt", "clean", "tags"),
    [
        ("a fox  in snow ", "a fox  in snow ", []),
        ("a fox <lora:fox:0.8> in snow", "a fox in snow", [tag("fox", 0.8)]),
        ("a fox, snow <lora:fox>", "a fox, snow", [tag("fox")]),
        ("<lora:fox:0@0,1@0.5>a fox", "a fox", [tag("fox", "0@0,1@0.5")]),
        ("a <lora:b:1> <lora:a:-0.5> fox", "a fox", [tag("b"), tag("a", -0.5)]),
        ("a fox <lora:My fox-v1.5_b (2):0.8>", "a fox", [tag("My fox-v1.5_b (2)", 0.8)]),
        ("a (fox:1.2) <lora:fox:1@3s,0@6s>", "a (fox:1.2)", [tag("fox", "1@3s,0@6s")]),
        ("a<lora:fox:1>fox", "afox", [tag("fox")]),
        ("<hypernet:x:1> 3 < 4 lora", "<hypernet:x:1> 3 < 4 lora", []),
        ("", "", []),
    ],
)
def test_tags_are_taken_out_of_the_prompt(prompt, clean, tags):
    assert parse_prompt(prompt) == (clean, tags)
    assert all(t.text_encoder_weight is None for t in parse_prompt(prompt)[1])


@pytest.mark.parametrize(
    "bad",
    ["<lora:>", "<lora::0.8>", "<lora:fox:loud>", "<lora:fox:nan>", "<lora:fox:", "<lora:fox:0.8", "<LORA:fox:1>"]
    + ["< lora:fox:1>", "<lora>", "<lora:fox:1:0.5:0.2>", "<lora:fox:1@0.5,0@0.1>", "<lora:a<lora:b>"],
)
def test_broken_tags_are_shown(bad):
    with pytest.raises(ValueError) as caught:
        parse_prompt(f"a fox {bad}")
    assert bad[:8] in str(caught.value)
