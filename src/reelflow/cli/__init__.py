"""The door for people at a terminal: one module per command, each loading what is heavy only when it is called."""
