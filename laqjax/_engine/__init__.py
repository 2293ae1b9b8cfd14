"""Loops over rounds: runs, sweeps, collectives between devices, checkpoints."""
