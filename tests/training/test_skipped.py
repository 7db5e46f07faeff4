"""Updates that are skipped have a budget: so many in a row, and so large a share of all."""

import numpy as np
import pytest

from contrastive_jax.training.loop import SkipBudget


@pytest.mark.parametrize("most", [0, 3, 10])
@pytest.mark.parametrize("pattern", ["x", "x.", "xx.", "x..", ".x...", "........x", ".........x", "." * 19 + "xx", "."])
def test_skips_that_alternate_with_good_updates_are_too_many_too(pattern, most):
  skipped = np.array([pattern[k % len(pattern)] == "x" for k in range(300)])
  in_a_row = np.array([skipped[max(0, k - most) : k + 1].sum() == most + 1 for k in range(300)])
  too_many = skipped & (in_a_row | (10 * np.cumsum(skipped) > 10 * most + np.arange(1, 301)))
  budget = SkipBudget(most)
  found = next((k for k in range(300) if budget.note(not skipped[k])), None)
  assert found == (int(np.argmax(too_many)) if too_many.any() else None)
  # Half of all is too much, whatever is allowed in a row; a tenth is not, where any are.
  assert (found is not None) or skipped.mean() <= 0.12
