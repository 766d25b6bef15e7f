"""`reelflow plan`: what a recipe or a founding model costs, before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from reelflow.cli.recipes import find_recipe, known_recipes
from reelflow.cli.terminal import stdout
from reelflow.errors import ConfigError, nearest

if TYPE_CHECKING:
    from reelflow.families.vdit import FoundingModel
    from reelflow.models.dit import DiTConfig
    from reelflow.planning.cost import DiTCost, VAECost
    from reelflow.recipes.forecast import Forecast
    from reelflow.recipes.recipe import Recipe

__all__ = ["Costs", "founding_tables", "memory_table", "model_table", "plan", "published_table", "summary"]

FORMULA = """\
FLOPs count a multiply-add as two, and matrix products and convolutions only. For N video and L context tokens of width
D, attention takes 4 D per pair of query and key that meet ((N + L)^2 when all do), and every linear map 2 x tokens x
weights. A training step is three forwards; a generated clip is one forward per evaluation (guidance and Heun double
them) and one decoding.
Of held memory only weights, gradients, two moments and an average, 4 bytes each, follow from that."""
TIMED = """\
Time: every operation, carried out alone on this machine, times how often it occurs, and what Python needs for a call; rendering
and decoding as a few clips took. Needs: what the process and its tensors take at their peak, walked without data; in training
that is process + weights + average + states + the larger of both peaks + holes, and a copy where there are checkpoints.
Resident: needs, what earlier stages freed and the process keeps, and the store's files as they are read, which the system takes
back where memory is short. A sample counts every evaluation of the network, and decoding (docs/planning.md)."""
MODEL_FORMULA = """\
One forward of one clip, a multiply-add being two FLOPs; attention is its share. Held: weights, gradients, two moments and
an average, 4 bytes each."""

MEMORY = """\
Activations and gradients are those of one clip in bfloat16, without recomputation, weighed as operations make and drop
them; what kernels use inside themselves comes on top. Keys and values are what a cache of the whole clip would hold."""


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
        from reelflow.generation.sampling import count_evaluations
        from reelflow.planning.cost import dit_cost, vae_cost

        shape, loss = recipe.clip, recipe.vae.loss
        whole = vae_cost(recipe.vae.model, shape.num_frames, shape.height, shape.width)
        crop = vae_cost(recipe.vae.model, loss.crop_frames, loss.crop_size, loss.crop_size)
        latents = recipe.vae.model.latent_shape(shape.num_frames, shape.height, shape.width)
        dit = dit_cost(recipe.dit.model, latents[1:], recipe.text.context_tokens)
        vae_samples, dit_samples = (t.batch_size * t.accumulate for t in (recipe.vae.training, recipe.dit.training))
        evaluations = count_evaluations(recipe.sampling, recipe.dit.flow.parameterization, dit.num_tokens)
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
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe (see: reelflow train --list), a published network (see: reelflow families), "
            "a founding model such as vdit-xl, or vdit for all."
        ),
    ] = None,
    *,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a value, as in dit.training.steps=900."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames per clip.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What the run must fit into, as in 8GiB; this machine's, unless said.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Of an hour, in any money; the plan then says what a run costs.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="Time nothing but one matrix product, and take a run to reach this share of its rate."),
    ] = None,
    founding: Annotated[
        bool, typer.Option("--founding", help="Tables of cost of the founding documents, and where they err.")
    ] = False,
) -> None:
    """Say what a recipe or a model costs. Tokens, parameters, operations and bytes; of a recipe also memory and time."""
    extents = {"frames": frames, "height": height, "width": width}
    asked = [
        f"--{name}" for name, value in (("memory", memory), ("price", price), ("share", share)) if value is not None
    ]
    if asked and (name is None or name not in known_recipes()):
        raise ConfigError(f"{', '.join(asked)} is about a recipe; nearest: reelflow plan world {asked[0]} ...")
    if founding:
        if name or assignments or any(extent is not None for extent in extents.values()):
            raise ConfigError("--founding prints tables of its own and takes nothing beside it")
        print(founding_tables())
        return
    if name is None:
        raise ConfigError("give a recipe or a model, such as: reelflow plan world, or reelflow plan vdit")
    if name in known_recipes():
        _plan_recipe(name, assignments or [], extents, memory, price, share)
        return
    if "." in name:
        print(published_table(name, assignments or [], **extents))
        print("\n" + memory_table(name, assignments or [], **extents))
        print("\n" + MODEL_FORMULA + "\n" + MEMORY)
        return
    models = _find_models(name, assignments or [])
    print(model_table(models, **extents))
    print("\n" + MODEL_FORMULA)


def _plan_recipe(
    name: str,
    assignments: Sequence[str],
    extents: Mapping[str, int | None],
    memory: str | None,
    price: float | None,
    share: float | None,
) -> None:
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--share must be above 0 and at most 1, got {share}; nearest: {min(1.0, max(0.1, share))}")
    if price is not None and not price >= 0:
        raise ConfigError(f"--price must not be negative, got {price}; nearest: 0")

    from reelflow.models.budget import in_bytes, readable

    limit = None if memory is None else in_bytes(memory)
    fields = {"frames": "clip.num_frames", "height": "clip.height", "width": "clip.width"}
    asked = [f"{fields[extent]}={value}" for extent, value in extents.items() if value is not None]
    recipe = find_recipe(name, [*assignments, *asked])
    costs = Costs.of(recipe)
    print(summary(recipe, costs))
    _print_counts(recipe, costs)
    if share is not None:
        _print_times(recipe, costs, share)
        return
    print(FORMULA)

    from reelflow.recipes import forecast, rehearsal
    from reelflow.recipes.recipe import FolderData
    from reelflow.training.meters import duration

    rates = rehearsal.measured_rates(recipe.dit.training.precision)
    process, media = rehearsal.process_bytes(recipe.dit.training.precision), rehearsal.measured_media(recipe)
    found = forecast.forecast(recipe, rates, process, media)
    if media is None and isinstance(recipe.data, FolderData):
        print(
            f"{recipe.data.folder} is not there, so {forecast.CLIPS:,} clips are assumed, and their decoding is left out"
        )
    for table in (_stages(found, costs, price), _memory(found)):
        stdout().print(table)
    limit = limit or rehearsal.machine_bytes()
    print(f"in all {duration(found.seconds)}{_money(found.seconds, price)}; {_fullest(found)}")
    print(TIMED)
    for stage in found.stages:
        if stage.peak <= limit:
            continue
        print(f"{stage.name} does not fit into {readable(limit)}: it takes {readable(stage.peak)}")
        if stage.step is None:
            continue
        trained: forecast.Trained = "autoencoder" if stage.name == "autoencoder" else "transformer"
        changes = forecast.changes(recipe, trained, limit, rates, process)
        for change in changes:
            longer = change.seconds / stage.seconds - 1
            print(
                f"  fits with {change.text}: {readable(change.peak)}, {duration(change.seconds)} ({longer:+.0%})"
                f"{_money(change.seconds, price)}"
            )
        if not changes:
            print("  and nothing that is known here makes it fit; a smaller network or smaller clips would")


def _print_counts(recipe: "Recipe", costs: Costs) -> None:
    table = Table("", "autoencoder", "transformer")
    vae, dit = recipe.vae.training, recipe.dit.training
    forward = costs.vae.encode_flops + costs.vae.decode_flops
    for title, *cells in (
        ("parameters", f"{costs.vae.num_parameters:,}", f"{costs.dit.num_parameters:,}"),
        ("one clip becomes", f"1/{costs.vae.compression:.0f} of its values", f"{costs.dit.num_tokens:,} tokens"),
        ("beside it", "", f"{costs.dit.context_tokens:,} context tokens"),
        ("forward of one clip", _flops(forward), _flops(costs.dit.flops)),
        ("of it attention", "", f"{costs.dit.attention_flops / costs.dit.flops:.0%}"),
        ("samples per step", f"{vae.batch_size * vae.accumulate} crops", f"{dit.batch_size * dit.accumulate} clips"),
        ("training step", _flops(costs.vae_step), _flops(costs.dit_step)),
        ("steps", f"{vae.steps if _trains_autoencoder(recipe) else 0:,}", f"{dit.steps:,}"),
    ):
        table.add_row(title, *cells)
    stdout().print(table)


def _trains_autoencoder(recipe: "Recipe") -> bool:
    return recipe.vae.tuned or (recipe.vae.pretrained is None and bool(recipe.vae.model.encoder))


def _print_times(recipe: "Recipe", costs: Costs, share: float) -> None:
    """Print what follows from operations alone."""
    import torch

    from reelflow.planning.cost import training_bytes
    from reelflow.training.meters import duration, measure_peak_flops

    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peaks = {kind: measure_peak_flops(dtype, torch.device("cpu")) for kind, dtype in types.items()}
    vae, dit = recipe.vae.training, recipe.dit.training
    held = [training_bytes(cost.num_parameters) / 2**20 for cost in (costs.vae, costs.dit)]
    times = [
        stage.steps * step / (share * peaks[stage.precision]) * trained
        for stage, step, trained in ((vae, costs.vae_step, _trains_autoencoder(recipe)), (dit, costs.dit_step, True))
    ]
    print(f"training: {duration(times[0])} and {duration(times[1])}; held {held[0]:,.0f} and {held[1]:,.0f} MiB")
    seconds = costs.clip / (share * peaks[recipe.sampling.precision])
    print(f"a generated clip: {_flops(costs.clip)}, about {duration(seconds)} ({recipe.sampling.num_steps} steps)")
    print(FORMULA)
    print(
        f"Time = FLOPs / ({share:g} x the peak of matrix products on this machine, measured now: "
        + ", ".join(f"{kind} {peak / 1e9:,.0f} GFLOP/s" for kind, peak in peaks.items())
        + ")."
    )


def _stages(found: "Forecast", costs: Costs, price: float | None) -> Table:
    from reelflow.training.meters import duration

    table = Table(
        "stage", "how often", "each", "GFLOP/s", "in all", *(["cost"] if price is not None else []), "needs", "resident"
    )
    flops = {
        ("autoencoder", "step"): costs.vae_step,
        ("transformer", "step"): costs.dit_step,
        ("latents", "clip"): costs.vae.encode_flops,
        ("sample", "clip"): costs.clip,
    }
    for stage, resident in zip(found.stages, found.resident, strict=True):
        each = flops.get((stage.name, stage.unit))
        table.add_row(
            stage.name,
            f"{stage.count:,} {stage.unit}{'s' if stage.count > 1 else ''}",
            f"{1e3 * stage.seconds_each:,.0f} ms",
            "" if each is None else f"{each / stage.seconds_each / 1e9:,.0f}",
            duration(stage.seconds),
            *([] if price is None else [f"{price * stage.seconds / 3600:,.2f}"]),
            f"{stage.peak / 2**20:,.0f} MiB",
            f"{resident / 2**20:,.0f} MiB",
        )
    return table


def _fullest(found: "Forecast") -> str:
    """Say when a run has the most in memory, and of what."""
    from reelflow.models.budget import readable

    index = found.fullest
    stage, resident = found.stages[index], found.resident[index]
    parts = {"the process": found.process, "its tensors": stage.peak - found.process}
    parts |= {"kept of earlier stages": resident - stage.files - stage.peak, "mapped files": stage.files}
    told = ", ".join(f"{readable(part)} {name}" for name, part in parts.items() if part)
    where = stage.name if stage.unit in ("step", "clip") else f"{stage.name}'s {stage.unit}"
    return f"at most {readable(resident)}, in {where}: {told}"


def _memory(found: "Forecast") -> Table:
    trained = [stage for stage in found.stages if stage.step is not None]
    table = Table("held in training, MiB", *(stage.name for stage in trained))
    steps = [stage.step for stage in trained if stage.step is not None]
    for title, parts in (
        ("the process itself", [found.process for _ in steps]),
        ("weights", [step.weights for step in steps]),
        ("their average", [step.average for step in steps]),
        ("states of the optimiser", [step.states for step in steps]),
        ("activations and gradients, at their peak", [step.activations for step in steps]),
        ("gradients and the update, at its peak", [step.gradients + step.update for step in steps]),
        ("holes", [step.holes for step in steps]),
    ):
        table.add_row(title, *(f"{part / 2**20:,.0f}" for part in parts))
    return table


def _money(seconds: float, price: float | None) -> str:
    return "" if price is None else f", {price * seconds / 3600:,.2f} at {price:g} an hour"


def _find_models(name: str, assignments: Sequence[str]) -> "dict[str, FoundingModel]":
    """Return the founding models of this name, or whose names begin so, each with the values set."""
    from reelflow.config import set_values
    from reelflow.families.vdit import founding_models

    known = founding_models()
    found = {name: known[name]} if name in known else {n: m for n, m in known.items() if n.startswith(f"{name}-")}
    if not found:
        raise ConfigError(f"no recipe is called {name!r}; {nearest(name, [*known_recipes(), *known])}")
    return {name: set_values(model, assignments) for name, model in found.items()}


def model_table(
    models: "Mapping[str, FoundingModel]",
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> str:
    """Return the costs of founding models on a clip, in Markdown; one that it does not fit has the reason in its row.

    Raises:
        ConfigError: the clip fits none of them.
    """
    from reelflow.planning.cost import dit_cost, training_bytes

    rows, refusal = [], None
    for name, model in models.items():
        asked = zip((frames, height, width), model.clip, strict=True)
        clip = tuple(usual if given is None else given for given, usual in asked)
        try:
            cost = dit_cost(model.dit, model.extents(*clip), model.context_tokens)
        except ConfigError as error:
            refusal = error
            rows.append((name, " x ".join(map(str, clip)), str(error), "", "", "", ""))
            continue
        rows.append(
            (
                name,
                " x ".join(map(str, clip)),
                f"{cost.num_parameters:,}",
                f"{cost.num_tokens:,} + {cost.context_tokens}",
                _flops(cost.flops),
                f"{cost.attention_flops / cost.flops:.0%}",
                f"{training_bytes(cost.num_parameters) / 2**30:.1f} GiB",
            )
        )
    if refusal is not None and not any(flops for _, _, _, _, flops, _, _ in rows):
        raise refusal
    return _markdown(("model", "clip", "parameters", "tokens + text", "forward", "attention", "held"), rows)


def published_table(
    name: str,
    assignments: Sequence[str] = (),
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> str:
    """Return what a published network computes of a clip, in Markdown.

    Raises:
        ConfigError: there is no network of this name, or the clip does not fit it.
    """
    from reelflow.planning.cost import dit_cost

    asked = _Asked.of(name, assignments, (frames, height, width))
    pictures = asked.image_tokens
    cost = dit_cost(asked.config, asked.latents, asked.context_tokens, image_tokens=pictures)
    rows = (
        ("clip", " x ".join(map(str, asked.clip))),
        (
            "tokens + text",
            f"{cost.num_tokens:,} + {cost.context_tokens}{f' + {pictures} of a picture' if pictures else ''}",
        ),
        ("parameters", f"{cost.num_parameters:,}"),
        ("forward of one clip", _flops(cost.flops)),
        ("of it attention", f"{_flops(cost.attention_flops)}, {cost.attention_flops / cost.flops:.0%}"),
        ("training step of one clip", _flops(3 * cost.flops)),
    )
    return _markdown((name, ""), rows)


def memory_table(
    name: str,
    assignments: Sequence[str] = (),
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> str:
    """Return what a published network holds while it works on a clip, in Markdown.

    Raises:
        ConfigError: as `published_table`.
    """
    from reelflow.planning.cost import training_bytes
    from reelflow.planning.memory import dit_memory

    asked = _Asked.of(name, assignments, (frames, height, width))
    memory = dit_memory(asked.config, asked.latents, asked.context_tokens, image_tokens=asked.image_tokens)
    rows = (
        ("weights", _gib(memory.weights)),
        ("activations of a forward, at their peak", _gib(memory.inference)),
        ("keys and values of all layers", _gib(memory.keys_values)),
        ("activations and gradients of a training step, at their peak", _gib(memory.training)),
        ("weights, gradients, moments and average in float32", _gib(training_bytes(memory.weights // 2))),
    )
    return _markdown(("memory, in bfloat16", ""), rows)


@dataclass(frozen=True)
class _Asked:
    """A published network, and a clip for it."""

    config: "DiTConfig"
    clip: tuple[int, ...]
    latents: tuple[int, int, int]
    context_tokens: int | tuple[int, ...]
    image_tokens: int

    @classmethod
    def of(cls, name: str, assignments: Sequence[str], extents: Sequence[int | None]) -> "_Asked":
        from reelflow.config import set_values
        from reelflow.families.published import find_size

        family, size = find_size(name)
        usual = size.clip or family.clip
        clip = tuple(own if said is None else said for said, own in zip(extents, usual, strict=True))
        config = set_values(size.config, assignments)
        pictures = family.image_tokens if config.image else 0
        return cls(config, clip, family.latent_shape(size, clip), family.context_tokens, pictures)


def founding_tables() -> str:
    """Return what the founding documents say of cost, beside what is true, in Markdown."""
    from reelflow.families.founding import CLIPS, clip_cost, corrections

    rows = []
    for cost in map(clip_cost, CLIPS):
        ratio = cost.full_pairs / cost.factorised_pairs
        rows.append(
            (
                cost.name,
                f"{' x '.join(map(str, cost.counted))} = {cost.counted.num_tokens:,}",
                " x ".join(map(str, cost.clip)),
                f"{' x '.join(map(str, cost.grid))} = {cost.grid.num_tokens:,}",
                f"{cost.full_pairs:.3g}",
                f"{cost.factorised_pairs:.3g}",
                f"{ratio:.1f}",
            )
        )
    heads = ("clip", "tokens they count", "nearest clip", "its tokens", "full pairs", "factorised", "S T / (S + T)")
    errors = [(correction.claim, correction.truth) for correction in corrections()]
    return f"{_markdown(heads, rows)}\n\n{_markdown(('they say', 'true'), errors)}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, len(heads) * ("---",), *rows))


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _flops(count: float | int) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"
