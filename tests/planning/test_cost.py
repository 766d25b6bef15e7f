import pytest
import torch

from reelflow.models.blocks import Dual, Single
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import CausalVAE, Stage, VAEConfig
from reelflow.planning.cost import count_flops, dit_cost, num_parameters, training_bytes, vae_cost

VAE = VAEConfig(
    latent_channels=4,
    encoder=(Stage(16, 1, space=2, time=2), Stage(32, 1)),
    decoder=(Stage(32, 1), Stage(16, 1, space=2, time=2)),
)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("layers", [(Dual(), Single()), (Single(mlp_ratio=2.0), Dual(mlp_ratio=3.0), Single())])
def test_the_formula_agrees_with_counted_operations(layers, activation):
    config = DiTConfig(
        in_channels=4,
        dim=48,
        num_heads=2,
        layers=layers,
        rope=(8, 8, 8),
        activation=activation,
        context_dim=12,
        vector_dim=6,
        stem=5,
    )
    cost = dit_cost(config, (3, 8, 4), context_tokens=7)
    with torch.device("meta"):
        model = VideoDiT(config)
        condition = Condition(context=torch.empty(1, 7, 12), vector=torch.empty(1, 6))
        counted = count_flops(model, torch.empty(1, 4, 3, 8, 4), torch.empty(1), condition)
    assert cost.flops == pytest.approx(counted, rel=0.01)
    assert cost.num_tokens == 3 * 4 * 2
    assert cost.num_parameters == num_parameters(VideoDiT(config))


def test_autoencoder_costs_grow_with_the_clip_and_nothing_is_allocated():
    short, long = vae_cost(VAE, 5, 32, 32), vae_cost(VAE, 9, 32, 32)
    assert long.decode_flops > 1.5 * short.decode_flops
    assert short.num_parameters == num_parameters(CausalVAE(VAE))
    assert short.compression == 5 * 3 * 32 * 32 / (4 * 3 * 16 * 16)


def test_training_holds_five_copies_in_float32():
    assert training_bytes(10) == 200
