"""The founding models on the synthetic world: the same clips and steps for each, so that they compare.

A model keeps its blocks, its parameterization and its times, and is made small. A class is a colour and a motion, and
leaves the shape to chance; pooled text is added to the time as well as attended to. One autoencoder serves all but the
pixels: after a first run, `--set vae.pretrained=runs/vdit-world` leaves its training out.
"""

from dataclasses import replace

from reelflow.conditioning.labels import ClassWords
from reelflow.conditioning.sentences import Sentences
from reelflow.conditioning.text import HashedWords
from reelflow.data.folder import ClipSpec
from reelflow.data.worlds import COLOURS, World
from reelflow.families.vdit import (
    FoundingModel,
    Size,
    asymmetric,
    class_conditional,
    gated,
    pixels,
    spatial_temporal_cross,
)
from reelflow.generation.sampling import Sampling
from reelflow.models.context import Layers
from reelflow.models.vae import Stage, VAEConfig, staged
from reelflow.nn.embed import SinCos
from reelflow.nn.patchify import Patch
from reelflow.recipes.recipe import AutoencoderStage, Recipe, TransformerStage, WorldData
from reelflow.training.autoencoder import AutoencoderConfig
from reelflow.training.flow import FlowConfig
from reelflow.training.loop import TrainingConfig
from reelflow.training.optim import OptimizerConfig

__all__ = ["vdit_gated_world", "vdit_mm_world", "vdit_pixels_world", "vdit_text_world", "vdit_world"]

SIZE = Size(dim=128, depth=4, num_heads=2)
WORDS = HashedWords(dim=96, max_words=12)
CLASSES = ClassWords(
    (
        tuple((colour,) for colour in COLOURS),
        (("left",), ("right",), ("up",), ("down",), ("still", "not"), ("circles", "around")),
    )
)
PIXELS = VAEConfig(latent_channels=3, encoder=(), decoder=())
LATENTS = staged(
    latent_channels=8,
    patch=2,
    conv="factorised",
    resample_kernel=1,
    encoder=(Stage(64, 1, space=2, time=2), Stage(128, 1)),
    decoder=(Stage(128, 2), Stage(64, 2, space=2, time=2)),
)


def vdit_world() -> Recipe:
    """A class, attention in space and in time, v over 1,000 steps; on a world of 32 x 32, 9 frames."""
    return _on_world(class_conditional(SIZE), CLASSES)


def vdit_pixels_world() -> Recipe:
    """The same on pixels, in patches of 8 x 8; on a world of 32 x 32, 9 frames."""
    return _on_world(pixels(SIZE), CLASSES, vae=PIXELS, patch=Patch(1, 8, 8))


def vdit_text_world() -> Recipe:
    """Attention in space, in time and to the text; on a world of 32 x 32, 9 frames."""
    return _on_world(spatial_temporal_cross(SIZE), WORDS)


def vdit_gated_world() -> Recipe:
    """Attention in space and in time, mixed by a learned alpha; on a world of 32 x 32, 9 frames."""
    return _on_world(gated(SIZE), WORDS)


def vdit_mm_world() -> Recipe:
    """Video and half as wide text with one joint attention; on a world of 32 x 32, 9 frames."""
    return _on_world(asymmetric(SIZE), WORDS)


def _on_world(
    model: FoundingModel,
    text: HashedWords | ClassWords | Sentences,
    *,
    vae: VAEConfig = LATENTS,
    patch: Patch = Patch(1, 2, 2),
) -> Recipe:
    doors = text.doors
    return Recipe(
        data=WorldData(world=World(height=32, width=32, num_frames=9), num_clips=2400, num_validation=64, seed=0),
        clip=ClipSpec(num_frames=9, height=32, width=32, fps=8.0),
        vae=AutoencoderStage(
            model=vae,
            loss=AutoencoderConfig(crop_frames=9, crop_size=32, kl=1e-3),
            training=_training(300, batch_size=8, lr=2e-3, ema_decay=0.98),
        ),
        text=text,
        dit=TransformerStage(
            model=replace(
                model.dit,
                in_channels=vae.latent_channels,
                patch=patch,
                absolute=(SinCos(max_period=100.0),),
                theta=100.0,  # few tokens a side
                context=Layers(doors["context_dim"]) if doors["context_dim"] else None,
                vector_dim=doors["vector_dim"],
                num_classes=doors["num_classes"],
            ),
            flow=FlowConfig(parameterization=model.parameterization, time=model.time, shift=model.shift),
            training=_training(1200, batch_size=16, lr=3e-3, ema_decay=0.99),
        ),
        sampling=Sampling(num_steps=24, guidance_scale=4.0, shift=model.shift, precision="bf16"),
    )


def _training(steps: int, *, batch_size: int, lr: float, ema_decay: float) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=batch_size,
        optimizer=OptimizerConfig(
            lr=lr, muon_lr=0.02, muon_iterations=4, warmup_steps=20, decay="linear", final_fraction=0.02
        ),
        seed=0,
        ema_decay=ema_decay,
        precision="bf16",
        validate_every=steps // 2,
        checkpoint_every=steps // 4,
    )
