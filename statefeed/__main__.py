"""Command-line entry point: `statefeed` and `python -m statefeed`."""

import sys
from importlib.util import find_spec

_APPLICATION = ("jsonargparse", "matplotlib", "numpy", "rich", "safetensors", "tokenizers", "yaml")


def main() -> None:
    """Run the command line and exit with its code; 2, with an error message, if the application is not installed."""
    if missing := [name for name in _APPLICATION if find_spec(name) is None]:
        print(f'statefeed: the command line needs {missing[0]}: pip install "statefeed[lm]"', file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:2] == ["bench"]:
        # Benchmarks run in a process as users of the library have it: torch.nn as shipped, default denormals and
        # allocator. Only the training benchmark, baselines included, runs with the trainer's process settings.
        from statefeed import bench

        if sys.argv[2:3] == ["training"]:
            _trainer_process()
        sys.exit(bench.main(sys.argv[2:]))
    from statefeed.lm import cli

    _trainer_process()
    sys.exit(cli.main(sys.argv[1:]))


def _trainer_process() -> None:
    from statefeed.lm import cli

    cli.own_process()


if __name__ == "__main__":
    main()
