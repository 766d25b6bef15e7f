import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_shard import JOINT, SHARED, batch, build, mean_loss
from torch.utils._python_dispatch import TorchDispatchMode

from reelflow.errors import ConfigError
from reelflow.models.context import Layers
from reelflow.parallel.recompute import Recompute, check_recompute, recompute_blocks


class Operators(TorchDispatchMode):
    """Counts what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def work(network, recompute: Recompute) -> tuple[list[torch.Tensor], int, Counter[str]]:
    """Return gradients, how many numbers were kept for the backward pass, and how often what was computed."""
    model = build(network)
    names = list(model.state_dict())
    recompute_blocks(model.blocks, recompute)
    assert list(model.state_dict()) == names
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with Operators() as operators:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = mean_loss(model, batch(network, 2, 2, packed=False), packed=False)
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients], sum(kept.values()), operators.count


@pytest.mark.parametrize("network", [replace(JOINT, context=Layers(5)), SHARED], ids=["joint", "shared"])
def test_less_is_kept_and_nothing_changes(network):
    """More is computed in its place: with attention kept, everything but attention."""
    found = {kind: work(network, kind) for kind in ("none", 2, "attention-kept", "blocks")}
    plain, most, once = found.pop("none")
    for kind, (results, _, _) in found.items():
        assert all(torch.equal(a, b) for a, b in zip(results, plain, strict=True)), kind
    assert most > found[2][1] > found["blocks"][1]
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert found["blocks"][2][attention] == 2 * once[attention] > 0
    assert found["attention-kept"][2][attention] == once[attention]
    assert found["attention-kept"][2]["aten::addmm"] > once["aten::addmm"]


def test_no_block_at_all_is_refused():
    with pytest.raises(ConfigError, match=r'recompute takes every n-th block, n at least 1, got 0; for none, "none"'):
        check_recompute(0)


COMPILED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from test_shard import JOINT, build
import torch._dynamo as dynamo
from reelflow.models.blocks import Attend, Branches, Cross, Dual, FeedForward, Single
from reelflow.models.condition import Condition
from reelflow.parallel.recompute import compile_blocks, recompute_blocks
layers = Dual(mlp_ratio=2.0), Single(mlp_ratio=2.0), Branches((Attend(), Cross(), FeedForward(2.0)))
model, plain = (build(replace(JOINT, layers=layers)) for _ in range(2))
recompute_blocks(model.blocks, 2)
compile_blocks(model.blocks)
counts = []
for (t, h, w), samples in (((2, 3, 5), 3), ((3, 7, 2), 4), ((5, 3, 4), 2), ((1, 5, 5), 2)):
    generator = torch.Generator().manual_seed(0)
    shape = samples, 2, t, 2 * h, 2 * w
    clip, times, text = (torch.randn(s, generator=generator, dtype=torch.double) for s in (shape, samples, (samples, 11, 5)))
    condition = Condition(context=text, context_mask=torch.arange(11)[None].expand(samples, -1) < 9)
    ours, theirs = (m(clip, times.sigmoid(), condition).square().mean() for m in (model, plain))
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    counts.append(dynamo.utils.counters["stats"]["unique_graphs"])
for a, b in zip(model.parameters(), plain.parameters(), strict=True):
    if b.grad is not None:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)
assert counts[0] == 3 and counts[1] == counts[2] == counts[3], counts
assert not dynamo.utils.counters["graph_break"]
"""


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_take_new_grids_without_compiling_again():
    """In a process of its own, whose signatures are not checked: a compiler would look into that."""
    command = [sys.executable, "-c", COMPILED, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
