"""Dual encoders: two transformer towers into one embedding space."""
