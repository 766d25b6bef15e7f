"""From what people say or show to the `Condition` that networks read."""
