"""Attention and its gradients in float64 NumPy, one head of one row at a time, from the formulas."""

import numpy as np


def attention(queries, keys, values, cotangent, seen, sigmoid_length=0):
  """Output, weights `[rows, heads, queries, keys]` and gradients by queries, keys and values.

  Args:
    queries: `[rows, length, heads, head_dim]`, as are `keys`, `values` and `cotangent`.
    keys: see `queries`.
    values: see `queries`.
    cotangent: gradient of the output.
    seen: bool `[rows, queries, keys]`; every query sees a key.
    sigmoid_length: n of sigmoid attention; 0 is softmax.
  """
  queries, keys, values, cotangent = (np.asarray(part, np.float64) for part in (queries, keys, values, cotangent))
  output, by_query, by_key, by_value = (np.zeros_like(queries) for _ in range(4))
  rows, length, heads, head_dim = queries.shape
  all_weights = np.zeros((rows, heads, length, length))
  for row in range(rows):
    for head in range(heads):
      q, k, v, g = (part[row, :, head] for part in (queries, keys, values, cotangent))
      logits = q @ k.T / np.sqrt(head_dim)
      if sigmoid_length:
        weights = seen[row] / (1 + sigmoid_length * np.exp(-logits))
        slope = weights * (1 - weights) * (g @ v.T)
      else:
        weights = seen[row] * np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        slope = weights * (g @ v.T - np.sum(g * (weights @ v), axis=1, keepdims=True))
      all_weights[row, head] = weights
      output[row, :, head] = weights @ v
      by_query[row, :, head] = slope @ k / np.sqrt(head_dim)
      by_key[row, :, head] = slope.T @ q / np.sqrt(head_dim)
      by_value[row, :, head] = weights.T @ g
  return output, all_weights, (by_query, by_key, by_value)


def seen(length, *, causal=False, mask=None, segment_ids=None):
  """Bool `[rows, queries, keys]`, token by token."""
  rows = len(segment_ids) if segment_ids is not None else len(mask) if mask is not None else 1
  result = np.ones((rows, length, length), bool)
  for row in range(rows):
    for query in range(length):
      for key in range(length):
        allowed = not causal or key <= query
        if segment_ids is not None:
          allowed = allowed and segment_ids[row][query] == segment_ids[row][key]
        if mask is not None:
          allowed = allowed and mask[row][query if len(mask[row]) > 1 else 0][key]
        result[row, query, key] = allowed
  return result
