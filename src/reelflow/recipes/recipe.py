"""A recipe: all that a run depends on (`reelflow.recipes.runs` carries it out)."""

from typing import Literal

from reelflow.conditioning.labels import ClassWords
from reelflow.conditioning.sentences import Sentences
from reelflow.conditioning.text import HashedWords, words_of
from reelflow.config import configuration
from reelflow.data.folder import ClipSpec
from reelflow.data.loader import Buckets, Packed
from reelflow.data.worlds import COMBINATIONS, Combination, World, prompt, split_combinations
from reelflow.diffusion.timesteps import shift_for
from reelflow.errors import ConfigError
from reelflow.generation.pipeline import ModelCard
from reelflow.generation.sampling import Sampling
from reelflow.models.adapters import LoRA
from reelflow.models.dit import DiTConfig
from reelflow.models.linear import is_linear
from reelflow.models.vae import VAEConfig
from reelflow.parallel.shard import ParallelConfig
from reelflow.recipes.sets import ShardsData
from reelflow.training.autoencoder import (
    AutoencoderConfig,
)
from reelflow.training.flow import FlowConfig, clip_sizes
from reelflow.training.loop import TrainingConfig

__all__ = [
    "AutoencoderStage",
    "FolderData",
    "Prior",
    "Recipe",
    "SubjectData",
    "TransformerStage",
    "WorldData",
]

Split = tuple[tuple[Combination, ...], tuple[Combination, ...]]


@configuration
class WorldData:
    """Clips rendered from the synthetic world; some combinations of colour, shape and motion are held out."""

    world: World
    num_clips: int
    num_validation: int  # clips of held-out combinations
    seed: int
    names: tuple[str, ...] = ()  # of colours, shapes and motions, if not of all that there are
    without: tuple[tuple[str, str], ...] = ()  # colours and shapes that no clip shows together
    kind: Literal["world"] = "world"

    @property
    def combinations(self) -> Split:
        """What there is to learn, and what is held out."""
        learned, held_out = (
            tuple(
                each
                for each in part
                if (each.colour, each.shape) not in self.without and (not self.names or set(each) <= set(self.names))
            )
            for part in split_combinations(seed=self.seed)
        )
        return learned, held_out


@configuration
class SubjectData:
    """A few clips of one thing of the synthetic world, which captions call by a word of its own in place of its colour.

    Raises:
        ConfigError: a name is unknown, the word is one of the world's, or a motion is both shown and set aside.
    """

    world: World
    colour: str
    shape: str
    word: str
    shown: tuple[str, ...]  # motions
    unshown: tuple[str, ...]  # motions of the clips that are set aside
    num_clips: int
    num_validation: int
    seed: int
    kind: Literal["subject"] = "subject"

    def __post_init__(self) -> None:
        for motion in (*self.shown, *self.unshown):
            prompt(self.colour, self.shape, motion)  # refuses unknown names
        if not self.shown or not self.unshown or set(self.shown) & set(self.unshown):
            raise ConfigError(
                f"a subject is shown in some motions and set aside in others, got {list(self.shown)} and {list(self.unshown)}"
            )
        known = {word for each in COMBINATIONS for word in words_of(prompt(*each))}
        if words_of(self.word) != [self.word] or self.word in known:
            raise ConfigError(
                f"a subject needs one word in lower case that captions do not know yet, got {self.word!r}"
            )

    @property
    def combinations(self) -> Split:
        """What there is to learn, and what is held out."""
        learned, held_out = (
            tuple(Combination(self.colour, self.shape, motion) for motion in motions)
            for motions in (self.shown, self.unshown)
        )
        return learned, held_out

    def named(self, text: str) -> str:
        """Return a caption with the word in place of the colour."""
        return text.replace(self.colour, self.word)


@configuration
class FolderData:
    """A folder of videos with captions; see `reelflow data inspect`."""

    folder: str
    num_validation: int  # clips set aside
    kind: Literal["folder"] = "folder"


@configuration
class AutoencoderStage:
    """The autoencoder: trained here, or taken from another model's folder and, if tuned, trained on.

    One of images is inflated (`reelflow.models.inflate`) where `model` is what comes of it.

    Raises:
        ConfigError: the loss needs a pretrained autoencoder, and there is none.
    """

    model: VAEConfig
    loss: AutoencoderConfig
    training: TrainingConfig
    pretrained: str | None = None  # a run or model folder
    tuned: bool = False  # whether the pretrained one is trained on
    perceptual: Literal["pyramid", "efficientnet-lite0"] = "pyramid"  # the distance on curves and in the loss
    start: Literal["random", "linear"] = (
        "random"  # "linear": a projection fitted to the clips (`reelflow.models.linear`)
    )

    def __post_init__(self) -> None:
        if self.start == "linear" and (self.pretrained is not None or not is_linear(self.model)):
            raise ConfigError("vae.start=linear fits the projection of an autoencoder built by reelflow.models.linear")
        if self.pretrained is not None and self.tuned:
            return
        for name, asked in {"tuned": self.tuned, "learned": self.loss.learned == "decoder"}.items():
            if asked:
                raise ConfigError(f"vae.{name} is about an autoencoder that exists; set vae.pretrained and vae.tuned")
        if self.loss.identity:
            raise ConfigError(
                "vae.loss.identity keeps the latents of a pretrained one; set vae.pretrained and vae.tuned"
            )


@configuration
class Prior:
    """Clips of its class that a pretrained transformer makes itself, to go on making them while it learns a subject.

    They are made once, by the recipe's sampling, clip i of prompt i (the prompts take turns) and of noise seed + i.

    Raises:
        ConfigError: there are no prompts or no clips, or the weight is not positive.
    """

    prompts: tuple[str, ...]  # of the class, without the subject's word
    num_clips: int = 64
    weight: float = 1.0  # of their loss beside the subject's (Ruiz et al. 2023, DreamBooth, eq. 2)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or self.num_clips < 1 or not 0 < self.weight < float("inf"):
            raise ConfigError(
                f"a prior needs prompts, clips and a weight above 0, got {len(self.prompts)}, {self.num_clips} and "
                f"{self.weight}; nearest to none at all: dit.prior=null"
            )


@configuration
class TransformerStage:
    """The transformer over the autoencoder's latents: trained from scratch, or a pretrained one trained on.

    With an adapter, that alone is learned, by AdamW; the finished model has it in its weights.

    Raises:
        ConfigError: there is an adapter or a prior, but nothing pretrained; an adapter is to be learned of dealt heads; or
            a step's batches cannot be dealt to the mesh.
    """

    model: DiTConfig
    flow: FlowConfig
    training: TrainingConfig
    pretrained: str | None = None  # a run or model folder
    adapter: LoRA | None = None
    prior: Prior | None = None  # as many of its clips as of others in every batch
    parallel: ParallelConfig = ParallelConfig()  # how it is spread over the processes that torchrun starts
    batches: Packed | Buckets | None = None  # how clips of several shapes make batches, in place of training.batch_size

    def __post_init__(self) -> None:
        if self.adapter is not None and self.pretrained is None:
            raise ConfigError(
                "an adapter changes a transformer that exists; set dit.pretrained, or leave dit.adapter out"
            )
        if self.prior is not None and self.pretrained is None:
            raise ConfigError(
                "a prior is what a pretrained transformer makes; set dit.pretrained, or leave dit.prior out"
            )
        mesh = self.parallel.mesh
        if self.adapter is not None and mesh.tensor > 1:
            raise ConfigError(
                f"an adapter changes whole maps, and tensor={mesh.tensor} cuts them; nearest: dit.parallel.mesh.tensor=1 and "
                f"dit.parallel.mesh.shard={mesh.shard * mesh.tensor}"
            )
        if self.parallel.compile == "blocks" and isinstance(self.batches, Packed):
            raise ConfigError(
                "compiled blocks would be compiled again for every new row of clips; nearest: dit.parallel.compile=none, or "
                "dit.batches.kind=buckets"
            )
        self.training.check(self.parallel.mesh.data_parallel)


@configuration
class Recipe:
    """All that a run depends on.

    The transformer also learns clips of the shapes in `also`. A video gives clips of every shape, of these and `clip`, that
    has the proportions nearest its own; the autoencoder, validation and samples know `clip` alone.

    Raises:
        ConfigError: the parts do not fit each other.
    """

    data: WorldData | SubjectData | FolderData | ShardsData
    clip: ClipSpec
    vae: AutoencoderStage
    text: HashedWords | ClassWords | Sentences
    dit: TransformerStage
    sampling: Sampling
    also: tuple[ClipSpec, ...] = ()  # at the frame rate of `clip`

    def __post_init__(self) -> None:
        self._check_shapes()
        if isinstance(self.data, ShardsData):
            self._check_shards()
        for name, need in {"in_channels": self.vae.model.latent_channels, **self.text.doors}.items():
            have = getattr(self.dit.model, name)
            if have != need:
                raise ConfigError(f"dit.model.{name} must be {need} to fit the rest of the recipe, got {have}")
        if self.dit.pretrained is not None and (
            self.vae.pretrained is None or (self.vae.tuned and self.vae.loss.learned == "all")
        ):
            raise ConfigError(
                "a pretrained transformer knows the latents of its own autoencoder; set "
                f"vae.pretrained={self.dit.pretrained} and vae.tuned=false"
            )
        flow, card = self.dit.flow, self.card()
        for num_frames in (self.clip.num_frames, *([1] if flow.image_fraction else [])):
            shift_for(flow.shift, card.num_tokens(num_frames))
        if self.sampling.guidance_scale != 1 and not flow.condition_dropout:
            raise ConfigError(
                f"guidance needs an unconditional branch, but dit.flow.condition_dropout is 0 and sampling.guidance_scale "
                f"{self.sampling.guidance_scale}; nearest: a condition_dropout of 0.1, or a guidance_scale of 1"
            )

    def _check_shards(self) -> None:
        if self.vae.pretrained is None or self.vae.tuned:
            raise ConfigError("shards hold latents of one autoencoder; set vae.pretrained to it, and vae.tuned=false")
        if self.also or self.dit.prior is not None:
            raise ConfigError(
                "shards hold clips as they are, of whatever shapes, and no prior; nearest: also=[] and dit.prior=null"
            )

    def latent_shape(self, clip: ClipSpec) -> tuple[int, int, int]:
        """Return the latent frames, rows and columns of clips."""
        _, *extents = self.vae.model.latent_shape(clip.num_frames, clip.height, clip.width)
        return extents[0], extents[1], extents[2]

    def _check_shapes(self) -> None:
        sizes = clip_sizes(
            self.dit.model,
            list(map(self.latent_shape, (self.clip, *self.also))),
            context_tokens=self.text.context_tokens,
        )
        largest, batches = max(size.tokens for size in sizes), self.dit.batches
        if self.also and batches is None:
            raise ConfigError(
                f"clips of {1 + len(self.also)} shapes need dit.batches; nearest: {{kind: packed, tokens: {largest}}}"
            )
        if batches is not None and batches.tokens < largest:
            raise ConfigError(
                f"a batch of {batches.tokens} tokens cannot hold a clip of {largest}; nearest: dit.batches.tokens={largest}"
            )
        if any(clip.fps != self.clip.fps for clip in self.also):
            rates = ", ".join(f"{clip.fps:g}" for clip in self.also)
            raise ConfigError(f"clips of all shapes have the frame rate of clip, {self.clip.fps:g}; also has {rates}")
        for size in sizes:
            shift_for(self.dit.flow.shift, size.tokens - self.text.context_tokens)

    def card(self, words: tuple[str, ...] = ()) -> ModelCard:
        """Describe the model that the recipe makes, and the words of its captions."""
        return ModelCard(
            vae=self.vae.model,
            dit=self.dit.model,
            text=self.text,
            clip=self.clip,
            sampling=self.sampling,
            words=words,
            parameterization=self.dit.flow.parameterization,
            tells=self.dit.flow.tells,
        )
