"""`reelflow evaluate`: numbers about clips."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from reelflow.cli.terminal import new_file, progress_bar, stdout, warn
from reelflow.errors import ConfigError, DataError, MediaError

if TYPE_CHECKING:
    from torch import Tensor

    from reelflow.data.video import Clip
    from reelflow.data.worlds import Combination
    from reelflow.evaluation.frechet import FrechetResult

__all__ = ["evaluate", "named_combination"]


def evaluate(
    clips: Annotated[Path, typer.Argument(metavar="A", help="A video, or a folder of videos.")],
    *,
    against: Annotated[Path | None, typer.Option(help="B: the videos of the same names to compare with.")] = None,
    world: Annotated[
        bool, typer.Option("--world", help="Read each clip of the synthetic world, and compare with its caption.")
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of this name.")] = False,
) -> None:
    """Measure clips. Alone: steadiness; against others: likeness; in the synthetic world: truth to the caption."""
    if json_out is not None:
        new_file(json_out, ".json", overwrite=overwrite)
    paths, others = _videos(clips), _videos(against) if against is not None else {}
    if clips.is_file() and against is not None and against.is_file():
        others = dict(zip(paths, others.values(), strict=True))
    if world and not any(_asked(path) for path in paths.values()):
        raise DataError(
            f"no clip of {clips} has a .txt, or a .json with a prompt, beside it that names a colour, a shape and a motion"
        )
    rows: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    with progress_bar("clips", "clips") as show:
        for done, (name, path) in enumerate(paths.items()):
            try:
                rows[name] = _measure(path, others.get(name), world=world)
            except MediaError as error:
                skipped[name] = str(error)
            show(done + 1, len(paths))
        if not rows:
            raise MediaError(next(iter(skipped.values())))
        means = _means(list(rows.values()))
        frechet = None
        if against is not None and clips.is_dir() and against.is_dir():
            frechet = _frechet([paths[name] for name in rows], list(others.values()), skipped)

    stdout().print(_table(rows, means))
    if frechet is not None:
        print(frechet)
    if against is not None and not set(rows) & set(others):
        warn(f"no video of {against} has the name of one of {clips}: nothing to take PSNR and SSIM of")
    for reason in skipped.values():
        warn(f"skipped: {reason}")
    if json_out is not None:
        from reelflow.config import to_dict

        values = {"clips": rows, "mean": means, "skipped": skipped, "frechet": frechet and to_dict(frechet)}
        partial = json_out.with_name(f".{json_out.name}.partial")
        partial.write_text(json.dumps(_finite(values), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, json_out)


def named_combination(text: str) -> "Combination | None":
    """Find the one colour, shape and motion that a caption names; None where one is missing or there are several."""
    from reelflow.conditioning.text import words_of
    from reelflow.data.worlds import COLOURS, SHAPES, WORDS, Combination

    words = words_of(text)
    spaced = f" {' '.join(words)} "
    colours, shapes = ([name for name in names if name in words] for names in (COLOURS, SHAPES))
    motions = [motion for motion, phrases in WORDS.items() if any(f" {phrase} " in spaced for phrase in phrases)]
    if not len(colours) == len(shapes) == len(motions) == 1:
        return None
    return Combination(colours[0], shapes[0], motions[0])


def _videos(path: Path) -> dict[str, Path]:
    """Return a file, or a folder's videos, by their names without suffix."""
    from reelflow.data.folder import list_videos

    if path.is_file():
        return {path.stem: path}
    videos: dict[str, Path] = {}
    for video in list_videos(path):
        name = video.relative_to(path).with_suffix("").as_posix()
        if name in videos:
            raise DataError(f"{videos[name]} and {video} have one name; keep one of them")
        videos[name] = video
    return videos


def _measure(path: Path, other: Path | None, *, world: bool) -> dict[str, Any]:
    from reelflow.data.video import read_clip
    from reelflow.evaluation.pixels import drift, flicker, jitter, psnr, ssim

    clip = read_clip(path)
    pixels = clip.to_float()[None]
    num_frames, height, width = clip.frames.shape[:3]
    row: dict[str, Any] = {"frames": num_frames, "size": f"{height}x{width}"}
    if num_frames > 1:
        slopes = drift(pixels)
        row["flicker"] = flicker(pixels).item()
        row["colour drift"], row["contrast drift"] = (slope.abs().mean().item() for slope in slopes)
    if num_frames > 2:
        row["jitter"] = jitter(pixels).item()
    if other is not None:
        reference = read_clip(other).to_float()[None]
        try:
            row["psnr"], row["ssim"] = psnr(pixels, reference).item(), ssim(pixels, reference).item()
        except ConfigError as error:
            raise ConfigError(f"{path} against {other}: {error}") from error
    if world:
        row |= _reading(clip, _asked(path))
    return row


def _asked(path: Path) -> "Combination | None":
    """Return what the prompt or the caption beside a clip asks for."""
    told, sidecar = path.with_suffix(".json"), path.with_suffix(".txt")
    try:
        if told.is_file():
            return named_combination(str(json.loads(told.read_text(encoding="utf-8"))["prompt"]))
        return named_combination(sidecar.read_text(encoding="utf-8")) if sidecar.is_file() else None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{told if told.is_file() else sidecar} holds no caption: {error!r}") from error


def _reading(clip: "Clip", asked: "Combination | None") -> dict[str, Any]:
    """Say what the analyser sees, and whether it is what was asked."""
    from reelflow.data.worlds import analyse

    seen = analyse(clip.frames.numpy())
    row: dict[str, Any] = {"seen": f"{seen.colour} {seen.shape} {seen.motion}"}
    if asked is not None:
        row |= {"asked": " ".join(asked)}
        right = [getattr(seen, name) == getattr(asked, name) for name in asked._fields]
        row |= dict(zip(asked._fields, map(float, right), strict=True)) | {"all": float(all(right))}
    return row


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Average every number over the clips that have it."""
    names = [name for row in rows for name, value in row.items() if isinstance(value, float)]
    return {name: fmean(row[name] for row in rows if name in row) for name in dict.fromkeys(names)}


def _frechet(a: list[Path], b: list[Path], skipped: dict[str, str]) -> "FrechetResult | None":
    """Compare two sets as sets, over as many frames as the shortest clip has; None where there is too little."""
    from reelflow.data.video import read_clip
    from reelflow.evaluation.frechet import PixelPyramid, frechet_between

    lengths: dict[Path, int] = {}
    for path in dict.fromkeys(a + b):
        try:
            lengths[path] = len(read_clip(path).frames)
        except MediaError as error:
            skipped[str(path)] = str(error)

    def batches(paths: list[Path]) -> Iterator["Tensor"]:
        return (read_clip(path).to_float()[None] for path in paths)

    a, b = ([path for path in paths if path in lengths] for paths in (a, b))
    if min(len(a), len(b)) < 2 or min(lengths.values()) < 3:
        warn("a Frechet distance needs 2 clips of 3 frames on either side; left out")
        return None
    return frechet_between(batches(a), batches(b), PixelPyramid(num_frames=min(lengths.values())), frame_stride=1)


def _table(rows: dict[str, dict[str, Any]], means: dict[str, float]) -> Table:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table("clip", *columns)
    for name, row in rows.items():
        table.add_row(Text(name), *(_cell(row.get(column)) for column in columns))
    if len(rows) > 1:
        table.add_section()
        table.add_row("mean", *(_cell(means.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(values: Any) -> Any:
    """Replace what JSON cannot hold (the infinite PSNR of equal clips) by null."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values
