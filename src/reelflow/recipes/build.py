"""Videos become a set to train on: `reelflow data build`, carried out stage by stage.

    OUT/analysis.jsonl   shots and measures of each video, one line as soon as it is known
    OUT/captions.jsonl   what the endpoint said of each clip
    OUT/encoded/         clips that are encoded and in no shard yet
    OUT/shards/          the set: latents and text features, or frames where there is no model
    OUT/clips.jsonl      every clip and every file that gives none, and what became of it
    OUT/report.html      the same to look at

Each line and each file is written whole or not at all, and what is there is not done again: killed at any moment, the same
command goes on, and no clip is in the set twice. Videos that are added later are added to the set.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelflow.conditioning.chat import Describer
from reelflow.config import configuration, to_dict
from reelflow.data.build import (
    Engine,
    Journal,
    Rejection,
    Selection,
    Source,
    Work,
    analyse,
    identify,
    in_process,
    select,
)
from reelflow.data.captioning import Captioning, Span, describe
from reelflow.data.filters import Filters
from reelflow.data.folder import ClipSpec, list_videos, read_captions
from reelflow.data.shards import Sample, ShardWriter
from reelflow.data.shots import ShotDetection
from reelflow.data.video import read_clip
from reelflow.errors import CheckpointError, DataError, MediaError, ReelflowError
from reelflow.generation.pipeline import ModelCard, model_folder, read_card
from reelflow.models.vae import CausalVAE
from reelflow.models.weights import files_sha256, load_weights, read_tensors, write_tensors
from reelflow.recipes.build_page import Shown, write_build_page, write_text
from reelflow.recipes.runs import parts_of_condition

__all__ = ["BuildConfig", "BuildReport", "build"]

SPARE_BYTES = 64 << 20  # that must be free to begin with

Progress = Callable[[str, int, int], None]  # stage, done, total


@configuration
class BuildConfig:
    """All that decides which clips are made; `clip` must be one that the model takes."""

    clip: ClipSpec
    shots: ShotDetection = ShotDetection()
    filters: Filters = Filters()
    captioning: Captioning = Captioning()
    shard_bytes: int = 256 << 20


@dataclass(frozen=True)
class BuildReport:
    """What became of a folder of videos."""

    num_files: int
    num_clips: int  # that its shots gave
    num_kept: int  # by the filters
    num_ready: int  # that are in the set
    rejected: tuple[Rejection, ...]
    finished: bool  # False where it was stopped, or only planned
    page: Path | None  # None where it was stopped

    @property
    def reasons(self) -> dict[str, int]:
        """How many files and clips were rejected, by the kind of reason, the commonest first."""
        return dict(Counter(one.kind for one in self.rejected).most_common())


def build(
    videos: Path,
    out: Path,
    config: BuildConfig,
    *,
    model: Path | None = None,
    describer: Describer | None = None,
    engine: Engine = in_process,
    plan: bool = False,
    on_progress: Progress = lambda stage, done, total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> BuildReport:
    """Build a set of shards from the videos in a folder, or go on with one; with `plan`, only say which clips it will have.

    Samples have the keys mean and logvar (latents of `model`, a run or model folder, in half precision) and those of its
    text features; without a model, frames (uint8, T H W 3). Their meta has caption, file, start, seconds and fps. Captions
    are those beside the videos, or the `describer`'s. `on_progress(stage, done, total)` follows along; when `stopped`, what
    is done is kept.

    Raises:
        ConfigError: the clip is none for the model, or the describer's server does not answer.
        CheckpointError: there is no model.
        DataError: the folder has no videos, `out` is a set made otherwise, no clip is kept, captioning fails again and again,
            or the disk is full (or will be).
    """
    paths = list_videos(videos)
    captions = {path: caption.text for path, caption in read_captions(videos, paths).items()}
    card = None if model is None else read_card(model)
    if card is not None:
        card.vae.latent_shape(config.clip.num_frames, config.clip.height, config.clip.width)
    if describer is not None and not plan:
        describer.check()
    _check_disk(out, SPARE_BYTES, "to begin with")
    made_by = {
        "clip": to_dict(config.clip),
        "shots": to_dict(config.shots),
        "filters": to_dict(config.filters),
        "captions": "beside the videos" if describer is None else _told(describer, config.captioning),
        "vae": None if model is None else files_sha256([model_folder(model) / "vae.safetensors"]),
        "text": None if card is None else to_dict(card.text),
    }
    # Shards are ended by `_Packing`, which knows what may then leave the spool.
    writer = None if plan else ShardWriter(out / "shards", fingerprint=made_by, shard_bytes=sys.maxsize)
    with nullcontext() if writer is None else writer, Journal(out / "analysis.jsonl") as journal:
        sources, unread = _identified(paths, videos)
        on_file = partial(on_progress, "scan")
        analyses = analyse(
            sources, config.clip, config.shots, journal=journal, engine=engine, on_file=on_file, stopped=stopped
        )
        taken = set() if writer is None else set(writer.keys)
        run = _Run(
            out, config, select(sources, analyses, config.clip, config.filters, taken=taken), on_progress, stopped
        )
        run.failed += unread
        if describer is None:
            texts = {id: captions[source.path] for id, (source, _) in run.clips.items()}
        else:
            texts = {} if plan or stopped() else run.caption(describer, taken)
        if writer is not None and not stopped():
            run.encode(writer, texts, engine, model, card)
        ready = set() if writer is None else set(writer.keys)
        finished = writer is not None and not stopped()
        page = None if stopped() else run.write(texts, ready)
        report = BuildReport(
            num_files=len(paths),
            num_clips=sum(len(analysis.clips) for analysis in analyses.values()),
            num_kept=len(run.clips),
            num_ready=len(ready),
            rejected=run.rejected(),
            finished=finished,
            page=page,
        )
        if writer is not None and finished:
            if not ready:
                reasons = ", ".join(f"{kind} {count}" for kind, count in report.reasons.items())
                raise DataError(f"no clip of {videos} is kept; rejected: {reasons}; {page} shows them")
            writer.finish(rejected=tuple(_line(one) for one in report.rejected))
            shutil.rmtree(out / "encoded", ignore_errors=True)
        return report


def _identified(paths: Sequence[Path], folder: Path) -> tuple[list[Source], list[Rejection]]:
    sources, unread = [], []
    for path in paths:
        try:
            sources.append(identify(path, folder))
        except MediaError as error:
            name = path.relative_to(folder).as_posix()
            unread.append(Rejection(path, name, f"unreadable: {str(error).removeprefix(f'{path}: ')}"))
    return sources, unread


def _check_disk(folder: Path, needed: int, purpose: str) -> None:
    """Refuse to begin what will not fit.

    Raises:
        DataError: less is free where `folder` is, or will be.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DataError(
            f"{there} has {free / 2**20:,.0f} MiB free, and {needed / 2**20:,.0f} MiB are needed {purpose}; "
            f"make room, or choose another folder"
        )


def _told(describer: Describer, captioning: Captioning) -> dict[str, Any]:
    """Return all that a caption depends on."""
    return {
        "model": describer.model,
        "purpose": describer.purpose,
        "max_words": describer.max_words,
        "num_pictures": captioning.num_pictures,
        "side": captioning.side,
    }


def _line(one: Rejection) -> str:
    return f"{one.file}{f' at {one.clip.start:.2f} s' if one.clip else ''}: {one.reason}"


class _Run:
    """The stages after the selection, and what they could not do."""

    def __init__(
        self, out: Path, config: BuildConfig, selection: Selection, on_progress: Progress, stopped: Callable[[], bool]
    ) -> None:
        self.out, self.config, self.selection = out, config, selection
        self.on_progress, self.stopped = on_progress, stopped
        self.failed: list[Rejection] = []
        self.clips = {clip.id: (source, clip) for source, clip in selection.kept}

    def caption(self, describer: Describer, taken: set[str]) -> dict[str, str]:
        """Return the caption of each clip that has one; those in the journal or in the set are not asked for again."""
        told = _told(describer, self.config.captioning)
        with Journal(self.out / "captions.jsonl") as journal:
            known = [json.loads(line) for line in journal.lines()]
            texts = {line["id"]: line["caption"] for line in known if line["told"] == told and line["id"] in self.clips}
            asked = [id for id in self.clips if id not in texts and id not in taken]
            spans = [
                Span(id, self.clips[id][0].path, self.clips[id][1].start, self.config.clip.seconds) for id in asked
            ]
            answers = describe(spans, describer, self.config.captioning, stopped=self.stopped)
            for done, answer in enumerate(answers, start=len(self.clips) - len(spans) + 1):
                if answer.reason is None:
                    journal.add(json.dumps({"id": answer.key, "caption": answer.caption, "told": told}).encode())
                    texts[answer.key] = answer.caption
                else:
                    self._fail(answer.key, f"no caption: {answer.reason}")
                self.on_progress("caption", done, len(self.clips))
        return texts

    def encode(
        self, writer: ShardWriter, texts: dict[str, str], engine: Engine, model: Path | None, card: ModelCard | None
    ) -> None:
        """Bring every clip that has a caption into the shards; one that is encoded already is only packed."""
        packing, spec = _Packing(writer, self.out / "encoded", self.config.shard_bytes), self.config.clip
        missing = [id for id in self.clips if id in texts and id not in writer]
        waiting = [id for id in missing if not packing.add(id, self._meta(id, texts))]
        needed = 2 * _sample_bytes(spec, card) * len(waiting)
        _check_disk(self.out, needed, f"for {len(waiting):,} more clips and their shards")
        items = [
            json.dumps(
                {
                    "id": id,
                    "path": str(self.clips[id][0].path.absolute()),
                    "start": self.clips[id][1].start,
                    "caption": texts[id],
                    "out": str(packing.path(id, texts[id]).absolute()),
                }
            )
            for id in waiting
        ]
        done = len(self.clips) - len(waiting)
        for result in map(json.loads, engine(partial(_encoder, model, spec), items, gpu=True)):
            id, done = result["id"], done + 1
            if result["error"] is not None:
                self._fail(id, f"not encoded: {result['error']}")
            elif not packing.add(id, self._meta(id, texts)):
                raise DataError(f"{packing.path(id, texts[id])} is gone; does another program clean {self.out}?")
            self.on_progress("encode", done, len(self.clips))
            if self.stopped():
                break
        packing.close()

    def _meta(self, id: str, texts: dict[str, str]) -> dict[str, Any]:
        source, clip = self.clips[id]
        spec = self.config.clip
        return {
            "caption": texts[id],
            "file": source.name,
            "start": clip.start,
            "seconds": spec.seconds,
            "fps": spec.fps,
        }

    def _fail(self, id: str, reason: str) -> None:
        source, clip = self.clips[id]
        self.failed.append(Rejection(source.path, source.name, reason, clip))

    def rejected(self) -> tuple[Rejection, ...]:
        """Return what is in no shard and why, by file, then by time."""
        found = [*self.selection.rejected, *self.failed]
        return tuple(sorted(found, key=lambda one: (one.file, one.clip.start if one.clip else -1.0)))

    def write(self, texts: dict[str, str], ready: set[str]) -> Path:
        """Write clips.jsonl and report.html, and return the page."""
        rejected = self.rejected()
        lost = {one.clip.id for one in self.failed if one.clip}
        kept = [pair for id, pair in self.clips.items() if id not in lost]
        lines = [
            {"fate": "kept" if clip.id in ready else "waiting", "file": source.name, **to_dict(clip)}
            | {"caption": texts.get(clip.id)}
            for source, clip in kept
        ]
        lines += [
            {"fate": "rejected", "reason": one.reason, "file": one.file, **(to_dict(one.clip) if one.clip else {})}
            for one in rejected
        ]
        write_text(self.out / "clips.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        shown = [Shown(source.path, source.name, clip, texts.get(clip.id, "")) for source, clip in kept]
        page = self.out / "report.html"
        write_build_page(page, shown, rejected, self.config.filters, self.config.clip)
        return page


class _Packing:
    """Moves encoded clips from the spool to the shards; a clip leaves the spool when the shard that has it is safe."""

    def __init__(self, writer: ShardWriter, spool: Path, shard_bytes: int) -> None:
        self.writer, self.spool, self.shard_bytes = writer, spool, shard_bytes
        self.added: list[Path] = []  # since the last shard ended
        self.num_bytes = 0
        try:
            spool.mkdir(exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write {spool}: {error.strerror}") from error
        for path in spool.iterdir():  # left when a build was killed between a shard and this, or in writing
            if path.name.partition("-")[0] in writer or path.name.startswith("."):
                path.unlink()

    def path(self, id: str, caption: str) -> Path:
        """Return where a clip is, or would be, with the text features of this caption."""
        told = hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return self.spool / f"{id}-{told}.safetensors"

    def add(self, id: str, meta: dict[str, Any]) -> bool:
        """Add a clip to the shard at hand and say so; or that it is not in the spool, or not whole."""
        path = self.path(id, meta["caption"])
        try:
            tensors = read_tensors(path)
        except CheckpointError:
            return False
        self.writer.add(Sample(id, tensors, meta))
        self.added.append(path)
        self.num_bytes += path.stat().st_size
        if self.num_bytes >= self.shard_bytes:
            self.close()
        return True

    def close(self) -> None:
        """End the shard at hand."""
        self.writer.flush()
        for path in self.added:
            path.unlink()
        self.added, self.num_bytes = [], 0


def _sample_bytes(spec: ClipSpec, card: ModelCard | None) -> int:
    if card is None:
        return 3 * spec.num_frames * spec.height * spec.width
    latents = 2 * 2 * math.prod(card.vae.latent_shape(spec.num_frames, spec.height, spec.width))
    return latents + sum(
        part.numel() * part.element_size() for part in parts_of_condition(card.text([""]).condition()).values()
    )


def _encoder(model: Path | None, spec: ClipSpec) -> Work:
    """Make the function that a worker applies to each clip: it leaves the encoded clip in the spool."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model is not None:
        card = read_card(model)
        vae = CausalVAE(card.vae).eval()
        load_weights(model_folder(model) / "vae.safetensors", vae)
        vae.to(device)

    def encoded(path: Path, start: float, caption: str) -> dict[str, Tensor]:
        size = (spec.height, spec.width)
        clip = read_clip(path, num_frames=spec.num_frames, fps=spec.fps, start=start, size=size)
        if model is None:
            return {"frames": clip.frames}
        text = {name: part[0] for name, part in parts_of_condition(card.text([caption]).condition()).items()}
        with torch.no_grad():
            posterior = vae.encode(clip.to_float()[None].to(device))
        found = {"mean": posterior.mean[0].half().cpu(), "logvar": posterior.logvar[0].half().cpu(), **text}
        wrong = [name for name, part in found.items() if part.is_floating_point() and not part.isfinite().all()]
        if wrong:
            raise DataError(f"{' and '.join(wrong)} came out infinite or NaN")
        return found

    def work(item: str) -> str:
        given = json.loads(item)
        path, out = Path(given["path"]), Path(given["out"])
        try:
            tensors = encoded(path, given["start"], given["caption"])
        except ReelflowError as error:
            return json.dumps({"id": given["id"], "error": str(error).removeprefix(f"{path}: ")})
        partial_file = out.with_name(f".{out.name}.{os.getpid()}")
        write_tensors({name: part.contiguous() for name, part in tensors.items()}, partial_file)
        os.replace(partial_file, out)
        return json.dumps({"id": given["id"], "error": None})

    return work
