from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from parity import EXAMPLES, Case, Inputs, as_ours, check

from reelflow.errors import CheckpointError
from reelflow.families.dit import DIT
from reelflow.models.condition import Condition


class Copies(DiTTransformer2DModel):
    """The reference with copies that stay copies: what all blocks' embedders would learn together."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for block in self.transformer_blocks:
            block.norm1.emb = self.transformer_blocks[0].norm1.emb

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return super().named_parameters(remove_duplicate=False)


def case(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
    heads, head_dim, channels = (draw(st.sampled_from(x)) for x in ([1, 2, 3], [8, 12], [1, 4]))
    batch, side, seed = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(0, 2**16))
    arguments = {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": draw(st.sampled_from([None, 2 * channels])),
        "num_layers": draw(st.integers(1, 3)),
        "sample_size": 2 * draw(st.integers(1, 5)),
        "num_embeds_ada_norm": draw(st.integers(1, 4)),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
    }
    generator = torch.Generator().manual_seed(seed)
    inputs: Inputs = {
        "latents": torch.randn(batch, channels, 1, 2 * side, 2 * side, generator=generator, dtype=torch.float64),
        "label": torch.randint(arguments["num_embeds_ada_norm"] + 1, (batch,), generator=generator),
        "t": torch.rand(batch, generator=generator, dtype=torch.float64),
    }
    return Case(DIT, Copies, arguments, inputs, _theirs, _ours, ("latents",), sign=1, seed=seed)


def _theirs(model, inputs: Inputs) -> torch.Tensor:
    times = 1000 * (1 - inputs["t"])
    return model(inputs["latents"][:, :, 0], times, inputs["label"], return_dict=False)[0][:, :, None]


def _ours(model, inputs: Inputs) -> torch.Tensor:
    return model(inputs["latents"], inputs["t"], Condition(label=inputs["label"]))


@settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_outputs_and_gradients_are_those_of_the_reference(data):
    check(case(data.draw))


def test_copies_that_differ_are_refused():
    arguments = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 1}
    state = DiTTransformer2DModel(**arguments).state_dict()
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.norm1\.emb.* not a copy"):
        as_ours(DIT, arguments, state, torch.float32)


def test_a_config_of_the_class_it_was_split_from_is_read():
    published = {
        "_class_name": "Transformer2DModel",
        "_diffusers_version": "0.12.0.dev0",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 72,
        "cross_attention_dim": None,
        "dropout": 0.0,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": 16,
        "num_embeds_ada_norm": 1000,
        "num_layers": 28,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 64,
        "upcast_attention": False,
        "use_linear_projection": False,
    }
    assert DIT.read(published) == DIT.sizes["xl_2_512"].config
    with pytest.raises(CheckpointError, match="num_vector_embeds=8192; published weights have None"):
        DIT.read(published | {"num_vector_embeds": 8192})
