"""Many processes on one model, applied from outside: meshes, sharded weights, shared tokens and heads, recomputation."""
