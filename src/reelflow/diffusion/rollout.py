"""A rollout is a matrix of times, steps x latent frames: which frame is how noisy when.

plain            image or past given        (rows: steps, columns: frames)
0.0 0.0 0.0      1.0 0.0 0.0
0.5 0.5 0.5      1.0 0.5 0.5
1.0 1.0 1.0      1.0 1.0 1.0
"""

from jaxtyping import Float
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["rollout_given"]


def rollout_given(times: Float[Tensor, " steps"], num_frames: int, *, num_given: int = 0) -> Float[Tensor, "steps T"]:
    """Let every frame walk `times`, except the first `num_given`, which are data (t = 1) from the start.

    Raises:
        ConfigError: nothing would be left to generate.
    """
    if not 0 <= num_given < num_frames:
        raise ConfigError(f"given frames must be 0 to {num_frames - 1} of {num_frames}, got {num_given}")
    matrix = times[:, None].repeat(1, num_frames)
    matrix[:, :num_given] = 1
    return matrix
