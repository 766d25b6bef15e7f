"""Clips: rendered worlds, video files, data sets and the caches of what was made of them."""
