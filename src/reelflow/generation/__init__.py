"""From prompts and pictures to clips."""
