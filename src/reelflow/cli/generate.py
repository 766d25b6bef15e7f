"""`reelflow generate`: a prompt (and a first frame) to a clip, and the JSON that makes it again."""

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from reelflow.cli.terminal import INTERRUPTED, Device, interruptible, new_file, progress_bar, warn
from reelflow.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from reelflow.families.adapters import AdapterUse
    from reelflow.generation.pipeline import Progress
    from reelflow.generation.provenance import Asking, Provenance

__all__ = ["SamplerKind", "adapter_use", "generate"]

SamplerKind = Literal[
    "euler",
    "heun",
    "midpoint",
    "dpm2s",
    "dpm2m",
    "unipc",
    "adams_bashforth",
    "ddim",
    "ancestral",
    "euler_maruyama",
    "dpm2m_sde",
]
"""The samplers that need no options; restart, and the options of all, are for --set."""


def generate(
    prompt: Annotated[str | None, typer.Argument(help='What to show; "" lets the model choose.')] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The clip: .mp4, .webm, .gif or .mkv (lossless).")],
    model: Annotated[
        Path | None, typer.Option(help="A run or model folder, or a published system as diffusers writes it.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="First frame: an image, or a video's first frame.")] = None,
    frames: Annotated[int | None, typer.Option(help="Length; longer than the model's is made in chunks.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Another seed, another clip [default: 0].", min=0, max=2**63 - 1)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps [default: the model's].")] = None,
    guidance: Annotated[float | None, typer.Option(help="How hard to follow the prompt; 1 = no guidance.")] = None,
    negative: Annotated[str | None, typer.Option(help="What a published system is to avoid.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, of a published system.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, of a published system.")] = None,
    shift: Annotated[float | None, typer.Option(help="More than 1 spends more steps near noise.")] = None,
    sampler: Annotated[
        SamplerKind | None, typer.Option(help="heun, midpoint and dpm2s cost two evaluations a step.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change the sampling, as in guidance.rescale=0.7."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NETWORK=]FILE[:STRENGTH]", help="LoRA or DoRA; may be repeated, and then they add."),
    ] = None,
    again: Annotated[Path | None, typer.Option("--from", help="Make the clip of this JSON again, bit for bit.")] = None,
    preview: Annotated[
        Path | None, typer.Option(help="A .png of the clip as known so far, renewed as it grows.")
    ] = None,
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
) -> int:
    """Make a clip from a prompt. Ctrl-C keeps what there is."""
    kind = None if sampler is None else {"kind": sampler}
    changes: dict[str, Any] = {"num_steps": steps, "guidance_scale": guidance, "shift": shift, "sampler": kind}
    changes |= {"negative_prompt": negative, "height": height, "width": width}
    changes = {name: value for name, value in changes.items() if value is not None}  # of the model's own sampling
    if again is not None and (
        changes or assignments or any(value is not None for value in (prompt, frames, seed, adapter))
    ):
        raise ConfigError(
            "--from makes the same clip again: leave out the prompt, --frames, --seed, --adapter and the sampling"
        )
    if again is None and prompt is None:
        raise ConfigError('give a prompt, such as "a red ring moving left", or --from FILE.json')
    if again is None and model is None:
        raise ConfigError("give the model to use: --model RUN (make one with: reelflow train)")

    from reelflow.data.video import VideoWriter
    from reelflow.families.systems import is_system
    from reelflow.generation.provenance import Provenance
    from reelflow.parallel.device import take_device

    place = take_device(device)
    told = None if again is None else Provenance.read(again)
    beside = Provenance.path_beside(out)
    new_file(out, overwrite=overwrite)
    new_file(beside, overwrite=overwrite)
    if preview is not None:
        new_file(preview, ".png", overwrite=overwrite)
    if told is not None:
        model, image = model or Path(told.model), image or (Path(told.image) if told.image else None)
    assert model is not None
    uses = told.adapters if told is not None else tuple(adapter_use(text) for text in adapter or ())
    engine = (Published if is_system(model) else Trained)(model, place, uses)
    sampling = engine.sampling(changes, assignments or []) if told is None else told.sampling
    num_frames = told.num_frames if told is not None else frames
    fps, size = engine.fps(sampling), engine.size(sampling)
    VideoWriter(out, fps=fps)  # refuses a suffix it cannot write
    if told is None:
        request = Provenance.of(
            _checked(prompt or "", engine),
            seed=seed or 0,
            num_frames=engine.num_frames if num_frames is None else num_frames,
            sampling=sampling,
            model=model,
            image=image,
            adapters=uses,
            device=place,
        )
    else:
        request = told.again(model=model, image=image, device=place)
        _warn_of_differences(told, place)
    first_frame = None if image is None else _first_frame(image, *size)
    engine.check(request, first_frame)

    start = time.perf_counter()
    made = _make(request, told, engine, fps, first_frame, out, preview)
    seconds = time.perf_counter() - start
    print(
        f"{out}: {made.frames_made} frames of {size[1]} x {size[0]} at {fps:g} fps in "
        f"{seconds:.1f} s, seed {made.seed}; {beside} makes it again"
    )
    if made.interrupted_after != (None if told is None else told.interrupted_after):
        print(f"stopped after {made.interrupted_after} steps, and so would --from {beside}")
        return INTERRUPTED
    if told is None or told.frames_sha256 is None:
        return 0
    same = made.frames_sha256 == told.frames_sha256
    print(f"the same frames as {again} tells of, bit for bit" if same else f"NOT the frames that {again} tells of")
    return 0 if same else 1


class Trained:
    """A model of ours, as the command asks it; its weights are read when it streams."""

    def __init__(self, folder: Path, device: "torch.device", adapters: "Sequence[AdapterUse]" = ()) -> None:
        from reelflow.generation.pipeline import read_card

        self.folder, self.device, self.adapters, self.card = folder, device, adapters, read_card(folder)
        self.num_frames = self.card.clip.num_frames
        if adapters:
            import torch

            from reelflow.families.adapters import check_files
            from reelflow.families.system import Expert
            from reelflow.models.dit import VideoDiT

            with torch.device("meta"):
                check_files([Expert(VideoDiT(self.card.dit))], adapters)

    def sampling(self, changes: Mapping[str, Any], assignments: Sequence[str]) -> "Asking":
        from reelflow.config import from_dict, set_values, to_dict
        from reelflow.generation.sampling import Sampling

        _refuse(changes, Sampling, "a model of yours has its own size and leads away from the empty prompt")
        return set_values(from_dict(Sampling, {**to_dict(self.card.sampling), **changes}), assignments)

    def fps(self, sampling: "Asking") -> float:
        return self.card.clip.fps

    def size(self, sampling: "Asking") -> tuple[int, int]:
        return self.card.clip.height, self.card.clip.width

    def check_prompt(self, prompt: str) -> list[str]:
        """Refuse a prompt that cannot be read; return the words that the model does not know, with hints."""
        self.card.text([prompt])
        hints = []
        for word in dict.fromkeys(self.card.unknown_words(prompt)):
            close = get_close_matches(word, self.card.words, n=2, cutoff=0.6)
            hints.append(f"{word} (did you mean {' or '.join(close)}?)" if close else word)
        return hints

    def check(self, request: "Provenance", first_frame: "Tensor | None") -> None:
        from reelflow.generation.sampling import Sampling

        if not isinstance(request.sampling, Sampling):
            raise ConfigError(f"the clip was made by a published system, but {self.folder} is a model of yours")
        self.card.check(num_frames=request.num_frames, image=first_frame, sampling=request.sampling)

    def stream(self, request: "Provenance", first_frame: "Tensor | None", progress: "Progress") -> "Iterator[Tensor]":
        from reelflow.generation.pipeline import Pipeline
        from reelflow.generation.published import load
        from reelflow.generation.sampling import Sampling

        assert isinstance(request.sampling, Sampling)
        pipeline = load(self.folder, device=self.device, adapters=self.adapters)
        assert isinstance(pipeline, Pipeline)
        return pipeline.stream(
            [request.prompt],
            num_frames=request.num_frames,
            image=first_frame,
            seed=request.seed,
            sampling=request.sampling,
            progress=progress,
        )


class Published:
    """A published system, as the command asks it; its weights are read when it streams."""

    def __init__(self, folder: Path, device: "torch.device", adapters: "Sequence[AdapterUse]" = ()) -> None:
        from reelflow.families.adapters import check_files
        from reelflow.families.systems import sketch_system
        from reelflow.generation.published import PublishedPipeline

        self.folder, self.device, self.adapters = folder, device, adapters
        self.sketch = PublishedPipeline(sketch_system(folder))
        check_files(self.sketch.system.experts, adapters)
        self.num_frames = self.sketch.system.defaults.clip[0]

    def sampling(self, changes: Mapping[str, Any], assignments: Sequence[str]) -> "Asking":
        from reelflow.config import from_dict, set_values
        from reelflow.generation.published import PublishedSampling

        _refuse(changes, PublishedSampling, "a published system keeps its own sampler and schedule")
        scale = {"guidance_scale": [changes["guidance_scale"]]} if "guidance_scale" in changes else {}
        return set_values(from_dict(PublishedSampling, {**changes, **scale}), assignments)

    def fps(self, sampling: "Asking") -> float:
        return getattr(sampling, "fps", None) or self.sketch.system.defaults.fps

    def size(self, sampling: "Asking") -> tuple[int, int]:
        from reelflow.generation.published import PublishedSampling

        assert isinstance(sampling, PublishedSampling)
        return self.sketch.clip(None, sampling)[1:]

    def check_prompt(self, prompt: str) -> list[str]:
        """Return nothing: large encoders read any words."""
        return []

    def check(self, request: "Provenance", first_frame: "Tensor | None") -> None:
        from reelflow.generation.published import PublishedSampling

        if not isinstance(request.sampling, PublishedSampling):
            raise ConfigError(f"the clip was made by a model of yours, but {self.folder} is a published system")
        self.sketch.check([request.prompt], num_frames=request.num_frames, image=first_frame, sampling=request.sampling)

    def stream(self, request: "Provenance", first_frame: "Tensor | None", progress: "Progress") -> "Iterator[Tensor]":
        import torch

        from reelflow.generation.published import PublishedPipeline, PublishedSampling, load

        assert isinstance(request.sampling, PublishedSampling)
        dtype = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}[request.sampling.precision]
        pipeline = load(self.folder, dtype=dtype, device=self.device, adapters=self.adapters)
        assert isinstance(pipeline, PublishedPipeline)
        yield pipeline.generate(
            [request.prompt],
            num_frames=request.num_frames,
            image=first_frame,
            seed=request.seed,
            sampling=request.sampling,
            progress=progress,
        )


def _make(
    request: "Provenance",
    told: "Provenance | None",
    engine: Trained | Published,
    fps: float,
    first_frame: "Tensor | None",
    out: Path,
    preview: Path | None,
) -> "Provenance":
    """Write the clip and its JSON, and return what the JSON says; stop where `told` says that it was stopped."""
    import torch

    from reelflow.data.video import VideoWriter, write_contact_sheet
    from reelflow.generation.pipeline import Progress, to_frames
    from reelflow.generation.provenance import Provenance

    torch.set_num_threads(request.num_threads)
    last_frame = request.num_frames if told is None else told.frames_made
    last_step = None if told is None else told.interrupted_after
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
        stream = engine.stream(request, first_frame, progress)
        beside = Provenance.path_beside(out)
        try:
            with VideoWriter(out, fps=fps) as writer:
                for part in stream:
                    new = to_frames(part[0])[: last_frame - num_frames].contiguous()
                    writer.write(new)
                    digest.update(new.numpy().tobytes())
                    num_frames += len(new)
                    if num_frames == last_frame:
                        break
        except KeyboardInterrupt:
            if writer.num_frames:
                cut = replace(request, frames_made=writer.num_frames, frames_sha256=None, interrupted_after=steps)
                cut.write(beside)
            raise
        if told is not None and not interrupted.is_set():
            stopped_after = told.interrupted_after  # which its frames may have ended before
        made = replace(
            request, frames_made=num_frames, frames_sha256=digest.hexdigest(), interrupted_after=stopped_after
        )
        made.write(beside)
    return made


def _checked(prompt: str, engine: Trained | Published) -> str:
    """Refuse a prompt that cannot be read, and warn of words that the model does not know."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the prompt is not valid Unicode at character {error.start + 1}") from error
    if hints := engine.check_prompt(prompt):
        warn(f"the model has never read these words and cannot follow them: {', '.join(hints)}")
    return prompt


def adapter_use(text: str) -> "AdapterUse":
    """Return what [NETWORK=]FILE[:STRENGTH] says; a name with a colon that exists is a file.

    Raises:
        ConfigError: it says no file, or a network that no system has.
    """
    from reelflow.families.adapters import AdapterUse

    head, equals, tail = text.partition("=")
    network, text = (head, tail) if equals and not Path(text).exists() else (None, text)
    file, strength = text, 1.0
    if not Path(text).exists() and ":" in text:
        file, _, number = text.rpartition(":")
        try:
            strength = float(number)
        except ValueError as error:
            raise ConfigError(f"the strength of an adapter is a number, as in {file}:0.8; got {number!r}") from error
    if not file:
        raise ConfigError(
            "an adapter is said as FILE, FILE:0.8, or transformer_2=FILE:0.8 where there are two networks"
        )
    return AdapterUse(file, strength, network)


def _refuse(changes: Mapping[str, Any], sampling: type, reason: str) -> None:
    """Refuse an option that a kind of sampling has no place for."""
    for name in changes:
        if name not in {field.name for field in fields(sampling)}:
            raise ConfigError(f"--{name.partition('_')[0]} is not for this model: {reason}")


def _first_frame(image: Path, height: int, width: int) -> "Tensor":
    """Read the first frame, 1 3 H W in [-1, 1], and say what was done to it."""
    from reelflow.data.video import probe, read_clip

    info = probe(image)
    if (info.height, info.width) != (height, width):
        print(f"{image}: {info.width} x {info.height}, resized and centre-cropped to {width} x {height}")
    return read_clip(image, num_frames=1, size=(height, width)).to_float()[None, :, 0]


def _warn_of_differences(told: "Provenance", device: "torch.device") -> None:
    differences = told.differences_here(device)
    if differences:
        warn(f"the last bits may differ: {'; '.join(differences)}")
    if told.interrupted_after is not None:
        print(f"it was interrupted after {told.interrupted_after} steps, and will be again", file=sys.stderr)
