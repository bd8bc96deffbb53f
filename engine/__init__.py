"""How training runs, never what it computes: stacks, CUDA graphs, processes, signals. Open it for speed."""
