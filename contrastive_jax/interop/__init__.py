"""Weights of other libraries, in and out, by declarative key maps that serve both directions."""
