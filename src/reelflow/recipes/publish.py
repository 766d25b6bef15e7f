"""What a run has trained, as a published family writes it."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from reelflow.families.autoencoders import AUTOENCODERS, save_vae
from reelflow.families.family import written
from reelflow.models.vae import CausalVAE
from reelflow.recipes.runs import pretrained_autoencoder

__all__ = ["publish_autoencoder"]


def publish_autoencoder(folder: Path) -> Path | None:
    """Write the autoencoder of a run as RUN/published, and return that; None if no family has such a network.

    The statistics of its latents go into the configuration; a family that has one number for all channels cannot hold those
    of an encoder that has learned.

    Raises:
        CheckpointError: the run has no autoencoder, or the disk is full.
    """
    target, partial = folder / "published", folder / ".published.partial"
    if target.is_dir():
        return target
    vae = pretrained_autoencoder(folder)
    said = vae.config
    own = CausalVAE(said)
    if any(
        not (before == after).all()
        for before, after in ((own.latent_mean, vae.latent_mean), (own.latent_std, vae.latent_std))
    ):
        said = replace(said, latent_mean=tuple(vae.latent_mean.tolist()), latent_std=tuple(vae.latent_std.tolist()))
    family = next((family for family in AUTOENCODERS if written(family, said) is not None), None)
    if family is None:
        return None
    same = CausalVAE(said)
    same.load_state_dict(vae.state_dict())
    shutil.rmtree(partial, ignore_errors=True)
    save_vae(same, partial, family)
    os.replace(partial, target)
    return target
