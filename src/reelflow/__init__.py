"""reelflow: train, sample, stream and evaluate video diffusion transformers."""

__version__ = "0.1.0"
