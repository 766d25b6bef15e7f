"""A rollout is a matrix of times, steps x latent frames: which frame is how noisy when.

Each frame walks the same times after a delay of its own, counted in rows; given frames are data throughout. With two
steps and three frames:

plain           past given       chunks of one    pyramid, lag 1
0.0 0.0 0.0     1.0 0.0 0.0      0.0 0.0 0.0      0.0 0.0 0.0
0.5 0.5 0.5     1.0 0.5 0.5      0.5 0.0 0.0      0.5 0.0 0.0
1.0 1.0 1.0     1.0 1.0 1.0      1.0 0.0 0.0      1.0 0.5 0.0
                                 1.0 0.5 0.0      1.0 1.0 0.5
                                 1.0 1.0 0.0      1.0 1.0 1.0
                                 1.0 1.0 0.5
                                 1.0 1.0 1.0
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["rollout_chunks", "rollout_delayed", "rollout_given", "rollout_plain", "rollout_pyramid", "with_given"]

Row = Float[Tensor, " steps"]
Matrix = Float[Tensor, "rows T"]


def rollout_delayed(times: Row, delays: Sequence[int]) -> Float[Tensor, "rows {len(delays)}"]:
    """Let frame f wait `delays[f]` rows at times[0], then walk `times`, then stay at 1.

    This is diffusion forcing (Chen et al. 2024, sec. 3.3); all other rollouts are choices of delays. Rows in which
    nothing would move are left out.

    Raises:
        ConfigError: no frames, a negative delay, or times that do not rise within [0, 1] to 1.
    """
    if not bool((times.diff() >= 0).all()) or not (0 <= times[0] < 1 and times[-1] == 1):
        raise ConfigError(
            f"times must rise within [0, 1] to 1, got {times[0]:g} to {times[-1]:g}; make them with inference_times"
        )
    if len(delays) < 1 or min(delays) < 0:
        raise ConfigError(f"delays must be at least 0, one per latent frame, got {list(delays)}")
    rows = torch.arange(max(delays) + times.shape[0], device=times.device)[:, None]
    place = (rows - torch.tensor(delays, device=times.device)).clamp(0, times.shape[0] - 1)
    return _without_idle_rows(times[place])


def rollout_plain(times: Row, num_frames: int) -> Float[Tensor, "rows {num_frames}"]:
    """Let every frame walk `times` together.

    Raises:
        ConfigError: as for `rollout_delayed`.
    """
    return rollout_delayed(times, [0] * num_frames)


def rollout_chunks(times: Row, num_frames: int, *, window: int, overlap: int = 0) -> Float[Tensor, "rows {num_frames}"]:
    """Let one chunk of frames after another walk `times`, each when those before it are data.

    A model that sees `window` frames at a time makes that many in the first chunk, and `window - overlap` in each later
    one, beside the last `overlap` of what is there. The last chunk may be shorter.

    Raises:
        ConfigError: as for `rollout_delayed`, or `overlap` is not from 0 to `window` - 1.
    """
    if window < 1 or not 0 <= overlap < window:
        raise ConfigError(
            f"overlap must be 0 to {max(window, 1) - 1} of a window of at least 1 frame, got {overlap} of {window}"
        )
    fresh = window - overlap
    return rollout_delayed(times, [max(0, (f - overlap) // fresh) * (len(times) - 1) for f in range(num_frames)])


def rollout_pyramid(times: Row, num_frames: int, *, lag: int) -> Float[Tensor, "rows {num_frames}"]:
    """Let each frame start `lag` rows after the one before it, so that the near future is always clearer than the far.

    A lag of 0 is plain; a lag of the number of steps makes one frame at a time.

    Raises:
        ConfigError: as for `rollout_delayed`.
    """
    return rollout_delayed(times, [f * lag for f in range(num_frames)])


def with_given(matrix: Matrix, given: Collection[int]) -> Float[Tensor, "kept T"]:
    """Hold the frames numbered in `given` at t = 1 throughout: inpainting in time, of any rollout.

    Raises:
        ConfigError: a frame is not there, or nothing would be left to generate.
    """
    num_frames, frames = matrix.shape[1], sorted(set(given))
    if frames and not 0 <= frames[0] <= frames[-1] < num_frames:
        raise ConfigError(f"given frames must lie in 0 to {num_frames - 1}, got {frames}")
    if len(frames) == num_frames:
        raise ConfigError(f"given frames must be 0 to {num_frames - 1} of {num_frames}, got {num_frames}")
    held = matrix.clone()
    held[:, frames] = 1
    return _without_idle_rows(held)


def rollout_given(times: Row, num_frames: int, *, num_given: int = 0) -> Float[Tensor, "rows {num_frames}"]:
    """Let every frame walk `times`, except the first `num_given`, which are data (t = 1) from the start.

    Raises:
        ConfigError: as for `rollout_delayed`, or nothing would be left to generate.
    """
    if not 0 <= num_given < num_frames:
        raise ConfigError(f"given frames must be 0 to {num_frames - 1} of {num_frames}, got {num_given}")
    return with_given(rollout_plain(times, num_frames), range(num_given))


def _without_idle_rows(matrix: Matrix) -> Float[Tensor, "kept T"]:
    moving = (matrix.diff(dim=0) != 0).any(dim=1)
    return torch.cat([matrix[:1], matrix[1:][moving]])
