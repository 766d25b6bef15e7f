from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from PIL import Image

from families import tiny
from reelflow.conditioning.pictured import PicturedReading, PretrainedPictured
from reelflow.errors import ConfigError

PROMPTS = ["The red kite runs over the sea", "", "a dog " * 200]
PICTURES = 2 * torch.rand(3, 3, 40, 60, generator=torch.Generator().manual_seed(0)) - 1
READING = PicturedReading(
    length=256,
    template=(
        "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the following aspects "
        "according to the reference image: "
        "1. The main content and theme of the video."
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
        "4. background environment, light, style and atmosphere."
        "5. camera angles, movements, and transitions used in the video:<|eot_id|>\n\n"
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    crop=103,
    header=4,
    header_end="<|end_header_id|>",
    picture_tokens=576,
    every=2,
    layer=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    tiny.llava(folder)
    return folder


@pytest.fixture(scope="module")
def read(folder):
    parts = [folder / name for name in ("text_encoder", "tokenizer", "image_processor")]
    return PretrainedPictured.load(*parts, READING)


@pytest.mark.parametrize("every", [2, 4])
def test_a_prompt_that_is_read_with_its_picture_is_hunyuan_video_i2v(read, every):
    reference = HunyuanVideoImageToVideoPipeline(
        text_encoder=read.encoder,
        tokenizer=read.tokenizer,
        image_processor=read.processor,
        transformer=None,
        vae=None,
        scheduler=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    template = {"template": READING.template, "crop_start": 103}
    ours = PretrainedPictured(read.tokenizer, read.processor, read.encoder, replace(READING, every=every))
    features = ours(PROMPTS, PICTURES)
    for row, prompt in enumerate(PROMPTS):
        array = ((PICTURES[row] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        with torch.no_grad():
            tokens, mask = reference._get_llama_prompt_embeds(
                Image.fromarray(array), prompt, template, image_embed_interleave=every
            )
        assert torch.equal(features.mask[row : row + 1], mask.bool())
        assert torch.equal(features.tokens[row : row + 1], tokens)
    told = features.mask[:, 576 // every :].sum(1)
    assert 0 < told[1] < told[0] < told[2] == READING.length - READING.header


def test_words_that_do_not_fit_are_named_in_the_log(read, caplog):
    read(PROMPTS[:2], PICTURES[:2])
    assert not caplog.messages
    read(PROMPTS[2:], PICTURES[2:])
    (message,) = caplog.messages
    before, _, dropped = message.partition("drops: ")
    assert before == "the encoder reads 256 tokens of a prompt and "
    assert PROMPTS[2].strip().endswith(dropped)


def test_another_picture_gives_other_tokens(read):
    first, second = read(["a dog"], PICTURES[:1]), read(["a dog"], PICTURES[1:2])
    count = int(first.mask.sum())
    assert (first.tokens - second.tokens).abs().amax(-1)[0, :count].min() > 0


def test_pictures_are_as_many_as_prompts_and_shown_once(read):
    with pytest.raises(ConfigError, match="a picture for each prompt, got 2 for 1"):
        read(["a dog"], PICTURES[:2])
    blind = replace(READING, template=READING.template.replace("<image>", ""))
    with pytest.raises(ConfigError, match="show the picture once, got 0 times"):
        PretrainedPictured(read.tokenizer, read.processor, read.encoder, blind)(["a dog"], PICTURES[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 4}, "length must be at least 5"),
        ({"every": 0}, "every must be at least 1"),
        ({"template": "<image>"}, "one {} for the prompt"),
    ],
)
def test_impossible_readings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(READING, **change)
