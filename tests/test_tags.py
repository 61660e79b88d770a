"""Tags of the web UIs and scheduled LoRAs in brackets, against weights at every step written out by hand."""

import pytest

from multilora.schedule import Schedule
from multilora.tags import LoraTag, parse_prompt

S17 = "0,0,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0"


def one(text, **options):
    clean, tags = parse_prompt(f"a fox {text}", **options)
    assert clean == "a fox"
    (tag,) = tags
    return tag


def tag(weight=1.0, text=None, **blocks):
    return LoraTag("a", Schedule.parse(weight), text, blocks)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<lora:a:0.5:0.8>", tag(0.8, 0.5)),  # text encoder first
        ("<lora:a:0.5:0@0,1@0.5>", tag("0@0,1@0.5", 0.5)),
        ("<lora:a:0.8:te=0.5>", tag(0.8, 0.5)),
        ("<lora:a:te=0.5>", tag(0.5, 0.5)),
        ("<lora:a:unet=0.7>", tag(0.7)),
        ("<lora:a:0.4:unet=0.7>", tag(0.7, 0.4)),
        ("<lora:a:te=0.3:unet=0.7>", tag(0.7, 0.3)),
        ("<lora:a: 1 : te = 0 >", tag(1.0, 0.0)),
        ("<lora:a:1:lbw=OUTALL>", tag(lbw="OUTALL")),
        ("<lora:a:1:OUTALL>", tag(lbw="OUTALL")),
        (f"<lora:a:1:{S17}>", tag(lbw=S17)),
        (f"<lora:a:0.5:0.8:{S17}>", tag(0.8, 0.5, lbw=S17)),
        ("<lora:a:0.5:in=1:mid=0:out=0.25>", tag(0.5, **{"in": 2.0, "mid": 0.0, "out": 0.5})),
        ("<lora:a:0:mid=0.5>", tag(1.0, **{"in": 0.0, "mid": 0.5, "out": 0.0})),
        ("<lora:a:1:start=10:stop=20>", tag("0@10,1@10,1@20,0@20")),
        ("<lora:a:0.8:step=5-10>", tag("0@5,0.8@5,0.8@10,0@10")),
        ("<lora:a:1:start=0.25>", tag("0@0.25,1@0.25")),
        ("<lora:a:1:stop=3>", tag("1@3,0@3")),
        ("<lora:a:1:stop=1>", tag("1@1s,0@1s")),
        ("<lora:a:1:start=7sigma:stop=2sigma>", tag("0@7sigma,1@7sigma,1@2sigma,0@2sigma")),
        ("<lora:a:1:stop=2sigma>", tag("1@2sigma,0@2sigma")),
        ("<lora:a:1> <lora:a:0.5>", tag(1.5)),
    ],
)
def test_fields_of_a_tag(text, wanted):
    assert one(text) == wanted


def test_presets_of_the_user_are_replaced_by_their_numbers():
    assert one("<lora:a:1:lbw=SOFT>", presets={"SOFT": S17}) == tag(lbw=S17)
    with pytest.raises(ValueError, match="unknown lbw preset 'SOFT'"):
        parse_prompt("<lora:a:1:lbw=SOFT>")


@pytest.mark.parametrize(
    ("text", "steps", "weights"),
    [
        ("[<lora:a:1>:<lora:b:0.5>:0.4]", 6, {"a": "110000", "b": "00hhhh"}),
        ("[<lora:a:1>:<lora:b:0.5>:2]", 6, {"a": "110000", "b": "00hhhh"}),
        ("[<lora:a:1>::0.5]", 5, {"a": "11000"}),
        ("[<lora:a:1>:0.5]", 5, {"a": "00111"}),
        ("[<lora:a:1>:0.25,0.75]", 5, {"a": "01100"}),
        ("[<lora:a:1>:<lora:b:1>:0.25,0.75]", 5, {"a": "01100", "b": "00011"}),
        ("[<lora:a:1>:<lora:b:1>:<lora:c:1>:0.25,0.75]", 5, {"a": "10000", "b": "01100", "c": "00011"}),
        ("[<lora:a:1>:<lora:b:1>:<lora:c:1>:0.25]", 5, {"a": "10000", "b": "01111", "c": "00000"}),
        ("[<lora:a:1>:[<lora:b:1>::0.75]:0.25]", 5, {"a": "10000", "b": "01100"}),
        ("[[<lora:a:1>:<lora:b:1>:1]:<lora:a:0.5>:3]", 5, {"a": "100hh", "b": "01100"}),
        ("[<lora:a:1>:<lora:a:0.5>:2]", 4, {"a": "11hh"}),
        ("<lora:a:0.5> [<lora:a:0.5>::2]", 4, {"a": "11hh"}),
        ("[<lora:a:1>:<lora:b:1>:1.0]", 4, {"a": "1111", "b": "0000"}),
        ("[<lora:a:1> <lora:b:1>::2]", 3, {"a": "110", "b": "110"}),
    ],
)
def test_brackets_schedule_their_loras(text, steps, weights):
    clean, tags = parse_prompt(f"a cat, {text} in snow")
    assert clean == "a cat, in snow"
    value = {"0": 0.0, "1": 1.0, "h": 0.5}
    assert {t.name: [t.weight.at(i, steps) for i in range(steps)] for t in tags} == {
        name: [value[c] for c in line] for name, line in weights.items()
    }


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("[red:blue:0.5] cat [soft]", "[red:blue:0.5] cat [soft]"),
        ("a [nice <lora:a:1>] cat", "a [nice ] cat"),
        (r"\[<lora:a:1>:x:0.5] cat", r"\[:x:0.5] cat"),
        ("[ <lora:a:1> cat", "[ cat"),
        ("[a] [<lora:a:1>::3] [b]", "[a] [b]"),
    ],
)
def test_other_brackets_stay(prompt, clean):
    assert parse_prompt(prompt)[0] == clean


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<lora:a:1:dyn=4>", "unknown field 'dyn=4'; known are te=, unet="),
        ("<lora:a:1:te=0@0,1@1>", "te: wanted a number"),
        ("<lora:a:0@0,1@1:0.5>", "the text encoder's weight: wanted a number"),
        ("<lora:a:1:te=x>", "te: 'x'"),
        ("<lora:a:1:0.5:0.2>", "3 weights after the name"),
        ("<lora:a:1:lbw=1,0>", "lbw=1,0: 2 values, wanted 12, 17, 20, 26 or 61"),
        ("<lora:a:1:lbw=OUTAL>", "lbw=OUTAL: unknown lbw preset 'OUTAL'. Nearest: OUTALL"),
        ("<lora:a:1:LOUD:lbw=ALL>", "'LOUD' is no weight, and lbw= is there already"),
        ("<lora:a:1:lbw=ALL:lbw=ALL>", "lbw= is there twice"),
        ("<lora:a:1:lbw=ALL:mid=0>", "give one of them"),
        ("<lora:a:0@0,1@1:mid=0>", "go with one weight"),
        ("<lora:a:1:start=ten>", "start=ten: a position is a fraction such as 0.4"),
        ("<lora:a:1:start=1.5>", "start=1.5: a fraction of the run is at most 1.0"),
        ("<lora:a:1:start=-2>", "start=-2: a position"),
        ("<lora:a:1:start=5:stop=5>", "stop lies after start"),
        ("<lora:a:1:start=5:stop=0.9>", "do not go together"),
        ("<lora:a:1:step=5>", "step=5: wanted FIRST-LAST"),
        ("<lora:a:1:step=5-9:stop=10>", "give one of them"),
        ("<lora:a:0@0,1@1:stop=3>", "not with the schedule '0@0,1@1'"),
        ("[a fox <lora:a:1>:0.5]", "'a fox' cannot change over the steps"),
        ("[<lora:a:1>|<lora:b:1>:0.2]", "'|' cannot change over the steps"),
        ("[<lora:a:1>:<lora:b:1>:HR]", "'HR': a position is a fraction"),
        ("[<lora:a:1>:0.7,0.2]", "the second position lies before the first"),
        ("[<lora:a:1>:2,0.7]", "a step and a fraction do not go together"),
        ("[<lora:a:1>:[<lora:b:1>::0.7]:3]", "steps and fractions do not go together"),
        ("[<lora:a:1>::::0.5]", "4 parts before its position"),
        ("[<lora:a:0@0,1@1>::0.5]", "its schedule does not go with brackets"),
        ("<lora:a:1> <lora:a:1:te=0>", "one LoRA has one text weight"),
        ("[<lora:a:1>::0.5] [<lora:a:1>:3]", "by steps and by fractions"),
    ],
)
def test_what_is_wrong_is_shown(text, words):
    with pytest.raises(ValueError) as caught:
        parse_prompt(f"a fox {text} in snow")
    assert words in str(caught.value)
    assert "<lora:" in str(caught.value) or "LoRA 'a'" in str(caught.value)
