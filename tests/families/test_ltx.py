from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, check

from reelflow.errors import CheckpointError
from reelflow.families.ltx import LTX, read
from reelflow.models.condition import Condition


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    heads, head_dim, channels = draw(st.integers(1, 3)), draw(st.sampled_from([6, 8, 10, 16])), draw(st.integers(1, 4))
    batch, longest = draw(st.integers(1, 2)), draw(st.integers(1, 6))
    grid = tuple(draw(st.integers(1, high)) for high in (4, 3, 4))
    lengths = draw(st.lists(st.integers(1, longest), min_size=batch, max_size=batch))
    seed = draw(st.integers(0, 2**16))
    arguments = {
        "in_channels": channels,
        "out_channels": draw(st.sampled_from([channels, None, 5])),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "num_layers": 2,
        "norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "caption_channels": 10,
        "_causal_temporal_positioning": draw(st.booleans()),
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    groups = draw(st.sampled_from([(), (1,), (grid[0],), (grid[0] * grid[1] * grid[2],)]))
    rates = st.sampled_from([8.0, 24.0, 25.0, 30.0])
    inputs: Inputs = {
        "latents": normal(batch, channels, *grid),
        "context": normal(batch, longest, 10),
        "mask": torch.arange(longest) < torch.tensor(lengths)[:, None],
        "t": torch.rand((batch, *groups), generator=generator, dtype=torch.float64),
        "fps": torch.tensor(draw(st.lists(rates, min_size=batch, max_size=batch)), dtype=torch.float64),
    }
    return Case(LTX, LTXVideoTransformer3DModel, arguments, inputs, _theirs, _ours, seed=seed)


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    latents, t, fps = inputs["latents"], inputs["t"], inputs["fps"]
    batch, _, *grid = latents.shape
    tokens = latents.flatten(2).mT
    if t.ndim == 2:  # it knows of one time for each clip, or for each token
        t = t.repeat_interleave(tokens.shape[1] // t.shape[1], dim=1)
    common = {"encoder_attention_mask": inputs["mask"], "return_dict": False}
    if model.config._causal_temporal_positioning:  # as the pipelines since 0.9.5
        axes = (torch.arange(n, dtype=fps.dtype) for n in grid)
        frame, row, column = (x.flatten().expand(batch, -1) for x in torch.meshgrid(*axes, indexing="ij"))
        common["video_coords"] = torch.stack(
            [(8 * frame - 7).clamp(min=0) / fps[:, None], 32 * row, 32 * column], dim=1
        )
    else:  # as those before
        common["rope_interpolation_scale"] = (8 / fps[:, None, None, None, None], 32, 32)
        common |= zip(("num_frames", "height", "width"), grid, strict=True)
    out = model(tokens, inputs["context"], 1000 * (1 - t), **common)[0]
    return out.mT.unflatten(2, grid)


def _ours(model, inputs: Inputs) -> torch.Tensor:
    condition = Condition(context=inputs["context"], context_mask=inputs["mask"])
    return model(inputs["latents"], inputs["t"], condition, token_rate=inputs["fps"] / 8)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


def test_a_text_of_another_width_than_the_video_is_refused():
    with pytest.raises(CheckpointError, match=r"cross_attention_dim=2048; .* 4096"):
        read({"attention_head_dim": 128})
