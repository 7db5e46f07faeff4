"""Weights of other libraries, in and out: declarative key maps used in both directions."""
