"""TextComposer, streaming, threads, cancel, what is left behind, and what is refused."""

import copy
import hashlib
import threading

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from multilora import files
from multilora.lora import Card, Lora
from multilora.method import UnknownName
from multilora.pipelines.text import Cancelled, TextComposer, composing_text
from multilora.pipelines.text_load import load_text
from tests import tiny, tiny_text
from tests.test_text import prompts, say


def composer(family="llama", k=2):
    made = TextComposer(tiny_text.model(family), tiny_text.tokenizer(family == "t5"))
    for lora, name in zip(tiny_text.loras(family, k), ("rude", "sort", "count"), strict=False):
        made.add(lora, name)
    return made


def state(model):
    """Bytes of all weights, class, hooks and instance attributes."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    return found.hexdigest(), type(model), hooks, sorted(model.__dict__), [type(m) for m in model.modules()]


MORE = {"max_new_tokens": 8, "eos_token_id": None}


# -- the composer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_text.FAMILIES)
def test_texts_in_texts_out(family):
    """Prompts of different lengths in one batch are answered as each alone, with weights of its own."""
    it = composer(family)
    asked = ["abc=", "hello world", "2+3="]
    weights = [{"rude": 1.0}, {"sort": -0.7, "rude": 0.5}, {}]
    together = it(asked, weights=weights, **MORE)
    assert together == [it(one, weights=own, **MORE) for one, own in zip(asked, weights, strict=True)]
    assert len(set(together)) == 3
    ids = it.tokenizer(asked[2], return_tensors="pt").input_ids
    bare = it.model.generate(ids, do_sample=False, pad_token_id=0, **MORE)
    start = 0 if family == "t5" else ids.shape[1]
    assert together[2] == it.tokenizer.decode(bare[0, start:], skip_special_tokens=True)


def test_weights_of_the_composer_and_of_the_request():
    it = composer()
    it.loras["rude"] = it.loras["rude"].scaled(0.5)
    default = it("abc", **MORE)
    assert default == it("abc", weights={"rude": 0.5, "sort": 1.0}, **MORE)
    assert default != it("abc", weights={"rude": 0.5}, **MORE)
    assert it("abc", "composite", **MORE) != default
    assert it("abc", "switch", {"every": 2}, **MORE) != default
    it.remove("rude")
    assert it("abc", **MORE) == it("abc", weights={"sort": 1.0}, **MORE)


def test_sampling_is_seeded_and_leaves_the_global_numbers():
    it = composer()
    before = torch.random.get_rng_state()
    once = it(["ab", "cd"], do_sample=True, top_k=0, seed=7, **MORE)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert it(["ab", "cd"], do_sample=True, top_k=0, seed=7, **MORE) == once
    assert it(["ab", "cd"], do_sample=True, top_k=0, seed=8, **MORE) != once
    assert len(it("ab", do_sample=True, num_return_sequences=3, **MORE)) == 3


def test_a_composer_without_loras_is_the_model():
    bare = TextComposer(tiny_text.model("llama"), tiny_text.tokenizer())
    assert bare("abc", **MORE) == composer()("abc", weights={}, **MORE)


def test_from_a_folder_with_lora_files(tmp_path):
    for family in tiny_text.FAMILIES:
        folder = tmp_path / family
        tiny_text.model(family).save_pretrained(folder)
        tiny_text.tokenizer(family == "t5").save_pretrained(folder)
        lora = files.save(tiny_text.loras(family, 1)[0], tmp_path / f"{family}-rude", format="peft")
        it = TextComposer.from_pretrained(folder, device="cpu")
        it.add(lora, weight=0.8)
        assert it("abc", **MORE) == composer(family, 1)("abc", weights={"rude": 0.8}, **MORE)


# -- streaming and cancelling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_text.FAMILIES)
def test_a_stream_is_the_answer_in_pieces(family):
    it = composer(family)
    wanted = it("abc def", "composite", **MORE)
    pieces = list(it.stream("abc def", "composite", **MORE))
    assert "".join(pieces) == wanted


def test_a_streamer_of_transformers_in_a_block():
    model, tokenizer = tiny_text.model("llama"), tiny_text.tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = tokenizer("abc def", return_tensors="pt").input_ids
    with composing_text(model, tiny_text.loras("llama", 2), "composite"):
        worker = threading.Thread(
            target=model.generate, args=(ids,), kwargs={"streamer": streamer, "pad_token_id": 0, **MORE}
        )
        worker.start()
        text = "".join(streamer)
        worker.join()
    assert text == composer()("abc def", "composite", **MORE)


def test_leaving_a_stream_stops_the_model():
    it, seen = composer(), []
    said = it.tokenizer("a b c d")["input_ids"]  # words with blanks: a streamer keeps a word until the next blank

    def says(ids, scores):
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([said[len(seen) % len(said)]]), 0.0)

    hook = it.model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    before = state(it.model)
    stream = it.stream("a b c d", **{**MORE, "max_new_tokens": 2000}, logits_processor=[says])
    assert next(stream).strip() in "abcd"
    stream.close()
    hook.remove()
    assert len(seen) < 2000
    assert state(it.model)[0] == before[0]
    assert it("abc", **MORE)


def test_errors_of_a_stream_are_raised_where_it_is_read():
    with pytest.raises(ValueError, match="unknown route method 'merg'"):
        list(composer().stream("abc", "merg", **MORE))
    with pytest.raises(ValueError, match="one text"):
        list(composer().stream(["abc"], **MORE))


class _After(StoppingCriteria):
    """Sets a flag after n tokens."""

    def __init__(self, n, flag):
        self.n, self.flag = n, flag

    def __call__(self, ids, scores, **kwargs):
        self.n -= 1
        if not self.n:
            self.flag.set()
        return torch.zeros(len(ids), dtype=torch.bool)


@pytest.mark.parametrize("family", tiny_text.FAMILIES)
def test_cancel_and_errors_leave_the_model_as_it_was(family):
    it, flag = composer(family), threading.Event()
    before = state(it.model)
    stop = StoppingCriteriaList([_After(3, flag)])
    for form in ("side", "rebuilt", "bank"):
        flag.clear()
        stop[0].n = 3
        with pytest.raises(Cancelled, match="before token 4"):
            it("abc", "composite", form=form, cancel=flag, stopping_criteria=stop, **MORE)
        assert state(it.model) == before
    with pytest.raises(KeyboardInterrupt), composing_text(it.model, tiny_text.loras(family, 2), form="rebuilt"):
        say(it.model, prompts(family))
        raise KeyboardInterrupt
    assert state(it.model) == before


def test_two_threads_each_get_what_they_would_have_got_alone():
    it = composer()
    jobs = [("abc", "merge", {"rude": 1.0}), ("abc", "composite", {"rude": 1.0, "sort": 1.0}), ("abc", "merge", {}),
            ("hello", "switch", {"rude": 1.0, "sort": 1.0})]  # fmt: skip
    wanted = [it(p, m, weights=w, **MORE) for p, m, w in jobs]
    found = [None] * len(jobs) * 2

    def work(n):
        prompt, method, weights = jobs[n % len(jobs)]
        found[n] = it(prompt, method, weights=weights, **MORE)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted * 2


def test_generations_of_two_threads_in_one_block_wait_for_each_other():
    model, sets = tiny_text.model("llama"), tiny_text.loras("llama", 2)
    batches = [prompts("llama", seed=s) for s in range(3)]
    found = {}
    with composing_text(model, sets, "composite"):
        wanted = [say(model, batch) for batch in batches]
        threads = [threading.Thread(target=lambda s=s: found.update({s: say(model, batches[s])})) for s in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[s], wanted[s]) for s in range(3))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_text.FAMILIES)
def test_beams_and_assistants_are_refused_by_name_and_nothing_stays(family):
    model, sets, inputs = tiny_text.model(family), tiny_text.loras(family, 2), prompts(family, 1)
    before, bare = state(model), say(model, inputs)
    with composing_text(model, sets, "composite"):
        with pytest.raises(ValueError, match=r"beam search under composite.*2 passes.*num_beams=1"):
            say(model, inputs, num_beams=2)
        with pytest.raises(ValueError, match="beam search under composite"):
            model.generate(**inputs, generation_config=GenerationConfig(num_beams=3, max_new_tokens=3))
        with pytest.raises(ValueError, match="assisted generation under composite"):
            say(model, inputs, prompt_lookup_num_tokens=3)
        assert say(model, inputs).shape[1] >= 12
    with (
        composing_text(model, sets, "switch", every=1),
        pytest.raises(ValueError, match=r"assisted generation.*changes"),
    ):
        say(model, inputs, prompt_lookup_num_tokens=3)
    assert state(model) == before
    assert torch.equal(say(model, inputs), bare)


def test_assisted_decoding_under_one_row_says_the_same():
    model, sets, inputs = tiny_text.model("llama"), tiny_text.loras("llama", 2), prompts("llama", 1)
    with composing_text(model, sets):
        assert torch.equal(say(model, inputs, prompt_lookup_num_tokens=2), say(model, inputs))


def test_loras_of_another_base_are_refused():
    qwen = Lora(dict(tiny_text.loras("qwen2", 1)[0]), Card(name="fox", family="qwen2"))
    t5 = tiny_text.loras("t5", 1)[0]
    picture = tiny.lora_for(tiny.sd15(), name="robe")
    wide = Lora({k: p for k, p in tiny_text.loras("llama", 1)[0].items() if "down_proj" in k}, Card(name="wide"))
    wide = Lora({k.replace("down_proj", "gate_proj"): p for k, p in wide.items()}, wide.card)
    it, model = composer(), tiny_text.model("llama")
    before = state(model)
    refused = [
        (qwen, "'fox' was made for a qwen2 model, this is LlamaForCausalLM"),
        (t5, r"t50: made for another model.*encoder\.block\.0"),
        (picture, r"robe.*unet"),
        (wide, r"wide.*\[28, 16\].*\[16, 28\]"),
    ]
    for lora, words in refused:
        with pytest.raises(ValueError, match=words):
            it.add(lora)
        with pytest.raises(ValueError, match=words), composing_text(model, [*tiny_text.loras("llama", 1), lora]):
            pass
    assert list(it.loras) == ["rude", "sort"]
    assert state(model) == before


def test_a_tokenizer_that_does_not_belong():
    more = copy.deepcopy(tiny_text.tokenizer())
    more.add_tokens(["zib", "zab", "zob"])
    with pytest.raises(ValueError, match=r"42 tokens\) does not belong to this LlamaForCausalLM, which embeds 40"):
        TextComposer(tiny_text.model("llama"), more)
    it = composer()
    with pytest.raises(ValueError, match="5 of its 6 tokens are unknown"):
        it("HELLO=", **MORE)
    with pytest.warns(UserWarning, match="1 of its 6 tokens"):
        assert it("Hello=", **MORE)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda it: it([], **MORE), "prompts"),
        (lambda it: it("", **MORE), "no tokens"),
        (lambda it: it(["a", 3], **MORE), "prompts"),
        (lambda it: it("a", weights={"rood": 1.0}, **MORE), "Nearest: rude"),
        (lambda it: it("a", weights={"rude": "x"}, **MORE), "weight of LoRA 'rude'"),
        (lambda it: it("a", weights={"rude": float("nan")}, **MORE), "weight of LoRA 'rude'"),
        (lambda it: it(["a", "b", "c"], weights=[{}, {}], **MORE), "2 entries for 3 prompts"),
        (lambda it: it("a", weights=[1.0], **MORE), "no mapping"),
        (lambda it: it("a", "merge", {"every": 3}, **MORE), "every"),
        (lambda it: it("a", "swich", **MORE), "Nearest: switch"),
        (lambda it: it("a", "switch", max_new_tokens=1), "at least one step per LoRA"),
        (lambda it: it("a", seed=-1, **MORE), "seed=-1"),
        (lambda it: it("a", form="fast", **MORE), "form 'fast'"),
        (lambda it: it("a", cancel=3, **MORE), "cancel=3"),
        (lambda it: it.add(tiny_text.loras("llama", 1)[0], "rude"), "'rude' is in the composition"),
        (lambda it: it.add("nowhere.safetensors"), "no such"),
        (lambda it: it.add("nowhere"), "unknown text LoRA"),
        (lambda it: it.add(tiny_text.loras("llama", 1)[0], "x", blocks={"nothing.*": 0.5}), "matches none"),
        (lambda it: it.remove("x"), "unknown LoRA"),
        (lambda it: load_text("nowhere/at/all"), "no such folder"),
        (lambda it: load_text("tests"), "no config.json"),
        (lambda it: TextComposer(torch.nn.Linear(2, 2), it.tokenizer), "wanted a transformers"),
        (lambda it: composing_text(it.model, [], weights=[1.0]).__enter__(), "1 values for 0"),
        (lambda it: composing_text(it.model).__enter__(), "none are on the model"),
        (lambda it: composing_text(it.model, it.loras, weights=[[1, 1], 1]).__enter__(), "some entries are lists"),
        (lambda it: composing_text(it.model, it.loras, weights=[[1, 1], [1]]).__enter__(), "1 values in row 1"),
    ],
)
def test_bad_arguments(call, words):
    it = composer()
    before = state(it.model)
    with pytest.raises(ValueError, match=words):
        call(it)
    assert state(it.model) == before
    assert list(it.loras) == ["rude", "sort"]


def test_unknown_names_are_unknown_names():
    with pytest.raises(UnknownName):
        composer()("a", weights={"rood": 1.0}, **MORE)


def test_what_several_passes_cannot_take():
    model, sets, inputs = tiny_text.model("llama"), tiny_text.loras("llama", 2), prompts("llama", padded=False)
    filled = model(inputs["input_ids"], use_cache=True).past_key_values
    with composing_text(model, sets, "composite"):
        with pytest.raises(ValueError, match="labels: composite averages 2 passes"):
            model(**inputs, labels=inputs["input_ids"])
        with pytest.raises(ValueError, match="filled elsewhere"):
            model(inputs["input_ids"][:, :1], past_key_values=filled)
    with (
        composing_text(model, sets, weights=[[1.0, 0.0], [0.0, 1.0]]),
        pytest.raises(ValueError, match=r"2 rows.* has 3"),
    ):
        model(**inputs)
    t5, own = tiny_text.model("t5"), prompts("t5")
    given = t5.encoder(**own)
    with (
        composing_text(t5, tiny_text.loras("t5", 2), "composite"),
        pytest.raises(ValueError, match="encoder's output"),
    ):
        t5(encoder_outputs=given, attention_mask=own["attention_mask"], decoder_input_ids=torch.zeros(3, 1, dtype=int))
