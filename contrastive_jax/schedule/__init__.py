"""What a run is over its steps: stages, segments, which source gives each pair, and the shapes of its batches."""
