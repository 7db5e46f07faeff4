"""Planning: compiles the real train step for hardware that is not there, and reads the result."""
