"""`reelflow data`: what would become of a folder of videos, and shards of what was made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from reelflow.cli.terminal import INTERRUPTED, interruptible, parse_size, progress_bar, stdout
from reelflow.errors import ConfigError

__all__ = ["data"]

data = typer.Typer(help="Look at data before training on it.", no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def _group() -> None:
    """Look at data before training on it."""


@data.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder of videos, with captions beside them or in metadata.csv.")],
    *,
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 17,
    size: Annotated[str, typer.Option(metavar="HxW", help="Height x width of a clip, in pixels.")] = "64x64",
    fps: Annotated[float, typer.Option(help="Frames per second of a clip.")] = 8.0,
) -> int:
    """Say what becomes of each video. Accepted or not and why, how it is cut and resized, its caption, its tokens."""
    from reelflow.data.folder import ClipSpec, inspect_folder
    from reelflow.nn.patchify import token_grid
    from reelflow.recipes.folder import folder as recipe

    height, width = parse_size(size)
    networks = recipe()
    _, *latents = networks.vae.model.latent_shape(frames, height, width)
    tokens = token_grid((latents[0], latents[1], latents[2]), networks.dit.model.patch).num_tokens
    reports = inspect_folder(folder, ClipSpec(frames, height, width, fps), tokens_per_clip=tokens)
    table = Table("file", "clips", "tokens", "caption", "what becomes of it")
    for report in reports:
        fate = "; ".join(report.notes) if report.accepted else f"rejected: {report.reason}"
        cells = (str(report.path), f"{report.num_clips}", f"{report.tokens or 0:,}", report.caption, fate)
        table.add_row(*(Text(cell) for cell in cells), style=None if report.accepted else "red")
    stdout().print(table)
    accepted = [report for report in reports if report.accepted]
    print(
        f"{len(accepted)} of {len(reports)} videos give {sum(r.num_clips for r in accepted):,} clips of "
        f"{frames} x {height} x {width} at {fps:g} fps: {sum(r.tokens or 0 for r in accepted):,} tokens ({tokens:,} a clip, by "
        f"the networks of the recipe folder)"
    )
    return 0 if accepted else 1


@data.command()
def shards(
    store: Annotated[Path, typer.Argument(help="A store, such as RUN/latents.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the shards; an unfinished one is gone on with.")],
    shard_size: Annotated[float, typer.Option(metavar="MB", help="Size at which a shard ends.")] = 256.0,
) -> int:
    """Write a store as shards. WebDataset tar files and an index, which can be streamed from far away."""
    from reelflow.data.shards import shards_from_store
    from reelflow.data.store import Store

    with progress_bar("writing", "samples") as on_sample:
        found = shards_from_store(Store.open(store), out, shard_bytes=int(shard_size * 1e6), on_sample=on_sample)
    print(f"{len(found):,} samples in {len(found.groups):,} shards, {found.num_bytes / 1e6:,.1f} MB: {out}")
    return 0


@data.command()
def check(
    url: Annotated[
        str, typer.Argument(metavar="SET", help="A set of shards: a folder, or a URL such as s3://bucket/set.")
    ],
) -> int:
    """Read every sample of a set of shards. Says what the tensors are, and lists what cannot be used and why."""
    from reelflow.data.shards import inspect_shards

    with progress_bar("reading", "samples") as on_sample:
        report = inspect_shards(url, on_sample=on_sample)
    for tensors, count in report.kinds.items():
        print(f"{count:,} x {tensors}")
    for line in report.bad:
        print(f"bad: {line}")
    print(
        f"{report.num_samples - len(report.bad):,} of {report.num_samples:,} samples can be used; "
        f"{report.num_shards:,} shards, {report.num_bytes / 1e6:,.1f} MB"
    )
    return 1 if report.bad else 0


@data.command("build")
def build_command(
    folder: Annotated[Path, typer.Argument(help="A folder of videos.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the set; the same command goes on with it.")],
    model: Annotated[
        Path | None,
        typer.Option(help="A run or model folder, whose latents and text features are stored [default: frames]."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames per clip [default: the model's, else 17].")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Height x width of a clip [default: the model's, else 64x64].")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second [default: the model's, else 8].")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Change a value, as in filters.max_text=null or shots.ratio=4."
        ),
    ] = None,
    caption_url: Annotated[
        str | None,
        typer.Option(
            help="Ask a model that sees for captions: an OpenAI-compatible address, as in http://localhost:8080/v1."
        ),
    ] = None,
    caption_model: Annotated[str | None, typer.Option(help="Which model to ask there.")] = None,
    caption_key: Annotated[str | None, typer.Option(help="The environment variable that holds the key.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say which clips there will be; writes report.html.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes [default: one a core]; 0 works in this one, without Ray.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster to work on [default: this machine].")] = None,
) -> int:
    """Make a set of clips to train on. Finds shots, filters, drops duplicates, captions and encodes; stopped, it goes on."""
    from contextlib import ExitStack

    from reelflow.conditioning.chat import Describer
    from reelflow.config import set_values
    from reelflow.data.build import in_process, on_ray
    from reelflow.data.folder import ClipSpec, list_videos
    from reelflow.generation.pipeline import read_card
    from reelflow.recipes.build import BuildConfig, build

    clip = ClipSpec(17, 64, 64, 8.0) if model is None else read_card(model).clip
    height, width = parse_size(size) if size else (clip.height, clip.width)
    spec = ClipSpec(clip.num_frames if frames is None else frames, height, width, clip.fps if fps is None else fps)
    config = set_values(BuildConfig(spec), assignments or [])
    if (caption_url is None) != (caption_model is None):
        raise ConfigError("captions need both, --caption-url and --caption-model")
    describer = None
    if caption_url is not None and caption_model is not None:
        describer = Describer(caption_url, caption_model, caption_key)
    if workers == 0 and address is not None:
        raise ConfigError("--workers 0 works in this process, and --address on a cluster; leave one of them out")
    list_videos(folder)  # a missing folder is refused before Ray starts
    if describer is not None and not plan:
        describer.check()
    with ExitStack() as stack:
        engine = in_process if workers == 0 else stack.enter_context(on_ray(workers=workers, address=address))
        stopped = stack.enter_context(interruptible("stopping after the clips at hand; Ctrl-C again stops at once"))
        shown = stack.enter_context(ExitStack())
        bars: dict[str, Callable[[int, int], None]] = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                shown.close()  # the bar of the stage before
                bars[stage] = shown.enter_context(progress_bar(stage, "videos" if stage == "scan" else "clips"))
            bars[stage](done, total)

        report = build(
            folder,
            out,
            config,
            model=model,
            describer=describer,
            engine=engine,
            plan=plan,
            on_progress=on_progress,
            stopped=stopped.is_set,
        )
    found = f"{report.num_files:,} videos gave {report.num_clips:,} clips; {report.num_kept:,} are kept"
    print(found + "".join(f", {count:,} {kind}" for kind, count in report.reasons.items()))
    if report.page is not None:
        print(f"{report.page} shows them, and {out / 'clips.jsonl'} lists them")
    if plan and report.page is not None:
        return 0 if report.num_kept else 1
    if not report.finished:
        print(f"stopped with {report.num_ready:,} clips in {out / 'shards'}; the same command goes on")
        return INTERRUPTED
    print(f"{out / 'shards'}: {report.num_ready:,} clips")
    return 0 if report.num_ready >= report.num_kept else 1
