import pytest
import torch
from torch import nn

from reelflow.errors import ConfigError
from reelflow.training.ema import Ema


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def drift(module, g):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g))


def test_the_average_is_the_decayed_sum_of_the_weights():
    net, g = model(), torch.Generator().manual_seed(1)
    ema = Ema(net, 0.8)
    expected = net[0].weight.detach().clone()
    for step in range(50):
        drift(net, g)
        ema.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    assert torch.allclose(ema.state_dict()["0.weight"], expected, atol=1e-5)


def test_without_warmup_the_decay_is_the_same_throughout():
    net = model()
    start = net[0].weight.detach().clone()
    ema = Ema(net, 0.75, warmup=False)
    drift(net, torch.Generator().manual_seed(1))
    ema.update(0)
    assert torch.allclose(ema.state_dict()["0.weight"], 0.75 * start + 0.25 * net[0].weight.detach())


def test_swapping_in_shows_the_average_and_gives_the_own_weights_back_exactly():
    net = model()
    ema = Ema(net, 0.9)
    drift(net, torch.Generator().manual_seed(1))
    own = {name: value.clone() for name, value in net.state_dict().items()}
    average = {name: value.clone() for name, value in ema.state_dict().items()}
    with ema.swapped_in():
        assert all(torch.equal(value, average[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
    assert not torch.equal(own["0.weight"], average["0.weight"])


def test_its_state_is_a_whole_model_and_not_a_copy():
    net, g = model(), torch.Generator().manual_seed(1)
    ema = Ema(net, 0.9)
    drift(net, g)
    ema.update(0)
    net[1].running_mean.fill_(3.0)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    assert state.keys() == net.state_dict().keys()
    assert torch.equal(state["1.running_mean"], torch.full((4,), 3.0))
    ema.state_dict()["0.weight"].zero_()
    with ema.swapped_in():
        assert not net[0].weight.any()


def test_tied_weights_are_averaged_under_both_names():
    net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    net["b"].weight = net["a"].weight
    ema = Ema(net, 0.5)
    drift(net, torch.Generator().manual_seed(0))
    state = ema.state_dict()
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert not torch.equal(state["b.weight"], net["b"].weight)


def test_impossible_decays_are_refused():
    with pytest.raises(ConfigError, match="decay"):
        Ema(model(), 1.0)
