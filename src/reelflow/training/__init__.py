"""The one loop that trains every model, and what it needs: optimisers, averages, checkpoints, meters."""
