"""The trainer of LoRAs for language models: data, which tokens the loss counts, exact resume, processes, refusals."""

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from multilora import files
from multilora.attach import attached
from multilora.lab.train.data import BadData
from multilora.lab.train.text import answer_losses, train
from multilora.lab.train.text_data import IGNORED, holds_texts, padded, read_texts, tokenised
from multilora.pipelines.denoise import Cancelled
from tests import tiny_text

PAIRS = [{"prompt": f"{w}=", "completion": w[::-1]} for w in ("abc", "de", "fghij", "kl", "m", "nopq", "rst")]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    (made / "a.jsonl").write_text("\n".join(map(json.dumps, PAIRS[:3])) + "\n\n")
    (made / "b.jsonl").write_text("\n".join(map(json.dumps, PAIRS[3:])))
    return made


def small(data, path, family="llama", **settings):
    given = {"rank": 2, "steps": 6, "batch": 2, "lr": 1e-2, "checkpoint_every": 2, "dtype": torch.float32}
    seq2seq = family == "t5"
    return train(data, tiny_text.model(family), tiny_text.tokenizer(seq2seq), path, **{**given, **settings})


# -- data -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_with_file_and_line(folder):
    found = read_texts(folder)
    assert [(e.prompt, e.completion) for e in found] == [(p["prompt"], p["completion"]) for p in PAIRS]
    assert [e.where for e in found[2:4]] == ["a.jsonl, line 3", "b.jsonl, line 1"]
    assert read_texts(folder / "a.jsonl") == found[:3]


def test_what_is_a_folder_of_texts(folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "metadata.jsonl").write_text("{}")
    assert holds_texts(folder)
    assert holds_texts(folder / "a.jsonl")
    assert not holds_texts(pictures)
    assert not holds_texts(tmp_path / "none")


BAD_LINES = {
    "not JSON": ('{"prompt": "a"', ("a.jsonl, line 2", "not JSON")),
    "a list": ('["a", "b"]', ("a.jsonl, line 2", "list", '"prompt"')),
    "mislabelled": ('{"instruction": "a", "output": "b"}', ("a.jsonl, line 2", "no 'text'", "'instruction'")),
    "no completion": ('{"prompt": "a", "answer": "b"}', ("a.jsonl, line 2", "no 'completion'", "'answer'")),
    "a number": ('{"prompt": "2+3=", "completion": 5}', ("a.jsonl, line 2", "'completion' is a int")),
    "empty completion": ('{"prompt": "a", "completion": " "}', ("a.jsonl, line 2", "'completion' is empty")),
    "both kinds": ('{"prompt": "a", "completion": "b", "text": "c"}', ("a.jsonl, line 2", "both")),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named_with_file_and_line(tmp_path, case):
    line, words = BAD_LINES[case]
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIRS[0]) + "\n" + line)
    with pytest.raises(BadData) as error:
        small(tmp_path, tmp_path / "out")
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


def test_bad_folders(tmp_path):
    for data, words in [(tmp_path / "none", "no such"), (tmp_path, r"no \.jsonl"), ([], "no example"), (3, "int")]:
        with pytest.raises(BadData, match=words):
            read_texts(data)
    (tmp_path / "a.jsonl").write_text(" \n")
    with pytest.raises(BadData, match=r"a\.jsonl: empty"):
        read_texts(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(BadData, match=r"a\.jsonl: not UTF-8"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    ("entry", "family", "words"),
    [
        ({"prompt": "a" * 30, "completion": "b"}, "llama", "example 1: no token to learn within 20"),
        ({"prompt": "a", "completion": "Ä"}, "llama", "example 1: 'Ä' has characters that the tokenizer"),
        ({"text": "abc"}, "t5", "example 1: an encoder-decoder"),
    ],
)
def test_examples_that_cannot_be_learned(tmp_path, entry, family, words):
    with pytest.raises(BadData, match=words):
        small([entry], tmp_path / "out", family, length=20)


# -- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_text.FAMILIES)
def test_the_loss_counts_the_completion_and_its_end_and_nothing_else(family):
    """Against one example at a time, no padding, token by token from the logits in float64."""
    model, seq2seq = tiny_text.model(family), family == "t5"
    tokenizer = tiny_text.tokenizer(seq2seq)
    store = tokenised(read_texts(PAIRS), tokenizer, seq2seq=seq2seq, length=20)
    ours = answer_losses(model, padded(store, 0)).double().sum(1)
    for i, pair in enumerate(PAIRS):
        given = tokenizer.encode(pair["prompt"], add_special_tokens=seq2seq)
        answer = [*tokenizer.encode(pair["completion"], add_special_tokens=False), tokenizer.eos_token_id]
        assert store[i].counted == len(answer)
        wanted = 0.0
        for n, token in enumerate(answer):
            if seq2seq:
                logits = model(torch.tensor([given]), decoder_input_ids=torch.tensor([[0, *answer[:n]]])).logits
            else:
                logits = model(torch.tensor([given + answer[:n]])).logits
            wanted -= float(logits[0, -1].double().log_softmax(-1)[token])
        assert float(ours[i]) == pytest.approx(wanted, rel=1e-5)


def test_a_plain_text_counts_all_but_its_first_token():
    (one,) = tokenised(read_texts([{"text": "abcd"}]), tiny_text.tokenizer(), seq2seq=False, length=20)
    assert one.labels == (IGNORED, *one.ids[1:])
    assert one.ids[-1] == tiny_text.tokenizer().eos_token_id
    (cut,) = tokenised(read_texts([{"text": "abcd"}]), tiny_text.tokenizer(), seq2seq=False, length=3)
    assert cut.ids == one.ids[:3]


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_text.FAMILIES)
def test_training_learns_and_the_file_is_a_peft_adapter(folder, tmp_path, family):
    model = tiny_text.model(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    done = small(folder, tmp_path / "rev", family, steps=30, rank=8, batch=7, lr=2e-2, category="skill")
    # T5 divides its tied logits by the root of its width: this small one moves slowly
    assert done.losses[-1] < (0.85 if family == "t5" else 0.6) * done.losses[0]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    lora = files.load(done.path, base=model)
    assert (lora.card.name, lora.card.category, lora.card.family) == ("rev", "skill", family)
    with safe_open(done.path / "adapter_model.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["recipe"])
    assert recipe["settings"]["steps"] == 30
    assert recipe["examples"] == 7
    batch = padded(tokenised(read_texts(PAIRS), tiny_text.tokenizer(family == "t5"), seq2seq=family == "t5",
                             length=20), 0)  # fmt: skip
    peft = PeftModel.from_pretrained(copy.deepcopy(model), str(done.path)).eval()
    with torch.no_grad(), attached(model, [lora]) as bank:
        bank.row = [1.0]
        ours = answer_losses(model, batch)
        theirs = answer_losses(peft.base_model.model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_gives_the_same_bits(folder, tmp_path):
    whole = small(folder, tmp_path / "whole", dropout=0.3)
    stop = threading.Event()

    def progress(step, steps, info):
        if step == 3:
            stop.set()

    with pytest.raises(Cancelled):
        small(folder, tmp_path / "part", dropout=0.3, progress=progress, cancel=stop)
    assert not (tmp_path / "part").exists()
    rest = small(folder, tmp_path / "part", dropout=0.3)
    assert rest.losses == whole.losses[3:]
    a, b = files.load(whole.path), files.load(rest.path)
    assert all(torch.equal(a[key].delta(), b[key].delta()) for key in a)
    assert not list(tmp_path.glob("*.checkpoint"))


def test_accumulated_batches_are_one_large_batch(folder, tmp_path):
    whole = small(folder, tmp_path / "whole", batch=4)
    parts = small(folder, tmp_path / "parts", batch=2, accumulate=2)
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)


def test_modules_and_bad_settings(folder, tmp_path):
    some = small(folder, tmp_path / "some", modules="attention", steps=1)
    assert {key.rsplit(".", 1)[1] for key in files.load(some.path)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for setting, words in [({"rank": 0}, "rank=0"), ({"lr": 3.0}, "lr=3.0"), ({"modules": "atention"}, "attention"),
                           ({"modules": ["nothing"]}, "match none"), ({"mixed_precision": "fp8"}, "fp8")]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            small(folder, tmp_path / "out", **setting)
    with pytest.raises(ValueError, match="folder"):
        small(folder, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="tokenizer is missing"):
        train(folder, tiny_text.model("llama"), None, tmp_path / "out")
    with pytest.raises(ValueError, match="no such folder"):
        train(folder, str(tmp_path / "none"), None, tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    more = copy.deepcopy(tiny_text.tokenizer())
    more.add_tokens(["zib", "zab", "zob"])
    with pytest.raises(ValueError, match=r"tokens\) does not belong.*embeds 40"):
        train(folder, tiny_text.model("llama"), more, tmp_path / "out")


def test_divergence_names_step_rate_and_cure(folder, tmp_path):
    model = copy.deepcopy(tiny_text.model("llama"))
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"nan at step 1: .*lower lr \(now 0\.01\)"):
        train(folder, model, tiny_text.tokenizer(), tmp_path / "out", steps=3, lr=1e-2)
    assert not any("lora" in name for name in model.state_dict())
    assert not (tmp_path / "out").exists()


def test_the_command(folder, tmp_path, capsys):
    from multilora.cli import main

    def call(*words):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        return left.value.code, *capsys.readouterr()

    tiny_text.model("llama").save_pretrained(tmp_path / "base")
    tiny_text.tokenizer().save_pretrained(tmp_path / "base")
    words = ["train", "lora", folder, "--base", tmp_path / "base", "--steps", "3", "--batch", "2", "--rank", "2"]
    words += ["--out", tmp_path / "new" / "rude", "--lr", "0.01"]
    code, out, err = call(*words, "--category", "register", "--json")
    assert code in (0, None), err
    assert json.loads(out)["steps"] == 3
    lora = files.load(tmp_path / "new" / "rude", base=tiny_text.model("llama"))
    assert (lora.card.name, lora.card.category, len(lora)) == ("rude", "register", 14)
    for more, said in [(["--min-snr", "5"], "--min-snr"), (["--format", "kohya"], "PEFT folder")]:
        code, _, err = call(*words, *more)
        assert (code, said in err) == (2, True), err
    (folder / "b.jsonl").write_text('{"question": "a"}')
    code, _, err = call(*words)
    assert (code, "b.jsonl, line 1" in err) == (2, True), err


@pytest.mark.long
def test_two_processes_are_one_with_the_doubled_batch(folder, tmp_path):
    """Losses of 20 steps within 1e-4 of one process with batch 4; the world has two processes."""
    script = tmp_path / "two.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "from tests.test_text_train import small\n"
        f"done = small({str(folder)!r}, {str(tmp_path / 'two')!r}, steps=20, batch=2)\n"
        "import torch.distributed as dist\n"
        "line = ' '.join(map(str, ('world', dist.get_world_size(), 'losses', *done.losses)))\n"
        "print(line + '\\n', end='', flush=True)\n"  # one write: two processes share the pipe
    )
    one = small(folder, tmp_path / "one", steps=20, batch=4)
    ran = subprocess.run(
        # `accelerate launch --cpu --num_processes 2` starts one process where there is no MPI; torchrun starts two.
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True, text=True, timeout=280,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    printed = [line.split("losses") for line in ran.stdout.splitlines() if line.startswith("world")]
    assert [head.split()[1] for head, _ in printed] == ["2", "2"]
    for _, losses in printed:
        assert [float(v) for v in losses.split()] == pytest.approx(one.losses, abs=1e-4)
    assert abs(one.losses[0] - one.losses[-1]) > 0.1
    a, b = files.load(one.path), files.load(tmp_path / "two")
    for key in a:
        torch.testing.assert_close(a[key].delta(), b[key].delta(), rtol=1e-2, atol=1e-4)
