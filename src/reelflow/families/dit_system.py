"""DiT's way from classes to pictures: a prompt is the name of a class, or its number; guidance away from no class.

Guidance leads all channels; the original's leads the first three of four.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import torch

from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.family import side_of_places
from reelflow.families.system import Asked, Conditions, Defaults, Expert, System, SystemFolder, one_frame, with_variance
from reelflow.models.condition import Condition

__all__ = ["class_to_picture"]


def class_to_picture(folder: SystemFolder) -> System:
    """Read a DiTPipeline, whose model_index.json may say what its classes are called."""
    network, vae = folder.transformer(), folder.vae()
    walk, classes = with_variance(folder.walk(), network), network.config.num_classes
    numbers = _numbers(folder, classes)
    side = round(side_of_places(network.config)) * network.config.patch.h * vae.config.spatial_stride

    def label(prompts: Sequence[str]) -> list[int]:
        return [_number(prompt, numbers, classes) for prompt in prompts]

    def conditions(asked: Asked) -> Conditions:
        cond, uncond = (Condition(label=torch.tensor(label(each))) for each in (asked.prompts, asked.negative))
        return Conditions(cond, uncond)

    def check(asked: Asked) -> None:
        one_frame(asked)
        label([*asked.prompts, *asked.negative])

    return System(
        experts=(Expert(network),),
        vae=vae,
        walk=walk,
        defaults=Defaults(num_steps=50, guidance_scale=4.0, clip=(1, side, side), fps=1.0),
        conditions=conditions,
        times=lambda num_steps, grid: walk.times(num_steps),
        check=check,
    )


def _numbers(folder: SystemFolder, classes: int) -> dict[str, int]:
    """Return the numbers of classes by each of their names; of classes that share a name, the last one's."""
    names = folder.index.get("id2label") or {}
    try:
        numbers = {each.strip(): int(number) for number, several in names.items() for each in several.split(",")}
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{folder.folder}: model_index.json has id2label, which is no names by number") from error
    if wrong := sorted(number for number in numbers.values() if not 0 <= number < classes):
        raise CheckpointError(f"{folder.folder}: model_index.json names class {wrong[0]}; there are {classes}")
    return numbers


def _number(prompt: str, numbers: Mapping[str, int], classes: int) -> int:
    """Return the class that a prompt asks for; "" is none, whose row in the table is the last."""
    asked = prompt.strip()
    if not asked:
        return classes
    if asked in numbers:
        return numbers[asked]
    if not asked.isdecimal():
        close = "".join(f"{name!r} or " for name in get_close_matches(asked, numbers, n=1, cutoff=0.0))
        raise ConfigError(f"there is no class {asked!r}; nearest: {close}a number from 0 to {classes - 1}")
    if int(asked) >= classes:
        raise ConfigError(f"classes are numbered 0 to {classes - 1}, got {asked}; nearest: {classes - 1}")
    return int(asked)


SYSTEMS = {"DiTPipeline": class_to_picture}
