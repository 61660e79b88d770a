"""Squared gradients by hand, for tests of Fisher estimates: plain autograd, one example at a time."""

import torch


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def autograd_squares(model, objective, parameters):
    """Per parameter the square of one example's gradient, by plain autograd."""
    flags = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    grads = torch.autograd.grad(objective(), parameters, allow_unused=True)
    for p, flag in zip(parameters, flags, strict=True):
        p.requires_grad_(flag)
    return [torch.zeros_like(p) if g is None else g.square() for p, g in zip(parameters, grads, strict=True)]
