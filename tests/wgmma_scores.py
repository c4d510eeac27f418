"""Scores as wgmma adds them up: products in blocks of 16, each a fused sum whose terms and result are cut, the model
that an H200 confirmed bit by bit (docs/crosscheck.md).
"""

import numpy as np

from generator.emulator.accumulate import fused_dot, wgmma_model

BLOCK = 16  # K of one wgmma of 16 bits


def wgmma_scores(q, k):
    """q [M, D] and k [N, D] of 16 bits -> float32 [M, N], the products before any scale."""
    form = {"bfloat16": "bf16", "float16": "f16"}[q.dtype.name]
    q, k = (np.asarray(x, np.float32) for x in (q, k))
    total, model = np.zeros((len(q), len(k)), np.float32), wgmma_model(form, "f32")
    for d in range(0, q.shape[1], BLOCK):
        total = fused_dot(q[:, d : d + BLOCK], k[:, d : d + BLOCK], total, (form, form), model)
    return total


def lost(q, k, scale):
    """The largest error of a scaled score. LSE can be off by as much, whatever the kernel does with the scores."""
    exact = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
    return float(np.abs(wgmma_scores(q, k) - exact).max() * scale)
