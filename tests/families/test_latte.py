from collections.abc import Callable
from typing import Any

import torch
from diffusers import LatteTransformer3DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, check

from reelflow.families.latte import LATTE
from reelflow.models.condition import Condition


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    heads, head_dim, channels = (draw(st.sampled_from(x)) for x in ([1, 2, 3], [8, 12], [1, 4]))
    frames, rows, columns = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    tokens, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**16))
    arguments = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": draw(st.sampled_from([None, 2 * channels])),
        "num_layers": draw(st.integers(1, 2)),
        "cross_attention_dim": heads * head_dim,
        "attention_bias": True,
        "sample_size": draw(st.sampled_from([2, 6, 10, 200])),
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "caption_channels": 10,
        "video_length": frames,
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs: Inputs = {
        "latents": normal(2, channels, frames, 2 * rows, 2 * columns),
        "context": normal(2, tokens, 10),
        "t": torch.rand(2, generator=generator, dtype=torch.float64),
    }
    return Case(LATTE, LatteTransformer3DModel, arguments, inputs, _theirs, _ours, sign=1, seed=seed)


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    return model(inputs["latents"], 1000 * (1 - inputs["t"]), inputs["context"], return_dict=False)[0]


def _ours(model, inputs: Inputs) -> torch.Tensor:
    return model(inputs["latents"], inputs["t"], Condition(context=inputs["context"]))


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))
