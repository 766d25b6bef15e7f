"""`reelflow vae`: an autoencoder alone. What it is, a video to latents and back, how long that takes, and training one."""

import json
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from reelflow.cli.terminal import INTERRUPTED, Device, interruptible, new_file, parse_size, progress_bar, stdout, warn
from reelflow.errors import CheckpointError, ConfigError, MediaError, nearest

if TYPE_CHECKING:
    import torch

    from reelflow.models.budget import Budgeted
    from reelflow.models.coder import Layer
    from reelflow.models.vae import CausalVAE
    from reelflow.recipes.recipe import Recipe

__all__ = ["vae"]

vae = typer.Typer(help="Encode, decode and train an autoencoder alone.", no_args_is_help=True, rich_markup_mode=None)
DType = Literal["float32", "bfloat16"]
Folder = Annotated[
    Path, typer.Option("--vae", help="A published autoencoder, a system that holds one, or a run or model folder.")
]
Memory = Annotated[
    str | None, typer.Option(help="What to take beside the weights, such as 4GiB [default: half of what is free].")
]
Precision = Annotated[DType, typer.Option(help="Type of weights and activations.")]
Which = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER|SIZE",
        help="A folder, or a published size: FAMILY.SIZE, which the error for an unknown one offers.",
    ),
]
Size = Annotated[str | None, typer.Option(metavar="HxW", help="Of a clip, in pixels.")]


class Found(NamedTuple):
    """An autoencoder without its weights, and where they are."""

    name: str
    vae: "CausalVAE"  # on the meta device
    clip: tuple[int, int, int]  # frames, height and width that it was made for
    weights: tuple[Path, ...]
    kind: Literal["published", "own", "size"]


@vae.callback()
def _group() -> None:
    """Encode, decode and train an autoencoder alone."""


@vae.command()
def info(
    which: Which,
    *,
    size: Size = None,
    frames: Annotated[int | None, typer.Option(help="Of a clip.")] = None,
    dtype: Precision = "float32",
) -> None:
    """Say what an autoencoder is. Its compression, whether it streams or what stands in the way, and what it takes."""
    import torch
    from torch.utils._pytree import tree_leaves

    from reelflow.models.budget import reach, readable
    from reelflow.models.coder import obstacles

    found = find(which)
    network, config = found.vae.to(getattr(torch, dtype)), found.vae.config
    height, width = parse_size(size) if size else found.clip[1:]
    num_frames = frames or found.clip[0]
    channels, *latents = config.latent_shape(num_frames, height, width)
    weights = sum(p.numel() for p in network.parameters())
    stride = config.spatial_stride
    print(
        f"{found.name}: {weights:,} parameters; each {config.temporal_stride} x {stride} x {stride} pixels become a latent "
        f"of {channels} channels, {3 * config.temporal_stride * stride**2 / channels:.3g} times fewer values; takes "
        f"{config.lengths} frames of sides that {stride} divides"
    )
    clip, shape = (1, 3, num_frames, height, width), (1, channels, *latents)
    whole = {"encoder": network.plan_encode(clip, 2**60).peak, "decoder": network.plan_decode(shape, 2**60).peak}
    for name, layers in (("encoder", config.encoder), ("decoder", config.decoder)):
        inputs = 3 * config.patch**2 if name == "encoder" else channels
        widths = " ".join(str(width) for width in _widths(layers, inputs))
        print(
            f"{name}: widths {widths}; {readable(whole[name])} for {num_frames} frames of {width} x {height}, {dtype}"
        )
        if found_obstacles := obstacles(layers, name):
            print(f"  does not stream: {found_obstacles[0]}{_others(len(found_obstacles) - 1)}")
            seen = reach(layers, "time", "decode") if name == "decoder" and config.pieces is None else None
            if seen:
                print(
                    f"  but goes by windows that give the same: a latent needs {seen[0]} before and {seen[1]} after it"
                )
            continue
        first = torch.empty(1, 3, 1, height, width, device="meta", dtype=network.latent_std.dtype)
        latent = first.new_empty(*shape)[:, :, :1]
        state = network.encode_chunk(first)[1] if name == "encoder" else network.decode_chunk(latent)[1]
        size_of_state = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
        print(f"  streams exactly, and remembers {readable(size_of_state)} from one chunk to the next")


@vae.command()
def encode(
    video: Annotated[Path, typer.Argument(help="The video.")],
    *,
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The latents, .safetensors: mean and logvar, C T H W.")],
    frames: Annotated[int | None, typer.Option(help="How many frames to take [default: all].")] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Resize and crop to [default: the video's].")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second to take [default: the video's].")] = None,
    memory: Memory = None,
    dtype: Precision = "float32",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of this name.")] = False,
) -> None:
    """Encode a video to latents. An autoencoder that streams reads it chunk by chunk."""
    import torch

    from reelflow.data.video import probe, read_clip
    from reelflow.generation.provenance import file_sha256
    from reelflow.models.parts import frames as frames_of
    from reelflow.models.weights import write_tensors
    from reelflow.parallel.device import take_device

    place = take_device(device)
    new_file(out, ".safetensors", overwrite=overwrite)
    found, told = find(str(folder)), probe(video)
    config = found.vae.config
    fps = told.fps if fps is None else fps
    if not 0 < fps < math.inf:
        raise ConfigError(f"--fps must be positive, got {fps}")
    height, width = parse_size(size) if size else (told.height, told.width)
    available = told.num_frames_at(fps)
    num_frames = available if frames is None else frames
    if num_frames > available:
        raise MediaError(f"{video} has {available} frames at {fps:g} fps, asked for {num_frames}")
    latents = config.latent_shape(num_frames, height, width)[1:]
    shape = (1, 3, num_frames, height, width)
    network = found.vae.to(getattr(torch, dtype))
    plan = network.plan_encode(shape, _memory(memory, place))
    _say(f"encoding {num_frames} frames of {width} x {height}", plan, latents)
    network = load(found, getattr(torch, dtype)).to(place)

    def clip(first: int, last: int) -> "torch.Tensor":
        read = read_clip(video, num_frames=last - first, fps=fps, start=first / fps, size=(height, width))
        return read.to_float()[None].to(place, network.latent_std.dtype)

    start, means, logvars, state = time.perf_counter(), [], [], None
    with progress_bar("frames", "frames") as show, torch.no_grad():
        if plan.chunk == latents[0] or plan.tile != latents[1:]:
            posterior = network.encode(clip(0, num_frames), memory=_memory(memory, place))
            means, logvars = [posterior.mean[0].cpu()], [posterior.logvar[0].cpu()]
        else:
            for begin in range(0, latents[0], plan.chunk):
                part = frames_of(begin, min(begin + plan.chunk, latents[0]), config.temporal_stride)
                made, state = network.encode_chunk(clip(part.start, part.stop), state)
                assert made is not None
                means.append(made.mean[0].cpu())
                logvars.append(made.logvar[0].cpu())
                show(part.stop, num_frames)
    seconds = time.perf_counter() - start
    metadata = {
        "source": str(video),
        "source_sha256": file_sha256(video),
        "vae_sha256": fingerprint(found),
        "layout": "C T H W, unit variance",
        "clip": f"{num_frames} x {height} x {width} at {fps:g} fps",
        "fps": f"{fps!r}",
    }
    result = {"mean": torch.cat(means, dim=1).contiguous(), "logvar": torch.cat(logvars, dim=1).contiguous()}
    partial = out.with_name(f".{out.name}.partial")
    try:
        write_tensors(result, partial, metadata=metadata)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{out}: latents {_times(result['mean'].shape)} of {num_frames} frames in {seconds:.1f} s")


@vae.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="A safetensors file with latents, C T H W, called mean or latents.")],
    *,
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The clip: .mp4, .webm, .gif or .mkv (lossless).")],
    stream: Annotated[
        bool, typer.Option("--stream", help="Write frames as soon as they exist: one latent's, or what --memory holds.")
    ] = False,
    memory: Memory = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second [default: as the latents say].")] = None,
    dtype: Precision = "float32",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of this name.")] = False,
) -> int:
    """Decode latents to a video. Written while it is decoded; Ctrl-C keeps what there is."""
    import torch

    from reelflow.data.video import VideoWriter
    from reelflow.generation.pipeline import to_frames
    from reelflow.models.budget import Budgeted
    from reelflow.parallel.device import take_device

    place = take_device(device)
    new_file(out, overwrite=overwrite)
    found = find(str(folder))
    x, metadata = _read_latents(latents, found)
    extent = x.shape[2], x.shape[3], x.shape[4]
    told = metadata.get("fps") or (re.findall(r"at (\S+) fps", metadata.get("clip", "")) or [None])[0]
    if fps is None and told is None:
        raise ConfigError(f"{latents} does not say its frames per second; give --fps")
    rate = float(told or 0) if fps is None else fps
    VideoWriter(out, fps=rate)  # refuses a suffix it cannot write
    network = found.vae.to(getattr(torch, dtype))
    way = network.way("decoder")
    if stream and not way.streams and way.window is None:
        raise ConfigError(f"{network.config.obstacles[-1]}, so frames exist only when all do; leave out --stream")
    if stream and memory is None:
        plan = Budgeted(1, (extent[1], extent[2]), 0, exact=True, peak=0)
    else:
        plan = network.plan_decode(x.shape, _memory(memory, place), collected=not stream)
    num_frames, height, width = network.config.clip_shape(*extent)
    _say(f"decoding {num_frames} frames of {width} x {height}", plan, extent)
    network = load(found, getattr(torch, dtype)).to(place)

    start = time.perf_counter()
    with (
        interruptible("stopping; what there is will be kept (Ctrl-C again leaves at once)") as interrupted,
        progress_bar("frames", "frames") as show,
        VideoWriter(out, fps=rate) as writer,
    ):
        for part in network.decode_parts(x.to(place, network.latent_std.dtype), plan):
            writer.write(to_frames(part[0].float()).contiguous())
            del part
            show(writer.num_frames, num_frames)
            if interrupted.is_set():
                break
    seconds = time.perf_counter() - start
    print(f"{out}: {writer.num_frames} frames of {width} x {height} at {rate:g} fps in {seconds:.1f} s")
    if writer.num_frames < num_frames:
        print(f"stopped after {writer.num_frames} of {num_frames} frames")
        return INTERRUPTED
    return 0


@vae.command()
def bench(
    which: Which,
    *,
    size: Size = None,
    lengths: Annotated[str, typer.Option("--frames", help="Lengths of clips, as in 17,33,65.")] = "17,33,65",
    memory: Memory = None,
    dtype: Precision = "float32",
    device: Device = "auto",
) -> None:
    """Measure encoding and decoding against the length of a clip. Weights of a size are random; peaks are planned ones."""
    import torch
    from rich.table import Table

    from reelflow.models.budget import readable
    from reelflow.parallel.device import take_device

    place = take_device(device)
    found = find(which)
    height, width = parse_size(size) if size else found.clip[1:]
    counts = [int(part) for part in re.findall(r"\d+", lengths)]
    config = found.vae.config
    extents = [config.latent_shape(count, height, width) for count in counts]
    limit = _memory(memory, place)
    network = load(found, getattr(torch, dtype)).to(place)
    table = Table("frames", "encode, s", "frames/s", "peak", "in", "decode, s", "frames/s", "peak", "in")
    with progress_bar("clips", "clips") as show, torch.no_grad():
        for done, (count, extent) in enumerate(zip(counts, extents, strict=True)):
            clip = torch.zeros(1, 3, count, height, width, dtype=network.latent_std.dtype, device=place)
            plans = network.plan_encode(clip.shape, limit), network.plan_decode((1, *extent), limit)
            start = time.perf_counter()
            latents = network.encode(clip, memory=limit).mean.cpu()  # so that it is done
            middle = time.perf_counter()
            network.decode(latents.to(place), memory=limit).cpu()
            cells = [f"{count}"]
            for seconds, plan in ((middle - start, plans[0]), (time.perf_counter() - middle, plans[1])):
                cells += [f"{seconds:.2f}", f"{count / seconds:.3g}", readable(plan.peak), _parts(plan, extent[1:])]
            table.add_row(*cells)
            show(done + 1, len(counts))
    print(f"{found.name}: clips of {width} x {height}, {dtype}, {place}, {torch.get_num_threads()} threads")
    stdout().print(table)


@vae.command()
def train(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe (reelflow train --list), or a folder of videos.")
    ],
    *,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run [default: runs/NAME-vae].")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Go on from this one: a run, a model, or a published autoencoder.")
    ] = None,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Leave the latents of --from as they are, to the last bit.")
    ] = False,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a value, as in vae.training.steps=900."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Your folder of videos, for a recipe on one.")] = None,
    device: Device = "auto",
) -> int:
    """Train an autoencoder. The same command goes on with a run that was stopped or killed; Ctrl-C keeps what there is."""
    from reelflow.data.folder import list_videos
    from reelflow.recipes.publish import publish_autoencoder
    from reelflow.recipes.recipe import FolderData
    from reelflow.recipes.runs import train_autoencoder

    recipe = _training(source, data, start, assignments or [], decoder_only=decoder_only)
    if isinstance(recipe.data, FolderData):
        list_videos(Path(recipe.data.folder))  # a missing folder is refused before the run claims one
    name = source if data is None and not Path(source).is_dir() else Path(data or source).resolve().name
    folder = out or Path("runs") / f"{name}-vae"
    config, training = recipe.vae.model, recipe.vae.training
    stride, (frames, size) = config.spatial_stride, recipe.vae.loss.crops[-1]
    print(
        f"each {config.temporal_stride} x {stride} x {stride} pixels become a latent of {config.latent_channels} channels; "
        f"{training.steps} steps of {training.batch_size * training.accumulate} crops of {frames} x {size} x {size}"
    )
    try:
        weights = train_autoencoder(recipe, folder, device=device, console=stdout())
    except KeyboardInterrupt:
        weights = None
    if weights is None:
        print(f"stopped; the same command goes on with {folder}")
        return INTERRUPTED
    if (published := publish_autoencoder(folder)) is not None:
        print(f"{published}: the same in the published format")
    print(
        f"{folder} is ready{_measured(folder)}; try: reelflow vae encode clip.mp4 --vae {folder} -o latents.safetensors"
    )
    return 0


def _training(
    source: str, data: Path | None, start: Path | None, assignments: list[str], *, decoder_only: bool
) -> "Recipe":
    """Return the recipe of an autoencoder; of its transformer, only what fits is kept.

    Raises:
        ConfigError: there is neither such a recipe nor such a folder, or a value is refused.
        CheckpointError: there is nothing to go on from.
    """
    from reelflow.cli.recipes import find_recipe, known_recipes
    from reelflow.config import set_values, to_dict

    known = known_recipes()
    if source not in known and not Path(source).is_dir():
        raise ConfigError(f"{source} is no recipe and no folder of videos; {nearest(source, known)}")
    if source not in known:
        if data is not None:
            raise ConfigError(f"{source} is a folder of videos already; leave out --data {data}")
        source, data = "folder", Path(source)
    ours = [] if data is None else [f"data.folder={json.dumps(str(data.resolve()))}"]
    if start is not None:
        found = find(str(start))
        if found.kind == "size":
            raise ConfigError(f"{start} has no weights to go on from; give a folder, or leave out --from")
        ours += ["vae.start=random", f"vae.pretrained={json.dumps(str(start.resolve()))}", "vae.tuned=true"]
        ours.append(f"vae.model={json.dumps(to_dict(found.vae.config))}")
    if decoder_only:
        if start is None:
            raise ConfigError("--decoder-only leaves an encoder as it is; say whose with --from")
        ours.append("vae.loss.learned=decoder")
    ours += assignments
    prefix = "vae."
    stage = set_values(known[source]().vae, [each.removeprefix(prefix) for each in ours if each.startswith(prefix)])
    return find_recipe(source, [f"dit.model.in_channels={stage.model.latent_channels}", *ours])


def _measured(folder: Path) -> str:
    """Say how well unseen clips were rebuilt at last."""
    log = folder / "vae" / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    found = [values["psnr"] for line in lines if "psnr" in (values := json.loads(line))]
    return f", unseen clips rebuilt at {found[-1]:.2f} dB" if found else ""


def find(which: str) -> Found:
    """Return the autoencoder of a folder or of a published size, without its weights.

    Raises:
        CheckpointError: the folder holds none.
        ConfigError: there is neither such a folder nor such a size.
    """
    import torch

    from reelflow.families.autoencoders import AUTOENCODERS, empty_vae
    from reelflow.generation.pipeline import model_folder, read_card
    from reelflow.models.vae import CausalVAE
    from reelflow.recipes.runs import trained_autoencoder

    sizes = {f"{family.name}.{name}": size for family in AUTOENCODERS for name, size in family.sizes.items()}
    path = Path(which)
    if not path.exists():
        if which not in sizes:
            raise ConfigError(f"{which} is no folder, and no published size; {nearest(which, sizes)}")
        with torch.device("meta"):
            return Found(which, CausalVAE(sizes[which].config), sizes[which].clip, (), "size")
    whole = any((path / name).is_file() for name in ("model.json", "model/model.json"))
    if not whole and (trained := trained_autoencoder(path)) is not None:
        recipe, file = trained
        with torch.device("meta"):
            network = CausalVAE(recipe.vae.model)
        return Found(which, network, (recipe.clip.num_frames, recipe.clip.height, recipe.clip.width), (file,), "own")
    if whole or (path / "recipe.json").is_file():
        card, weights = read_card(path), model_folder(path) / "vae.safetensors"
        with torch.device("meta"):
            network = CausalVAE(card.vae)
        return Found(which, network, (card.clip.num_frames, card.clip.height, card.clip.width), (weights,), "own")
    if (path / "model_index.json").is_file():
        path = path / "vae"
    network, family = empty_vae(path)
    same = [size.clip for size in family.sizes.values() if size.config == network.config]
    clip = same[0] if same else next(iter(family.sizes.values())).clip
    files = (path,) if path.is_file() else tuple(sorted(path.glob("*.safetensors")))
    return Found(str(path), network, clip, files, "published")


def load(found: Found, dtype: "torch.dtype") -> "CausalVAE":
    """Return an autoencoder with its weights; random ones if it is but a size."""
    import torch

    from reelflow.families.autoencoders import load_vae
    from reelflow.models.vae import CausalVAE
    from reelflow.models.weights import load_weights

    if found.kind == "published":
        return load_vae(found.name, dtype=dtype)
    torch.manual_seed(0)
    network = CausalVAE(found.vae.config).to(dtype).eval()
    if found.kind == "own":
        load_weights(found.weights[0], network)
    return network


def fingerprint(found: Found) -> str:
    """Return the SHA-256 of an autoencoder's weights, file after file."""
    from reelflow.models.weights import files_sha256

    return files_sha256(found.weights)


def _read_latents(path: Path, found: Found) -> "tuple[torch.Tensor, dict[str, str]]":
    """Return latents, 1 C T H W, that the autoencoder can decode, and what their file says of them.

    Raises:
        CheckpointError: the file is no safetensors, holds none, or they are of another autoencoder or not finite.
    """
    from reelflow.interop.checkpoints import Stored

    stored = Stored(path)
    name = next((name for name in ("mean", "latents") if name in stored.meta), None)
    if name is None:
        raise CheckpointError(
            f"{path} holds neither mean nor latents, but {', '.join(list(stored.meta)[:3]) or 'nothing'}"
        )
    shape, channels = tuple(stored.meta[name].shape), found.vae.config.latent_channels
    if len(shape) == 5 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 4 or shape[0] != channels or 0 in shape:
        raise CheckpointError(f"{path}: {name} is {_times(shape)}; {found.name} decodes {channels} x T x H x W")
    of = stored.metadata.get("vae_sha256")
    if of is None:
        warn(f"{path} does not say which autoencoder made it")
    elif of != (own := fingerprint(found)):
        raise CheckpointError(
            f"{path} was made by another autoencoder (sha256 {of[:12]}...) than {found.name} ({own[:12]}...); give that one"
        )
    latents = stored[name].float()
    if not bool(latents.isfinite().all()):
        raise CheckpointError(f"{path}: {name} holds NaN or infinity; what made it overflowed")
    return latents.reshape(1, *shape), stored.metadata


def _memory(asked: str | None, device: "torch.device") -> int:
    """Return bytes: those asked for, or half of what is free."""
    from reelflow.models.budget import in_bytes

    if asked is not None:
        return in_bytes(asked)
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        free = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        free = None
    return 512 * int(free[1]) if free else 2**32


def _say(doing: str, plan: "Budgeted", extent: tuple[int, int, int]) -> None:
    from reelflow.models.budget import readable

    print(f"{doing}, {_parts(plan, extent)}" + (f", peak {readable(plan.peak)}" if plan.peak else ""))
    if not plan.exact:
        warn("tiles are blended where they overlap, an approximation: the whole picture does not fit in the memory")


def _parts(plan: "Budgeted", extent: "tuple[int, ...]") -> str:
    parts = [] if plan.chunk == extent[0] else [f"{plan.chunk} of {extent[0]} latents at a time"]
    if plan.tile != tuple(extent[1:]):
        parts.append(f"tiles of {_times(plan.tile)}")
    return ", ".join(parts) or "whole"


def _times(shape: "tuple[int, ...]") -> str:
    return " x ".join(map(str, shape))


def _widths(layers: "tuple[Layer, ...]", channels: int) -> list[int]:
    """Return the channels that layers give, one after the other, but for those like the one before."""
    widths = [channels]
    for layer in layers:
        channels = layer.width(channels)
        if channels != widths[-1]:
            widths.append(channels)
    return widths


def _others(count: int) -> str:
    return f" (and {count} more)" if count else ""
