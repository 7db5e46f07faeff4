"""Meshes, sharding rules, and agreement between several hosts."""
