"""Published checkpoints into our models and back: which tensor is which, and the folders they lie in."""
