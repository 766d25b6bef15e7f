import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelflow.diffusion.process import (
    Parameterization,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
    levels,
    preconditioning,
)
from reelflow.diffusion.samplers import Restart
from reelflow.diffusion.timesteps import TableShift
from reelflow.errors import CheckpointError, ConfigError
from reelflow.generation.pipeline import Pipeline, Progress, fingerprint, read_card, to_frames
from reelflow.generation.sampling import (
    Ancestral,
    Ddim,
    Dpm2mSde,
    Euler,
    EulerMaruyama,
    Guidance,
    Heun,
    Projection,
    Restarted,
    Sampling,
    UniPC,
)
from reelflow.models.dit import VideoDiT
from reelflow.nn.embed import Number
from tiny_model import CARD, tiny_pipeline

PROMPT = "a red ring moving left"


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture
def folder(pipeline, tmp_path):
    pipeline.save(tmp_path / "run" / "model")
    return tmp_path / "run"


def image(batch=1, seed=0):
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_saved_pipeline_makes_the_same_clip(pipeline, folder):
    assert torch.equal(pipeline.generate([PROMPT], seed=3), Pipeline.load(folder).generate([PROMPT], seed=3))
    assert read_card(folder) == CARD


def test_a_clip_depends_on_its_seed_and_its_prompt_and_is_in_range(pipeline):
    clip = pipeline.generate([PROMPT], seed=1)
    assert clip.shape == (1, 3, 9, 32, 32)
    assert clip.abs().max() <= 1
    assert not torch.equal(clip, pipeline.generate([PROMPT], seed=2))
    assert not torch.equal(clip, pipeline.generate(["a blue disc"], seed=1))
    assert torch.equal(clip, pipeline.generate([PROMPT], seed=1))


def test_a_network_is_told_of_the_shape_of_its_clips_with_and_without_the_prompt(pipeline):
    dit = replace(CARD.dit, numbers=2 * (Number(channels=4, scale=1.0),))
    card = replace(CARD, dit=dit, tells=("frames", "aspect"), clip=replace(CARD.clip, width=64))
    model, told = VideoDiT(dit), []
    for number in model.numbers:
        number.register_forward_pre_hook(lambda _, given: told.append(given[0].unique().item()))
    for num_frames, frames in ((9, 3.0), (1, 1.0)):
        told.clear()
        Pipeline(card, pipeline.vae, model).generate([PROMPT], num_frames=num_frames)
        assert told == 8 * [frames, 2.0]  # steps x branches
    with pytest.raises(
        ConfigError, match=r"of 0 numbers is told as many .* not frames, aspect; nearest: 2 in dit\.numbers"
    ):
        replace(card, dit=CARD.dit)
    with pytest.raises(ConfigError, match=r"of 2 numbers .* not nothing"):
        replace(card, tells=())


def test_prompts_in_a_batch_do_not_touch_each_other(pipeline):
    both = pipeline.generate([PROMPT, "赤い 輪"], seed=5)
    torch.testing.assert_close(both[1:], pipeline.generate(["赤い 輪"], seed=6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", ["", "красное кольцо", "حلقة حمراء", "赤い輪", "🔴⭕"])
def test_prompts_in_any_script_and_empty_ones_make_a_clip(pipeline, prompt):
    assert pipeline.generate([prompt], sampling=Sampling(num_steps=1)).isfinite().all()


@pytest.mark.parametrize("overlap", [1, 2])
def test_streaming_hands_out_the_frames_of_the_whole_clip(pipeline, overlap):
    parts = list(pipeline.stream([PROMPT], num_frames=29, seed=4, overlap=overlap))
    assert [part.shape[2] for part in parts] == ([9, 8, 8, 4] if overlap == 1 else [9, 4, 4, 4, 4, 4])
    assert torch.equal(parts[0], pipeline.generate([PROMPT], seed=4))
    if overlap == 2:
        assert torch.equal(torch.cat(parts, dim=2), pipeline.generate([PROMPT], num_frames=29, seed=4))


@pytest.mark.parametrize("num_frames", [5, 13])
def test_latents_are_handed_out_instead_of_the_clip_they_decode_to(pipeline, num_frames):
    made = {kind: pipeline.generate(["one"], num_frames=num_frames, output=kind) for kind in ("clip", "latents")}
    config = pipeline.card.vae
    assert made["latents"].shape == (1, *config.latent_shape(num_frames, *made["clip"].shape[3:]))
    if num_frames <= pipeline.card.clip.num_frames:
        with torch.no_grad():
            assert torch.equal(pipeline.vae.decode(made["latents"]).clamp(-1, 1), made["clip"])


def test_each_chunk_goes_on_from_the_last_frames_of_the_one_before(pipeline):
    first, second = pipeline.stream([PROMPT], num_frames=17, seed=4, overlap=1)
    end = first[:, :, -1]
    own = torch.Generator().manual_seed(4)
    noise = [torch.randn(4, 3, 4, 4, generator=own)[None] for _ in range(2)][1]
    alone = pipeline.generate([PROMPT], image=end, noise=noise)
    assert torch.equal(second, alone[:, :, 1:])


def test_a_given_first_frame_is_the_reconstruction_of_the_image_whatever_the_prompt(pipeline):
    picture = image()
    with torch.no_grad():
        again = pipeline.vae.decode(pipeline.vae.encode(picture[:, :, None]).mean).clamp(-1, 1)
    for prompt in (PROMPT, ""):
        clip = pipeline.generate([prompt], image=picture, seed=7)
        torch.testing.assert_close(clip[:, :, :1], again, atol=1e-5, rtol=0)
    assert not torch.equal(clip[:, :, 1:], pipeline.generate([""], seed=7)[:, :, 1:])


def test_progress_counts_every_step_of_every_chunk(pipeline):
    seen = []
    list(pipeline.stream([PROMPT], num_frames=17, overlap=1, progress=Progress(lambda *step: seen.append(step))))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_previews_come_every_so_many_steps_and_change_nothing(pipeline):
    seen = []
    progress = Progress(on_preview=seen.append, preview_every=2)
    assert torch.equal(pipeline.generate([PROMPT], progress=progress), pipeline.generate([PROMPT]))
    assert [tuple(clip.shape) for clip in seen] == 2 * [(1, 3, 9, 32, 32)]


def test_a_stopped_clip_is_what_is_known_by_then(pipeline):
    steps = []
    stop = Progress(lambda done, total: steps.append(done), should_stop=lambda: steps[-1] == 6)
    parts = list(pipeline.stream([PROMPT], num_frames=29, overlap=1, progress=stop))
    assert [part.shape[2] for part in parts] == [9, 8]
    assert torch.equal(parts[0], pipeline.generate([PROMPT]))
    assert parts[1].isfinite().all()


@pytest.mark.parametrize("sampler", [Euler(), Heun(), UniPC(order=3)], ids=lambda sampler: sampler.kind)
def test_samplers_and_guidance_in_bf16_make_clips(pipeline, sampler):
    guidance = Guidance(difference=Projection(momentum=-0.5), interval=(0.0, 0.9), rescale=0.5)
    sampling = Sampling(num_steps=4, sampler=sampler, precision="bf16", shift=3.0, guidance=guidance)
    clip = pipeline.generate([PROMPT], sampling=sampling)
    assert clip.isfinite().all()
    assert not torch.equal(clip, pipeline.generate([PROMPT], sampling=replace(sampling, guidance=Guidance())))


@pytest.mark.parametrize(
    "sampler",
    [Ddim(), Ancestral(), EulerMaruyama(), Dpm2mSde(), Restarted((Restart(0, 2),), Euler())],
    ids=lambda sampler: sampler.kind,
)
def test_what_a_sampler_draws_for_a_clip_depends_on_its_own_seed_alone(pipeline, sampler):
    """In both chunks of a long clip."""
    sampling = Sampling(num_steps=3, sampler=sampler)
    both = pipeline.generate([PROMPT, "a blue disc"], num_frames=13, seed=5, sampling=sampling)
    alone = pipeline.generate(["a blue disc"], num_frames=13, seed=6, sampling=sampling)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)
    still = pipeline.generate(["a blue disc"], num_frames=13, seed=6, sampling=Sampling(num_steps=3))
    assert (alone - still).abs().max() > 0.01


class Knowing(VideoDiT):
    """A network that knows the data, and answers as the card says; at t = 1 it cannot, and answers absurdly."""

    def __init__(self, card, data):
        super().__init__(card.dit)
        self.space, self.data = card.parameterization, data

    def forward(self, latents, t, condition):
        x = latents
        if isinstance(self.space.process, VarianceExploding):
            assert 0.2 < x.square().mean() < 5  # about unit variance, at t = 0 too
            x = x / preconditioning(self.space.process, t).c_in
        alpha, sigma = levels(self.space.process, t)
        answer = self.space.target(self.data.double(), (x - alpha * self.data) / sigma, t)
        answer = torch.where(sigma == 0, 1e6, answer).float()
        return answer.repeat(1, 2, 1, 1, 1) if self.space.learned_variance else answer


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("space", "sampler"),
    [
        (Parameterization(RectifiedFlow(), "data"), Euler()),
        (Parameterization(VariancePreserving(), "v"), Ddim(eta=0.0)),
        (Parameterization(VariancePreserving(), "noise", learned_variance=True), Ancestral()),
        (Parameterization(VariancePreserving(schedule="cosine", zero_terminal_snr=True), "v"), UniPC()),
        (Parameterization(VarianceExploding(), "v"), Heun()),
    ],
    ids=lambda value: getattr(value, "kind", None) or f"{value.process.kind}-{value.prediction}",
)
def test_a_model_is_sampled_as_it_was_trained(pipeline, space, sampler, given):
    """Knowing the data, it makes them, however it answers; a first frame is what is given."""
    dit = replace(CARD.dit, out_channels=8) if space.learned_variance else CARD.dit
    card = replace(CARD, dit=dit, parameterization=space, sampling=Sampling(num_steps=8, sampler=sampler))
    data = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    picture = image()[:, :, None]
    with torch.no_grad():
        latents = data.clone()
        if given:
            latents[:, :, :1] = pipeline.vae.encode(picture).mean
        wanted = pipeline.vae.decode(latents).clamp(-1, 1)
    made = Pipeline(card, pipeline.vae, Knowing(card, data)).generate(
        [PROMPT], image=picture[:, :, 0] if given else None
    )
    torch.testing.assert_close(made, wanted, atol=1e-3, rtol=0)


def test_a_card_that_cannot_be_sampled_is_refused():
    for changes, message in (
        (
            {"parameterization": Parameterization(learned_variance=True)},
            "answer 8 channels, got 4; set dit.out_channels=8",
        ),
        ({"dit": replace(CARD.dit, out_channels=8)}, "answer 4 channels, got 8"),
        ({"parameterization": Parameterization(prediction="noise")}, "at t = 0"),
        ({"sampling": Sampling(shift=TableShift(rows=((1, 1.0), (11, 2.0))))}, "got 12; nearest: 11"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(CARD, **changes)


def test_steps_that_are_walked_again_are_counted(pipeline):
    seen = []
    sampling = Sampling(num_steps=4, sampler=Restarted((Restart(1, 3, 2),), Euler()))
    list(pipeline.stream([PROMPT], sampling=sampling, progress=Progress(lambda *step: seen.append(step))))
    assert seen == [(done, 8) for done in range(1, 9)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 10}, "nearest: 9 or 13"),
        ({"num_frames": 0}, "got 0; nearest: 1"),
        ({"image": image()[..., :16]}, "32 x 32, got 32 x 16"),
        ({"image": image().mul(255)}, r"floats in \[-1, 1\]"),
        ({"image": image().fill_(float("nan"))}, r"floats in \[-1, 1\]"),
        ({"image": image(), "num_frames": 1}, "leaves nothing to generate"),
        ({"image": image(2)}, "got 1 prompts and 2 first frames"),
        ({"prompts": []}, "got 0 prompts"),
        ({"prompts": ["one two three four five six seven"]}, "7 words"),
        ({"noise": torch.zeros(1, 4, 2, 4, 4)}, "must be shaped"),
        ({"sampling": Sampling(shift=TableShift(rows=((12, 1.0),))), "num_frames": 5}, "got 8; nearest: 12"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_computed(pipeline, monkeypatch, arguments, message):
    monkeypatch.setattr(Pipeline, "_chunk", None)
    with pytest.raises(ConfigError, match=message):
        pipeline.generate(**{"prompts": [PROMPT], **arguments})


@pytest.mark.parametrize("overlap", [0, 3])
def test_an_overlap_that_leaves_nothing_to_generate_is_refused_for_long_clips_only(pipeline, overlap):
    with pytest.raises(ConfigError, match="overlap must be 1 to 2"):
        next(pipeline.stream([PROMPT], num_frames=13, overlap=overlap))
    assert next(pipeline.stream([PROMPT], overlap=overlap)).shape[2] == 9


def test_a_model_is_never_written_over(pipeline, folder):
    with pytest.raises(CheckpointError, match="exists already"):
        pipeline.save(folder / "model")


def test_the_fingerprint_tells_models_apart(folder, tmp_path):
    tiny_pipeline(seed=1).save(tmp_path / "other")
    assert fingerprint(folder) == fingerprint(folder / "model") != fingerprint(tmp_path / "other")
    (tmp_path / "other" / "dit.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"dit\.safetensors"):
        fingerprint(tmp_path / "other")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Pipeline.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no model\.json"):
        Pipeline.load(tmp_path)
    (tmp_path / "recipe.json").touch()
    with pytest.raises(CheckpointError, match="has not finished training"):
        Pipeline.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"vae": 1}', "\udcff"])
def test_a_torn_or_hostile_card_is_refused(folder, text):
    (folder / "model" / "model.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="not a model card"):
        Pipeline.load(folder)


def test_truncated_weights_are_refused(folder):
    path = folder / "model" / "dit.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Pipeline.load(folder)


def test_weights_of_another_model_are_refused(folder):
    path = folder / "model" / "vae.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][None]}, path)
    with pytest.raises(CheckpointError, match="another model"):
        Pipeline.load(folder)


def test_a_misspelt_field_of_the_card_is_named(folder):
    path = folder / "model" / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": 1}))
    with pytest.raises(CheckpointError, match="colour"):
        read_card(folder)


def test_the_ends_of_the_range_are_black_and_white():
    clip = torch.tensor([-1.0, 0.0, 1.0]).expand(1, 1, 3).expand(3, 2, 1, 3)
    assert to_frames(clip).tolist() == 2 * [[[[0] * 3, [128] * 3, [255] * 3]]]
