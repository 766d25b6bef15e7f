"""What a family of published transformers says of itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from reelflow.errors import CheckpointError, ConfigError, ReelflowError, nearest
from reelflow.families.originals import Original
from reelflow.interop.mapping import Row, linear, table
from reelflow.models.dit import DiTConfig
from reelflow.nn.embed import SinCos
from reelflow.nn.rope import Spans

__all__ = [
    "FORMER",
    "Family",
    "Size",
    "arguments",
    "attend_rows",
    "cross_rows",
    "dual_rows",
    "dual_video_rows",
    "mlp_rows",
    "places",
    "readout_rows",
    "refiner_rows",
    "side_of_places",
    "vector_rows",
    "written",
]


@dataclass(frozen=True)
class Size:
    """One published network."""

    config: DiTConfig
    parameters: int  # trained values, as published
    repository: str  # where its weights are; "" if they are not public
    clip: tuple[int, int, int] | None = None  # frames, height and width that it is made for; the family's unless said
    stride: tuple[int, int, int] | None = None  # of its autoencoder; the family's unless said


@dataclass(frozen=True)
class Family:
    """A published design: its sizes, and the way between its checkpoints and ours.

    `read`, `write` and `weights` are of the layout of diffusers, or, where diffusers has none, of the only one.

    The network predicts velocity (data - noise) where the family is a flow: what runs the other way is turned round by
    `weights`.
    """

    name: str
    class_name: str  # as a checkpoint's config.json calls it
    sizes: Mapping[str, Size]
    licence: str  # of the weights
    read: Callable[[dict[str, Any]], DiTConfig]  # of a config.json
    write: Callable[[DiTConfig], dict[str, Any]]
    weights: Callable[[DiTConfig], tuple[Row, ...]]
    clip: tuple[int, int, int] = (1, 256, 256)  # frames, height and width in pixels
    stride: tuple[int, int, int] = (
        1,
        8,
        8,
    )  # pixels to a latent, in time (frame 0 alone, if above 1), height and width
    context_tokens: int | tuple[int, ...] = 0  # of a prompt, padded; of each source, if there are several
    image_tokens: int = 0  # of a picture, where one is read
    former_names: tuple[str, ...] = ()  # of the class, in older files
    native: bool = False  # `read`, `write` and `weights` are of the original repository's layout; diffusers has none
    original: Original | None = None  # the original repository's layout, where it is another one
    notes: tuple[str, ...] = ()  # where references disagree, and what was chosen

    def latent_shape(self, size: Size, clip: Sequence[int]) -> tuple[int, int, int]:
        """Return (t, h, w) of the latents of a clip of so many frames, rows and columns.

        Raises:
            ConfigError: the autoencoder takes no such clip; the nearest are named.
        """
        stride = size.stride or self.stride
        extents = []
        for name, n, step in zip(("frames", "height", "width"), clip, stride, strict=True):
            alone = int(name == "frames" and step > 1)  # frame 0 has a latent to itself
            count, rest = divmod(n - alone, step)
            if rest or count + alone < 1:
                near = [k * step + alone for k in (count, count + 1) if k + alone >= 1]
                raise ConfigError(f"{name} {n} does not fit a stride of {step}; nearest: {' or '.join(map(str, near))}")
            extents.append(count + alone)
        return (extents[0], extents[1], extents[2])


C = TypeVar("C")


@runtime_checkable
class Design(Protocol[C]):
    """What goes between a config.json and a configuration."""

    @property
    def read(self) -> Callable[[dict[str, Any]], C]: ...

    @property
    def write(self) -> Callable[[C], dict[str, Any]]: ...


def written(design: Design[C], config: C) -> dict[str, Any] | None:
    """Return the config.json of a network of this design, or None if it is of another."""
    try:  # what is written of its own networks; of others it may not find what it looks for
        said = design.write(config)
        return said if design.read(said) == config else None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, ReelflowError, TypeError, ValueError):
        return None


def arguments(
    found: Mapping[str, Any], defaults: Mapping[str, Any], *, fixed: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the values of a config.json over a class's defaults; names with a leading underscore are not values.

    Raises:
        CheckpointError: the file has a value that the class does not know, or one other than `fixed` has.
    """
    given = {name: value for name, value in found.items() if not name.startswith("_")}
    for name in given:
        if name not in defaults:
            raise CheckpointError(f"config.json has an unknown value {name!r}; {nearest(name, list(defaults))}")
    values = {**defaults, **given}
    for name, value in (fixed or {}).items():
        if values[name] != value:
            raise CheckpointError(f"config.json has {name}={values[name]!r}; published weights have {value!r}")
    return values


FORMER: dict[str, Any] = {
    "attention_type": "default",
    "double_self_attention": False,
    "norm_num_groups": 32,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
}
"""What files written for diffusers' former Transformer2DModel say besides: nothing, if it is this."""


def places(dim: int, side: float) -> SinCos:
    """Return the sinusoids of columns, then of rows, of a `dim` wide image transformer that sees every grid as side x side."""
    span = (0.0, side)
    waves = Spans(None, span, span, at="edge")
    return SinCos(split=(0, dim // 2, dim // 2), first="sin", order="twh", coordinates=waves)


def side_of_places(config: DiTConfig) -> float:
    """Return the side that a network's `places` have.

    Raises:
        ValueError: it has none.
    """
    waves = (absolute.coordinates for absolute in config.absolute if isinstance(absolute, SinCos))
    (side,) = (spans.h[1] for spans in waves if isinstance(spans, Spans) and spans.h)
    return side


# Tables of weights that several families share, in the names of diffusers.


def vector_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Relate a `VectorEmbedding`."""
    return table(linear(f"{ours}.up", f"{theirs}.linear_1"), linear(f"{ours}.down", f"{theirs}.linear_2"))


def attend_rows(ours: str, theirs: str, *, norms: bool = True) -> tuple[Row, ...]:
    """Relate a `SelfAttention`, perhaps with RMS norms of queries and keys."""
    return table(
        linear(f"{ours}.project.qkv", [f"{theirs}.to_q", f"{theirs}.to_k", f"{theirs}.to_v"]),
        linear(f"{ours}.project.norm_q", f"{theirs}.norm_q", bias=False) if norms else (),
        linear(f"{ours}.project.norm_k", f"{theirs}.norm_k", bias=False) if norms else (),
        linear(f"{ours}.out", f"{theirs}.to_out.0"),
    )


def cross_rows(ours: str, theirs: str, *, norms: bool = True) -> tuple[Row, ...]:
    """Relate a `CrossAttention` to the text, perhaps with RMS norms of queries and keys."""
    return table(
        linear(f"{ours}.query", f"{theirs}.to_q"),
        linear(f"{ours}.read.kv", [f"{theirs}.to_k", f"{theirs}.to_v"]),
        linear(f"{ours}.norm_q", f"{theirs}.norm_q", bias=False) if norms else (),
        linear(f"{ours}.read.norm_k", f"{theirs}.norm_k", bias=False) if norms else (),
        linear(f"{ours}.out", f"{theirs}.to_out.0"),
    )


def mlp_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """Relate an `Mlp`."""
    return table(linear(f"{ours}.up", f"{theirs}.net.0.proj"), linear(f"{ours}.down", f"{theirs}.net.2"))


def dual_rows(*, norms: bool = True) -> tuple[Row, ...]:
    """Relate a `DualBlock`, perhaps with RMS norms of queries and keys."""
    return table(
        dual_video_rows(norms=norms),
        linear("context.modulation.linear", "norm1_context.linear"),
        linear("context.project.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
        linear("context.project.norm_q", "attn.norm_added_q", bias=False) if norms else (),
        linear("context.project.norm_k", "attn.norm_added_k", bias=False) if norms else (),
        linear("context.out", "attn.to_add_out"),
        mlp_rows("context.mlp", "ff_context"),
    )


def dual_video_rows(*, norms: bool = True) -> tuple[Row, ...]:
    """Relate the video's half of a `DualBlock`."""
    return table(
        linear("video.modulation.linear", "norm1.linear"),
        attend_rows("video", "attn", norms=norms),
        mlp_rows("video.mlp", "ff"),
    )


def refiner_rows(depth: int) -> tuple[Row, ...]:
    """Relate a `Refiner`."""
    block = table(
        linear("norm1", "norm1"),
        linear("norm2", "norm2"),
        linear("qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        linear("out", "attn.to_out.0"),
        linear("mlp.up", "ff.net.0.proj"),
        linear("mlp.down", "ff.net.2"),
        linear("gates", "norm_out.linear"),
    )
    return table(
        vector_rows("time.mlp", "time_text_embed.timestep_embedder"),
        vector_rows("mean", "time_text_embed.text_embedder"),
        linear("embed", "proj_in"),
        (table(block, ours=f"blocks.{i}.", theirs=f"token_refiner.refiner_blocks.{i}.") for i in range(depth)),
    )


def readout_rows() -> tuple[Row, ...]:
    """Relate the readout's modulation, where theirs has the scale first."""
    return linear({"modulation.linear": "shift scale"}, {"norm_out.linear": "scale shift"})
