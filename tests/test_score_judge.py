"""The judge: both orders, ties, what cannot be read, retries, cost, and that its failures cost nothing else."""

import math
import socket

import pytest
from PIL import Image

from multilora.lab.score.judge import HOPELESS, Judge, Verdict, read_verdict
from multilora.lab.score.judge_http import Endpoint
from multilora.lab.score.record import ScoreFailed, measure, ready, resolve
from tests.judge_server import GREY, brighter, serving


def endpoint(server, **settings):
    waits = []
    settings = {"first_wait": 1.0, "sleep": waits.append, "chance": lambda: 1.0, "timeout": 20.0} | settings
    return Endpoint(server.url, "vlm", **settings), waits


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The robe is missing in B.\nVERDICT: A", "A"),
        ("VERDICT: B", "B"),
        ("**VERDICT:** **B**", "B"),
        ("Verdict: TIE.", "TIE"),
        ("verdict: a tie", "TIE"),
        ("verdict: draw", "TIE"),
        ("VERDICT: Picture B", "B"),
        ("The winner is A.", "A"),
        ('{"reason": "sharper", "winner": "B"}', "B"),
        ('```json\n{"verdict": "A"}\n```', "A"),
        ("<think>VERDICT: A? no.</think>\nVERDICT: B", "B"),
        ("VERDICT: A because it has the robe", "A"),
        ("verdict: b", "B"),
        ("B", "B"),
        (" (A). ", "A"),
        ("tie", "TIE"),
        ("", None),
        ("Both are nice.", None),
        ("A fox in a robe.", None),
        ("VERDICT: A, or VERDICT: B", None),
        ("VERDICT: A or B", None),
        ("VERDICT: A/B", None),
        ("VERDICT: C", None),
        ("My answer: a robe is in both pictures", None),
        ("VERDICT: unclear", None),
    ],
)
def test_verdicts_are_read(text, want):
    assert read_verdict(text) == want


@pytest.mark.parametrize(
    ("answers", "points", "consistent"),
    [
        (("first", "first"), 1.0, True),
        (("second", "second"), 0.0, True),
        (("tie", "tie"), 0.5, True),
        (("first", "second"), 0.5, False),  # the place won, not the picture
        (("first", "tie"), 0.75, False),
        (("tie", "second"), 0.25, False),
    ],
)
def test_points_are_the_mean_of_both_orders(answers, points, consistent):
    assert Verdict(answers).points == points
    assert Verdict(answers).consistent is consistent
    assert math.isnan(Verdict((answers[0], None)).points)


# -- an endpoint -----------------------------------------------------------------------------------------------------


def test_every_pair_is_asked_both_ways_and_the_brighter_wins():
    with serving(brighter) as server:
        scorer = resolve("judge", model="vlm", url=server.url, parallel=3).ready()
        nearly = Image.new("RGB", (25, 16), GREY[5].getpixel((0, 0)))
        got = scorer(GREY[1:6], "a grey card", references=[GREY[2], GREY[2], GREY[2], [GREY[1], GREY[9]], nearly])
        assert got == [0.0, 0.5, 1.0, 0.5, 0.5]
        tally = scorer.source.tally
        assert len(server.asked) == tally.calls == 10  # card 2 and itself: a tie without a question
        assert (tally.input_tokens, tally.output_tokens) == (1000, 70)
        assert tally.ties == 2
        assert tally.bias == 0.5
        assert (tally.unreadable, tally.refused, tally.kept) == (0, 0, 0)
        seen = [tuple(p.convert("L").getpixel((0, 0)) for p in a.pictures) for a in server.asked]
        assert sorted(seen) == sorted(pair[::-1] for pair in seen)
        first = server.asked[0]
        assert "a grey card" in first.text
        assert first.body["model"] == "vlm"
        assert first.headers["Authorization"] is None
        assert "vlm at 127.0.0.1" in scorer.model


def test_a_judge_that_follows_the_place_gives_half_points_and_is_found_out():
    with serving(lambda asked, n: "VERDICT: A") as server:
        judge = Judge(endpoint(server)[0])
        verdicts = list(judge.compare([(GREY[0], GREY[5], "x"), (GREY[3], GREY[1], "y")]))
    assert [v.points for v in verdicts] == [0.5, 0.5]
    assert not any(v.consistent for v in verdicts)
    assert judge.tally.bias == 1.0


def test_large_pictures_are_shrunk_and_small_ones_sent_as_they_are():
    with serving(brighter) as server:
        noise = Image.effect_noise((1200, 600), 80).convert("RGB")
        small = Image.effect_noise((50, 40), 80).convert("RGB")
        list(Judge(endpoint(server, side=300)[0]).compare([(noise, small, "x")]))
        large, same = server.asked[0].pictures
    assert {large.size, same.size} == {(300, 150), (50, 40)}
    assert small.tobytes() in (large.tobytes(), same.tobytes())


def test_unreadable_answers_are_counted_asked_again_and_then_given_up():
    def reply(asked, number):
        if "silent" in asked.text:
            return "I like both."
        return "Hm." if "alone: VERDICT" not in asked.text else brighter(asked)  # only the reminder helps

    with serving(reply) as server:
        judge = Judge(endpoint(server)[0], tries=3)
        verdicts = list(judge.compare([(GREY[1], GREY[0], "speak"), (GREY[1], GREY[0], "silent")]))
    assert verdicts[0].points == 1.0
    assert verdicts[1].answers == (None, None)
    assert math.isnan(verdicts[1].points)
    assert judge.tally.unreadable == 2 + 2 * 3
    assert judge.tally.calls == 4 + 2 * 3


def test_rivals_without_an_answer_do_not_count():
    with serving(
        lambda asked, n: "?" if asked.pictures[0].size != asked.pictures[1].size else brighter(asked)
    ) as server:
        judge = Judge(endpoint(server)[0], tries=1)
        odd = Image.new("RGB", (9, 9))
        got = judge.numbers([GREY[4], GREY[4]], ["x", "x"], [(GREY[1], odd, GREY[7]), (odd,)])
    assert got[0] == 0.5
    assert math.isnan(got[1])


def test_passing_failures_are_waited_out_with_doubled_waits():
    failures = [(503, {}), (429, {}, {"Retry-After": "9"}), (200, b"<html>"), (500, {})]

    with serving(lambda asked, n: failures[n - 1] if n <= 4 else brighter(asked)) as server:
        client, waits = endpoint(server, parallel=1)
        assert client.answer("which?", GREY[:2]).text.endswith("VERDICT: B")
    assert waits == [1.0, 9.0, 4.0, 8.0]


def test_waits_are_shortened_by_chance():
    with serving(lambda asked, n: (503, {})) as server:
        client, waits = endpoint(server, attempts=4, chance=lambda: 0.0)
        with pytest.raises(ScoreFailed, match="in 4 tries; the last: status 503"):
            client.answer("which?", GREY[:2])
    assert waits == [0.5, 1.0, 2.0]


def test_a_server_that_asks_for_an_hour_is_not_waited_for():
    with serving(lambda asked, n: (429, {}, {"Retry-After": "3600"})) as server:
        client, waits = endpoint(server)
        with pytest.raises(ScoreFailed, match="asks to wait 3600 s"):
            client.answer("which?", GREY[:2])
    assert not waits


def test_a_wrong_key_ends_it_at_once_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")

    def reply(asked, number):
        assert asked.headers["Authorization"] == "Bearer sk-very-secret"
        return 401, {"error": f"bad key {asked.headers['Authorization'].split()[1]}"}

    with serving(reply) as server:
        client, waits = endpoint(server, key="JUDGE_KEY")
        with pytest.raises(ScoreFailed, match="status 401") as failed:
            client.answer("which?", GREY[:2])
        assert len(server.asked) == 1
    assert not waits
    assert "secret" not in str(failed.value) + client.name + str(client.facts)
    assert "[key]" in str(failed.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307])
def test_a_redirect_does_not_carry_the_key_away(monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", "sk-1")
    with serving(brighter) as elsewhere:
        away = {"Location": elsewhere.url + "/chat/completions"}
        with (
            serving(lambda asked, n: (status, {}, away)) as server,
            pytest.raises(ScoreFailed, match=f"status {status}"),
        ):
            endpoint(server, key="JUDGE_KEY")[0].answer("which?", GREY[:2])
        assert not elsewhere.asked + elsewhere.looked


def test_one_refused_question_costs_one_pair_and_only_refusals_end_it():
    with serving(
        lambda asked, n: (400, {"error": "content filter"}) if "rude" in asked.text else brighter(asked)
    ) as server:
        judge = Judge(endpoint(server, parallel=1)[0])
        verdicts = list(judge.compare([(GREY[1], GREY[0], "kind"), (GREY[1], GREY[0], "rude")]))
        assert [v.answers for v in verdicts] == [("first", "first"), (None, None)]
        assert judge.tally.refused == 2
        hopeless = Judge(endpoint(server, parallel=1)[0])
        with pytest.raises(ScoreFailed, match=f"refused the first {HOPELESS} questions: .*content filter"):
            list(hopeless.compare([(GREY[1], GREY[0], f"rude {i}") for i in range(9)]))
        assert hopeless.tally.refused < 9


@pytest.mark.parametrize("body", [{"choices": []}, {"choices": [{"message": {}}]}, [], {"error": "x"}])
def test_an_answer_of_another_shape_is_a_failure_that_shows_it(body):
    with serving(lambda asked, n: (200, body)) as server, pytest.raises(ScoreFailed, match="no choices"):
        endpoint(server)[0].answer("which?", GREY[:2])


def test_answers_are_kept_and_not_paid_for_twice(tmp_path):
    pairs = [(GREY[i], GREY[i + 1], f"card {i}") for i in range(4)]
    path = str(tmp_path / "answers.sqlite")
    with serving(lambda asked, n: brighter(asked) if n <= 5 else (403, {})) as server:
        stopped = Judge(endpoint(server, parallel=1)[0], cache=path)
        with pytest.raises(ScoreFailed, match="403"):
            list(stopped.compare(pairs))
        server.reply = brighter
        for _ in range(2):
            again = Judge(endpoint(server, parallel=1)[0], cache=path)
            assert [v.points for v in again.compare(pairs)] == [0.0] * 4
        assert len(server.asked) == 6 + 3
        assert (again.tally.calls, again.tally.kept) == (0, 8)
        other = Judge(endpoint(server, parallel=1)[0], "quality", cache=path)
        list(other.compare(pairs[:1]))
        assert other.tally.kept == 0


def test_cost_is_told_before_anything_is_asked():
    with serving(brighter) as server:
        judge = Judge(endpoint(server)[0], prices=(2.0, 10.0))
        told = judge.estimate(["a fox"] * 10, size=(768, 512))
        assert not server.asked
        assert (told.pairs, told.calls, told.pictures) == (10, 20, 40)
        # OpenAI's rule: 2 tiles of 512 px a picture
        assert told.input_tokens == 20 * (len(judge.question("a fox")) // 4 + 2 * (85 + 2 * 170))
        assert told.output_tokens == 20 * 300
        assert told.money == pytest.approx((told.input_tokens * 2 + told.output_tokens * 10) / 1e6)
        assert "10 pairs: 20 calls with 40 pictures" in str(told)
        assert math.isnan(Judge(endpoint(server)[0]).estimate(["x"]).money)


# -- failures cost nothing else --------------------------------------------------------------------------------------


def test_an_unreachable_judge_costs_no_pictures_and_no_other_scores(monkeypatch):
    monkeypatch.setattr("multilora.lab.score.judge_http.time.sleep", lambda seconds: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        judge = resolve("judge", model="vlm", url=url)
        judge.source.answerer._sleep = lambda seconds: None
        presence = resolve("presence")
        there, failed = ready([judge, presence])  # before any picture
        assert there == [presence]
        assert "no answer from http://127.0.0.1" in failed["judge"]
        assert "refused" in failed["judge"]
        images = [Image.effect_noise((128, 128), 60).convert("RGB") for _ in range(2)]
        found = measure([judge, presence], images, prompts="a", elements="zib", references=images[:1])
    assert set(found.values) == {"presence"}
    assert len(found.values["presence"]) == 2
    assert "no answer" in found.failed["judge"]


def test_servers_that_want_other_fields_get_them():
    with serving(
        lambda asked, n: (400, {"error": "max_tokens"}) if "max_tokens" in asked.body else brighter(asked)
    ) as server:
        fields = '{"max_tokens": null, "temperature": null, "max_completion_tokens": 800, "seed": 5}'
        scorer = resolve("judge", model="vlm", url=server.url, request=fields)
        assert scorer([GREY[3]], "x", references=[GREY[1]]) == [1.0]
        body = server.asked[0].body
        assert (body["max_completion_tokens"], body["seed"]) == (800, 5)
        assert not {"max_tokens", "temperature"} & set(body)
        assert scorer.source.estimate(["x"]).output_tokens == 2 * 800


def test_a_server_without_a_list_of_models_is_reached():
    with serving(brighter) as server:
        Endpoint(server.url.replace("/v1", "/other"), "vlm").reach()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://x/v1"}, "wanted http"),
        ({"url": "file:///etc/passwd"}, "wanted http"),
        ({"url": "localhost:8000"}, "wanted http"),
        ({"url": "https://user:pw@x/v1"}, "wanted http"),
        ({"url": "http://example.org/v1", "key": "JUDGE_KEY"}, "unencrypted"),
        ({"url": "https://example.org/v1", "key": "NO_SUCH_KEY"}, "has no NO_SUCH_KEY"),
        ({"url": "http://localhost/v1", "request": "{max"}, "not JSON"),
        ({"url": "http://localhost/v1", "request": '{"messages": []}'}, "wanted an object of further fields"),
        ({}, "wanted the folder"),
        ({"model": "", "url": "http://localhost/v1"}, "needs a model"),
    ],
)
def test_bad_settings_are_said_before_anything_is_asked(settings, message, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match=message):
        resolve("judge", **{"model": "vlm", **settings}).load()
