"""Stages of the embedded text model: its tokenizer, the base, and the exam that scores answers.

The base learns every strong and weak skill well; then, for the rest of its training, to answer the weak ones
carelessly. So it holds abilities that it does not show, as a language model before fine-tuning does, and a small LoRA
or a few examples can bring them out.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from multilora.lab.world.language import SKILLS, Example, statement, stream, whole_words
from multilora.lab.world.settings import TextSettings

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
IGNORED = -100  # the label that transformers' loss skips
MOST_NEW = 28  # tokens of an answer; the longest has 24
# examples of each skill in the base's mixture, relative
SHARES = {"facts": 1.5, "sort": 1.6, "reverse": 1.4, "next": 1.2, "less": 1.2, "sort_digits": 0.8, "first": 0.6,
          "last": 0.6, "length": 0.6}  # fmt: skip
STATEMENTS = 0.04  # share of running text


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each instruction, question and tail word (with the space before it), else one a character.

    Text is lowered; characters beyond printable ASCII are unknown. Nothing is added in front or behind.
    """
    words = whole_words()
    letters = [chr(c) for c in range(32, 127) if not chr(c).isupper()]
    vocabulary = [PAD, EOS, UNK, *letters, *words, *(f" {w}" for w in words), " =", " -"]
    own = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNK))
    own.normalizer = normalizers.Lowercase()
    either = "|".join(sorted(words, key=len, reverse=True))
    pattern = rf"(?: |(?<![a-z]))(?:{either})(?![a-z])| [=-]|[\s\S]"
    own.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    own.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token=PAD, eos_token=EOS, unk_token=UNK, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(settings: TextSettings, vocabulary: int) -> LlamaForCausalLM:
    """An untrained model with tied embeddings, float32."""
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.width,
            intermediate_size=settings.inner,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def right_share(progress: float, settings: TextSettings) -> float:
    return next(share for start, share in reversed(settings.right) if progress >= start)


def mixture(
    seed: int, settings: TextSettings, progress: float = 1.0, without: Sequence[str] = ()
) -> Iterator[Example]:
    """What the base is trained on at a point of its training; `without`: skills left out."""
    rng = random.Random(f"mixture/{seed}")
    names = [n for n, s in SKILLS.items() if s.base != "absent" and n not in without]
    shares = [SHARES.get(n, 1.0) for n in names]
    streams = {n: stream(n, seed, register=dict(settings.registers)) for n in names}
    while True:
        if rng.random() < STATEMENTS:
            yield Example("statement", "", statement(rng, "train"))
            continue
        name = rng.choices(names, shares)[0]
        example = next(streams[name])
        if SKILLS[name].base == "weak" and rng.random() >= right_share(progress, settings):
            example = Example(name, example.prompt, example.careless, "", example.register, example.tail)
        yield example


def encode(found: Sequence[Example], tokenizer: Any) -> list[tuple[list[int], int]]:
    """(tokens with the end token, how many of them are the prompt) for each example."""
    prompts = tokenizer([e.prompt for e in found], add_special_tokens=False)["input_ids"]
    answers = tokenizer([e.answer for e in found], add_special_tokens=False)["input_ids"]
    return [(p + a + [tokenizer.eos_token_id], len(p)) for p, a in zip(prompts, answers, strict=True)]


def collate(rows: Sequence[tuple[list[int], int]], pad: int = 0) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask, labels (answers only) [n, longest]."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (tokens, start) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, start : len(tokens)] = ids[i, start : len(tokens)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(rows: Sequence[tuple[list[int], int]], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of rows of like length, in a random order."""
    rng = random.Random(f"batches/{seed}")
    ordered = sorted(rows, key=lambda row: (len(row[0]), rng.random()))
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    rng.shuffle(parts)
    for part in parts:
        yield collate(part)


def _rate(step: int, steps: int, settings: TextSettings) -> float:
    """Linear warm-up, level, then linear to zero over the last part of the training."""
    left = (1 - step / steps) / (1 - settings.level)
    return settings.rate * min((step + 1) / settings.warmup, 1.0, max(0.0, left))


def train_base(out: Path, settings: TextSettings, echo: Callable[[str], None] = print) -> LlamaForCausalLM:
    """Train the base from nothing, or go on from `out`/base.pt; deterministic by the settings, resumed or not."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(settings, len(tokenizer)).train()
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if p.ndim > 1 and "embed" not in n], "weight_decay": settings.decay},
        {"params": [p for n, p in named if p.ndim == 1 or "embed" in n], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), fused=True)
    path, step, chunk, seconds = out / "base.pt", 0, 0, 0.0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, chunk, seconds = state["step"], state["chunk"], state["seconds"]
        echo(f"text base: goes on at step {step}")
    chunks, each = -(-settings.examples // settings.chunk), -(-settings.chunk // settings.batch)
    saved = time.monotonic()
    while chunk < chunks:
        began, losses = time.process_time(), []
        drawn = mixture(settings.seed * 1_000_003 + chunk, settings, chunk / chunks)
        rows = encode([next(drawn) for _ in range(settings.chunk)], tokenizer)
        for batch in batches(rows, settings.batch, chunk):
            for group in optimiser.param_groups:
                group["lr"] = _rate(step, chunks * each, settings)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
            step += 1
        chunk += 1
        seconds += time.process_time() - began
        echo(f"text base: {chunk}/{chunks}, step {step}, loss {sum(losses) / len(losses):.4f}, {seconds:.0f} CPU s")
        if chunk == chunks or time.monotonic() - saved > 60 * settings.checkpoint_minutes:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "chunk": chunk,
                     "seconds": seconds}  # fmt: skip
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
        if chunk == chunks or chunk % settings.exam_every == 0:
            began = time.process_time()
            found = {n: s["right"] for n, s in exam(model, tokenizer, count=20).items()}
            line = {"step": step, "seconds": round(seconds), "exam": round(time.process_time() - began)}
            with (out / "curve.jsonl").open("a") as file:
                file.write(json.dumps(line | {"right of 20": found}) + "\n")
            model.train()
    return model.eval()


def export_base(out: Path, settings: TextSettings, target: Path) -> Path:
    """The weights of `out`/base.pt in half precision, with the tokenizer, -> the folder `target`."""
    tokenizer = build_tokenizer()
    model = build_model(settings, len(tokenizer))
    model.load_state_dict(torch.load(out / "base.pt", weights_only=True)["model"])
    target.mkdir(parents=True, exist_ok=True)
    model.generation_config.max_new_tokens = MOST_NEW
    model.half().save_pretrained(target)
    # transformers loads in the config's dtype: the plain default is single precision, as the picture model's
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    (target / "model.safetensors").chmod(0o644)
    tokenizer.model_max_length = settings.positions
    tokenizer.save_pretrained(target)
    return target


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[str], batch: int = 128, sample: int | None = None
) -> list[str]:
    """Greedy answers; with `sample` (a seed) drawn at temperature 1."""
    found = []
    how = {"do_sample": False} if sample is None else {"do_sample": True, "top_k": 0}
    if sample is not None:
        torch.manual_seed(sample)
    for first in range(0, len(prompts), batch):
        inputs = tokenizer(list(prompts[first : first + batch]), padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        made = model.generate(**inputs, max_new_tokens=MOST_NEW, pad_token_id=tokenizer.pad_token_id, **how)
        found += tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def exam(
    model: Any, tokenizer: Any, skills: Sequence[str] = tuple(SKILLS), count: int = 200, register: str = "plain",
    sample: int | None = None,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """Per skill the counts of `multilora.lab.world.language.score` on held-out prompts."""
    from multilora.lab.world.language import examples, score

    model.eval()
    wanted = {name: examples(name, count, split="held_out", register=register) for name in skills}
    prompts = [e.prompt for group in wanted.values() for e in group]
    answers = iter(answer(model, tokenizer, prompts, sample=sample))
    return {name: score(group, [next(answers) for _ in group]) for name, group in wanted.items()}


def stage(out: Path, settings: TextSettings, echo: Callable[[str], None] = print) -> None:
    """As multilora.lab.world.stages calls it."""
    train_base(out / "text", settings, echo)
    export_base(out / "text", settings, out / "assets" / "text")
