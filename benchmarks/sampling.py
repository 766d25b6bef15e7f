"""A whole sampling run with guidance, of published networks: ours against diffusers' loop, float32, eager.

Run: python benchmarks/sampling.py [FAMILY ...] [--steps N] [--rounds N] [--threads N]. Networks and prompts are those of
benchmarks/families.py: width 768, a few blocks, 2,000 tokens of video, 60 real tokens in a padded prompt. Both sides take
the same noise and the same steps of their published scheduler, with a guided and an unguided evaluation in each, and end
in the same latents. Runs alternate; medians are shown, and the median of each round's ratios.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from families import CASES, GRID, Case, condition_of, rounds_of, sides, told
from reelflow.cli.main import keep_freed_memory
from reelflow.diffusion.guidance import guided
from reelflow.families.mochi_system import SCHEDULE
from reelflow.families.schedulers import read_scheduler, sigmas_of

SCALE = 5.0
SCHEDULERS: dict[str, Any] = {
    "hunyuan": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    "wan": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    "mochi": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    "cogvideox": diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
    ),
    "ltx": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def runs(name: str, case: Case, steps: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return our run and theirs, of the same noise."""
    s, scheduler = sides(case), SCHEDULERS[name]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, case.channels, GRID[0], case.patch * GRID[1], case.patch * GRID[2], generator=generator)
    prompts = [told(case, generator) for _ in range(2)]
    own = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)  # the pipeline's own sigmas
    sigmas = sigmas_of(steps, SCHEDULE) if name == "mochi" else sigmas_of(steps)

    def ours() -> Tensor:
        walk = read_scheduler({"_class_name": type(scheduler).__name__, **scheduler.config})
        times = walk.times(steps, sigmas=sigmas.float()) if own else walk.times(steps)

        def under(prompt: tuple[Tensor, Tensor, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            condition = condition_of(case, s.model.config, *prompt)
            prepared = s.model.prepare(noise, condition, token_rate=case.token_rate)
            return lambda x, t: s.model(x, walk.fed(t.double()).float(), prepared)

        predict = guided(*map(under, prompts), scale=SCALE)
        return walk.sampler(generator)(predict, noise, times, parameterization=walk.parameterization)

    def theirs() -> Tensor:
        if own:
            scheduler.set_timesteps(sigmas=sigmas.float().tolist())
        else:
            scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            noisy = 1000 - t if name == "mochi" else t  # it alone is told how much is data
            cond, uncond = (case.call(s.reference, x, noisy.float()[None], *prompt) for prompt in prompts)
            x = scheduler.step(uncond + SCALE * (cond - uncond), t, x, return_dict=False)[0]
        return x

    return ours, theirs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(SCHEDULERS)}; all unless named")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - SCHEDULERS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SCHEDULERS)}")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    print(f"{arguments.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}\n")
    print(f"{'':>10} {'steps':>5} {'ours s':>8} {'theirs s':>8} {'theirs/ours':>12} {'difference':>11}")
    ratios = []
    for name in arguments.families or SCHEDULERS:
        both = runs(name, CASES[name], arguments.steps)
        ours, theirs = (run() for run in both)
        error = (ours - theirs).abs().max().item() / theirs.square().mean().sqrt().item()
        rows = rounds_of(both, arguments.rounds)
        seconds = [statistics.median(column) for column in zip(*rows, strict=True)]
        ratios.append(statistics.median(b / a for a, b in rows))
        print(
            f"{name:>10} {arguments.steps:>5} {seconds[0]:>8.2f} {seconds[1]:>8.2f} {ratios[-1]:>12.3f} {error:>11.0e}",
            flush=True,
        )
    print(f"\ngeometric mean {statistics.geometric_mean(ratios):.3f}")


if __name__ == "__main__":
    main()
