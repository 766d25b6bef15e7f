"""Complete runs: from videos to a model, one function each."""
