"""Adaptive layer norm: a vector that knows the time (and the class, the pooled text) scales, shifts and gates tokens.

The vector comes once for each *group* of tokens: one group is the whole clip (t per sample), one per frame (t per
frame), or one per token. Groups are equal runs of tokens in scan order, so a per-frame vector serves every token of
its frame. (AdaLN-zero: Peebles & Xie 2023, sec. 3.2.) Where clips of several sizes share a row, groups are runs of any
length, and `rows` names each token's group.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reelflow.nn.linear import Linear

__all__ = ["Modulation", "Rows", "Table", "gated", "modulate", "spread"]

Rows = Int[Tensor, " _"]  # of a vector with one row per group: which one a token goes by


class Modulation(nn.Module):
    """SiLU and a linear map from the vector to `num_chunks` vectors of width `dim`, all zero at the start."""

    def __init__(self, vector_dim: int, dim: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = Linear(vector_dim, num_chunks * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vector: Float[Tensor, "B groups V"]) -> tuple[Float[Tensor, "B groups D"], ...]:
        return self.linear(F.silu(vector)).chunk(self.num_chunks, dim=-1)


class Table(nn.Module):
    """What a block, or the readout, adds to vectors that all share: `num_chunks` rows of width `dim`, zero at the start.

    (AdaLN-single: Chen et al. 2023, PixArt-alpha, sec. 2.3.) Given one vector of width `dim`, every row is added to it.
    """

    def __init__(self, dim: int, num_chunks: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(num_chunks, dim))

    def forward(self, shared: Float[Tensor, "B groups width"]) -> Iterator[Float[Tensor, "B groups D"]]:
        """Give the chunks one by one: with a vector for each token, all of them at once are large."""
        chunks = shared.split(self.rows.shape[1], dim=-1)
        for index, row in enumerate(self.rows):
            yield chunks[index % len(chunks)] + row


def spread(
    vector: Float[Tensor, "B groups D"], num_tokens: int, rows: Rows | None = None
) -> Float[Tensor, "B tokens_or_one D"]:
    """Give each token its group's vector; a single group stays one row and broadcasts."""
    groups = vector.shape[1]
    if rows is not None and groups > 1:
        return F.embedding(rows, vector[0])[None]  # whose gradient is a sum in a fixed order
    return vector if groups in (1, num_tokens) else vector.repeat_interleave(num_tokens // groups, dim=1)


def modulate(
    x: Float[Tensor, "B N D"],
    shift: Float[Tensor, "B groups D"] | None,
    scale: Float[Tensor, "B groups D"],
    rows: Rows | None = None,
) -> Float[Tensor, "B N D"]:
    """Return x * (1 + scale) + shift; the shift may be left out."""
    if shift is None:
        return x * spread(1 + scale, x.shape[1], rows)
    return torch.addcmul(spread(shift, x.shape[1], rows), x, spread(1 + scale, x.shape[1], rows))


def gated(
    x: Float[Tensor, "B N D"],
    gate: Float[Tensor, "B groups D"],
    branch: Float[Tensor, "B N D"],
    rows: Rows | None = None,
) -> Float[Tensor, "B N D"]:
    """Return the residual sum x + gate * branch."""
    return torch.addcmul(x, spread(gate, x.shape[1], rows).to(x.dtype), branch.to(x.dtype))
