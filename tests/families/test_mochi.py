from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, check

from reelflow.errors import ConfigError
from reelflow.families.mochi import MOCHI, transformer
from reelflow.models.condition import Condition


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([6, 8, 12, 18]))
    channels, patch, longest = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 6))
    batch, frames, rows, columns = (draw(st.integers(low, high)) for low, high in ((1, 2), (1, 4), (1, 3), (1, 4)))
    lengths = draw(st.lists(st.integers(0, longest), min_size=batch, max_size=batch))  # 0: the empty prompt
    narrow = [6, 9, 15] if heads * head_dim % 3 == 0 else []
    seed = draw(st.integers(0, 2**16))
    arguments = {
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": draw(st.integers(1, 3)),
        "pooled_projection_dim": draw(st.sampled_from([*narrow, heads * head_dim])),
        "in_channels": channels,
        "out_channels": draw(st.sampled_from([None, 3])),
        "text_embed_dim": 16,
        "time_embed_dim": 16,
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs: Inputs = {
        "latents": normal(batch, channels, frames, patch * rows, patch * columns),
        "context": normal(batch, longest, 16),
        "mask": torch.arange(longest) < torch.tensor(lengths)[:, None],
        "t": torch.rand(batch, generator=generator, dtype=torch.float64),
    }
    return Case(MOCHI, MochiTransformer3DModel, arguments, inputs, _theirs, _ours, sign=1, seed=seed)


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    return model(inputs["latents"], inputs["context"], 1000 * inputs["t"], inputs["mask"], return_dict=False)[0]


def _ours(model, inputs: Inputs) -> torch.Tensor:
    return model(inputs["latents"], inputs["t"], Condition(context=inputs["context"], context_mask=inputs["mask"]))


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # it asks for float32, where that is no choice
@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


def test_widths_whose_mlps_have_no_ratio_in_common_are_refused():
    with pytest.raises(ConfigError, match=r"8/3 .* widths 16 and 24 .* multiples of 3"):
        transformer(heads=2, head_dim=8, depth=1, context=24)
