from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, check

from reelflow.families.hunyuan import HUNYUAN
from reelflow.models.condition import Condition


def case(draw: Callable[[st.SearchStrategy[Any]], Any], picture: str | None) -> Case:
    heads, rope = draw(st.integers(1, 3)), draw(st.sampled_from([[4, 6, 6], [2, 4, 6], [6, 2, 2]]))
    channels, extra = draw(st.integers(1, 3)), 3 if picture == "latent_concat" else 0
    frames, rows, columns = (draw(st.integers(low, 3)) for low in (2 if picture == "token_replace" else 1, 1, 1))
    patch_t, batch, words, seed = (draw(st.integers(1, n)) for n in (2, 2, 6, 2**16))
    guidance = picture == "token_replace" or (picture is None and draw(st.booleans()))
    arguments = {
        "in_channels": channels + extra,
        "out_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": sum(rope),
        "num_layers": draw(st.integers(1, 2)),
        "num_single_layers": draw(st.integers(0, 2)),
        "num_refiner_layers": draw(st.integers(1, 2)),
        "mlp_ratio": draw(st.sampled_from([1.5, 2.0])),
        "patch_size": draw(st.integers(1, 2)),
        "patch_size_t": patch_t,
        "guidance_embeds": guidance,
        "text_embed_dim": 10,
        "pooled_projection_dim": 7,
        "rope_axes_dim": rope,
        "image_condition_type": picture,
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    side = arguments["patch_size"]
    grid = (frames * patch_t, rows * side, columns * side)
    lengths = torch.tensor([words, max(1, words - 2)][:batch])
    inputs: Inputs = {
        "latents": normal(batch, channels, *grid),
        "channels": normal(batch, extra, *grid),
        "context": normal(batch, words, 10),
        "mask": torch.arange(words) < lengths[:, None],
        "pooled": normal(batch, 7),
        "t": torch.rand(batch, generator=generator, dtype=torch.float64),
        "guidance": 8 * torch.rand(batch, generator=generator, dtype=torch.float64) if guidance else None,
    }
    learned = ("latents", "context", "pooled", *(["channels"] if extra else []))
    return Case(HUNYUAN, HunyuanVideoTransformer3DModel, arguments, inputs, _theirs, _ours, learned, seed=seed)


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    return model(
        torch.cat([inputs["latents"], inputs["channels"]], dim=1),
        1000 * (1 - inputs["t"]),
        inputs["context"],
        inputs["mask"],
        inputs["pooled"],
        None if inputs["guidance"] is None else 1000 * inputs["guidance"],
        return_dict=False,
    )[0]


def _ours(model, inputs: Inputs) -> torch.Tensor:
    t, guidance, patch = inputs["t"], inputs["guidance"], model.config.patch
    if model.config.out_groups == "first":
        t = t[:, None].repeat(1, inputs["latents"].shape[2] // patch.t)
        t[:, 0] = 1
    condition = Condition(
        context=inputs["context"],
        context_mask=inputs["mask"],
        vector=inputs["pooled"],
        numbers=None if guidance is None else guidance[:, None],
        channels=inputs["channels"] if inputs["channels"].shape[1] else None,
    )
    return model(inputs["latents"], t, condition)


@pytest.mark.parametrize("picture", [None, "latent_concat", "token_replace"])
@settings(max_examples=EXAMPLES // 2, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(picture, data):
    check(case(data.draw, picture))
