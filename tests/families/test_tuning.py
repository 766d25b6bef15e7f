"""Adapters of published systems, learned from a folder of clips, and read by the reference."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_ltx_system
import test_wan_system
import tiny
import torch
from diffusers import LTXPipeline, WanPipeline
from parity import error, randomise
from rich.console import Console
from safetensors import safe_open

import reelflow
from reelflow.cli.main import run
from reelflow.data.folder import ClipSpec
from reelflow.data.store import Store
from reelflow.data.video import write_video
from reelflow.errors import CheckpointError, ConfigError
from reelflow.families.adapters import AdapterUse
from reelflow.families.systems import load_system, sketch_system
from reelflow.generation.published import PublishedSampling
from reelflow.models.adapters import LoRA
from reelflow.recipes.published import Tuning, times_of, tune, tuning
from reelflow.training.flow import FlowTask
from reelflow.training.loop import TrainingConfig
from reelflow.training.optim import OptimizerConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
QUIET = Console(quiet=True)
PROMPT = "a red kite over the dunes"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for index in range(3):
        frames = rng.integers(0, 256, (9, 4, 4, 3), np.uint8).repeat(16, 1).repeat(16, 2)
        write_video(folder / f"{index}.mkv", frames, fps=8)
        (folder / f"{index}.txt").write_text(PROMPT)
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A system of two networks."""
    parts = tmp_path_factory.mktemp("parts")
    tokenizer, encoder = tiny.umt5(parts)
    pipeline = WanPipeline(
        transformer=test_wan_system.transformer(),
        transformer_2=test_wan_system.transformer(num_layers=1),
        vae=test_wan_system.vae(),
        boundary_ratio=0.875,
        tokenizer=tokenizer,
        text_encoder=encoder,
        scheduler=test_wan_system.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    return saved(pipeline, tmp_path_factory.mktemp("wan") / "system")


@pytest.fixture(scope="module")
def ltx(tmp_path_factory) -> Path:
    parts = tmp_path_factory.mktemp("parts")
    tokenizer, encoder = tiny.t5(parts, length=128)
    pipeline = LTXPipeline(
        transformer=test_ltx_system.transformer(),
        vae=test_ltx_system.vae(),
        tokenizer=tokenizer,
        text_encoder=encoder,
        scheduler=test_ltx_system.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
    )
    return saved(pipeline, tmp_path_factory.mktemp("ltx") / "system")


def saved(pipeline, folder: Path) -> Path:
    for name in ("transformer", "transformer_2", "vae"):
        if getattr(pipeline, name, None) is not None:
            randomise(getattr(pipeline, name), seed=len(name))
    pipeline.save_pretrained(folder)
    return folder


def asked(system: Path, videos: Path, **changes) -> Tuning:
    base = tuning(str(system), str(videos))
    training = TrainingConfig(
        steps=3,
        batch_size=2,
        optimizer=OptimizerConfig(lr=5e-2, muon_lr=None, warmup_steps=0, decay="constant"),
        seed=0,
        ema_decay=None,
        log_every=1,
        validate_every=3,
    )
    small = {
        "data": replace(base.data, num_validation=1),
        "clip": ClipSpec(num_frames=9, height=64, width=64, fps=8.0),
        "adapter": LoRA(rank=2),
        "training": training,
    }
    return replace(base, **small | changes)


@pytest.mark.parametrize("which", ["wan", "ltx"])
def test_an_adapter_of_a_published_network_is_learned_and_loads_in_the_reference(request, videos, which, tmp_path):
    system = request.getfixturevalue(which)
    network = {"wan": "transformer_2", "ltx": "transformer"}[which]
    made = tune(asked(system, videos, network=network), tmp_path / "run", console=QUIET)
    assert made == tmp_path / "run" / "adapter"
    lines = [json.loads(line) for line in (tmp_path / "run" / "dit" / "log.jsonl").read_text().splitlines()]
    (change,) = (line["change"] for line in lines if "change" in line)
    assert change > 1e-3

    # What is cached is what the system itself makes.
    store, clips = Store.open(tmp_path / "run" / "latents"), Store.open(tmp_path / "run" / "clips")
    theirs = load_system(system)
    clip = clips.batch("frames", torch.arange(3)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        means = theirs.vae.encode(clip).mean
    for kept in store.batch("mean", torch.arange(2)):
        assert min(float((mean - kept).abs().max()) for mean in means) < 1e-5
    assert store.meta(0)["caption"] == PROMPT

    # The reference reads the file, and its network answers as ours does.
    pipeline = (WanPipeline if which == "wan" else LTXPipeline).from_pretrained(system)
    into = {"load_into_transformer_2": True} if network == "transformer_2" else {}
    pipeline.load_lora_weights(made, adapter_name="own", **into)
    assert getattr(pipeline, network).peft_config["own"].r == 2
    pipeline.set_progress_bar_config(disable=True)
    ours = reelflow.load(system, adapters=[AdapterUse(str(made))])
    plain = reelflow.load(system)
    grid = theirs.vae.config.latent_shape(9, 64, 64)
    noise = torch.randn(1, *grid, generator=torch.Generator().manual_seed(0))
    sampling = PublishedSampling(num_steps=3, guidance_scale=(1.0,), height=64, width=64, fps=8.0)
    mine = ours.generate([PROMPT], num_frames=9, noise=noise, sampling=sampling, output="latents")
    before = plain.generate([PROMPT], num_frames=9, noise=noise, sampling=sampling, output="latents")
    assert error(mine, before) > 1e-3
    given = noise if which == "wan" else noise.flatten(2).mT
    reference = pipeline(
        prompt=PROMPT, num_frames=9, height=64, width=64, num_inference_steps=3, guidance_scale=1.0, latents=given,
        output_type="latent", **({"frame_rate": 8} if which == "ltx" else {}),
    )[0]  # fmt: skip
    reference = reference if which == "wan" else reference.mT.unflatten(2, grid[1:])
    assert error(mine, reference) < 1e-4


def test_what_is_drawn_are_the_times_of_the_network_that_learns(wan, videos, tmp_path, monkeypatch):
    drawn, loss = [], FlowTask._draw

    def watching(self, batch, generator):
        draw = loss(self, batch, generator)
        drawn.append(draw.t)
        return draw

    monkeypatch.setattr(FlowTask, "_draw", watching)
    made = tune(asked(wan, videos), tmp_path / "run", console=QUIET)
    assert torch.cat(drawn).max() <= 0.125  # 0 is noise
    with safe_open(made / "pytorch_lora_weights.safetensors", "pt") as file:
        assert "0.125" in str(file.metadata())
    with pytest.raises(CheckpointError, match="transformer"):
        reelflow.load(wan, adapters=[AdapterUse(str(made), network="transformer_2")])


def test_a_range_that_another_network_works_at_is_refused(wan):
    system = sketch_system(wan)
    assert times_of(system, "transformer", None) == (0.0, 0.125)
    assert times_of(system, "transformer_2", (0.5, 1.0)) == (0.5, 1.0)
    with pytest.raises(ConfigError, match=r"transformer works from t = 0 to 0.125 .*nearest: 0.1 to 0.125"):
        times_of(system, "transformer", (0.1, 0.5))
    with pytest.raises(ConfigError, match=r"nearest: 0.125 to 1$"):
        times_of(system, "transformer_2", (0.0, 0.1))


def test_what_cannot_be_learned_is_refused_before_anything_is_written(wan, ltx, videos, tmp_path):
    for config, message in (
        (asked(ltx, videos, network="transformer_2"), "the system has no transformer_2"),
        (asked(wan, videos, clip=ClipSpec(num_frames=9, height=60, width=64, fps=8.0)), "height must be a multiple of"),
        (asked(wan, videos, times=(0.0, 0.5)), "transformer works from t = 0 to 0.125"),
    ):
        with pytest.raises(ConfigError, match=message):
            tune(config, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_one_command_learns_an_adapter_of_a_system(wan, videos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {
        "clip": {"num_frames": 5, "height": 32, "width": 32, "fps": 8.0},
        "data.num_validation": 1,
        "adapter": {"rank": 1},
        "network": "transformer_2",
        "training.steps": 1,
        "training.precision": "fp32",
    }
    settings = [word for path, value in small.items() for word in ("--set", f"{path}={json.dumps(value)}")]
    command = ["train", str(wan), "-o", "style", *settings]
    assert run(command) == 2
    assert "give their folder with --data" in capsys.readouterr().err
    assert run([*command, "--data", str(videos)]) == 0
    assert "style/adapter is ready; try: reelflow generate" in capsys.readouterr().out
    assert run([*command, "--data", str(videos), "--set", "adapter.rank=2"]) == 2  # another run
    assert "adapter.rank was 1, now 2" in capsys.readouterr().err
