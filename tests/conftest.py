"""Shape annotations are checked while tests run: every jaxtyping signature in reelflow goes through beartype.

One thread is the fastest for tensors this small, and the same everywhere.
"""

import torch
from jaxtyping import install_import_hook

install_import_hook("reelflow", "beartype.beartype")
torch.set_num_threads(1)
