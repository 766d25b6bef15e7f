"""A codebook of the ways in which an autoencoder's training fails: what each looks like, and what to do.

Signs are running means of the training's parts and numbers of the last validation; those that a run does not have,
such as an adversary's, are not looked at.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["CODEBOOK", "Failure", "diagnose"]

Signs = Mapping[str, float]


class Failure(NamedTuple):
    """One way to fail, the signs it needs, how it is seen in them, and what to do about it."""

    name: str
    signs: tuple[str, ...]
    seen: Callable[[Signs], bool]
    advice: str

    def line(self, signs: Signs) -> str:
        numbers = ", ".join(f"{name} {signs[name]:.3g}" for name in self.signs)
        return f"{self.name} ({numbers}): {self.advice}"


CODEBOOK = (
    Failure(
        "the discriminator wins",
        ("real_accuracy", "fake_accuracy"),
        lambda s: min(s["real_accuracy"], s["fake_accuracy"]) > 0.97,
        "its gradient says little now; start it later, or give it fewer channels or layers",
    ),
    Failure(
        "the discriminator is a constant",
        ("real_accuracy", "fake_accuracy"),
        lambda s: max(s.values()) > 0.97 and min(s.values()) < 0.03,
        "it calls everything real, or everything false; lower lr, or lengthen warmup_steps",
    ),
    Failure(
        "the discriminator is blind",
        ("real_accuracy", "fake_accuracy", "hinge"),
        lambda s: abs(s["real_accuracy"] + s["fake_accuracy"] - 1) < 0.05 and abs(s["hinge"] - 1) < 0.02,
        "it tells nothing apart; wait, and if it stays so raise lr or its channels, or cut larger crops",
    ),
    Failure(
        "the adversary has no gradient",
        ("adaptive_weight",),
        lambda s: s["adaptive_weight"] > 1e3,
        "the adaptive weight makes noise of what is left; start it later, or lower its weight",
    ),
    Failure(
        "the adversary is silenced",
        ("adaptive_weight",),
        lambda s: s["adaptive_weight"] < 1e-4,
        "its gradient explodes beside that of the distances; lower lr, or its layers",
    ),
    Failure(
        "channels are silent",
        ("channels_used",),
        lambda s: s["channels_used"] < 0.5,
        "most latent channels equal the prior; lower kl, or use fewer latent_channels",
    ),
    Failure(
        "latents have spots",
        ("latent_peak",),
        lambda s: s["latent_peak"] > 20,
        "a position far outside the others decodes to a spot; give outlier a weight",
    ),
    Failure(
        "the posterior is a point",
        ("posterior_std",),
        lambda s: s["posterior_std"] < 1e-4,
        "kl does nothing and the latent space is not smooth; raise kl",
    ),
    Failure(
        "rebuilt clips flicker",
        ("flicker_ratio",),
        lambda s: s["flicker_ratio"] > 1.15,
        "they change more from frame to frame than the clips; raise temporal or wavelet, or cut longer crops",
    ),
    Failure(
        "rebuilt clips are smeared in time",
        ("flicker_ratio",),
        lambda s: s["flicker_ratio"] < 0.7,
        "they change less from frame to frame than the clips; train longer, or divide time by less",
    ),
    Failure(
        "images fall behind",
        ("psnr", "psnr_image"),
        lambda s: s["psnr_image"] < s["psnr"] - 3,
        "single frames are rebuilt worse than clips; raise image_fraction",
    ),
)


def diagnose(signs: Signs) -> tuple[str, ...]:
    """Name what fails, a line for each, with its numbers and what to do."""
    found = []
    for failure in CODEBOOK:
        own = {name: signs[name] for name in failure.signs if name in signs}
        if len(own) == len(failure.signs) and failure.seen(own):
            found.append(failure.line(own))
    return tuple(found)
