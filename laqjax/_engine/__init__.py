"""Engines: the loops over rounds, sweeps, collectives between devices, and checkpoints."""
