"""`reelflow plan`: what a recipe costs, before anything runs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from reelflow.cli.recipes import find_recipe
from reelflow.cli.terminal import stdout
from reelflow.errors import ConfigError

if TYPE_CHECKING:
    from reelflow.planning.cost import DiTCost, VAECost
    from reelflow.recipes.recipe import Recipe

__all__ = ["Costs", "plan", "summary"]

FORMULA = """\
FLOPs count a multiply-add as two, and matrix products and convolutions only. For N video and L context tokens of width
D, attention takes 4 (N + L)^2 D per block, and every linear map 2 x tokens x weights. A training step is three forwards;
a generated clip is one forward per evaluation (guidance and Heun double them) and one decoding.
Held in training: weights, gradients, two moments and an average, 4 bytes each; activations come on top."""


@dataclass(frozen=True)
class Costs:
    """What a recipe computes, in FLOPs (a multiply-add is two) unless it says otherwise."""

    vae: "VAECost"  # of one whole clip
    dit: "DiTCost"
    vae_step: float
    dit_step: float
    clip: float  # one generated clip

    @classmethod
    def of(cls, recipe: "Recipe") -> "Costs":
        """Count the costs of a recipe."""
        from reelflow.planning.cost import dit_cost, vae_cost

        shape, loss = recipe.clip, recipe.vae.loss
        whole = vae_cost(recipe.vae.model, shape.num_frames, shape.height, shape.width)
        crop = vae_cost(recipe.vae.model, loss.crop_frames, loss.crop_size, loss.crop_size)
        latents = recipe.vae.model.latent_shape(shape.num_frames, shape.height, shape.width)
        dit = dit_cost(recipe.dit.model, latents[1:], recipe.text.max_words)
        vae_samples, dit_samples = (t.batch_size * t.accumulate for t in (recipe.vae.training, recipe.dit.training))
        sampling = recipe.sampling
        evaluations = sampling.num_steps * (1 if sampling.guidance_scale == 1 else 2)
        evaluations *= 2 if sampling.sampler == "heun" else 1
        return cls(
            vae=whole,
            dit=dit,
            vae_step=3.0 * (crop.encode_flops + crop.decode_flops) * vae_samples,
            dit_step=3.0 * dit.flops * dit_samples,
            clip=float(evaluations * dit.flops + whole.decode_flops),
        )


def summary(recipe: "Recipe", costs: Costs) -> str:
    """Say on one line what a recipe trains."""
    clip = recipe.clip
    return (
        f"clips of {clip.num_frames} x {clip.height} x {clip.width} at {clip.fps:g} fps -> "
        f"autoencoder ({costs.vae.num_parameters / 1e6:.1f} M parameters, {costs.vae.compression:.0f} values to 1) -> "
        f"transformer ({costs.dit.num_parameters / 1e6:.1f} M parameters, "
        f"{costs.dit.num_tokens} + {costs.dit.context_tokens} tokens)"
    )


def plan(
    recipe: Annotated[str, typer.Argument(help="world or folder (see: reelflow train --list).")],
    *,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a value, as in dit.training.steps=900."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames per clip.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    share: Annotated[
        float, typer.Option(help="Share of the measured peak that a run reaches; training prints it.")
    ] = 0.3,
) -> None:
    """Say what a recipe costs. Tokens, parameters, operations and bytes, and the time they take on this machine."""
    if not 0 < share <= 1:
        raise ConfigError(f"--share must be above 0 and at most 1, got {share}")

    import torch

    from reelflow.planning.cost import training_bytes
    from reelflow.training.meters import duration, measure_peak_flops

    extents = {"num_frames": frames, "height": height, "width": width}
    asked = [f"clip.{name}={value}" for name, value in extents.items() if value is not None]
    chosen = find_recipe(recipe, [*(assignments or []), *asked])
    costs = Costs.of(chosen)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peaks = {name: measure_peak_flops(dtype, torch.device("cpu")) for name, dtype in types.items()}

    table = Table("", "autoencoder", "transformer")
    vae, dit = chosen.vae.training, chosen.dit.training
    trains_vae = chosen.vae.pretrained is None
    times = [
        stage.steps * step / (share * peaks[stage.precision]) * trained
        for stage, step, trained in ((vae, costs.vae_step, trains_vae), (dit, costs.dit_step, True))
    ]
    forward = costs.vae.encode_flops + costs.vae.decode_flops
    held = [training_bytes(c.num_parameters) for c in (costs.vae, costs.dit)]
    for name, *cells in (
        ("parameters", f"{costs.vae.num_parameters:,}", f"{costs.dit.num_parameters:,}"),
        ("one clip becomes", f"1/{costs.vae.compression:.0f} of its values", f"{costs.dit.num_tokens:,} tokens"),
        ("beside it", "", f"{costs.dit.context_tokens:,} context tokens"),
        ("forward of one clip", _flops(forward), _flops(costs.dit.flops)),
        ("of it attention", "", f"{costs.dit.attention_flops / costs.dit.flops:.0%}"),
        ("samples per step", f"{vae.batch_size * vae.accumulate} crops", f"{dit.batch_size * dit.accumulate} clips"),
        ("training step", _flops(costs.vae_step), _flops(costs.dit_step)),
        ("steps", f"{vae.steps if trains_vae else 0:,}", f"{dit.steps:,}"),
        ("held in training", *(f"{count / 2**20:,.0f} MiB" for count in held)),
        ("estimated training", *(duration(seconds) for seconds in times)),
    ):
        table.add_row(name, *cells)
    print(summary(chosen, costs))
    stdout().print(table)
    seconds = costs.clip / (share * peaks[chosen.sampling.precision])
    print(f"a generated clip: {_flops(costs.clip)}, about {duration(seconds)} ({chosen.sampling.num_steps} steps)")
    print(FORMULA)
    print(
        f"Time = FLOPs / ({share:g} x the peak of matrix products on this machine, measured now: "
        + ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in peaks.items())
        + ")."
    )


def _flops(count: float | int) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"
