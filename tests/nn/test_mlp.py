from typing import get_args

import pytest
import torch

from reelflow.nn.mlp import Activation, Mlp, activate, inner_width

KINDS = get_args(Activation)


@pytest.mark.parametrize("kind", KINDS)
def test_the_inner_width_gives_the_hidden_width(kind):
    x = torch.randn(2, 3, inner_width(kind, 8), generator=torch.Generator().manual_seed(0))
    assert activate(x, kind).shape == (2, 3, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_mlp_is_linear_activation_linear(kind):
    torch.manual_seed(0)
    mlp, x = Mlp(4, 6, activation=kind).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    assert mlp.up.out_features == inner_width(kind, 6)
    assert torch.equal(mlp(x), mlp.down(activate(mlp.up(x), kind)))


def test_activations_are_their_formulas():
    x = torch.linspace(-4, 4, 16, dtype=torch.float64).view(1, 1, -1)
    gelu = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    silu = x / (1 + torch.exp(-x))
    torch.testing.assert_close(activate(x, "gelu_tanh"), gelu)
    torch.testing.assert_close(activate(x, "silu"), silu)
    torch.testing.assert_close(activate(x, "relu2"), x.clamp(min=0) ** 2)
    torch.testing.assert_close(activate(x, "geglu"), gelu[..., :8] * x[..., 8:])
    torch.testing.assert_close(activate(x, "swiglu"), silu[..., :8] * x[..., 8:])


def test_the_derivative_of_the_squared_relu_is_twice_the_relu():
    x = torch.tensor([[[-2.0, -0.5, 0.5, 3.0]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: activate(x, "relu2"), x)
