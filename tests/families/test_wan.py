from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, check

from reelflow.families.wan import WAN
from reelflow.models.condition import Condition


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    heads, head_dim, channels = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([12, 14, 16, 22])),
        draw(st.integers(1, 4)),
    )
    picture, extra = draw(st.sampled_from([0, 0, 6])), draw(st.integers(0, 3))
    batch, frames, rows, columns = (draw(st.integers(low, high)) for low, high in ((1, 2), (1, 4), (1, 3), (1, 3)))
    per_token, positions = draw(st.booleans()), draw(st.booleans())
    seed = draw(st.integers(0, 2**16))
    arguments = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels + extra,
        "out_channels": channels,
        "text_dim": 10,
        "freq_dim": 16,
        "ffn_dim": draw(st.integers(5, 40)),
        "num_layers": 2,
        "cross_attn_norm": draw(st.booleans()),
        "image_dim": picture or None,
        "added_kv_proj_dim": heads * head_dim if picture else None,
        "pos_embed_seq_len": 6 if picture and positions else None,
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grid = (frames, 2 * rows, 2 * columns)
    times = (batch, frames * rows * columns) if per_token else (batch,)
    inputs: Inputs = {
        "latents": normal(batch, channels, *grid),
        "channels": normal(batch, extra, *grid),
        "context": normal(batch, 512 if picture else draw(st.integers(1, 7)), 10),
        "t": torch.rand(times, generator=generator, dtype=torch.float64),
        "picture": normal(batch, 6, picture) if picture else None,
    }
    return Case(
        WAN, WanTransformer3DModel, arguments, inputs, _theirs, _ours, ("latents", "context", "channels"), seed=seed
    )


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    picture = inputs["picture"]
    if picture is not None and model.config.pos_embed_seq_len:
        picture = picture.unflatten(1, (2, -1)).flatten(0, 1)  # of the first and the last frame, one after the other
    return model(
        torch.cat([inputs["latents"], inputs["channels"]], dim=1),
        1000 * (1 - inputs["t"]),
        inputs["context"],
        encoder_hidden_states_image=picture,
        return_dict=False,
    )[0]


def _ours(model, inputs: Inputs) -> torch.Tensor:
    channels = inputs["channels"] if inputs["channels"].shape[1] else None
    condition = Condition(context=inputs["context"], image=inputs["picture"], channels=channels)
    return model(inputs["latents"], inputs["t"], condition)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))
