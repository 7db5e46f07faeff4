"""Meshes, sharding rules and what several hosts must agree on."""
