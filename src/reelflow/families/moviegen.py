"""Movie Gen Video (Polyak et al. 2024, arXiv:2410.13720): a language model's block, with a look at the text in its middle.

Its weights are not public, so there is no table of them. The paper gives width, depth, heads, the MLP's width, SwiGLU and
RMS norms, attention to all, learned tables of times, rows and columns added before every block, and three encoders' text
(UL2, ByT5, MetaCLIP), each through a linear map and a norm, one after the other.

Inferred: one map of the time for all blocks and a table in each, since a map in each would add a third to 30B; no norm of
queries and keys and an eps of 1e-5, as in LLaMA 3, but with biases; a norm with weights before the look at the text; the
widths of ByT5's and MetaCLIP's features; the lengths of the tables (256 frames of 768 x 768 pixels are 32 x 48 x 48
tokens, and sides of other proportions are longer). The vector that tells one text from another is one with its norm's bias.
"""

from typing import Any, Never

from reelflow.errors import CheckpointError
from reelflow.families.family import Family, Size, arguments
from reelflow.models.blocks import Attend, Branches, Cross, FeedForward
from reelflow.models.context import Layers, Sources
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import Learned
from reelflow.nn.norm import Norm
from reelflow.nn.patchify import Patch

__all__ = ["MOVIEGEN", "transformer"]


def transformer(
    *,
    dim: int,
    depth: int,
    heads: int,
    mlp: int,
    channels: int = 16,
    texts: tuple[int, ...] = (4096, 1472, 1280),
    table: tuple[int, int, int] = (32, 64, 64),
    patch: Patch = Patch(1, 2, 2),
) -> DiTConfig:
    """Return the network with an MLP of width `mlp`, that reads features of widths `texts`, in clips up to `table`."""
    norm = Norm("rms", eps=1e-5)
    branches = (
        Attend(norm=norm, qk_norm=None),
        Cross(norm=Norm("rms", eps=1e-5, affine=True), qk_norm=None),
        FeedForward(ratio=mlp / dim, norm=norm),
    )
    return DiTConfig(
        in_channels=channels,
        dim=dim,
        num_heads=heads,
        layers=depth * (Branches(branches),),
        patch=patch,
        rope="none",
        absolute=(Learned(table, every=True),),
        activation="swiglu",
        modulation="shared",
        context=Sources(tuple(Layers(width, norms="out") for width in texts)),
        out_norm=norm,
    )


_DEFAULTS: dict[str, Any] = {
    "dim": 6144,
    "depth": 48,
    "heads": 48,
    "mlp": 16384,
    "channels": 16,
    "texts": [4096, 1472, 1280],
    "table": [32, 64, 64],
    "patch": [1, 2, 2],
}


def read(found: dict[str, Any]) -> DiTConfig:
    """Return the network of `transformer`'s arguments.

    Raises:
        CheckpointError: a value is unknown.
    """
    c = arguments(found, _DEFAULTS)
    times, rows, columns = c["table"]
    return transformer(
        dim=c["dim"],
        depth=c["depth"],
        heads=c["heads"],
        mlp=c["mlp"],
        channels=c["channels"],
        texts=tuple(c["texts"]),
        table=(times, rows, columns),
        patch=Patch(*c["patch"]),
    )


def write(config: DiTConfig) -> dict[str, Any]:
    """Return `transformer`'s arguments."""
    layer, (positions,), context = config.layers[0], config.absolute, config.context
    assert isinstance(layer, Branches)
    feed = layer.branches[-1]
    assert isinstance(feed, FeedForward)
    assert isinstance(positions, Learned)
    assert isinstance(context, Sources)
    return {
        "dim": config.dim,
        "depth": len(config.layers),
        "heads": config.num_heads,
        "mlp": round(feed.ratio * config.dim),
        "channels": config.in_channels,
        "texts": [source.in_dim for source in context.sources],
        "table": list(positions.size),
        "patch": list(config.patch),
    }


def weights(config: DiTConfig) -> Never:
    """Refuse.

    Raises:
        CheckpointError: no weights of this family were ever published.
    """
    raise CheckpointError("weights of this family are not public, so there is no layout to read or to write")


MOVIEGEN = Family(
    name="moviegen",
    class_name="",
    sizes={  # advertised as 30B, 5B and 1B; these are counts of what is inferred
        "30b": Size(transformer(dim=6144, depth=48, heads=48, mlp=16384), 29_307_119_680, ""),
        "5b": Size(transformer(dim=3072, depth=32, heads=24, mlp=8192), 4_922_774_592, ""),
        "1b": Size(transformer(dim=1536, depth=24, heads=16, mlp=4096), 934_660_672, ""),
    },
    licence="",
    read=read,
    write=write,
    weights=weights,
    native=True,
    clip=(249, 768, 768),  # as many latents as the paper's 256 frames, of which none is alone
    stride=(8, 8, 8),
    context_tokens=(512, 100, 256),
    notes=("weights are not public: the configuration follows the paper, and what it leaves open is inferred.",),
)
