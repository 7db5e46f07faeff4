"""Scoring embeddings: zero-shot classification, retrieval, and the report a person reads."""
