"""The networks: the video transformer, the causal autoencoder, and the condition they share."""
