"""The updates of all optimisers in float64 NumPy, one layer's parameter at a time, written from the papers.

Each function takes a parameter, its gradients of the steps so far, the rates of these steps and the options, and
returns the parameter after them. Gradients are clipped beforehand; nothing is stacked.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Keller Jordan's coefficients of the quintic Newton-Schulz iteration.
QUINTIC = (3.4445, -4.7750, 2.0315)


def adamw(p, gradients: Sequence[np.ndarray], rates: Sequence[float], o: Any, decay: float, *, nesterov: bool = False):
  """Loshchilov and Hutter (arXiv 1711.05101), algorithm 2; with Nesterov's look-ahead as Dozat's NAdam."""
  m = v = 0.0
  for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
    m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g**2
    first = m / (1 - o.b1**t)
    if nesterov:
      first = o.b1 * m / (1 - o.b1 ** (t + 1)) + (1 - o.b1) * g / (1 - o.b1**t)
    p = p - rate * (first / (np.sqrt(v / (1 - o.b2**t)) + o.eps) + decay * p)
  return p


def lion(p, gradients, rates, o, decay):
  """Chen et al. (arXiv 2302.06675), program 1."""
  m = 0.0
  for g, rate in zip(gradients, rates, strict=True):
    p = p - rate * (np.sign(o.b1 * m + (1 - o.b1) * g) + decay * p)
    m = o.b2 * m + (1 - o.b2) * g
  return p


def adafactor(p, gradients, rates, o, decay):
  """Shazeer and Stern (arXiv 1804.04235), algorithms 4 and 5, with the momentum of Zhai et al. (arXiv 2106.04560)."""
  factored = p.ndim >= 2 and sorted(p.shape)[-2] >= 128
  rows = columns = full = m = 0.0
  for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
    kept, square = 1 - t**-o.adafactor_decay, g**2 + 1e-30
    if factored:
      rows = kept * rows + (1 - kept) * square.mean(axis=1)
      columns = kept * columns + (1 - kept) * square.mean(axis=0)
      estimate = np.outer(rows, columns) / rows.mean()
    else:
      full = estimate = kept * full + (1 - kept) * square
    u = g / np.sqrt(estimate)
    u = u / max(1.0, math.sqrt(np.mean(u**2)))
    m = o.b1 * m + (1 - o.b1) * u if o.b1 else u
    p = p - rate * (m + decay * p)
  return p


def muon(p, gradients, rates, o, decay):
  """Of matrices: Jordan's Muon with the scale of Liu et al. (arXiv 2502.16982); rates are those of all else."""
  a, b, c = QUINTIC
  beta, m = o.muon_beta, 0.0
  for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
    m = beta * m + (1 - beta) * g
    ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    x = ahead.T if ahead.shape[0] > ahead.shape[1] else ahead
    x = x / (np.linalg.norm(x) + o.eps)
    for _ in range(5):
      gram = x @ x.T
      x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if ahead.shape[0] > ahead.shape[1] else x
    own = rate * o.muon_learning_rate / o.learning_rate
    p = p - own * (o.muon_rms * math.sqrt(max(p.shape)) * x + decay * p)
  return p
