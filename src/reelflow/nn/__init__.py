"""Building blocks made of tensors: attention, positions, norms, modulation, convolutions. No noise, no files."""
