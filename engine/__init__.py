"""Execution of training: threads, stacks, CUDA graphs, processes, signals. It changes speed, not results."""
