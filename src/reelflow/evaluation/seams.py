"""Do tiles show? How much a clip changes across the borders of the tiles it was decoded in, against elsewhere."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.errors import ConfigError

__all__ = ["seam_energy"]


def seam_energy(clip: Float[Tensor, "B C T H W"], rows: Sequence[int], columns: Sequence[int]) -> Float[Tensor, " B"]:
    """Return the mean squared difference of neighbours across borders over that of all others: 1 where no seam shows.

    A border lies before row, or column, so and so. Of the difference between a clip decoded in tiles and the same decoded
    whole, it says how much of what is wrong lies at the borders.

    Raises:
        ConfigError: there are no borders, or one is not inside the frame; or the clip changes nowhere else.
    """
    across, elsewhere = [], []
    for axis, borders in ((3, rows), (4, columns)):
        differences = clip.double().diff(dim=axis).square().transpose(axis, -1)  # position p: between p and p + 1
        size = differences.shape[-1]
        if any(not 0 < border <= size for border in borders):
            raise ConfigError(f"borders lie before positions 1 to {size} of axis {axis}, got {list(borders)}")
        at = torch.zeros(size, dtype=torch.bool, device=clip.device)
        at[[border - 1 for border in borders]] = True
        across.append(differences[..., at].flatten(1))
        elsewhere.append(differences[..., ~at].flatten(1))
    seams, rest = torch.cat(across, dim=1), torch.cat(elsewhere, dim=1)
    if not seams.numel():
        raise ConfigError("there are no borders; give rows or columns")
    base = rest.mean(dim=1)
    if not bool((base > 0).all()):
        raise ConfigError("the clip changes nowhere but at the borders, so there is nothing to compare with")
    return seams.mean(dim=1) / base
