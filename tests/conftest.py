"""Shape annotations are checked while tests run: every jaxtyping signature in reelflow goes through beartype."""

from jaxtyping import install_import_hook

install_import_hook("reelflow", "beartype.beartype")
