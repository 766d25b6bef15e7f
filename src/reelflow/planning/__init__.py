"""The line walked on paper: tokens, parameters, operations and bytes, before anything runs."""
