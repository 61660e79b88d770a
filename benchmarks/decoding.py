"""What a token costs: a language model with 8 LoRAs, 2 of them picked for each token, in every way of routing.

    OMP_NUM_THREADS=1 python benchmarks/decoding.py [rounds] > benchmarks/decoding.md

A Llama with random weights decodes tokens with a KV cache, each way in turn in one process; CPU seconds of one thread,
medians over the rounds, as ratios to the bare model. A/A is the bare model against itself: below it nothing is told
apart. "Launch-bound" is so small that calling operations takes the time, as on a GPU without graphs;
"bandwidth-bound" reads more weights than any cache holds. The loops are what published mixtures do: every layer has
its router and runs one expert after the other (LoRAMoE's code all of them, arXiv 2312.09979; others the best two).
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch
from flip import Leaves
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from multilora.attach import attached
from multilora.gate_token_switch import TokenSwitchGate
from multilora.lab.machine import processor
from multilora.lora import Lora, LowRank

EXPERTS, RANK, TOP, PROMPT, TOKENS = 8, 16, 2, 16, 8
SIZES = {"launch-bound": (256, 704), "bandwidth-bound": (1024, 2816)}  # widths of the stream and of the feed-forward
# The goals of research/performance.md, C12.
GOALS = {"bandwidth-bound": ("of the bare model", 1.08), "launch-bound": ("of the loop over all", 0.55)}
UNMERGED, MERGED = "token switch, un-merged", "token switch, merged for each token (the paper's)"
EACH, LOOP = "router in every layer, un-merged by the same code", "router in every layer, loop over all 8"
BEST = "router in every layer, loop over the best 2"


def language_model(wide: int, inner: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=wide, intermediate_size=inner, num_hidden_layers=8,
                         num_attention_heads=wide // 64, num_key_value_heads=wide // 64)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def experts(model: nn.Module) -> list[Lora]:
    g, found = torch.Generator().manual_seed(1), []
    for _ in range(EXPERTS):
        parts = {}
        for name, m in model.named_modules():
            if isinstance(m, nn.Linear) and "layers" in name:
                down = torch.randn(RANK, m.in_features, generator=g) / m.in_features**0.5
                parts[name] = LowRank(down, 0.02 * torch.randn(m.out_features, RANK, generator=g))
        found.append(Lora(parts))
    return found


def gate(model: nn.Module, loras: list[Lora], per: str) -> TokenSwitchGate:
    """Routers with random numbers: sharp enough that tokens differ in their picks."""
    paths = list(loras[0]) if per == "linear" else list(loras[0])[:1]
    heads = {path if per == "linear" else "network": (path, loras[0][path].shape[1]) for path in paths}
    made = TokenSwitchGate.fresh(heads, EXPERTS, top_k=TOP, per=per, seed=2)
    for name, tensor in made.tensors.items():
        made.tensors[name] = 20 * tensor
    return made


class Loop(nn.Module):
    """A layer as published code has it: its own router, then one expert after the other."""

    def __init__(self, base: nn.Linear, parts: list[LowRank], weight: torch.Tensor, every: bool):
        super().__init__()
        self.base, self.weight, self.every = base, weight, every
        self.pairs = [(p.down.T.contiguous().T, p.up.contiguous()) for p in parts]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, p = self.base(x), torch.softmax(x @ self.weight.T, -1)
        if not self.every:
            best, index = p.topk(TOP, -1)
            best = best / best.sum(-1, keepdim=True)
            if x.shape[:-1].numel() == 1:
                for j, i in enumerate(index.flatten().tolist()):
                    down, up = self.pairs[i]
                    y = y + best[..., j : j + 1] * ((x @ down.T) @ up.T)
                return y
            p = torch.zeros_like(p).scatter(-1, index, best)  # the prompt, which is not timed
        for i, (down, up) in enumerate(self.pairs):
            y = y + p[..., i : i + 1] * ((x @ down.T) @ up.T)
        return y


def looped(model: nn.Module, loras: list[Lora], routers: TokenSwitchGate, every: bool) -> nn.Module:
    """The model with Loop layers, sharing its weights."""
    shared = {id(p): p for p in model.parameters()}
    other = copy.deepcopy(model, dict(shared))
    for path in loras[0]:
        parent, _, name = path.rpartition(".")
        base = other.get_submodule(path)
        setattr(other.get_submodule(parent), name,
                Loop(base, [lora[path] for lora in loras], routers.tensors[f"weight.{path}"], every))  # fmt: skip
    return other


class Decoding:
    """TOKENS tokens after a prompt of PROMPT, fed from a list: which is likeliest does not matter here."""

    def __init__(self, model: nn.Module, batch: int = 1, before=lambda: None):
        g = torch.Generator().manual_seed(3)
        self.model, self.before = model, before
        self.prompt = torch.randint(512, (batch, PROMPT), generator=g)
        self.tokens = torch.randint(512, (batch, TOKENS), generator=g)
        self.cache = DynamicCache(config=model.config)
        before()
        model(self.prompt, past_key_values=self.cache)

    def __call__(self) -> tuple[float, torch.Tensor]:
        """(seconds of the tokens, their logits)"""
        logits = []
        if self.cache.get_seq_length() > PROMPT:
            self.cache.crop(PROMPT - self.cache.get_seq_length())
        self.before()  # what a text costs once, such as hooks
        start = time.process_time()
        for t in range(TOKENS):
            self.before()
            logits.append(self.model(self.tokens[:, t : t + 1], past_key_values=self.cache).logits)
        return time.process_time() - start, torch.cat(logits, 1)


def measured(ways: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, the ways in turn; the first is run once more, as "A/A", amid the others."""
    names = list(ways)
    half = len(names) // 2 + 1
    turns = {name: ways.get(name, ways[names[0]]) for name in (*names[:half], "A/A", *names[half:])}
    found: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, call in turns.items():
            found[name].append(call()[0])
    return found


def composed(model: nn.Module, loras: list[Lora], form: str, router: TokenSwitchGate | None, batch: int) -> Callable:
    """A way with the LoRAs attached for the length of a call: a model holds one set at a time."""

    def before() -> None:
        if router is None:
            bank.row = [1.0] + [0.0] * (EXPERTS - 1)
        else:
            bank.gate = router.asked()

    with attached(model, loras, form=form) as bank:
        run = Decoding(model, batch, before)

    def call() -> tuple[float, torch.Tensor]:
        with bank.again():
            return run()

    return call


def ways_of(model: nn.Module, loras: list[Lora], batch: int) -> dict[str, Callable]:
    shared, each = gate(model, loras, "network"), gate(model, loras, "linear")
    found = {
        "bare model": Decoding(model, batch),
        "one LoRA, no router": composed(model, loras, "side", None, batch),
        UNMERGED: composed(model, loras, "side", shared, batch),
        EACH: composed(model, loras, "side", each, batch),
        LOOP: Decoding(looped(model, loras, each, every=True), batch),
    }
    if batch == 1:  # merging, and this loop's code, are for one token
        found[MERGED] = composed(model, loras, "rebuilt", shared, batch)
        found[BEST] = Decoding(looped(model, loras, each, every=False), batch)
    return found


def check(found: dict) -> None:
    """The ways that compute the same agree, and LoRAs do something."""
    outs = {name: call()[1] for name, call in found.items()}

    def off(a: str, b: str) -> float:
        return ((outs[a] - outs[b]).abs().max() / outs[b].abs().max()).item()

    for a, b in ((MERGED, UNMERGED), (EACH, BEST)):
        if a in outs and b in outs and not off(a, b) < 1e-4:
            raise SystemExit(f"{a} and {b} differ by {off(a, b):.1e}")
    if not off(UNMERGED, "bare model") > 1e-3:
        raise SystemExit("the LoRAs do nothing")


def counted(call: Callable) -> float:
    """Dispatched operations of a token, views left out; they depend on no machine."""
    with Leaves() as leaves:
        call()
    return leaves.count / TOKENS


def report(title: str, batch: int, operations: dict[str, float], seconds: dict[str, list[float]]) -> None:
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    base, loop = middle["bare model"], middle[LOOP]
    again = [a / b for a, b in zip(seconds["A/A"], seconds["bare model"], strict=True)]
    print(f"\n## {title}, batch {batch}\n\nThe bare model takes {1000 * base / TOKENS:.2f} ms a token.\n")
    print("| | operations | time, of the bare model | of the loop over all |\n|---|---|---|---|")
    for name, value in middle.items():
        count = f"{operations[name]:.0f}" if name in operations else ""
        print(f"| {name} | {count} | {value / base:.3f} | {value / loop:.3f} |")
    print(f"\nA/A round by round: {min(again):.3f} to {max(again):.3f}.")
    if batch == 1:
        of, bound = GOALS[title]
        value = middle[UNMERGED] / (base if of == "of the bare model" else loop)
        verdict = "met" if value <= bound else "missed"
        print(f"Goal for {UNMERGED!r}: at most {bound:.2f} {of}; {value:.3f}, {verdict}.")


@torch.no_grad()
def main(rounds: int = 7) -> None:
    print("# What a token costs with LoRAs routed token by token\n\nMade by `python benchmarks/decoding.py`.\n")
    print(f"{EXPERTS} LoRAs of rank {RANK} on all linears of the blocks, {TOP} picked a token. Machine: "
          f"{processor()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}; "
          f"{rounds} rounds of {TOKENS} tokens, float32.")  # fmt: skip
    for title, widths in SIZES.items():
        model = language_model(*widths)
        loras = experts(model)
        for batch in (1, 4):
            found = ways_of(model, loras, batch)
            check(found)
            operations = {name: counted(call) for name, call in found.items()}
            report(title, batch, operations, measured(found, rounds))


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
