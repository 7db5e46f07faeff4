"""A run over its steps: stages, segments, the source of each pair, and the shapes of batches."""
