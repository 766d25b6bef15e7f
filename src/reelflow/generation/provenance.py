"""All that is needed to make a clip again, written as JSON beside it: `out.mp4` has `out.json`.

The same model, request and thread count give the same frames, bit for bit, on the same kind of machine with the same
versions; the hash of the frames tells whether they did.
"""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from reelflow.config import configuration, from_dict, to_dict
from reelflow.errors import CheckpointError, ConfigError, MediaError
from reelflow.families.adapters import AdapterUse
from reelflow.generation.pipeline import fingerprint
from reelflow.generation.published import PublishedSampling
from reelflow.generation.sampling import Sampling

__all__ = ["Asking", "Provenance", "file_sha256", "versions_here"]

Asking = Sampling | PublishedSampling
CPU = torch.device("cpu")


@configuration
class Provenance:
    """A request, what it was put to, and what came of it."""

    prompt: str
    seed: int
    num_frames: int  # asked for
    sampling: Asking
    model: str
    model_sha256: str
    image: str | None  # the first frame
    image_sha256: str | None
    num_threads: int  # sums are split among threads, and their order shows in the last bits
    versions: dict[str, str]
    frames_made: int = 0
    frames_sha256: str | None = None  # of the 8-bit frames, T H W 3; None when a second Ctrl-C cut the writing short
    interrupted_after: int | None = None  # steps; None when it was left to finish
    adapters: tuple[AdapterUse, ...] = ()
    adapters_sha256: tuple[str, ...] = ()
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("num_frames", 1), ("num_threads", 1), ("frames_made", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @classmethod
    def of(
        cls,
        prompt: str,
        *,
        seed: int,
        num_frames: int,
        sampling: Asking,
        model: Path,
        image: Path | None,
        adapters: Sequence[AdapterUse] = (),
        device: torch.device = CPU,
    ) -> "Provenance":
        """Describe a request before it is carried out on `device`.

        Raises:
            CheckpointError: there is no model there, or an adapter is missing.
            MediaError: the image cannot be read.
        """
        return cls(
            prompt=prompt,
            seed=seed,
            num_frames=num_frames,
            sampling=sampling,
            model=str(model.resolve()),
            model_sha256=fingerprint(model),
            image=None if image is None else str(image.resolve()),
            image_sha256=None if image is None else file_sha256(image),
            num_threads=torch.get_num_threads(),
            versions=versions_here(device),
            adapters=tuple(replace(use, file=str(Path(use.file).resolve())) for use in adapters),
            adapters_sha256=tuple(_adapter_sha256(Path(use.file)) for use in adapters),
        )

    @staticmethod
    def path_beside(video: Path) -> Path:
        """Return where the provenance of `video` lies."""
        return video.with_suffix(".json")

    @classmethod
    def read(cls, path: Path) -> "Provenance":
        """Read what `write` wrote.

        Raises:
            MediaError: the file is missing, or holds something else.
        """
        try:
            return from_dict(cls, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, ConfigError) as error:
            raise MediaError(f"{path} is not the JSON that reelflow writes beside a clip: {error}") from error

    def write(self, path: Path) -> None:
        """Write it whole or not at all, replacing what was there."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(to_dict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def again(
        self, *, model: Path | None = None, image: Path | None = None, device: torch.device = CPU
    ) -> "Provenance":
        """Return the same request, put to the same model here; say where model and image are if they have moved.

        Raises:
            CheckpointError: there is no model there, or another one; or an adapter is missing, or another one.
            MediaError: the first frame is missing, or another one.
        """
        model, image = model or Path(self.model), image or (Path(self.image) if self.image else None)
        request = Provenance.of(
            self.prompt,
            seed=self.seed,
            num_frames=self.num_frames,
            sampling=self.sampling,
            model=model,
            image=image,
            adapters=self.adapters,
            device=device,
        )
        if request.model_sha256 != self.model_sha256:
            raise CheckpointError(
                f"the clip was made by the model {self.model} of SHA-256 {self.model_sha256[:12]}..., but {model} has "
                f"{request.model_sha256[:12]}...; say where the old one is (--model)"
            )
        if request.image_sha256 != self.image_sha256:
            raise MediaError(
                f"the clip was made from {self.image or 'no first frame'} of SHA-256 {_short(self.image_sha256)}, but "
                f"{image} has {_short(request.image_sha256)}; say where the old one is (--image)"
            )
        for use, was, now in zip(self.adapters, self.adapters_sha256, request.adapters_sha256, strict=True):
            if was != now:
                raise CheckpointError(
                    f"the clip was made with the adapter {use.file} of SHA-256 {_short(was)}, but what is there now has "
                    f"{_short(now)}; put the old one in its place"
                )
        return replace(request, num_threads=self.num_threads)

    def differences_here(self, device: torch.device = CPU) -> list[str]:
        """Name the versions that differ from those at hand, which may show in the last bits of the frames."""
        here = versions_here(device)
        return [
            f"{name} was {self.versions.get(name)}, now {here.get(name)}"
            for name in {**self.versions, **here}
            if self.versions.get(name) != here.get(name)
        ]


def versions_here(device: torch.device = CPU) -> dict[str, str]:
    """Return what besides the request may move the last bits: software, the processor's instruction set, the accelerator."""
    packages = {name: version(name) for name in ("reelflow", "torch", "av")}
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found = {**packages, "python": platform.python_version(), "processor": processor}
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        found["accelerator"] = device.type
    return found


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        MediaError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MediaError(f"cannot read {path}: {error.strerror}") from error


def _adapter_sha256(source: Path) -> str:
    """Return the SHA-256 of an adapter's file, or of all files of its folder in the order of their names."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    if not files or not all(path.is_file() for path in files):
        raise CheckpointError(f"{source} is no adapter: it is missing, or no folder of files")
    digests = [file_sha256(path) for path in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}..."
