"""The mathematics of noise: processes, times, samplers, guidance. No shapes beyond `B C T H W`, no networks."""
