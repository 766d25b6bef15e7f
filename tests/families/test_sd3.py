from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, check

from reelflow.families.sd3 import SD3
from reelflow.models.condition import Condition


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    heads, head_dim, channels = (draw(st.sampled_from(x)) for x in ([1, 2, 3], [8, 12], [1, 4]))
    depth, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    tokens, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**16))
    arguments = {
        "sample_size": draw(st.sampled_from([4, 12])),
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": depth,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": 10,
        "caption_projection_dim": heads * head_dim,
        "pooled_projection_dim": 7,
        "pos_embed_max_size": draw(st.integers(5, 8)),
        "dual_attention_layers": draw(st.sampled_from([[], [0], [1], [0, 2]])),
        "qk_norm": draw(st.sampled_from([None, "rms_norm"])),
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs: Inputs = {
        "latents": normal(2, channels, 1, 2 * rows, 2 * columns),
        "context": normal(2, tokens, 10),
        "pooled": normal(2, 7),
        "t": torch.rand(2, generator=generator, dtype=torch.float64),
    }
    return Case(
        SD3, SD3Transformer2DModel, arguments, inputs, _theirs, _ours, ("latents", "context", "pooled"), seed=seed
    )


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    times = 1000 * (1 - inputs["t"])
    return model(inputs["latents"][:, :, 0], inputs["context"], inputs["pooled"], times, return_dict=False)[0][
        :, :, None
    ]


def _ours(model, inputs: Inputs) -> torch.Tensor:
    condition = Condition(context=inputs["context"], vector=inputs["pooled"])
    return model(inputs["latents"], inputs["t"], condition)


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))
