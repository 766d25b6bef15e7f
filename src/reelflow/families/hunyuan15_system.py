"""HunyuanVideo-1.5's way from prompts to clips: a language model's features, and the bytes of what is to be written.

Guidance is a part of the folder, with a configuration of its own. A first frame enters beside the noisy latents, and as
the features of a vision encoder that the network attends to; without one there are zeros, and no features.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from reelflow.conditioning.pretrained import Reading
from reelflow.config import configuration, from_dict
from reelflow.errors import CheckpointError, ConfigError, nearest
from reelflow.families.hunyuan_system import beside
from reelflow.families.schedulers import sigmas_of
from reelflow.families.system import (
    Asked,
    Conditions,
    Defaults,
    Expert,
    System,
    SystemFolder,
    first_frame,
    first_latents,
)
from reelflow.models.condition import Condition, Source
from reelflow.models.context import Sources
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE

__all__ = ["ClassifierFreeGuidance", "image_to_video", "text_to_video"]

PROMPT = Reading(
    length=1000,
    template=(
        "<|im_start|>system\nYou are a helpful assistant. Describe the video by detailing the following aspects: "
        "        1. The main content and theme of the video. "
        "        2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
        "        3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. "
        "        4. background environment, light, style and atmosphere. "
        "        5. camera angles, movements, and transitions used in the video.<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ),
    crop=108,
    layer=2,
    empty=" ",
)
GLYPHS = Reading(length=256, cleaning="quotes", empty=None)
CLIPS = {640: (121, 480, 848), 960: (121, 720, 1280)}  # by the side of a square of as many pixels

Read = Callable[[Sequence[str]], Condition]


@configuration
class ClassifierFreeGuidance:
    """The guider's guider_config.json.

    Raises:
        ConfigError: it guides a part of the steps only, which is not reproduced.
    """

    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    use_original_formulation: bool = False  # 0 is off, not 1
    start: float = 0.0
    stop: float = 1.0
    enabled: bool = True

    def __post_init__(self) -> None:
        if (self.start, self.stop) != (0, 1):
            raise ConfigError(
                f"guidance of a part of the steps is not reproduced, got {self.start} to {self.stop}; nearest: 0 to 1"
            )

    @property
    def scale(self) -> float:
        """The scale as we count it: 1 is off."""
        return self.guidance_scale + self.use_original_formulation if self.enabled else 1.0


def text_to_video(folder: SystemFolder) -> System:
    """Read a HunyuanVideo15Pipeline.

    Raises:
        CheckpointError: the network is to be told where a step leads, which this pipeline does not tell.
    """
    guider, network, vae, read = read_guider(folder), folder.transformer(), folder.vae(), prompt_reader(folder)
    if network.config.numbers:
        raise CheckpointError(
            f"the transformer of {folder.folder} is told where a step leads (use_meanflow), and HunyuanVideo15Pipeline "
            f"does not tell it; nearest: HunyuanVideo15ImageToVideoPipeline"
        )
    assert isinstance(network.config.context, Sources)
    width, extra = network.config.context.sources[2].in_dim, network.config.extra_channels

    def conditions(asked: Asked) -> Conditions:
        count = len(asked.prompts)
        channels = torch.zeros(count, extra, *asked.latent_shape[1:])
        return told(asked, read, Condition(channels=channels, further=(Source(torch.zeros(count, 0, width)),)))

    return system(folder, guider, network, vae, conditions)


def image_to_video(folder: SystemFolder) -> System:
    """Read a HunyuanVideo15ImageToVideoPipeline."""
    guider, network, vae, read = read_guider(folder), folder.transformer(), folder.vae(), prompt_reader(folder)
    features = folder.image("image_encoder", "feature_extractor", layer=0)

    def conditions(asked: Asked) -> Conditions:
        channels = beside(first_latents(asked, vae), asked.latent_shape[1])
        picture = Source(features(first_frame(asked)[:, :, 0]))
        return told(asked, read, Condition(channels=channels, further=(picture,)))

    whole = system(folder, guider, network, vae, conditions)
    return replace(whole, picture="must", next_time=bool(network.config.numbers))


def prompt_reader(folder: SystemFolder) -> Read:
    """Return a reader of prompts, and of what they put in quotes."""
    text, glyphs = folder.text(PROMPT), folder.text(GLYPHS, "text_encoder_2", "tokenizer_2")

    def read(prompts: Sequence[str]) -> Condition:
        written = glyphs(prompts)
        return text(prompts).condition() + Condition(further=(Source(written.tokens, written.mask),))

    return read


def told(asked: Asked, read: Read, frame: Condition) -> Conditions:
    """Return prompts, the first frame beside them."""
    return Conditions(read(asked.prompts) + frame, read(asked.negative) + frame if asked.guided else None)


def system(
    folder: SystemFolder,
    guider: ClassifierFreeGuidance,
    network: VideoDiT,
    vae: CausalVAE,
    conditions: Callable[[Asked], Conditions],
) -> System:
    """Return what text to video and images to video share."""
    walk = folder.walk()
    area = folder.json("transformer/config.json").get("target_size", 640)
    if area not in CLIPS:
        raise CheckpointError(f"{folder.folder}: target_size must be one of {list(CLIPS)}, got {area}")
    return System(
        experts=(Expert(network),),
        vae=vae,
        walk=walk,
        defaults=Defaults(num_steps=50, guidance_scale=guider.scale, clip=CLIPS[area], fps=24.0),
        conditions=conditions,
        times=lambda num_steps, grid: walk.times(num_steps, sigmas=sigmas_of(num_steps)),
        rescale=guider.guidance_rescale,
    )


def read_guider(folder: SystemFolder) -> ClassifierFreeGuidance:
    """Return the folder's guidance.

    Raises:
        CheckpointError: it is of another class, or has values that we do not reproduce.
    """
    found = folder.json("guider/guider_config.json")
    name, known = str(found.get("_class_name")), ClassifierFreeGuidance.__name__
    if name != known:
        raise CheckpointError(f"guider_config.json is of {name!r}; {nearest(name, [known])}")
    try:
        return from_dict(ClassifierFreeGuidance, {k: v for k, v in found.items() if not k.startswith("_")})
    except ConfigError as error:
        raise CheckpointError(f"guider_config.json: {error}") from error


SYSTEMS = {"HunyuanVideo15Pipeline": text_to_video, "HunyuanVideo15ImageToVideoPipeline": image_to_video}
