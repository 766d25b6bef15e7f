"""What training costs: our loop, the bare step, diffusers with accelerate, and the floor, in turn, one step of each at a time.

    python benchmarks/train.py [--threads N] [--precision bf16] [--device cuda --compile]     the four beside each other
    python benchmarks/train.py --curves [--worlds 1 2]                                        against tokens, and processes

    ours        `reelflow.training.loop.train`: posteriors from a store on disk, noise, times, dropped text, log, guard, average
    bare        forward, backward and fused AdamW of the same network, on fixed tensors
    reference   the same network and weights in diffusers, trained as its examples do, with accelerate: the same samples by a
                DataLoader, noise, times, clipping, a schedule, EMAModel, a tracker; AdamW is fused here too
    floor       the matrix products and attention of ours alone, forward and backward, on tensors of their own

Ratios are medians over steps of what was timed right after one another; means are shown too, as not every step writes to the
log. FLOPs of a step: 3 x batch x (4 D per pair of query and key that meet + 2 tokens x weights of every linear map); see
`reelflow.planning.cost`. MFU is those FLOPs a second over the fastest square matrix product, measured first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from reelflow.cli.main import keep_freed_memory
from reelflow.data.loader import ShuffledBatches
from reelflow.data.store import Store, write_store
from reelflow.families.wan import WAN
from reelflow.models.condition import Condition
from reelflow.models.dit import DiTConfig, VideoDiT
from reelflow.models.vae import Posterior
from reelflow.parallel.mesh import MeshConfig, Workers, start
from reelflow.parallel.recompute import compile_blocks
from reelflow.parallel.shard import ParallelConfig, parallelize
from reelflow.planning.cost import dit_cost
from reelflow.recipes.plot import Series, line_plot_svg, svg_file
from reelflow.training.ema import Ema
from reelflow.training.flow import FlowConfig, FlowTask, LatentBatch
from reelflow.training.loop import TrainingConfig, train
from reelflow.training.meters import measure_peak_flops, peak_memory_bytes
from reelflow.training.optim import OptimizerConfig, build_optimizers

DOCS = Path(__file__).parents[1] / "docs"
CHANNELS, WORDS, TEXT, SAMPLES = 16, 32, 256, 64
LR, BETAS, DECAY, EMA, CLIP = 1e-4, (0.9, 0.95), 0.01, 0.999, 1.0
WARM, LOG_EVERY = 2, 5
GRIDS = ((1, 8, 8), (1, 16, 16), (2, 16, 16), (4, 16, 16), (4, 22, 22))  # of tokens


@dataclass(frozen=True)
class Job:
    """What is trained, where and how."""

    grid: tuple[int, int, int]
    batch: int
    dim: int
    depth: int
    precision: Any
    device: torch.device
    compiled: bool

    @property
    def latents(self) -> tuple[int, int, int]:
        t, h, w = self.grid
        return t, 2 * h, 2 * w

    @property
    def num_tokens(self) -> int:
        t, h, w = self.grid
        return self.batch * t * h * w

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the reference's class."""
        heads = {"num_attention_heads": self.dim // 64, "attention_head_dim": 64}
        return heads | {"num_layers": self.depth, "ffn_dim": 4 * self.dim, "text_dim": TEXT}

    def config(self) -> DiTConfig:
        return WAN.read(self.arguments())

    def flops(self) -> float:
        return 3.0 * self.batch * dit_cost(self.config(), self.latents, WORDS).flops

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def write_data(job: Job, folder: Path) -> None:
    """Write random posteriors and text features, as a run caches them."""
    draws = torch.Generator().manual_seed(0)

    def samples() -> Iterator[dict[str, Tensor]]:
        for _ in range(SAMPLES):
            mean = torch.randn(CHANNELS, *job.latents, generator=draws)
            context = torch.randn(WORDS, TEXT, generator=draws)
            yield {"mean": mean.half(), "logvar": torch.full_like(mean, -6.0).half(), "context": context}

    write_store(folder, samples(), fingerprint={})


# Ours


def our_model(job: Job) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(job.config()).to(job.device)
    for parameter in model.parameters():  # none is zero, as none is after the first steps
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)
    return model


def our_batches(job: Job, data: Path) -> ShuffledBatches[LatentBatch]:
    store = Store.open(data)

    def collate(rows: Tensor, _: torch.Generator) -> LatentBatch:
        posterior = Posterior(*(store.batch(key, rows).float() for key in ("mean", "logvar")))
        return LatentBatch(posterior, Condition(context=store.batch("context", rows)))

    return ShuffledBatches(len(store), job.batch, collate, seed=0, prefetch=0)


def our_task(job: Job, model: VideoDiT) -> FlowTask:
    null = Condition(context=torch.zeros(1, WORDS, TEXT))
    latents = torch.zeros(1, CHANNELS, *job.latents)
    fixed = LatentBatch(Posterior(latents, latents), null)
    flow = FlowConfig(given_fraction=0.0)
    return FlowTask(model, flow, null=null, validation=fixed, flops_per_sample=job.flops() / job.batch)


def our_config(job: Job, steps: int) -> TrainingConfig:
    optimizer = OptimizerConfig(
        lr=LR, muon_lr=None, warmup_steps=2, decay="constant", weight_decay=DECAY, grad_clip=CLIP, betas=BETAS
    )
    return TrainingConfig(
        steps=steps,
        batch_size=job.batch,
        optimizer=optimizer,
        seed=0,
        ema_decay=EMA,
        precision=job.precision,
        log_every=LOG_EVERY,
    )


def train_ours(
    job: Job, data: Path, folder: Path, steps: int, on_step: Callable[[int], None], workers: Workers | None = None
) -> None:
    model = our_model(job)
    if job.compiled:
        compile_blocks(model.blocks)
    if workers is not None:
        parallelize(model, workers, ParallelConfig(mesh=workers.config))
    with our_batches(job, data) as batches:
        train(
            our_task(job, model),
            batches,
            our_config(job, steps),
            folder,
            workers=workers,
            on_step=on_step,
            console=Console(quiet=True),
        )


# The others: each call of what they return is one step


def bare(job: Job) -> Callable[[], None]:
    model = our_model(job).train()
    if job.compiled:
        compile_blocks(model.blocks)
    (optimizer,) = build_optimizers(model, our_config(job, 1).optimizer)
    draws = torch.Generator().manual_seed(0)
    latents, target = (torch.randn(job.batch, CHANNELS, *job.latents, generator=draws).to(job.device) for _ in range(2))
    context = torch.randn(job.batch, WORDS, TEXT, generator=draws).to(job.device)
    t, condition = torch.full((job.batch,), 0.5, device=job.device), Condition(context=context)

    def step() -> None:
        with job.cast():
            loss = (model(latents, t, condition).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def reference(job: Job, data: Path, folder: Path) -> Callable[[], None]:
    import diffusers
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
    from torch.utils.data import DataLoader, TensorDataset

    accelerator = Accelerator(
        cpu=job.device.type == "cpu",
        mixed_precision="bf16" if job.precision == "bf16" else "no",
        log_with="tensorboard",
        project_dir=folder,
    )
    accelerator.init_trackers("reference")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**job.arguments())
    take_weights(model, our_model(replace(job, device=torch.device("cpu"))))
    model.train()
    ema = EMAModel(model.parameters(), decay=EMA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)
    scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=2)
    store = Store.open(data)
    rows = torch.arange(len(store))
    samples = TensorDataset(*(store.batch(key, rows) for key in ("mean", "logvar", "context")))
    loader = DataLoader(samples, batch_size=job.batch, shuffle=True, drop_last=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if job.compiled:
        model.compile_repeated_blocks(dynamic=True)
    ema.to(accelerator.device)

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    batches, count = endless(), 0
    nothing = torch.zeros(WORDS, TEXT, device=accelerator.device)

    def step() -> None:
        nonlocal count
        mean, logvar, context = next(batches)
        with accelerator.accumulate(model):
            latents = mean.float() + torch.exp(0.5 * logvar.float()) * torch.randn_like(mean.float())
            dropped = torch.rand(len(latents), device=latents.device) < 0.1
            context = torch.where(dropped[:, None, None], nothing, context)
            noise = torch.randn_like(latents)
            u = compute_density_for_timestep_sampling("logit_normal", len(latents), logit_mean=0.0, logit_std=1.0)
            sigma = u.to(latents).view(-1, 1, 1, 1, 1)
            noisy = (1 - sigma) * latents + sigma * noise
            answer = model(noisy, 1000 * sigma.flatten(), context, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(answer.float(), (noise - latents).float())
            average = accelerator.gather(loss.repeat(job.batch)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(model.parameters())
            count += 1
            if count % LOG_EVERY == 0:
                accelerator.log({"loss": average.item(), "lr": scheduler.get_last_lr()[0]}, step=count)

    return step


@torch.no_grad()
def take_weights(model: nn.Module, ours: VideoDiT) -> None:
    """Give the reference the weights of ours."""
    given = dict(ours.named_parameters())
    found = {name: value for row in WAN.weights(ours.config) for name, value in row.to_theirs(given).items()}
    state = model.state_dict()
    for name, value in found.items():
        state[name].copy_(value)


@torch.no_grad()
def difference(job: Job) -> float:
    """Return the largest difference between ours and the reference, over the root mean square."""
    import diffusers

    ours = our_model(replace(job, device=torch.device("cpu")))
    theirs = diffusers.WanTransformer3DModel(**job.arguments()).eval()
    take_weights(theirs, ours)
    draws = torch.Generator().manual_seed(1)
    latents = torch.randn(1, CHANNELS, *job.latents, generator=draws)
    context = torch.randn(1, WORDS, TEXT, generator=draws)
    velocity = ours(latents, torch.tensor([0.3]), Condition(context=context))
    answer = -theirs(latents, torch.tensor([700.0]), context, return_dict=False)[0]
    return ((velocity - answer).abs().max() / velocity.square().mean().sqrt()).item()


def floor(job: Job) -> Callable[[], None]:
    from families import Floor, Products

    model = our_model(job)
    condition = Condition(context=torch.randn(job.batch, WORDS, TEXT, device=job.device))
    latents, t = torch.randn(job.batch, CHANNELS, *job.latents, device=job.device), torch.zeros(job.batch) + 0.5
    with torch.no_grad(), Products() as products:
        model(latents, t.to(job.device), condition)
    alone = Floor(products)

    def step() -> None:
        with job.cast():
            alone.both()

    return step


# Beside each other


def beside(job: Job, steps: int) -> None:
    """Train ours, and after each of its steps take one of the others."""
    rows: dict[str, list[float]] = {"ours": []}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data(job, data)
        others = {"bare": bare(job), "reference": reference(job, data, Path(folder) / "reference")}
        if job.device.type == "cpu":
            others["floor"] = floor(job)
        rows |= {name: [] for name in others}
        mark = time.perf_counter()

        def on_step(step: int) -> None:
            nonlocal mark
            job.wait()
            rows["ours"].append(time.perf_counter() - mark)
            for name, run in others.items():
                job.wait()
                start = time.perf_counter()
                run()
                job.wait()
                rows[name].append(time.perf_counter() - start)
            mark = time.perf_counter()

        train_ours(job, data, Path(folder) / "run", steps, on_step)
        parts = what_ours_adds(job, data)
    kept = {name: seconds[WARM:-1] for name, seconds in rows.items()}  # the last step of ours writes a checkpoint
    kind = torch.bfloat16 if job.precision == "bf16" else torch.float32
    peak, flops = measure_peak_flops(kind, job.device, seconds=1.0), job.flops()
    print(f"{flops / 1e9:.1f} GFLOP a step; the fastest matrix product: {peak / 1e9:,.0f} GFLOP/s")
    print(f"{'':10} {'median ms':>10} {'mean ms':>9} {'/ bare':>8} {'mean / mean':>12} {'tokens/s':>10} {'MFU':>6}")
    for name, seconds in kept.items():
        median, mean = statistics.median(seconds), statistics.mean(seconds)
        ratio = statistics.median(own / bare for own, bare in zip(seconds, kept["bare"], strict=True))
        to_mean = mean / statistics.mean(kept["bare"])
        print(
            f"{name:10} {1e3 * median:>10.1f} {1e3 * mean:>9.1f} {ratio:>8.3f} {to_mean:>12.3f} "
            f"{job.num_tokens / median:>10,.0f} {flops / median / peak:>6.1%}"
        )
    pairs = zip(kept["reference"], kept["ours"], strict=True)
    print(f"ours and the reference give the same numbers within {difference(job):.0e}")
    print(f"reference / ours = {statistics.median(theirs / ours for theirs, ours in pairs):.3f}")
    bare_ms = 1e3 * statistics.median(kept["bare"])
    print("what ours does beside the bare step, each part alone:")
    for name, seconds in parts.items():
        print(f"  {name:45} {1e3 * seconds:7.2f} ms  {1e5 * seconds / bare_ms:5.2f} %")


def what_ours_adds(job: Job, data: Path) -> dict[str, float]:
    """Return the seconds of the parts that the bare step does without."""
    model = our_model(job)
    task, ema = our_task(job, model), Ema(model, EMA)
    grads = [torch.ones_like(p) for p in model.parameters()]
    draws = torch.Generator().manual_seed(0)

    def seconds(run: Callable[[], object]) -> float:
        times = []
        for _ in range(12):
            job.wait()
            start = time.perf_counter()
            run()
            job.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    with our_batches(job, data) as batches, torch.no_grad():
        batch = next(batches)
        shape = batch.posterior.mean.shape
        return {
            "reading a batch (data/loader.py, data/store.py)": seconds(lambda: next(batches)),
            "drawing latents and noise (training/flow.py)": seconds(
                lambda: (batch.posterior.sample(draws), torch.randn(shape, generator=draws))
            ),
            "dropping text (Condition.where)": seconds(
                lambda: batch.condition.where(torch.ones(job.batch, dtype=torch.bool), task.null)
            ),
            "norms of gradients (parallel/shard.py: norms)": seconds(lambda: torch._foreach_norm(grads)),
            "clipping (loop.py: _foreach_mul_)": seconds(lambda: torch._foreach_mul_(grads, 1.0)),
            "the average (training/ema.py)": seconds(lambda: ema.update(10)),
        }


# Against tokens, and processes


def one_side(job: Job, side: str, steps: int) -> None:
    """Print tokens per second and the peak of this process as JSON, for a process of its own."""
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_data(job, data)

        def on_step(_: int) -> None:
            job.wait()
            marks.append(time.perf_counter())

        if side == "ours":
            train_ours(job, data, Path(folder) / "run", steps, on_step)
        else:
            step = reference(job, data, Path(folder) / "reference")
            for number in range(steps):
                step()
                on_step(number)
    print(json.dumps(told(job, marks, job.num_tokens)))


def told(job: Job, marks: list[float], tokens: int) -> dict[str, float]:
    seconds = statistics.median(after - before for before, after in pairwise(marks[:-1]))
    on_device = job.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(job.device) if on_device else peak_memory_bytes()
    return {"tokens_per_second": tokens / seconds, "peak": peak}


def one_rank(job: Job, steps: int) -> None:
    """Train as one of torchrun's processes, each with a batch of its own; the first prints as `one_side` does."""
    world, data = int(os.environ["WORLD_SIZE"]), Path(os.environ["REELFLOW_DATA"])
    marks: list[float] = []
    with start(MeshConfig(shard=world), job.device) as workers:
        config_folder = data.parent / "run"

        def on_step(_: int) -> None:
            marks.append(time.perf_counter())

        model = our_model(job)
        parallelize(model, workers, ParallelConfig(mesh=workers.config))
        training = replace(our_config(job, steps), accumulate=world)
        with our_batches(job, data) as batches:
            train(
                our_task(job, model),
                batches,
                training,
                config_folder,
                workers=workers,
                on_step=on_step,
                console=Console(quiet=True),
            )
        if workers.is_first:
            print(json.dumps(told(job, marks, world * job.num_tokens)))


def child(command: list[str], **environment: str) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(next(line for line in reversed(run.stdout.splitlines()) if line.startswith("{")))


def curves(job: Job, steps: int, options: list[str]) -> None:
    """Draw throughput and memory against tokens per sample, ours and the reference's."""
    found: dict[str, list[tuple[int, dict[str, float]]]] = {"ours": [], "reference": []}
    for t, h, w in GRIDS:
        for side, points in found.items():
            values = child([__file__, "--side", side, "--grid", str(t), str(h), str(w), *options])
            points.append((t * h * w, values))
            speed, peak = values["tokens_per_second"], values["peak"] / 2**20
            print(f"{t * h * w:>6} tokens a sample  {side:10} {speed:>10,.0f} tokens/s {peak:>8,.0f} MiB", flush=True)
    for name, label, key, scale in (
        ("throughput", "tokens per second", "tokens_per_second", 1.0),
        ("memory", "MiB, of the process", "peak", 2.0**-20),
    ):
        lines = [Series(side, [(n, scale * each[key]) for n, each in points]) for side, points in found.items()]
        title = f"A training step: batch {job.batch}, width {job.dim}, {job.depth} blocks, {job.precision}"
        svg = line_plot_svg(lines, x_label="tokens per sample", y_label=label, title=title, size=(560, 340))
        (DOCS / f"training-{name}.svg").write_text(svg_file(svg))


def worlds(job: Job, steps: int, sizes: list[int], options: list[str]) -> None:
    """Draw throughput against the number of processes, which share weights, gradients and states (FSDP)."""
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            data = Path(folder) / str(size) / "data"
            write_data(job, data)
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
            values = child([*torchrun, __file__, "--side", "rank", *options], REELFLOW_DATA=str(data))
            points.append((size, values))
            speed, peak = values["tokens_per_second"], values["peak"] / 2**20
            print(f"{size:>3} processes {speed:>10,.0f} tokens/s {peak:>8,.0f} MiB in the first", flush=True)
    if len(points) > 1:
        line = Series("ours", [(size, values["tokens_per_second"]) for size, values in points])
        title = f"A training step: batch {job.batch} a process, width {job.dim}, {job.depth} blocks, {job.precision}"
        svg = line_plot_svg([line], x_label="processes", y_label="tokens per second", title=title, size=(560, 340))
        (DOCS / "training-worlds.svg").write_text(svg_file(svg))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=(3, 12, 12), metavar=("T", "H", "W"), help="of tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dim", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=0, help="of each; 25, or 6 for curves")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="blocks of all sides")
    parser.add_argument("--curves", action="store_true", help="draw docs/training-throughput.svg and -memory.svg")
    parser.add_argument("--worlds", type=int, nargs="+", help="draw docs/training-worlds.svg")
    parser.add_argument("--side", choices=("ours", "reference", "rank"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    warnings.filterwarnings("ignore", message="In CPU autocast")
    grid = asked.grid[0], asked.grid[1], asked.grid[2]
    device = torch.device(asked.device)
    job = Job(grid, asked.batch, asked.dim, asked.depth, asked.precision, device, asked.compile)
    names = ("batch", "dim", "depth", "threads", "precision", "device", "steps")
    options = [word for name in names for word in (f"--{name}", str(getattr(asked, name)))]
    options += ["--compile"] if asked.compile else []
    if asked.side == "rank":
        one_rank(job, asked.steps or 6)
    elif asked.side:
        one_side(job, asked.side, asked.steps or 6)
    elif asked.curves or asked.worlds:
        if asked.curves:
            curves(job, asked.steps or 6, options)
        if asked.worlds:
            worlds(job, asked.steps or 6, asked.worlds, [*options, "--grid", *map(str, grid)])
    else:
        import diffusers

        print(__doc__)
        print(
            f"{job.batch} x {job.num_tokens // job.batch} tokens, width {job.dim}, {job.depth} blocks, {job.precision}, "
            f"{asked.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}"
        )
        beside(job, asked.steps or 25)


if __name__ == "__main__":
    main()
