"""All published autoencoders, and folders of their weights into models and back."""

from contextlib import suppress
from pathlib import Path

import torch

from reelflow.errors import CheckpointError, ConfigError, nearest
from reelflow.families.coder import Coder
from reelflow.families.cogvideox_vae import COGVIDEOX_VAE
from reelflow.families.cosmos_vae import COSMOS_VAE
from reelflow.families.family import written
from reelflow.families.hunyuan15_vae import HUNYUAN15_VAE
from reelflow.families.hunyuan_vae import HUNYUAN_VAE
from reelflow.families.kl_vae import KL_VAE
from reelflow.families.ltx_vae import LTX_VAE
from reelflow.families.mochi_vae import MOCHI_VAE
from reelflow.families.opensora_vae import OPENSORA_VAE
from reelflow.families.svd_vae import SVD_VAE
from reelflow.families.wan_vae import WAN_VAE
from reelflow.interop.checkpoints import Stored, read_configuration, read_into, write_folder
from reelflow.interop.mapping import Row, differences
from reelflow.models.vae import CausalVAE

__all__ = ["AUTOENCODERS", "empty_vae", "load_vae", "save_vae"]

AUTOENCODERS: tuple[Coder, ...] = (
    WAN_VAE,
    HUNYUAN_VAE,
    KL_VAE,
    LTX_VAE,
    HUNYUAN15_VAE,
    MOCHI_VAE,
    COGVIDEOX_VAE,
    OPENSORA_VAE,
    SVD_VAE,
    COSMOS_VAE,
)


def load_vae(source: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> CausalVAE:
    """Return the autoencoder in a folder of published weights (config.json and safetensors), as diffusers writes them.

    Or that in a safetensors file, where shapes tell enough. Weights keep the type they are stored in, or are cast to `dtype`.

    Raises:
        CheckpointError: there is no such autoencoder, or the weights are not those of its configuration.
    """
    vae, family = empty_vae(source)
    stored = Stored(Path(source))
    read_into(vae, _table(family, vae, stored), stored, dtype=dtype, device=device)
    for statistic in (vae.latent_mean, vae.latent_std):  # constants come in the type of none
        statistic.data = statistic.to(next(vae.parameters()).dtype)
    return vae.to(memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload]


def empty_vae(source: str | Path) -> tuple[CausalVAE, Coder]:
    """Return the autoencoder that a folder's config.json tells of, without weights, on the meta device; and its family.

    Of a safetensors file its shapes tell.

    Raises:
        CheckpointError: there is no such file, or it tells of no autoencoder known here.
    """
    if Path(source).is_file():
        return _bare(Stored(Path(source)))
    path = Path(source) / "config.json"
    found = read_configuration(path)
    known = {family.class_name: family for family in AUTOENCODERS}
    name = found.get("_class_name") or (found.get("architectures") or [None])[0]
    if name not in known:
        raise CheckpointError(f"{path} is of {name!r}, which is no autoencoder known here; {nearest(str(name), known)}")
    with torch.device("meta"):
        return CausalVAE(known[name].read(found)), known[name]


def save_vae(vae: CausalVAE, folder: str | Path, family: Coder, *, dtype: torch.dtype | None = None) -> None:
    """Write an autoencoder of a family as diffusers would: config.json and safetensors, which it reads again.

    Raises:
        CheckpointError: the folder is not empty, or the disk is full, or the latents' statistics are no longer those of
            the configuration.
        ConfigError: the network is not of this family.
    """
    if (said := written(family, vae.config)) is None:
        raise ConfigError(f"the network is none of {family.name}; {family.name} has {', '.join(family.sizes)}")
    config = {"_class_name": family.class_name, **said}
    write_folder(vae, family.weights(vae.config), Path(folder), config=config, dtype=dtype)


def _bare(stored: Stored) -> tuple[CausalVAE, Coder]:
    shapes = {name: tuple(x.shape) for name, x in stored.meta.items()}
    for family in AUTOENCODERS:
        if family.bare is not None:
            with suppress(KeyError), torch.device("meta"):
                return CausalVAE(family.read(family.bare(shapes))), family
    raise CheckpointError(f"{stored.where} is no autoencoder that shapes tell; give a folder with a config.json")


def _table(family: Coder, vae: CausalVAE, stored: Stored) -> tuple[Row, ...]:
    """Return the table of weights as they are named today, unless the older names fit."""
    if family.older_weights is not None:
        rows = family.older_weights(vae.config)
        if not differences(rows, vae, {name: x.shape for name, x in stored.meta.items()}):
            return rows
    return family.weights(vae.config)
