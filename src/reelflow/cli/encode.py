"""`reelflow encode`: a video of any length to latents, chunk by chunk."""

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from reelflow.cli.terminal import new_file, parse_size, progress_bar
from reelflow.errors import ConfigError, MediaError

__all__ = ["encode"]


def encode(
    video: Annotated[Path, typer.Argument(help="The video.")],
    *,
    model: Annotated[Path, typer.Option(help="A run or model folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The latents, .safetensors: mean and logvar, C T H W.")],
    reconstruct: Annotated[Path | None, typer.Option(help="Also write the latents decoded again.")] = None,
    frames: Annotated[int | None, typer.Option(help="How many frames to take [default: all].")] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Resize and crop to [default: the model's].")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second to take [default: the model's].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of these names.")] = False,
) -> None:
    """Encode a video to latents. Any length, at memory that does not grow; says what the way back loses."""
    import torch

    from reelflow.data.video import VideoWriter, probe, read_clip
    from reelflow.generation.pipeline import model_folder, read_card, to_frames
    from reelflow.generation.provenance import file_sha256
    from reelflow.models.vae import CausalVAE, EncoderState
    from reelflow.models.weights import load_weights, write_tensors
    from reelflow.nn.conv import START, State
    from reelflow.training.meters import peak_memory_bytes

    new_file(out, ".safetensors", overwrite=overwrite)
    card = read_card(model)
    height, width = parse_size(size) if size else (card.clip.height, card.clip.width)
    fps = card.clip.fps if fps is None else fps
    if not 0 < fps < math.inf:
        raise ConfigError(f"--fps must be positive, got {fps}")
    if reconstruct is not None:
        new_file(reconstruct, overwrite=overwrite)
        VideoWriter(reconstruct, fps=fps)  # refuses a suffix it cannot write
    info, stride = probe(video), card.vae.temporal_stride
    available = info.num_frames_at(fps)
    num_frames = available if frames is None else frames
    if num_frames > available:
        raise MediaError(f"{video} has {available} frames at {fps:g} fps, asked for {num_frames}")
    fitting = 1 + max(0, num_frames - 1) // stride * stride
    if num_frames != fitting:
        raise ConfigError(
            f"the autoencoder takes 1 + {stride} k frames, and {video} would give {num_frames} at {fps:g} fps; "
            f"nearest: --frames {fitting}"
        )
    card.vae.latent_shape(num_frames, height, width)

    vae = CausalVAE(card.vae).eval()
    weights = model_folder(model) / "vae.safetensors"
    load_weights(weights, vae)
    print(
        f"{video}: {info.width} x {info.height} at {info.fps:g} fps, taken as {num_frames} frames of "
        f"{width} x {height} at {fps:g} fps (resized, centre-cropped)"
    )
    piece = max(stride, (card.clip.num_frames - 1) // stride * stride)
    means, logvars, error = [], [], 0.0
    encoder: EncoderState | None = None
    decoder: State = START
    writer = VideoWriter(reconstruct, fps=fps) if reconstruct is not None else nullcontext()
    with progress_bar("frames", "frames") as show, writer as movie, torch.no_grad():
        for begin in (0, *range(1 + piece, num_frames, piece)):  # after frame 0 alone, whole latents: nothing pends
            count = min(num_frames - begin, piece if begin else 1 + piece)
            clip = read_clip(video, num_frames=count, fps=fps, start=begin / fps, size=(height, width)).to_float()[None]
            posterior, encoder = vae.encode_chunk(clip, encoder)
            assert posterior is not None
            decoded, decoder = vae.decode_chunk(posterior.mean, decoder)
            decoded = decoded.clamp(-1, 1)
            error += (decoded - clip).double().square().sum().item()
            means.append(posterior.mean[0])
            logvars.append(posterior.logvar[0])
            if movie is not None:
                movie.write(to_frames(decoded[0]))
            show(begin + count, num_frames)
    metadata = {
        "source": str(video),
        "source_sha256": file_sha256(video),
        "vae_sha256": file_sha256(weights),
        "layout": "C T H W, unit variance",
        "clip": f"{num_frames} x {height} x {width} at {fps:g} fps",
    }
    latents = {"mean": torch.cat(means, dim=1).contiguous(), "logvar": torch.cat(logvars, dim=1).contiguous()}
    partial = out.with_name(f".{out.name}.partial")
    try:
        write_tensors(latents, partial, metadata=metadata)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    mse = error / (3 * num_frames * height * width)
    psnr = 10 * math.log10(4 / mse) if mse else math.inf
    print(
        f"{out}: latents {' x '.join(map(str, latents['mean'].shape))} (channels, frames, rows, columns); decoded again "
        f"they have {psnr:.2f} dB PSNR; peak memory {peak_memory_bytes() / 2**20:,.0f} MiB"
    )
    if reconstruct is not None:
        print(f"{reconstruct}: the latents decoded again")
