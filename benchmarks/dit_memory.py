"""Is the model of a transformer's peak memory right? Published networks, with two blocks of each kind that they have.

Run: python benchmarks/dit_memory.py [NETWORK ...] [--forward]. Every case is a process of its own, on one thread. Measured is
how far the resident size rises above what it is before, when weights are in memory and the same call has been made once, with
freed memory given back at once (MALLOC_MMAP_THRESHOLD_=65536; VmHWM, reset by /proc/self/clear_refs). What kernels keep from one
call to the next, some 8 MiB of packed matrices, is then the process's own, as `reelflow plan` counts it. Predicted is what that
says (`reelflow.planning.memory`): the most bytes alive at once among the tensors that operations make.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace

import torch

from reelflow.families.published import find_size
from reelflow.models.dit import VideoDiT
from reelflow.planning.memory import dit_memory, example, repeats

CASES = [
    (name, shape, kind, dtype)
    for name, shape in (
        ("wan.t2v_1_3b", (5, 48, 48)),
        ("hunyuan.t2v", (3, 32, 32)),
        ("cogvideox.2b", (5, 48, 48)),
        ("mochi.10b", (3, 32, 32)),
        ("ltx.2b_0_9_5", (5, 24, 24)),
        ("latte.1_t2v", (8, 32, 32)),
    )
    for kind, dtype in (("forward", "float32"), ("training step", "float32"), ("forward", "bfloat16"))
]


def resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        (line,) = (line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(name: str, shape: tuple[int, int, int], kind: str, dtype: torch.dtype) -> None:
    """Print what was measured and what was predicted, in MiB."""
    torch.manual_seed(0)
    family, size = find_size(name)
    layers = [layer for unit, count in repeats(size.config.layers) for layer in min(count, 2) * unit]
    config = replace(size.config, layers=tuple(layers))
    pictures = family.image_tokens if config.image else 0
    model = VideoDiT(config).to(dtype).eval()

    def run(extents: tuple[int, int, int]) -> None:
        inputs = example(config, extents, family.context_tokens, image_tokens=pictures, dtype=dtype)
        if kind == "forward":
            with torch.no_grad():
                model(*inputs, token_rate=1.0)
        else:
            model(*inputs, token_rate=1.0).float().square().mean().backward()
            for parameter in model.parameters():
                parameter.grad = None

    run(shape)  # a first call of a shape takes more, which stays
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    run(shape)
    measured = resident("VmHWM") - before
    memory = dit_memory(config, shape, family.context_tokens, image_tokens=pictures, dtype=dtype)
    predicted = memory.inference if kind == "forward" else memory.training
    print(f"{measured / 2**20:.1f} {predicted / 2**20:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="how their names begin; all unless said")
    parser.add_argument("--forward", action="store_true", help="leave training steps out")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case is not None:
        torch.set_num_threads(1)
        name, shape, kind, dtype = CASES[asked.case]
        measure(name, shape, kind, getattr(torch, dtype))
        return
    print("| network, two blocks of a kind | latents | | type | measured MiB | predicted MiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for index, (name, shape, kind, dtype) in enumerate(CASES):
        if asked.networks and not name.startswith(tuple(asked.networks)):
            continue
        if asked.forward and kind != "forward":
            continue
        told = subprocess.run(
            [sys.executable, __file__, "--case", str(index)],
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        measured, predicted = map(float, told.stdout.split()[-2:])
        cells = f"{name} | {' x '.join(map(str, shape))} | {kind} | {dtype}"
        print(f"| {cells} | {measured:,.0f} | {predicted:,.0f} | {predicted / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
