"""How training runs: stacks, CUDA graphs, processes, signals; the method is the same. Open it for speed."""
