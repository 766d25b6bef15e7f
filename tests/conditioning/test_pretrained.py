"""Readings of published systems, given tiny random encoders, give what the systems' own pipelines give."""

import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideoPipeline,
    LattePipeline,
    LTXPipeline,
    MochiPipeline,
    StableDiffusion3Pipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from families import tiny
from reelflow.conditioning.pretrained import PretrainedImage, PretrainedText, Reading
from reelflow.errors import CheckpointError, ConfigError

PROMPTS = ['The red  kite &amp; a cat "HI" over the sea', "", "a dog runs"]
LLAMA = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
QWEN = (
    "<|im_start|>system\nYou are a helpful assistant. Describe the video by detailing the following aspects: "
    "        1. The main content and theme of the video. "
    "        2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
    "        3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. "
    "        4. background environment, light, style and atmosphere. "
    "        5. camera angles, movements, and transitions used in the video.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every encoder, as tokenizer_NAME and encoder_NAME."""
    folder = tmp_path_factory.mktemp("encoders")
    for name in ("t5", "umt5", "byt5", "clip_text", "llama", "qwen_vl"):
        getattr(tiny, name)(folder, tokenizer=f"tokenizer_{name}", encoder=f"encoder_{name}")
    tiny.clip_text(folder, tokenizer="tokenizer_clip_l", encoder="encoder_clip_l", projection=12, seed=1)
    tiny.clip_text(folder, tokenizer="tokenizer_clip_g", encoder="encoder_clip_g", projection=20, pad="!", seed=2)
    for name in ("clip_vision", "siglip"):
        getattr(tiny, name)(folder, processor=f"processor_{name}", encoder=f"encoder_{name}")
    return folder


def load(folder: Path, name: str, reading: Reading) -> PretrainedText:
    return PretrainedText.load(folder / f"encoder_{name}", folder / f"tokenizer_{name}", reading)


def parts(pipeline: type, *texts: PretrainedText) -> dict:
    """Fill a pipeline with encoders, and with nothing else."""
    given: dict = {}
    for number, text in enumerate(texts):
        suffix = f"_{number + 1}" if number else ""
        given |= {f"text_encoder{suffix}": text.encoder, f"tokenizer{suffix}": text.tokenizer}
    others = dict.fromkeys(("vae", "transformer", "scheduler"))
    allowed = pipeline.__init__.__annotations__
    return {name: value for name, value in {**others, **given}.items() if name in allowed}


@torch.no_grad()  # with gradients, torch chooses another kernel
def each(read, prompts=PROMPTS) -> list[torch.Tensor]:
    """Ask a pipeline for one prompt at a time, as we do: in a batch, sums are rounded in another order."""
    found = [read(prompt) for prompt in prompts]
    columns = zip(*found, strict=True) if isinstance(found[0], tuple) else [found]
    return [torch.cat(column) for column in columns]


def test_web_prompts_and_zeros_beyond_them_are_wan(folder):
    text = load(folder, "umt5", Reading(length=512, cleaning="web", padding="zeros"))
    reference = WanPipeline(**parts(WanPipeline, text))
    (tokens,) = each(lambda prompt: reference._get_t5_prompt_embeds(prompt, max_sequence_length=512))
    ours = text(PROMPTS)
    assert torch.equal(ours.tokens, tokens)
    assert ours.mask.all()
    assert ours.pooled is None


def test_a_template_its_crop_and_an_inner_layer_are_hunyuan_video(folder):
    text = load(folder, "llama", Reading(length=256, template=LLAMA, crop=95, layer=2))
    pooled = load(folder, "clip_text", Reading(length=77, mask_encoder=False, pooled="output"))
    reference = HunyuanVideoPipeline(**parts(HunyuanVideoPipeline, text, pooled))
    tokens, vector, mask = each(reference.encode_prompt)
    ours = text(PROMPTS)
    assert torch.equal(ours.mask, mask.bool())
    assert 0 < ours.mask[1].sum() < ours.mask[0].sum()
    assert torch.equal(ours.tokens, tokens)
    assert torch.equal(pooled(PROMPTS).pooled, vector)


def test_a_chat_and_quoted_texts_are_hunyuan_video_15(folder):
    text = load(folder, "qwen_vl", Reading(length=1000, template=QWEN, crop=108, layer=2, empty=" "))
    quotes = load(folder, "byt5", Reading(length=256, cleaning="quotes", empty=None))
    reference = HunyuanVideo15Pipeline  # needs an autoencoder to be made, but not to read
    tokens, mask = each(lambda p: reference._get_mllm_prompt_embeds(text.encoder, text.tokenizer, p, "cpu"))
    tokens2, mask2 = each(lambda p: reference._get_byt5_prompt_embeds(quotes.tokenizer, quotes.encoder, p, "cpu"))
    ours, ours2 = text(PROMPTS), quotes(PROMPTS)
    assert torch.equal(ours.mask, mask.bool())
    assert torch.equal(ours2.mask, mask2.bool())
    assert ours2.mask.any(1).tolist() == [True, False, False]
    assert torch.equal(ours.tokens, tokens)
    assert torch.equal(ours2.tokens, tokens2)


def test_padding_that_nobody_sees_is_mochi(folder):
    text = load(folder, "t5", Reading(length=256, empty=None))
    reference = MochiPipeline(**parts(MochiPipeline, text), force_zeros_for_empty_prompt=True)
    tokens, mask = each(reference._get_t5_prompt_embeds)
    ours = text(PROMPTS)
    assert torch.equal(ours.mask, mask)
    assert mask.any(1).tolist() == [True, False, True]
    assert torch.equal(ours.tokens[mask], tokens[mask])  # what else the empty prompt gives is never read


def test_padding_that_all_see_is_cogvideox(folder):
    text = load(folder, "t5", Reading(length=226, mask_encoder=False, padding="encoded"))
    (tokens,) = each(CogVideoXPipeline(**parts(CogVideoXPipeline, text))._get_t5_prompt_embeds)
    assert torch.equal(text(PROMPTS).tokens, tokens)
    assert text(PROMPTS).mask.all()


def test_padding_that_only_the_encoder_sees_is_ltx(folder):
    text = load(folder, "t5", Reading(length=128, mask_encoder=False))
    tokens, mask = each(LTXPipeline(**parts(LTXPipeline, text))._get_t5_prompt_embeds)
    ours = text(PROMPTS)
    assert torch.equal(ours.mask, mask)
    assert torch.equal(ours.tokens, tokens)


def test_cleaned_captions_are_latte(folder):
    told = load(folder, "t5", Reading(length=120, cleaning="caption", padding="zeros"))
    away = PretrainedText(told.tokenizer, told.encoder, replace(told.reading, padding="encoded"))
    alone = PretrainedText(told.tokenizer, told.encoder, replace(told.reading, padding="masked"))
    read = torch.no_grad()(LattePipeline(**parts(LattePipeline, told)).encode_prompt)
    cond, uncond = read(PROMPTS, clean_caption=True)
    assert torch.allclose(told(PROMPTS).tokens, cond, rtol=0, atol=1e-4)  # in a batch, padding is zeros
    assert torch.equal(told(PROMPTS).tokens == 0, cond == 0)
    assert torch.allclose(away(["", "", ""]).tokens, uncond, rtol=0, atol=1e-4)
    cond, uncond = read(PROMPTS[0], clean_caption=True)
    context = alone(PROMPTS[:1]).condition().trimmed().context
    assert torch.equal(context, cond)  # of a single prompt, it is cut off
    assert torch.equal(away([""]).tokens[:, : context.shape[1]], uncond)


def test_two_projections_and_a_text_are_stable_diffusion_3(folder):
    clip = Reading(length=77, layer=1, mask_encoder=False, padding="encoded", pooled="projection")
    texts = [load(folder, "clip_l", clip), load(folder, "clip_g", clip)]
    texts.append(load(folder, "t5", Reading(length=256, mask_encoder=False, padding="encoded")))
    reference = StableDiffusion3Pipeline(**parts(StableDiffusion3Pipeline, *texts))
    for number in (0, 1):
        tokens, pooled = each(lambda prompt, n=number: reference._get_clip_prompt_embeds(prompt, clip_model_index=n))
        ours = texts[number](PROMPTS)
        assert torch.equal(ours.tokens, tokens)
        assert torch.equal(ours.pooled, pooled)
    (tokens,) = each(reference._get_t5_prompt_embeds)
    assert torch.equal(texts[2](PROMPTS).tokens, tokens)


PICTURES = 2 * torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(0)) - 1


def pillows():
    arrays = ((PICTURES + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def test_a_picture_gives_the_tokens_that_the_reference_gives_its_network(folder):
    clip = PretrainedImage.load(folder / "encoder_clip_vision", folder / "processor_clip_vision", layer=1)
    wan = WanImageToVideoPipeline(None, None, None, None, image_processor=clip.processor, image_encoder=clip.encoder)
    assert torch.equal(clip(PICTURES), wan.encode_image(pillows(), "cpu"))
    siglip = PretrainedImage.load(folder / "encoder_siglip", folder / "processor_siglip", layer=0)
    for row, picture in enumerate(pillows()):
        theirs = HunyuanVideo15ImageToVideoPipeline._get_image_embeds(
            siglip.encoder, siglip.processor, picture, torch.device("cpu")
        )
        assert torch.equal(siglip(PICTURES[row : row + 1]), theirs)


# What holds of every reading

TEXTS = st.text('redkitø "“”.<>&\n蓝', max_size=20)


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(TEXTS, min_size=1, max_size=3), length=st.integers(2, 12))
def test_features_of_a_prompt_do_not_depend_on_its_neighbours(folder_of_t5, prompts, length):
    text = PretrainedText(*folder_of_t5, Reading(length=length, empty=None, pooled="mean"))
    together = text(prompts)
    for row, prompt in enumerate(prompts):
        alone = text([prompt])
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))
    assert together.tokens.isfinite().all()


@pytest.fixture(scope="module")
def folder_of_t5(tmp_path_factory):
    return tiny.t5(tmp_path_factory.mktemp("t5"))


def test_threads_may_share_an_encoder(folder_of_t5):
    text = PretrainedText(*folder_of_t5, Reading(length=9))
    alone, found = text(["a kite"]), []
    threads = [threading.Thread(target=lambda: found.extend(text(["a kite"]) for _ in range(10))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(each.tokens, alone.tokens) for each in found] == [True] * 60


def test_the_mean_is_of_real_tokens_and_of_nothing_is_zero(folder_of_t5):
    text = PretrainedText(*folder_of_t5, Reading(length=9, empty=None, pooled="mean"))
    features = text(["a red kite", ""])
    count = int(features.mask[0].sum())
    assert torch.allclose(features.pooled[0], features.tokens[0, :count].mean(0), atol=1e-6)
    assert not features.mask[1].any()
    assert features.pooled[1].abs().max() == 0
    assert features.condition().vector is features.pooled


def test_words_that_do_not_fit_are_named_in_the_log(folder, caplog):
    template = "<|start_header_id|>user<|end_header_id|> {} and left<|eot_id|>"
    text = load(folder, "llama", Reading(length=9, crop=3, template=template))
    text(["a red kite", "a red kite over green dunes"])  # of the second, the template's last word is cut
    assert not caplog.messages
    text(["a red kite over green dunes slowly by the sea"])
    assert caplog.messages == ["the encoder reads 9 tokens of a prompt and drops: the sea"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"crop": -1}, "crop must be 0 or more"),
        ({"layer": -1}, "layer must be 0 or more"),
        ({"template": "describe"}, "one {} for the prompt"),
    ],
)
def test_impossible_readings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Reading(**{"length": 8, **change})


def test_a_reading_that_the_encoder_cannot_serve_is_refused(folder):
    with pytest.raises(ConfigError, match="0 to 2 for this encoder of 2 layers, got 3"):
        load(folder, "t5", Reading(length=8, layer=3))
    with pytest.raises(ConfigError, match="77 positions, the reading asks for 90; nearest: length=67"):
        load(folder, "clip_text", Reading(length=80, crop=10))


def test_a_folder_without_all_weights_is_refused(folder, tmp_path):
    reading = Reading(length=8)
    with pytest.raises(CheckpointError, match="there is no folder"):
        PretrainedText.load(tmp_path / "none", tmp_path / "none", reading)
    with pytest.raises(CheckpointError, match="no tokenizer that transformers reads"):
        PretrainedText.load(folder / "encoder_t5", tmp_path, reading)
    torn = tmp_path / "torn"
    shutil.copytree(folder / "encoder_t5", torn)
    weights = load_file(torn / "model.safetensors")
    weights.pop("encoder.final_layer_norm.weight")
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights of a T5EncoderModel: encoder"):
        PretrainedText.load(torn, folder / "tokenizer_t5", reading)
    (torn / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="no encoder that transformers reads"):
        PretrainedText.load(torn, folder / "tokenizer_t5", reading)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'pip install "reelflow\[text\]"'):
        PretrainedText.load(Path(), Path(), Reading(length=8))


def test_what_features_depend_on_is_in_the_identity(folder):
    text = load(folder, "t5", Reading(length=8))
    same = load(folder, "t5", Reading(length=8))
    assert text.identity == same.identity
    others = [load(folder, "t5", Reading(length=9)), load(folder, "umt5", Reading(length=8))]
    half = PretrainedText.load(folder / "encoder_t5", folder / "tokenizer_t5", Reading(length=8), dtype=torch.bfloat16)
    moved = load(folder, "t5", Reading(length=8))
    with torch.no_grad():
        moved.encoder.encoder.final_layer_norm.weight[3] += 1e-6
    assert len({each.identity for each in (text, half, moved, *others)}) == 5
    assert half(["a"]).tokens.dtype is torch.bfloat16
