"""The trace of a plan and its chart: what stands in which cell, colours read back; the command prints the path."""

import math

import pytest
from PIL import Image

from multilora.cli import main
from multilora.lab.chart import COLOURS, WIDTH
from multilora.lab.schedule_chart import draw_schedule
from multilora.lab.sheet import PAPER
from multilora.lora import Card
from multilora.method import Method, resolve
from multilora.plan import Moment, Pass
from multilora.schedule import Schedule
from multilora.trace import by_step, traced

NAMES = ("fox", "robe", "hat")
SCHEDULES = [Schedule.parse(text) for text in ("1", "0@0,1@1", "0.5@4s,0@4s")]


def run(bound, steps=7):
    bound, runs = traced(bound)
    plan = bound([object()] * 3)
    for step in range(steps):
        for _ in range(2):  # a sampler of second order
            weights = tuple(s.at(step, steps) for s in SCHEDULES)
            plan(Moment(step, steps, math.nan, None, weights, tuple(Card(n) for n in NAMES)))
    assert len(runs) == 1
    return by_step(runs[0])


def test_effects_are_weights_times_shares():
    seen = run(resolve("route", "switch", every=1))
    assert [s.step for s in seen] == list(range(7))
    assert [s.effects for s in seen[:3]] == [(1, 0, 0), (0, pytest.approx(1 / 6), 0), (0, 0, 0.5)]
    composite = run(resolve("route", "composite"))
    assert composite[3].effects == pytest.approx((1 / 3, 0.5 / 3, 0.5 / 3))
    assert composite[4].effects == pytest.approx((1 / 3, 4 / 6 / 3, 0.0))
    assert run(resolve("route", "merge"))[3].weights == pytest.approx((1.0, 0.5, 0.5))


def test_a_gate_and_a_combination_of_ones_own_pass_through():
    def fn(loras):
        def plan(moment):
            return [Pass(lambda path, x: None)]

        plan.combine = "kept"
        return plan

    record = Method("own", "route", "", "", "1", (), (), fn)
    bound, runs = traced(resolve("route", record))
    plan = bound([])
    assert plan.combine == "kept"
    plan(Moment(0, 1, 0.0, None, (1.0,)))
    assert runs[0][0].effects is None
    picture = draw_schedule(NAMES[:1], {"own": by_step(runs[0])}, title="gate")
    assert picture.width == WIDTH


def rows_of(picture, colour):
    """Of each line of the picture, the [first, last] pixels in exactly this colour, where there are at least 20."""
    data, found = picture.load(), {}
    for y in range(picture.height):
        xs = [x for x in range(picture.width) if data[x, y] == colour]
        if len(xs) >= 20:
            found[y] = (xs[0], xs[-1])
    return found


def test_lanes_stand_where_a_lora_acts():
    seen = run(resolve("route", "switch", every=2), steps=6)
    picture = draw_schedule(NAMES, {"switch": seen}, title="a fox")
    assert picture.mode == "RGB"
    assert picture.width == WIDTH
    assert picture.getpixel((0, 0)) == PAPER
    lane = [span for y, span in rows_of(picture, COLOURS[0]).items() if y > 500]
    left, right = min(a for a, _ in lane), max(b for _, b in lane)
    cells = (WIDTH - 28 - left - 16) / 6  # fox at full strength in steps 0 and 1 of 6
    assert (right - left + 1) / cells == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("values", [("0",), ("-1@0,2@1",), ("1e5@0,0@1",), ("0.001",)])
def test_any_weights_and_a_single_step_are_drawn(values):
    for steps in (1, 2, 120):
        bound, runs = traced(resolve("route", "merge"))
        plan = bound([object()])
        for step in range(steps):
            plan(Moment(step, steps, 0.0, None, tuple(Schedule.parse(v).at(step, steps) for v in values)))
        assert draw_schedule(["a long name " * 9], {"merge": by_step(runs[0])}, title="x").height > 300
    with pytest.raises(ValueError, match="at least one run"):
        draw_schedule(["a"], {"merge": []}, title="x")


def test_the_command_draws_beside_the_picture_and_prints_notes(tmp_path, capsys):
    out = tmp_path / "fox.png"
    prompt = "a korv fox [<lora:korv:2.9>::0.5] <lora:merlo:0.5:2:step=1-3>"
    with pytest.raises(SystemExit) as ended:
        main(["compose", prompt, "--method", "merge", "--steps", "4", "--seed", "1", "--show-schedule", "--out",
              str(out)])  # fmt: skip
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    assert printed.out.split() == [str(out), str(tmp_path / "fox_schedule.png")]
    assert Image.open(tmp_path / "fox_schedule.png").width == WIDTH
    assert "note: korv at 2.9, merlo at 2: together" in printed.err
    assert "method merge, step 1" in printed.err


def test_presets_of_a_file_in_the_command(tmp_path, capsys):
    file = tmp_path / "presets.txt"
    file.write_text("MINE:1,1,1,1,1,1,1,1,0,0,0,0\n")
    arguments = ["compose", "a korv fox <lora:korv:1:lbw=MINE>", "--steps", "1", "--seed", "1", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--lbw-presets", str(file), "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert not ended.value.code, printed.err
    assert '"up_blocks.1.' in printed.out
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "lbw=MINE: unknown lbw preset 'MINE'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*arguments[:1], "a fox", "--lora", "korv", "--block", "korv:lbw=LOUD", "--out", str(tmp_path)])
    assert "--block korv:lbw=LOUD: unknown lbw preset" in capsys.readouterr().err
