"""How much the squared error of a network counts at each time.

At a given x all predictions err together: alpha d(data) + sigma d(noise) = 0. So a squared error of one is that of
another times the ratio of these

    velocity   (alpha + sigma)^2        noise   alpha^2
    v          alpha^2 + sigma^2        data    sigma^2

and a weight on one is a weight on any other. Each weighting below says on which error its formula stands; `loss_weight`
gives the weight on the error of the network's own prediction. Weights multiply the loss at a time that was drawn, so
the density of the draw counts as well; `log_snr_rate` turns one measure into the other.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from reelflow.config import configuration
from reelflow.diffusion.process import (
    Parameterization,
    Prediction,
    Process,
    Time,
    levels,
    log_snr,
    reverse_variances,
)
from reelflow.errors import ConfigError

__all__ = ["SNR", "MinSNR", "Sigmoid", "Uniform", "Weighting", "log_snr_rate", "loss_weight", "variational_bound"]


@configuration
class Uniform:
    """1 on the squared error of `of`; of None, on that of the network's own prediction.

    Of "v" with data of unit variance, this is the weighting of Karras et al. 2022 (table 1).
    """

    kind: Literal["uniform"] = "uniform"
    of: Prediction | None = None


@configuration
class SNR:
    """SNR on the data error, which is 1 on the noise error: the simple loss of Ho et al. 2020, eq. 14."""

    kind: Literal["snr"] = "snr"


@configuration
class MinSNR:
    """min(SNR, gamma) on the data error (Hang et al. 2023, eq. 10).

    Raises:
        ConfigError: `gamma` is not positive.
    """

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ConfigError(f"gamma must be positive, got {self.gamma}; published: 5")


@configuration
class Sigmoid:
    """sigmoid(bias - log SNR) on the noise error (Kingma & Gao 2023, sec. 5; Hoogeboom et al. 2024).

    There log SNR is drawn evenly: for other draws multiply by `log_snr_rate` over the density of t.
    """

    kind: Literal["sigmoid"] = "sigmoid"
    bias: float = 0.0


Weighting = Uniform | SNR | MinSNR | Sigmoid
TINY = 1e-100


def loss_weight(
    weighting: Weighting, process: Process, prediction: Prediction, t: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Return the weight on the squared error of `prediction`, in float64; at the ends its limit, perhaps infinite."""
    alpha, sigma = process.alpha(t).clamp(min=TINY), process.sigma(t).clamp(min=TINY)  # 0 / 0 becomes its limit
    ratio = {"velocity": (alpha + sigma) ** 2, "v": alpha**2 + sigma**2, "noise": alpha**2, "data": sigma**2}
    match weighting:
        case Uniform(of=of):
            weight = ratio[of or prediction] / ratio[prediction]
        case SNR():
            weight = ratio["noise"] / ratio[prediction]
        case MinSNR(gamma=gamma):
            weight = torch.minimum(alpha**2, gamma * sigma**2) / ratio[prediction]
        case Sigmoid(bias=bias):
            weight = torch.sigmoid(bias - 2 * (alpha / sigma).log()) * (alpha**2 / ratio[prediction])
    return weight.where(weight < 1 / TINY, torch.inf)


def log_snr_rate(process: Process, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return d(log SNR)/dt, in float64; infinite where data or noise is absent."""
    with torch.enable_grad():
        t = t.detach().double().requires_grad_()
        (rate,) = torch.autograd.grad(log_snr(process, t).sum(), t)
    return rate.nan_to_num(nan=torch.inf, posinf=torch.inf)


def variational_bound(
    parameterization: Parameterization,
    data: Float[Tensor, "B C T H W"],
    x: Float[Tensor, "B C T H W"],
    output: Float[Tensor, "B C_out T H W"],
    t: Time,
    t_next: Time,
) -> Float[Tensor, "B C T H W"]:
    """Return KL(q(x' | x, data) || p(x' | x)), in nats per element, for the step from t to t_next.

    Gradients reach the learned variance only; the mean is taken as it is (Nichol & Dhariwal 2021, sec. 3.1). Add it,
    times a small weight, to the loss of the prediction. A step into t = 1 draws nothing, so it costs nothing here.

    Raises:
        ConfigError: the variance is not learned.
    """
    raw = parameterization.split(x, output)[1]
    if raw is None:
        raise ConfigError("the variational bound trains a learned variance; set learned_variance=True")
    here, there = levels(parameterization.process, t), levels(parameterization.process, t_next)
    raw = raw.where(there.sigma > 0, 0)  # also against gradients: 0 x infinity is not 0
    small, _ = reverse_variances(here, there)
    forgotten = 1 - (here.alpha * there.sigma / (there.alpha * here.sigma)) ** 2
    error = parameterization.estimate(x, output, t).data.detach() - data
    log_variance = parameterization.log_variance(raw, here, there)
    log_true = small.clamp(min=1e-20).log()
    gap = (there.alpha * forgotten).to(x.dtype) * error
    bound = 0.5 * (log_variance - log_true + (log_true - log_variance).exp() - 1 + gap**2 * (-log_variance).exp())
    return torch.where(there.sigma > 0, bound, 0).to(x.dtype)
