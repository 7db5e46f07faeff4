"""Host-side pure functions from files and strings to what the towers read."""
