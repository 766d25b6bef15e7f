import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reelflow.errors import CheckpointError
from reelflow.models.weights import load_weights, read_tensors, write_tensors


def network(seed: int, *, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


@pytest.fixture
def path(tmp_path):
    save_file(network(0).state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_weights_and_buffers_survive_a_round_trip(path):
    model = network(1)
    load_weights(path, model)
    for name, value in network(0).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_weights_take_the_dtype_of_the_model(path):
    model = network(1).double()
    load_weights(path, model)
    assert model[0].weight.dtype == torch.float64
    assert torch.equal(model[0].weight.float(), network(0)[0].weight)


def test_loaded_weights_can_still_be_trained(path):
    model = network(1)
    load_weights(path, model)
    model(torch.rand(4, 2)).sum().backward()
    assert model[1].bias.grad.all()


def test_what_differs_is_listed_and_the_model_is_left_alone(path):
    tensors = read_tensors(path)
    tensors["0.bais"] = tensors.pop("0.bias")
    tensors["0.weight"] = torch.zeros(4, 2)
    save_file(tensors, path)
    model = network(1)
    with pytest.raises(CheckpointError) as refusal:
        load_weights(path, model)
    message = str(refusal.value)
    assert "1 missing (0.bias)" in message
    assert "1 unexpected (0.bais)" in message
    assert "1 of another shape (0.weight is [4, 2], expected [3, 2])" in message
    assert str(path) in message
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), network(1).state_dict().values(), strict=True)
    )


def test_long_lists_of_differences_are_cut(path):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    with pytest.raises(CheckpointError, match=r"4 missing \(2\.weight, 2\.bias, 3\.weight, \.\.\.\); 3 unexp"):
        load_weights(path, model)


@pytest.mark.parametrize("keep", [0, 4, 20, 200, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"w\.safetensors is missing or is not a whole safetensors file"):
        load_weights(path, network(1))


@pytest.mark.parametrize(
    "content", [b"not weights at all", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", b"\x80\x02}."]
)
def test_anything_else_is_refused(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_tensors(tmp_path / "w")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="is missing or is not"):
            read_tensors(path)


def test_a_written_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"b": "c"})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    assert torch.equal(read_tensors(tmp_path / "a.safetensors")["a"], torch.ones(2))
