"""Random gates of LoRA-Switch for a small language model, texts for it, and a run of one call per token."""

import torch

from multilora.gate_token_switch import TokenSwitchGate

HEAD, WIDTH = "model.layers.0.self_attn.q_proj", 16
IDS = torch.tensor([[3, 9, 21, 4, 30, 12], [7, 8, 5, 33, 3, 3], [16, 2, 17, 11, 28, 6]])


def _gate(k=4, top_k=2, per="network", heads=None, order=None, dtype=torch.float32):
    heads = {"network": (HEAD, WIDTH)} if heads is None else heads
    made = TokenSwitchGate.fresh(heads, k, top_k=top_k, per=per, seed=5, dtype=dtype)
    for i, tensor in enumerate(made.tensors.values()):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)) * (1 if i % 2 else 2))
    return TokenSwitchGate(made.heads, made.tensors, k, top_k=top_k, per=per, order=order)


def _token_by_token(model, bank, gate, ids, weights=None):
    """Logits [B, T, vocabulary] of one call per token with a KV cache, and the gates asked."""
    cache, logits, asked = None, [], []
    for t in range(ids.shape[1]):
        asked.append(gate.asked(weights))
        bank.gate = asked[-1]
        output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1), asked


def _same(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max()
