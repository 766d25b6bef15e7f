"""`reelflow generate`: a prompt (and a first frame) to a clip, and the JSON that makes it again."""

import hashlib
import sys
import time
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reelflow.cli.terminal import INTERRUPTED, interruptible, new_file, progress_bar, warn
from reelflow.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from reelflow.generation.pipeline import ModelCard
    from reelflow.generation.provenance import Provenance

__all__ = ["generate"]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to show; \"\" lets the model choose.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The clip: .mp4, .webm, .gif or .mkv (lossless).")],
    model: Annotated[Path | None, typer.Option(help="A run or model folder.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame: an image, or a video's first frame.")] = None,
    frames: Annotated[int | None, typer.Option(help="Length; longer than the model's is made in chunks.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed, another clip [default: 0].", min=0, max=2**63 - 1)] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps [default: the model's].")] = None,
    guidance: Annotated[float | None, typer.Option(help="How hard to follow the prompt; 1 = no guidance.")] = None,
    shift: Annotated[float | None, typer.Option(help="More than 1 spends more steps near noise.")] = None,
    sampler: Annotated[Literal["euler", "heun"] | None, typer.Option(help="heun costs two evaluations a step.")] = None,
    again: Annotated[Path | None, typer.Option("--from", help="Make the clip of this JSON again, bit for bit.")] = None,
    preview: Annotated[Path | None, typer.Option(help="A .png of the clip as known so far, renewed as it grows.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
) -> int:
    """Make a clip from a prompt. Ctrl-C keeps what there is."""
    asked = {"--frames": frames, "--seed": seed, "--steps": steps, "--guidance": guidance}
    asked |= {"--shift": shift, "--sampler": sampler, "a prompt": prompt}
    extra = [name for name, value in asked.items() if value is not None]
    if again is not None and extra:
        raise ConfigError(f"--from makes the same clip again; leave out {', '.join(extra)}")
    if again is None and prompt is None:
        raise ConfigError('give a prompt, such as "a red ring moving left", or --from FILE.json')
    if again is None and model is None:
        raise ConfigError("give the model to use: --model RUN (make one with: reelflow train)")

    from reelflow.data.video import VideoWriter
    from reelflow.generation.pipeline import fingerprint, read_card
    from reelflow.generation.provenance import Provenance, file_sha256, versions_here

    told = Provenance.read(again) if again is not None else None
    new_file(out, overwrite=overwrite)
    new_file(Provenance.path_beside(out), overwrite=overwrite)
    if preview is not None:
        new_file(preview, ".png", overwrite=overwrite)
    model = model or Path(told.model)  # type: ignore[union-attr]
    card = read_card(model)
    VideoWriter(out, fps=card.clip.fps)  # refuses a suffix it cannot write
    if told is not None:
        image = image or (Path(told.image) if told.image else None)
    image_sha256 = file_sha256(image) if image is not None else None
    if told is not None:
        told.require(model_sha256=fingerprint(model), image_sha256=image_sha256)
        _warn_of_differences(told)
        request = told
    else:
        changes = {"num_steps": steps, "guidance_scale": guidance, "shift": shift, "sampler": sampler}
        request = Provenance(
            prompt=_checked(prompt or "", card),
            seed=seed or 0,
            num_frames=card.clip.num_frames if frames is None else frames,
            sampling=replace(card.sampling, **{name: value for name, value in changes.items() if value is not None}),
            image=None if image is None else str(image.resolve()),
            image_sha256=image_sha256,
            model=str(model.resolve()),
            model_sha256=fingerprint(model),
            num_threads=_num_threads(),
            versions=versions_here(),
            frames_made=0,
            frames_sha256=None,
            interrupted_after=None,
        )
    first_frame = _first_frame(image, card) if image is not None else None
    card.check(num_frames=request.num_frames, image=first_frame)
    start = time.perf_counter()
    made = _make(request, card, model, first_frame, out, preview, again=told is not None)

    seconds = time.perf_counter() - start
    clip = f"{made.frames_made} frames, {card.clip.width} x {card.clip.height} at {card.clip.fps:g} fps"
    print(f"{out}: {clip}, in {seconds:.1f} s; {Provenance.path_beside(out)} makes it again")
    if told is not None and made.frames_sha256 is not None:
        if told.frames_sha256 not in (None, made.frames_sha256):
            warn(f"these frames are not those of {again}, bit for bit")
            return 1
        print(f"the same frames as {again}'s, bit for bit" if told.frames_sha256 else f"{again} holds no hash to compare")
    elif made.interrupted:
        print(f"stopped after {made.interrupted_after} steps; --from {Provenance.path_beside(out)} stops there too")
        return INTERRUPTED
    return 0


def _make(
    request: "Provenance",
    card: "ModelCard",
    model: Path,
    first_frame: "Tensor | None",
    out: Path,
    preview: Path | None,
    *,
    again: bool,
) -> "Provenance":
    """Write the clip and its JSON, and return what the JSON says; with `again`, stop where the last time stopped."""
    import torch

    from reelflow.data.video import VideoWriter, write_contact_sheet
    from reelflow.generation.pipeline import Pipeline, Progress, to_frames
    from reelflow.generation.provenance import Provenance

    torch.set_num_threads(request.num_threads)
    pipeline = Pipeline.load(model)
    last_frame = request.frames_made if again else request.num_frames
    last_step = request.interrupted_after if again else None
    steps, stopped_after, num_frames, digest = 0, None, 0, hashlib.sha256()

    with (
        interruptible("stopping; what there is will be kept (Ctrl-C again leaves at once)") as interrupted,
        progress_bar("steps", "steps") as show,
    ):

        def on_step(done: int, total: int) -> None:
            nonlocal steps
            steps = done
            show(done, total)

        def should_stop() -> bool:
            nonlocal stopped_after
            if interrupted.is_set() or steps == last_step:
                stopped_after = steps
            return stopped_after is not None

        def on_preview(clip: "Tensor") -> None:
            if preview is not None:
                write_contact_sheet(preview, [to_frames(clip[0])], columns=6)

        progress = Progress(on_step, on_preview if preview is not None else None, should_stop=should_stop)
        stream = pipeline.stream(
            [request.prompt],
            num_frames=request.num_frames,
            image=first_frame,
            seed=request.seed,
            sampling=request.sampling,
            progress=progress,
        )
        beside = Provenance.path_beside(out)
        try:
            with VideoWriter(out, fps=card.clip.fps) as writer:
                for part in stream:
                    new = to_frames(part[0])[: last_frame - num_frames].contiguous()
                    writer.write(new)
                    digest.update(new.numpy())
                    num_frames += len(new)
                    if num_frames == last_frame:
                        break
        except KeyboardInterrupt:
            if writer.num_frames:
                cut = replace(request, frames_made=writer.num_frames, frames_sha256=None, interrupted_after=steps)
                cut.write(beside)
            raise
        made = replace(
            request, frames_made=num_frames, frames_sha256=digest.hexdigest(), interrupted_after=stopped_after
        )
        made.write(beside)
    return made


def _checked(prompt: str, card: "ModelCard") -> str:
    """Refuse a prompt that cannot be read, and warn of words that the model does not know."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not valid Unicode at character {error.start + 1}") from error
    card.text([prompt])
    hints = []
    for word in dict.fromkeys(card.unknown_words(prompt)):
        close = get_close_matches(word, card.words, n=2, cutoff=0.6)
        hints.append(f"{word} (did you mean {' or '.join(close)}?)" if close else word)
    if hints:
        warn(f"the model has never read these words and cannot follow them: {', '.join(hints)}")
    return prompt


def _first_frame(image: Path, card: "ModelCard") -> "Tensor":
    """Read the first frame, 1 3 H W in [-1, 1], and say what was done to it."""
    from reelflow.data.video import probe, read_clip

    height, width = card.clip.height, card.clip.width
    info = probe(image)
    if (info.height, info.width) != (height, width):
        print(f"{image}: {info.width} x {info.height}, resized and centre-cropped to {width} x {height}")
    return read_clip(image, num_frames=1, size=(height, width)).to_float()[None, :, 0]


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


def _warn_of_differences(told: "Provenance") -> None:
    differences = told.differences_here()
    if differences:
        warn(f"the last bits may differ: {'; '.join(differences)}")
    if told.interrupted:
        print(f"it was interrupted after {told.interrupted_after} steps, and will be again", file=sys.stderr)
