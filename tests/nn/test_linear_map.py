import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from reelflow.nn.linear import Linear, linear

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


class Calls(TorchFunctionMode):
    """Remembers whether PyTorch's own linear map was called."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.torch |= func is F.linear
        return func(*args, **(kwargs or {}))


def by_torch(x: torch.Tensor, map: Linear) -> bool:
    with Calls() as calls:
        map(x)
    return calls.torch


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "x",
    [normal(2, 5, 8), normal(8), normal(3, 0, 8), normal(2, 8, 5).mT, normal(2, 5, 24)[..., 8:16]],
    ids=["tokens", "one", "none", "turned", "part"],
)
def test_it_is_the_linear_map_of_torch(x, bias):
    map = Linear(8, 6, bias=bias)
    with torch.no_grad():
        found = map(x)
    torch.testing.assert_close(found, F.linear(x, map.weight, map.bias), rtol=0, atol=1e-6)
    assert found.is_contiguous()


def test_onednn_computes_it_in_float32_without_gradients_alone():
    map = Linear(8, 6)
    assert by_torch(normal(5, 8), map)
    with torch.no_grad():
        assert by_torch(normal(5, 8), map) == (not ONEDNN)
        assert by_torch(normal(5, 8, dtype=torch.float64), Linear(8, 6).double())
        with torch.autocast("cpu", torch.bfloat16):
            assert map(normal(5, 8)).dtype == torch.bfloat16
            assert by_torch(normal(5, 8), map)


def test_training_has_the_gradients_of_torch():
    map, x = Linear(8, 6), normal(5, 8)
    ours, theirs = (
        torch.autograd.grad(f(x, map.weight, map.bias).square().sum(), [map.weight, map.bias])
        for f in (linear, F.linear)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_flops_are_counted_and_shapes_are_known_without_data():
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            Linear(8, 6)(normal(2, 5, 8))
        with FakeTensorMode():
            shape = Linear(8, 6)(torch.empty(2, 5, 8)).shape
    assert counter.get_total_flops() == 2 * 2 * 5 * 8 * 6
    assert shape == (2, 5, 6)
