"""`python -m reelflow`, which torchrun can start: `torchrun --nproc-per-node 4 -m reelflow train world`."""

from reelflow.cli.main import main

if __name__ == "__main__":
    main()
