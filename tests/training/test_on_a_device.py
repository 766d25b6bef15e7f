"""What training does on an accelerator, by one that is not there (tests/pretended.py)."""

from contextlib import contextmanager
from dataclasses import replace

import flow_run
import pytest
import torch
from flow_run import NETWORK, QUIET, clip, same_shape
from torch.optim import optimizer as torch_optimizer

from pretended import Pretended
from reelflow.data.loader import ShuffledBatches
from reelflow.diffusion.process import Parameterization, VariancePreserving
from reelflow.evaluation.rebuilt import measure_rebuilt
from reelflow.models.adapters import LoRA, new_adapter
from reelflow.models.blocks import Single
from reelflow.models.condition import Condition
from reelflow.models.context import Layers
from reelflow.models.dit import VideoDiT
from reelflow.models.vae import CausalVAE, Stage, staged
from reelflow.nn.embed import Number
from reelflow.training import loop
from reelflow.training.adapter import AdapterTask
from reelflow.training.autoencoder import AutoencoderConfig, AutoencoderTask, frame_latents
from reelflow.training.discriminator import Adversarial
from reelflow.training.ema import Ema
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch, Preserved, inner_matrix
from reelflow.training.loop import train
from reelflow.training.optim import build_optimizers

NULL = Condition(context=torch.zeros(1, 3, 5), context_mask=torch.tensor([[True, False, False]]))
CONFIG = replace(flow_run.CONFIG, steps=2, accumulate=1, log_every=1, validate_every=2, checkpoint_every=1)


@pytest.fixture
def there(monkeypatch):
    """An accelerator, with what is asked of a driver."""
    fused = torch_optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(
        torch_optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused, Pretended.device.type]
    )
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 1234)
    monkeypatch.setattr(torch.random, "fork_rng", fork_nothing)
    with Pretended() as found:
        yield found


@contextmanager
def fork_nothing(devices, device_type):
    assert (devices, device_type) == ([Pretended.device], Pretended.device.type)
    yield


def single(batch):
    """In float32."""
    if isinstance(batch, list):
        return [single(part) for part in batch]
    if isinstance(batch, Preserved):
        return Preserved(single(batch.own), single(batch.prior), batch.weight)
    return LatentBatch(
        type(batch.posterior)(*(x.float() for x in batch.posterior)),
        batch.condition.map(lambda x: x.float() if x.is_floating_point() else x),
    )


def flow_task(there, network=NETWORK, *, validation=None, **changes) -> FlowTask:
    torch.manual_seed(0)
    fixed = single(same_shape([50, 51])) if validation is None else validation
    return FlowTask(there.take(VideoDiT(network)), FlowConfig(**changes), null=NULL, validation=fixed)


SMALL = replace(NETWORK, layers=(Single(mlp_ratio=2.0),), context=Layers(5))
LEARNED = Parameterization(VariancePreserving(), "v", learned_variance=True)
FLOWS = {
    "given frames": (NETWORK, same_shape([0, 1]), {"given_fraction": 1.0}),
    "a row of many shapes": (SMALL, [clip(0), clip(1), clip(2)], {"given_fraction": 0.5}),
    "a subject and its prior": (SMALL, Preserved(same_shape([0, 1]), same_shape([2]), 0.5), {}),
    "a learned variance": (replace(SMALL, out_channels=4), same_shape([0, 1]), {"parameterization": LEARNED}),
    "told shapes": (
        replace(SMALL, numbers=2 * (Number(channels=4),)),
        same_shape([0]),
        {"tells": ("aspect", "frames")},
    ),
}


@pytest.mark.parametrize("case", FLOWS)
def test_between_a_batch_and_its_gradient_nobody_reads_from_the_device_and_the_draws_are_the_cpu_s(there, case):
    network, batch, changes = FLOWS[case]
    torch.manual_seed(0)
    here = FlowTask(VideoDiT(network), FlowConfig(**changes), null=NULL, validation=single(same_shape([50, 51])))
    task, states = flow_task(there, network, **changes), []
    for each in (here, task):
        generator = torch.Generator().manual_seed(3)
        each.loss(single(batch), generator).value.backward()
        states.append(generator.get_state())
    assert torch.equal(*states)
    assert {p.grad.device for p in task.model.parameters() if p.grad is not None} == {there.device}
    assert there.reads == 0


def test_a_step_reads_what_was_lost_and_the_gradient_and_a_run_goes_on_from_the_cpu_s_checkpoint(there, tmp_path):
    """By Muon and AdamW, with averages and a validation."""
    batch, reads, step = single(same_shape([0, 1])), [], loop._Run.train_step
    torch.manual_seed(0)
    here = FlowTask(VideoDiT(SMALL), FlowConfig(), null=NULL, validation=batch)

    def counted(self, meter, interrupted):
        before = there.reads
        step(self, meter, interrupted)
        reads.append(there.reads - before)

    def died(done):
        raise KeyError

    with pytest.MonkeyPatch.context() as patch, ShuffledBatches(4, 2, lambda *_: batch, seed=0, prefetch=0) as batches:
        with pytest.raises(KeyError):
            train(here, batches, CONFIG, tmp_path, hidden=inner_matrix, console=QUIET, on_step=died)
        patch.setattr(loop._Run, "train_step", counted)
        task = flow_task(there, SMALL, validation=batch)
        result = train(task, batches, CONFIG, tmp_path, hidden=inner_matrix, console=QUIET)
    assert (result.step, result.skipped, reads) == (CONFIG.steps, 0, [2])
    assert {p.device for p in task.model.parameters()} == {there.device}
    assert '"peak_device_bytes": 1234' in result.log.read_text()


def test_an_adapter_learns_and_is_probed_there(there):
    flow = flow_task(there, SMALL)
    adapter = new_adapter(flow.model, LoRA(rank=2, magnitudes=True), torch.Generator().manual_seed(0))
    task = AdapterTask(flow, adapter, probe_after=1)
    there.reads = 0
    for asked in (0, 1):
        loss = task.loss(single(same_shape([0, 1])), torch.Generator())
        loss.value.backward()
        assert ("change" in loss.parts, there.reads) == (bool(asked), asked)
    assert {p.grad.device for p in task.model.parameters()} == {there.device}


VAE = staged(2, (Stage(8, 0, space=2, time=2),), (Stage(8, 0, space=2, time=2),), mid_attention="frame")
ALL = AutoencoderConfig(
    crop_frames=3,
    crop_size=8,
    wavelet=1.0,
    outlier=1.0,
    identity=1.0,
    log_variance=0.0,
    adversarial=Adversarial(start=0, channels=8, layers=1),
)


def test_an_autoencoder_and_its_adversary_learn_there(there):
    torch.manual_seed(0)
    vae = there.take(CausalVAE(VAE))
    task = AutoencoderTask(
        vae,
        ALL,
        validation=torch.randint(256, (3, 3, 16, 16, 3), dtype=torch.uint8),
        reference=frame_latents(vae, 2),
        measure=measure_rebuilt,
    )
    optimizers, average = build_optimizers(task.model, CONFIG.optimizer, hidden=task.hidden), Ema(task.model, 0.9)
    there.reads = 0
    task.loss(torch.rand(2, 3, 3, 8, 8), torch.Generator()).value.backward()
    for optimizer in optimizers:
        optimizer.step()
    average.update(0)
    assert there.reads == 0
    assert {x.device for x in task.model.state_dict().values() if x.ndim} == {there.device}
    with torch.no_grad():
        assert "ssim" in task.validate(torch.Generator())
