"""Random tensors, and the published formula of a merge by Fisher, in numpy."""

import numpy as np
import torch


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def published(values, fishers, weights, normalize, floor, favor_target):
    """_merge_with_coeffs of mmatena/model_merging, in numpy: values, fishers are per model a list of arrays."""
    if normalize:
        norms = [np.sqrt(sum(np.sum(np.square(d)) for d in f)) for f in fishers]
        weights = [w / n for w, n in zip(weights, norms, strict=True)]
    merged = []
    for i in range(len(values[0])):
        lhs, rhs = 0.0, 0.0
        for j, (v, f, w) in enumerate(zip(values, fishers, weights, strict=True)):
            diag = np.maximum(f[i], floor) if (not favor_target or j == 0) else f[i]
            lhs, rhs = lhs + w * diag, rhs + w * diag * v[i]
        with np.errstate(invalid="ignore"):
            merged.append(rhs / lhs)
    return merged
