"""Language models under LoRAs: logits against PEFT, generation against merged weights and hand-written loops."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from transformers import LogitsProcessor, LogitsProcessorList

import multilora as ml
from multilora import files
from multilora.lora import Lora
from multilora.pipelines.text import composing_text
from tests import tiny_text

ONE = 1e-5
WEIGHTS = [0.9, -0.6, 0.7]


@pytest.fixture(params=tiny_text.FAMILIES)
def family(request):
    return request.param


def prompts(family, rows=3, length=7, seed=0, padded=True):
    """input_ids and attention_mask of a batch, padded left for a decoder, right for an encoder."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 39, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for r in range(rows if padded else 0):
        place = slice(length - r, length) if family == "t5" and r else slice(0, r)
        mask[r, place] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model, family, inputs, **more):
    if family == "t5":
        start = torch.arange(4).repeat(len(inputs["input_ids"]), 1)
        more = {"decoder_input_ids": start, **more}
    with torch.no_grad():
        return model(**inputs, **more).logits


def weighted(lora, weight):
    return weight * lora


def with_peft(family, sets):
    """The model with PEFT's own adapters l0, l1, ... holding the LoRAs."""
    peft = None
    for i, lora in enumerate(sets):
        rank = next(iter(lora.values())).rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[f"{p}" for p in lora])
        if peft is None:
            peft = get_peft_model(copy.deepcopy(tiny_text.model(family)), config, adapter_name="l0")
        else:
            peft.add_adapter(f"l{i}", config)
        set_peft_model_state_dict(peft, files.state(lora, "peft"), adapter_name=f"l{i}")
    return peft.eval()


def merged_model(family, lora):
    """A copy of the model with the LoRA added into its weights in float64."""
    model = copy.deepcopy(tiny_text.model(family))
    for path, part in lora.items():
        weight = model.get_submodule(path).weight
        weight.data = (weight.double() + part.delta().double()).float()
    return model


def say(model, inputs, **more):
    return model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, "eos_token_id": None,
                                       "pad_token_id": 0, **more})  # fmt: skip


# -- logits against PEFT ----------------------------------------------------------------------------------------------


def test_one_lora_equals_peft_set_adapter(family):
    sets, model, inputs = tiny_text.loras(family, 2), tiny_text.model(family), prompts(family)
    peft = with_peft(family, sets)
    bare = logits(model, family, inputs)
    for i, lora in enumerate(sets):
        peft.set_adapter(f"l{i}")
        wanted = logits(peft, family, inputs)
        with composing_text(model, [lora]):
            assert (logits(model, family, inputs) - wanted).abs().max() < ONE
        assert (wanted - bare).abs().max() > 0.1
    assert torch.equal(logits(model, family, inputs), bare)


@pytest.mark.parametrize("form", ["side", "rebuilt", "bank"])
def test_merge_equals_peft_cat(family, form):
    sets, model, inputs = tiny_text.loras(family, 3), tiny_text.model(family), prompts(family)
    peft = with_peft(family, sets)
    peft.add_weighted_adapter(["l0", "l1", "l2"], WEIGHTS, "all", combination_type="cat")
    peft.set_adapter("all")
    wanted = logits(peft, family, inputs)
    with composing_text(model, sets, "merge", weights=WEIGHTS, form=form):
        assert (logits(model, family, inputs) - wanted).abs().max() < ONE
    peft.set_adapter("l0")
    assert (wanted - logits(peft, family, inputs)).abs().max() > 0.1


def test_rows_of_a_batch_equal_peft_mixed_batch_and_single_runs(family):
    sets, model = tiny_text.loras(family, 2), tiny_text.model(family)
    inputs = prompts(family, 4)
    names = ["l1", "__base__", "l0", "l1"]
    rows = [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    peft = with_peft(family, sets)
    wanted = logits(peft, family, inputs, adapter_names=names)
    with composing_text(model, sets, weights=rows):
        ours = logits(model, family, inputs)
    assert (ours - wanted).abs().max() < ONE
    rows = [[0.5, -1.0], [0.0, 0.0], [1.0, 0.3], [0.2, 0.0]]
    with composing_text(model, sets, weights=rows):
        ours = logits(model, family, inputs)
    for r, row in enumerate(rows):
        one = {key: value[r : r + 1] for key, value in inputs.items()}
        with composing_text(model, sets, weights=row):
            assert (ours[r : r + 1] - logits(model, family, one)).abs().max() < ONE


def test_adapters_that_peft_holds_are_taken_over():
    sets, inputs = tiny_text.loras("llama", 2), prompts("llama")
    peft = with_peft("llama", sets)
    with composing_text(tiny_text.model("llama"), sets):
        wanted = logits(tiny_text.model("llama"), "llama", inputs)
    before = logits(peft, "llama", inputs)
    with composing_text(peft, None):
        assert (logits(peft, "llama", inputs) - wanted).abs().max() < ONE
        tokens = say(peft, inputs)
    assert torch.equal(logits(peft, "llama", inputs), before)
    with composing_text(tiny_text.model("llama"), sets):
        assert torch.equal(say(tiny_text.model("llama"), inputs), tokens)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["side", "rebuilt", "bank"])
def test_generation_equals_a_model_with_merged_weights(family, form):
    sets, model, inputs = tiny_text.loras(family, 3), tiny_text.model(family), prompts(family)
    together = ml.merge(sets, WEIGHTS)
    wanted = say(merged_model(family, together), inputs)
    with composing_text(model, sets, weights=WEIGHTS, form=form):
        assert torch.equal(say(model, inputs), wanted)
    with composing_text(model, [together], form=form):
        assert torch.equal(say(model, inputs), wanted)
    assert not torch.equal(say(model, inputs), wanted)


def test_generation_of_rows_equals_single_generations(family):
    sets, model, inputs = tiny_text.loras(family, 2), tiny_text.model(family), prompts(family, padded=False)
    rows = [[1.0, 0.0], [0.0, 0.0], [-0.5, 0.8]]
    for method in ("merge", "composite", "sum_of_differences"):
        with composing_text(model, sets, method, weights=rows):
            ours = say(model, inputs)
        for r, row in enumerate(rows):
            with composing_text(model, sets, method, weights=row):
                alone = say(model, {key: value[r : r + 1] for key, value in inputs.items()})
            assert torch.equal(ours[r : r + 1], alone), (method, r)


def test_several_sequences_of_one_row(family):
    """num_return_sequences repeats rows side by side; so do the weights and every pass's encoder output."""
    sets, model, inputs = tiny_text.loras(family, 2), tiny_text.model(family), prompts(family, 2)
    rows = [[1.0, 0.4], [0.0, 1.0]]
    with composing_text(model, sets, "composite", weights=rows):
        greedy = say(model, inputs)
        torch.manual_seed(3)
        ours = say(model, inputs, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(ours, greedy.repeat_interleave(2, 0))


def test_equal_loras_averaged_are_one(family):
    """k equal LoRAs with averaged logits say what one says, greedy and sampled."""
    (lora,), model, inputs = tiny_text.loras(family, 1), tiny_text.model(family), prompts(family)
    for more in ({}, {"do_sample": True, "top_k": 0, "temperature": 1.5}):
        with composing_text(model, [lora], weights=[0.8]):
            torch.manual_seed(5)
            wanted = say(model, inputs, **more)
        with composing_text(model, [lora] * 3, "composite", weights=[0.8] * 3) as conductor:
            torch.manual_seed(5)
            assert torch.equal(say(model, inputs, **more), wanted)
        assert set(conductor.passes) == {3}


def hand(family, inputs, models_at, tokens=12):
    """Greedy decoding without any cache: at token n the mean logits of `models_at(n)`, [(model, share)]."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    said = torch.zeros(len(ids), 1, dtype=torch.long) if family == "t5" else ids
    scores = []
    for n in range(tokens):
        total = 0.0
        for model, share in models_at(n):
            with torch.no_grad():
                if family == "t5":
                    out = model(**inputs, decoder_input_ids=said).logits
                else:
                    positions = (mask.cumsum(1) - 1).clamp(min=0)
                    out = model(said, attention_mask=mask, position_ids=positions, use_cache=False).logits
            total = total + share * out[:, -1].double()
        scores.append(total)
        said = torch.cat([said, total.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(len(ids), 1, dtype=torch.long)], 1)
    return said, torch.stack(scores, 1)


@pytest.mark.parametrize("form", ["side", "bank"])
def test_composite_equals_a_hand_loop_without_cache(family, form):
    sets, model, inputs = tiny_text.loras(family, 3), tiny_text.model(family), prompts(family)
    alone = [merged_model(family, weighted(lora, w)) for lora, w in zip(sets, WEIGHTS, strict=True)]
    wanted, scores = hand(family, inputs, lambda n: [(m, 1 / 3) for m in alone])
    with composing_text(model, sets, "composite", weights=WEIGHTS, form=form) as conductor:
        made = say(model, inputs, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(made.sequences, wanted)
    assert (torch.stack(made.logits, 1) - scores).abs().max() < 1e-4
    assert conductor.passes == [3] * 12
    assert not torch.equal(say(alone[0], inputs), wanted)


def test_sum_of_differences_equals_a_hand_loop(family):
    sets, model, inputs = tiny_text.loras(family, 2), tiny_text.model(family), prompts(family)
    alone = [merged_model(family, lora) for lora in sets]
    wanted, _ = hand(family, inputs, lambda n: [(model, -1.0), *((m, 1.0) for m in alone)])
    with composing_text(model, sets, "sum_of_differences"):
        assert torch.equal(say(model, inputs), wanted)


@pytest.mark.parametrize("form", ["side", "rebuilt", "bank"])
def test_switch_equals_a_hand_loop(form):
    """Two tokens a LoRA. The cache holds what each LoRA wrote: the hand loop hands its own from one to another."""
    family = "llama"
    sets, model, inputs = tiny_text.loras(family, 2), tiny_text.model(family), prompts(family, padded=False)
    alone = [merged_model(family, weighted(lora, w)) for lora, w in zip(sets, WEIGHTS, strict=False)]
    said, cache = inputs["input_ids"], None
    fed = said
    for n in range(12):
        with torch.no_grad():
            out = alone[n // 2 % 2](fed, past_key_values=cache, use_cache=True)
        cache, fed = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        said = torch.cat([said, fed], 1)
    with composing_text(model, sets, "switch", weights=WEIGHTS[:2], form=form, every=2):
        assert torch.equal(say(model, inputs), said)
    with composing_text(model, sets, "switch", weights=WEIGHTS[:2], form=form, every=6):
        assert not torch.equal(say(model, inputs), said)


def test_switch_without_cache_equals_a_hand_loop(family):
    sets, model, inputs = tiny_text.loras(family, 2), tiny_text.model(family), prompts(family)
    if family == "t5":  # its encoder runs once, under the row of the first token
        sets = [Lora({k: p for k, p in s.items() if k.startswith("decoder.")}, s.card) for s in sets]
    alone = [merged_model(family, lora) for lora in sets]
    wanted, _ = hand(family, inputs, lambda n: [(alone[n // 3 % 2], 1.0)])
    with composing_text(model, sets, "switch", every=3):
        assert torch.equal(say(model, inputs, use_cache=False), wanted)


def test_a_weight_follows_its_schedule_over_the_tokens():
    sets, model, inputs = tiny_text.loras("llama", 1), tiny_text.model("llama"), prompts("llama")
    alone = merged_model("llama", sets[0])
    wanted, _ = hand("llama", inputs, lambda n: [(model if n < 5 else alone, 1.0)])
    with composing_text(model, sets, weights=["0@0s,0@5s,1@5s"]):
        assert torch.equal(say(model, inputs, use_cache=False), wanted)


def test_the_encoder_runs_once_per_pass():
    sets, model, inputs = tiny_text.loras("t5", 3), tiny_text.model("t5"), prompts("t5")
    seen = []
    hook = model.encoder.block[0].register_forward_hook(lambda *_: seen.append(1))
    with composing_text(model, sets, "composite"):
        say(model, inputs)
    hook.remove()
    assert len(seen) == 3


@pytest.mark.parametrize("more", [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}])
def test_other_caches_and_prefills(more):
    sets, model, inputs = tiny_text.loras("llama", 2), tiny_text.model("llama"), prompts("llama")
    for method, options in (("composite", {}), ("switch", {"every": 4})):
        with composing_text(model, sets, method, **options):
            wanted = say(model, inputs)
            assert torch.equal(say(model, inputs, **more), wanted), method


def test_a_conversation_goes_on_with_its_cache():
    """A second `generate` with the cache that the first returned: each pass has its own past."""
    sets, model, inputs = tiny_text.loras("llama", 2), tiny_text.model("llama"), prompts("llama", padded=False)
    with composing_text(model, sets, "composite"):
        whole = say(model, inputs, max_new_tokens=11)
        first = say(model, inputs, max_new_tokens=5, return_dict_in_generate=True)
        mask = torch.ones_like(first.sequences)
        more = {"input_ids": first.sequences, "attention_mask": mask, "past_key_values": first.past_key_values}
        assert torch.equal(say(model, more, max_new_tokens=6), whole)


def test_beams_with_one_pass(family):
    sets, model, inputs = tiny_text.loras(family, 2), tiny_text.model(family), prompts(family)
    wanted = say(merged_model(family, ml.merge(sets, [0.5, 1.0])), inputs, num_beams=3)
    with composing_text(model, sets, weights=[0.5, 1.0]):
        assert torch.equal(say(model, inputs, num_beams=3), wanted)


class _Forbid(LogitsProcessor):
    def __call__(self, ids, scores):
        scores[:, 5:] = -torch.inf
        return scores


def test_processors_of_logits_act_on_the_average(family):
    sets, model, inputs = tiny_text.loras(family, 2), tiny_text.model(family), prompts(family)
    with composing_text(model, sets, "composite"):
        made = say(model, inputs, logits_processor=LogitsProcessorList([_Forbid()]))
    assert made[:, -12:].max() < 5
