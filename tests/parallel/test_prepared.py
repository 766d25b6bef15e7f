"""A condition that is prepared once serves a model whose weights, or whose tokens, are spread over processes."""

import processes
import pytest
import torch
from test_shard import JOINT, SHARED, build

from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig
from reelflow.parallel.mesh import MeshConfig, start
from reelflow.parallel.shard import ParallelConfig, parallelize

MESHES = (MeshConfig(shard=2), MeshConfig(sequence=2))


def predict(config: DiTConfig, mesh: MeshConfig) -> list[torch.Tensor]:
    """Return predictions of one model, at two times, from one prepared condition."""
    workers = start(mesh, "cpu")
    model = parallelize(build(config), workers, ParallelConfig(mesh)).eval()
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((2, 2, 3, 4, 2), (2, 3, 5)))
    condition = Condition(context=context, context_mask=torch.tensor([[True, False, False], [True, True, True]]))
    with torch.no_grad():
        prepared = model.prepare(x, condition)
        return [model(x, torch.full((2,), t, dtype=torch.float64), prepared) for t in (0.2, 0.7)]


def predict_on_both(config: DiTConfig) -> list[list[torch.Tensor]]:
    return [predict(config, mesh) for mesh in MESHES]


@pytest.mark.parametrize("config", [JOINT, SHARED])
def test_a_prepared_condition_predicts_on_a_mesh_what_it_does_in_one_process(config):
    expected = predict(config, MeshConfig())
    for found in processes.run(2, predict_on_both, config):
        for predictions in found:
            for ours, theirs in zip(predictions, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
