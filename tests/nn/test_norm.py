import torch

from reelflow.nn.norm import ChannelRMSNorm


def test_each_position_is_divided_by_the_root_mean_square_of_its_channels():
    x = torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = ChannelRMSNorm(6, eps=0.0).double()
    norm.weight.data[:] = torch.arange(6)
    expected = x / x.square().mean(1, keepdim=True).sqrt() * torch.arange(6).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=0)


def test_no_position_sees_another():
    x = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    norm = ChannelRMSNorm(4)
    y = norm(x)
    x[0, :, 1, 0, 1] *= -7
    changed = (norm(x) != y).any(1)
    assert changed.sum() == 1
    assert changed[0, 1, 0, 1]


def test_precision_and_channels_last_memory_are_kept():
    x = torch.ones(2, 4, 3, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
    y = ChannelRMSNorm(4)(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert ChannelRMSNorm(4, elementwise_affine=False)(x).dtype == torch.bfloat16
