"""Numbers about clips: how far two are apart, how steady one is, how two sets of them differ."""
