"""DreamBooth on the synthetic world: a thing that a model has never seen, a word for it, and what the word costs the rest.

The thing is a ring of magenta, a colour and a shape that the base knows, but not together; "zwx" is its word. It is shown in
two motions and asked for in a third (Ruiz et al. 2023, DreamBooth).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from reelflow.conditioning.text import HashedWords
from reelflow.data.folder import ClipSpec
from reelflow.data.worlds import Combination, World, prompt
from reelflow.evaluation.world import PromptScores, score_prompts
from reelflow.generation.pipeline import Pipeline, to_frames
from reelflow.models.adapters import LoRA
from reelflow.models.blocks import Dual, Single
from reelflow.models.linear import linear
from reelflow.recipes.recipe import Prior, Recipe, SubjectData, WorldData
from reelflow.recipes.world import world
from reelflow.training.optim import OptimizerConfig

__all__ = ["SubjectScores", "score_subject", "small_world", "subject_world"]

COLOURS, SHAPES = ("red", "blue", "magenta"), ("disc", "triangle", "ring")
SHOWN, UNSHOWN = ("still", "left"), ("right",)
THING = ("magenta", "ring")
OTHERS = tuple(
    Combination(colour, THING[1], motion) for colour in COLOURS if colour != THING[0] for motion in (*SHOWN, *UNSHOWN)
)


def small_world() -> Recipe:
    """32 x 32, 9 frames of a corner of the world in which no ring is magenta: the base of `subject_world`.

    16 minutes on one thread of a machine with much else to do. Of 96 clips of rings in red and blue 100 % have the colour,
    93 % the motion and 40 % the shape asked for: a hole takes longer to learn.
    """
    base = world()
    model = replace(
        base.dit.model,
        in_channels=8,
        dim=128,
        num_heads=4,
        layers=(Dual(mlp_ratio=3.0), *4 * (Single(mlp_ratio=3.0),)),
        stem=0,
    )
    return replace(
        base,
        data=WorldData(
            world=World(height=32, width=32, num_frames=9),
            num_clips=1200,
            num_validation=32,
            seed=0,
            names=(*COLOURS, *SHAPES, *SHOWN, *UNSHOWN),
            without=(THING,),
        ),
        clip=ClipSpec(num_frames=9, height=32, width=32, fps=8.0),
        vae=replace(base.vae, model=linear(8, patch=2, space=2, time=4), start="linear"),
        text=HashedWords(dim=96, max_words=12),
        dit=replace(
            base.dit,
            model=model,
            flow=replace(base.dit.flow, shift=2.0),
            training=replace(
                base.dit.training, steps=1200, validate_every=600, preview_every=1200, checkpoint_every=600
            ),
        ),
        sampling=replace(base.sampling, guidance_scale=4.0, shift=2.0),
    )


def subject_world(base: str = "runs/small-world") -> Recipe:
    """A LoRA learns the word for a magenta ring from six clips, and goes on making the other rings.

    Measured on 16 clips by the word, in a motion that it was not shown in, and 96 of other rings; each run is 200 steps, 2 to 3
    minutes where the base took 16. `taken` are other rings that came out magenta. The whole transformer learned with
    `dit.adapter=null` and lr 5e-4; "alone" is `dit.prior=null`.

        in %                     by the word: colour  motion  shape    others: colour  motion  shape    taken
        the base                                   6      88     19               100      93     40        0
        LoRA alone                               100     100     31                97      93     45        1
        LoRA, prior                              100      94     12               100      98     18        0
        all of it, alone                         100     100     56                52      75     33       30
        all of it, prior                         100     100     31               100      97     25        0

    So all of it learns the word and forgets half of the class's colours, and the prior keeps them. A prior keeps what the model
    makes, its faults too: of the shape, which the base mostly misses, less is right with it.
    """
    recipe = small_world()
    training = replace(
        recipe.dit.training,
        steps=200,
        batch_size=6,
        optimizer=OptimizerConfig(lr=2e-3, muon_lr=None, warmup_steps=10, decay="linear"),
        ema_decay=0.95,
        validate_every=50,
        preview_every=200,
        checkpoint_every=100,
    )
    colour, shape = THING
    others = tuple(prompt(*each) for each in OTHERS if each.motion in SHOWN)
    return replace(
        recipe,
        data=SubjectData(
            world=World(height=32, width=32, num_frames=9),
            colour=colour,
            shape=shape,
            word="zwx",
            shown=SHOWN,
            unshown=UNSHOWN,
            num_clips=6,
            num_validation=12,
            seed=1,
        ),
        vae=replace(recipe.vae, pretrained=base, start="random"),
        dit=replace(
            recipe.dit,
            training=training,
            pretrained=base,
            adapter=LoRA(rank=8, targets=("attention", "mlp")),
            prior=Prior(others, num_clips=64),
        ),
    )


class SubjectScores(NamedTuple):
    """What a model makes of the word, and of its class without the word."""

    subject: PromptScores  # in motions that the subject was not shown in
    others: PromptScores
    taken: float  # share of the others' clips that show the subject's colour


def score_subject(
    pipeline: Pipeline,
    data: SubjectData,
    *,
    others: Sequence[Combination] = OTHERS,
    per_prompt: int = 16,
    seed: int = 0,
) -> SubjectScores:
    """Make clips of the subject, by its word, and of others of its class, and read them back."""
    _, unshown = data.combinations
    subject, rest = ([each for each in asked for _ in range(per_prompt)] for asked in (unshown, others))
    own = _made(pipeline, [data.named(prompt(*each)) for each in subject], seed)
    made = _made(pipeline, [prompt(*each) for each in rest], seed)
    return SubjectScores(
        subject=score_prompts(own, subject),
        others=score_prompts(made, rest),
        taken=score_prompts(made, [each._replace(colour=data.colour) for each in rest]).colour,
    )


def _made(pipeline: Pipeline, prompts: list[str], seed: int) -> list[Any]:
    parts = (prompts[start : start + 16] for start in range(0, len(prompts), 16))
    return [
        to_frames(clip).numpy()
        for number, part in enumerate(parts)
        for clip in pipeline.generate(part, seed=seed + 16 * number)
    ]
