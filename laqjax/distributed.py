"""Runs of several processes: how they connect, and what they must have in common."""

from laqjax._engine.processes import assert_same_on_all_processes, initialize_distributed, run_on_process_zero

__all__ = ["assert_same_on_all_processes", "initialize_distributed", "run_on_process_zero"]
