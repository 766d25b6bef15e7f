"""How far two sets of clips are apart, as the Frechet distance between Gaussians fitted to features of them.

    |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2))        (Dowson & Landau 1982)

The number means nothing without the features, the counts, the frames and the resizing, so a result carries them all.
FVD is this distance over I3D's features (Unterthiner et al. 2018); over any other features it is not FVD, and nothing
here is called so.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from einops import pack, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, avg_pool3d, interpolate

from reelflow.config import configuration
from reelflow.errors import ConfigError, DataError
from reelflow.evaluation.pixels import check_clip

__all__ = ["Extractor", "FeatureStatistics", "FrechetResult", "PixelPyramid", "frechet_between", "frechet_distance"]


@runtime_checkable
class Extractor(Protocol):
    """A network, or anything else, that turns clips in [-1, 1] of one size and length into feature vectors.

    `name` identifies it well enough to be found again: architecture, weights, layer.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def num_features(self) -> int: ...
    def __call__(self, clips: Float[Tensor, "N 3 T H W"]) -> Float[Tensor, "N D"]: ...


class FeatureStatistics:
    """Count, mean and covariance of feature vectors that come in batches, in float64.

    Batches are merged by their means and scatters (Chan, Golub & LeVeque 1983), so that a large common offset
    costs no digits, and parts gathered in different places can be put together.
    """

    def __init__(self, num_features: int) -> None:
        if num_features < 1:
            raise ConfigError(f"num_features must be at least 1, got {num_features}")
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    @property
    def num_features(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Float[Tensor, "D D"]:
        """The unbiased covariance; refused (`ConfigError`) for fewer than two vectors."""
        if self.count < 2:
            raise ConfigError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, features: Float[Tensor, "N D"]) -> None:
        """Add a batch of vectors, which may be empty.

        Raises:
            ConfigError: they have another width, or hold NaN or infinity.
        """
        self._check_width(features.shape[1])
        if not features.isfinite().all():
            raise ConfigError("features must be finite, got NaN or infinity")
        if len(features):
            batch = features.detach().to("cpu", torch.float64)
            centred = batch - batch.mean(0)
            self._add(len(batch), batch.mean(0), centred.T @ centred)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the vectors that `other` has seen.

        Raises:
            ConfigError: they have another width.
        """
        self._check_width(other.num_features)
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, which JSON keeps to the last bit."""
        return {"count": self.count, "mean": self.mean.tolist(), "scatter": self.scatter.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FeatureStatistics":
        """Take up what `to_dict` returned.

        Raises:
            DataError: it is something else.
        """
        try:
            count = int(values["count"])
            mean, scatter = (torch.tensor(values[name], dtype=torch.float64) for name in ("mean", "scatter"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"feature statistics hold count, mean and scatter; these do not: {error!r}") from error
        if mean.ndim != 1 or not len(mean) or scatter.shape != (len(mean), len(mean)) or count < 0:
            raise DataError(
                f"feature statistics hold a count, D means and a D x D scatter, "
                f"got {count}, {list(mean.shape)} and {list(scatter.shape)}"
            )
        if not (mean.isfinite().all() and scatter.isfinite().all()):
            raise DataError("feature statistics must be finite, got NaN or infinity")
        statistics = cls(len(mean))
        statistics.count, statistics.mean, statistics.scatter = count, mean, scatter
        return statistics

    def _check_width(self, found: int) -> None:
        if found != self.num_features:
            raise ConfigError(f"these statistics are of {self.num_features} features, got {found}")

    def _add(self, count: int, mean: Float[Tensor, " D"], scatter: Float[Tensor, "D D"]) -> None:
        total = self.count + count
        apart = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(apart, apart) * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total


@configuration
class FrechetResult:
    """A Frechet distance with everything it depends on; `str()` says all of it."""

    value: float
    num_a: int
    num_b: int
    num_frames: int
    frame_stride: int
    resize: str
    extractor: str
    note: str = ""

    def __str__(self) -> str:
        return (
            f"Frechet distance over {self.extractor}: {self.value:.4g} ({self.num_a} against {self.num_b} clips, "
            f"{self.num_frames} frames at stride {self.frame_stride}, {self.resize}{self.note and f'; {self.note}'})"
        )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Frechet (2-Wasserstein) distance between the Gaussians of `a` and `b`, at least 0.

    Raises:
        ConfigError: they differ in width, or one has seen fewer than two vectors.
    """
    if a.num_features != b.num_features:
        raise ConfigError(f"both sides need the same features, got {a.num_features} and {b.num_features} of them")
    cov_a, cov_b = a.covariance, b.covariance
    # Tr (S_a S_b)^(1/2) sums the roots of the eigenvalues of M M', M = S_a^(1/2) S_b^(1/2): the singular values of M,
    # which, taken directly, keep the digits that squaring loses where a covariance is rank-deficient.
    overlap = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    value = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(value.item(), 0.0)  # equal sets may round to just below


def frechet_between(
    clips_a: Iterable[Float[Tensor, "_ 3 _ _ _"]],
    clips_b: Iterable[Float[Tensor, "_ 3 _ _ _"]],
    extractor: Extractor,
    *,
    frame_stride: int,
) -> FrechetResult:
    """Return the distance between two streams of batches of clips in [-1, 1], each read once.

    Of every clip the frames 0, stride, 2 stride, ... are taken, as many as the extractor reads, and resized (bilinear,
    antialiased, the aspect ratio not kept) where the size is another.

    Raises:
        ConfigError: a clip is too short or out of range, or a side has fewer than two clips.
    """
    if frame_stride < 1:
        raise ConfigError(f"frame_stride must be at least 1, got {frame_stride}")
    a, b = (_statistics(clips, extractor, frame_stride) for clips in (clips_a, clips_b))
    fewest, width = min(a.count, b.count), extractor.num_features
    note = f"{fewest} clips leave a covariance of {width} features rank-deficient: biased upwards"
    return FrechetResult(
        value=frechet_distance(a, b),
        num_a=a.count,
        num_b=b.count,
        num_frames=extractor.num_frames,
        frame_stride=frame_stride,
        resize=f"{extractor.size[0]} x {extractor.size[1]} bilinear antialiased",
        extractor=extractor.name,
        note=note if fewest <= width else "",
    )


@configuration
class PixelPyramid:
    """76 fixed features of a clip that need no weights: coarse colours, and edges and motion at three scales.

    It is weak. It sees colour, contrast, sharpness, noise, speed, direction and jerk as averages over a clip; it knows
    nothing of objects, so a low distance says that two sets look alike from afar, not that either is any good. Use it
    where no trained network is at hand, and to follow one run, not to compare papers.
    """

    num_frames: int
    size: tuple[int, int] = (64, 64)  # pixels, height and width

    def __post_init__(self) -> None:
        if self.num_frames < 3 or min(self.size) < 16:
            raise ConfigError(f"PixelPyramid needs 3 frames of 16 x 16 or more, got {self.num_frames} of {self.size}")

    @property
    def name(self) -> str:
        return "PixelPyramid v1 (76 untrained features)"

    @property
    def num_features(self) -> int:
        return 76

    def __call__(self, clips: Float[Tensor, "N 3 T H W"]) -> Float[Tensor, "N 76"]:
        """Return colours in [-1, 1], signed motion in [-1, 1], and logarithms of mean absolute differences.

        Raises:
            ConfigError: the clips are not of the length and size asked for.
        """
        if tuple(clips.shape[2:]) != (self.num_frames, *self.size):
            raise ConfigError(
                f"expected clips of {(self.num_frames, *self.size)} frames, rows, columns, got {tuple(clips.shape[2:])}"
            )
        grey = clips.mean(1, keepdim=True)
        features = [
            adaptive_avg_pool3d(clips, (1, 2, 2)),
            adaptive_avg_pool3d(grey, (1, 4, 4)),
            clips.std(dim=(3, 4)).mean(-1),
            clips.std(dim=2).mean(dim=(2, 3)),
        ]
        for scale in (1, 2, 4):
            features += _edges_and_motion(avg_pool3d(grey, (1, scale, scale)))
        return pack(features, "N *")[0]


def _edges_and_motion(x: Float[Tensor, "N 1 T H W"]) -> list[Tensor]:
    """Return the strength of edges by direction, of change and of jerk by quarter, and which way the edges move."""
    corner = x[:, :, :-1, :-1, :-1]
    across, down, later = x[:, :, :-1, :-1, 1:] - corner, x[:, :, :-1, 1:, :-1] - corner, x[:, :, 1:, :-1, :-1] - corner
    edges = torch.stack([across, down, (across + down) / 2, (across - down) / 2], dim=1).abs().mean(dim=(2, 3, 4, 5))
    change = adaptive_avg_pool3d(later.abs(), (1, 2, 2))
    jerk = adaptive_avg_pool3d(x.diff(n=2, dim=2).abs(), (1, 2, 2))
    # Where brightness is carried along, across * u + down * v + later = 0: the sign of the products is a direction.
    motion = [
        2 * (edge * later).mean(dim=(1, 2, 3, 4)) / ((edge**2 + later**2).mean(dim=(1, 2, 3, 4)) + 1e-4)
        for edge in (across, down)
    ]
    return [*((strength + 0.01).log() for strength in (edges, change, jerk)), torch.stack(motion, dim=1)]


@torch.no_grad()
def _statistics(clips: Iterable[Tensor], extractor: Extractor, frame_stride: int) -> FeatureStatistics:
    statistics = FeatureStatistics(extractor.num_features)
    span = (extractor.num_frames - 1) * frame_stride + 1
    for batch in clips:
        check_clip(batch)
        if batch.shape[2] < span:
            raise ConfigError(
                f"{extractor.num_frames} frames at stride {frame_stride} need clips of {span} frames, "
                f"got {batch.shape[2]}"
            )
        frames = batch[:, :, :span:frame_stride]
        if tuple(frames.shape[-2:]) != extractor.size:
            images = rearrange(frames, "B C T H W -> (B T) C H W")
            images = interpolate(images, extractor.size, mode="bilinear", antialias=True)
            frames = rearrange(images, "(B T) C H W -> B C T H W", B=len(batch))
        statistics.update(extractor(frames))
    return statistics


def _root(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps  # below it an eigenvalue is rounding, not variance
    return (vectors * values.where(values > noise, 0).sqrt()) @ vectors.T
