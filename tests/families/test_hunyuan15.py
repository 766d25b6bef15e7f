from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.transformers import transformer_hunyuan_video15 as theirs
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, check

from reelflow.families.hunyuan15 import HUNYUAN15
from reelflow.models.condition import Condition, Source
from reelflow.models.context import Sources
from reelflow.models.dit import DiTConfig

ByT5 = theirs.HunyuanVideo15ByT5TextProjection


def narrowed(found: dict[str, Any]) -> DiTConfig:
    """Give the glyphs' maps 7 channels inside: no value says that there are 2,048, which would take most of the time."""
    config = HUNYUAN15.read(found)
    text, glyphs, picture = config.context.sources
    return replace(config, context=Sources((text, replace(glyphs, hidden=(7, 7)), picture)))


NARROW = replace(HUNYUAN15, read=narrowed)


def case(draw: Callable[[st.SearchStrategy[Any]], Any], *, picture: bool) -> Case:
    heads, rope = draw(st.integers(1, 3)), draw(st.sampled_from([[4, 6, 6], [2, 4, 6], [6, 2, 2]]))
    channels, extra = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    frames, rows, columns, side, side_t = (draw(st.integers(1, n)) for n in (4, 3, 3, 2, 2))
    batch, words, glyphs, seed = (draw(st.integers(1, n)) for n in (2, 6, 4, 2**16))
    next_time = draw(st.booleans())
    arguments = {
        "in_channels": channels + extra,
        "out_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": sum(rope),
        "num_layers": 2,
        "num_refiner_layers": draw(st.integers(1, 2)),
        "mlp_ratio": draw(st.sampled_from([1.5, 2.0])),
        "patch_size": side,
        "patch_size_t": side_t,
        "text_embed_dim": 10,
        "text_embed_2_dim": 9,
        "image_embed_dim": 8,
        "rope_axes_dim": rope,
        "use_meanflow": next_time,
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def times() -> torch.Tensor:
        return torch.rand(batch, generator=generator, dtype=torch.float64)

    def mask(length: int, shortest: int) -> torch.Tensor:
        return torch.arange(length) < torch.tensor([length, max(shortest, length - 2)][:batch])[:, None]

    grid = (frames * side_t, rows * side, columns * side)
    inputs: Inputs = {
        "latents": normal(batch, channels, *grid),
        "channels": normal(batch, extra, *grid),
        "text": normal(batch, words, 10),
        "text_mask": mask(words, 1),
        "glyphs": normal(batch, glyphs, 9),
        "glyph_mask": mask(glyphs, 0),
        "picture": normal(batch, 3, 8) * picture,
        "t": times(),
        "next": times() if next_time else None,
    }
    learned = ("latents", "channels", "text", "glyphs", "picture")
    return Case(NARROW, HunyuanVideo15Transformer3DModel, arguments, inputs, _theirs, _ours, learned, seed=seed)


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    return model(
        torch.cat([inputs["latents"], inputs["channels"]], dim=1),
        1000 * (1 - inputs["t"]),
        inputs["text"],
        inputs["text_mask"],
        None if inputs["next"] is None else 1000 * (1 - inputs["next"]),
        inputs["glyphs"],
        inputs["glyph_mask"],
        inputs["picture"],
        return_dict=False,
    )[0]


def _ours(model, inputs: Inputs) -> torch.Tensor:
    picture, after = inputs["picture"], inputs["next"]
    condition = Condition(
        context=inputs["text"],
        context_mask=inputs["text_mask"],
        further=(
            Source(inputs["glyphs"], inputs["glyph_mask"]),
            Source(picture if picture.any() else picture[:, :0]),
        ),
        channels=inputs["channels"],
        numbers=None if after is None else after[:, None],
    )
    return model(inputs["latents"], inputs["t"], condition)


@pytest.mark.parametrize("picture", [False, True])
@settings(max_examples=EXAMPLES // 2, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_outputs_and_gradients_are_those_of_the_reference(picture, data):
    with mock.patch.object(theirs, "HunyuanVideo15ByT5TextProjection", lambda found, _, out: ByT5(found, 7, out)):
        check(case(data.draw, picture=picture))
