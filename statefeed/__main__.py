"""Command-line entry point: `statefeed` and `python -m statefeed`."""

import io
import os
import sys
from importlib.util import find_spec

_APPLICATION = ("jsonargparse", "matplotlib", "numpy", "rich", "safetensors", "tokenizers", "yaml")


def main() -> None:
    """Run the command line and exit with its code; 2, with an error message, if the application is not installed."""
    _open_streams()
    if missing := [name for name in _APPLICATION if find_spec(name) is None]:
        print(f'statefeed: the command line needs {missing[0]}: pip install "statefeed[lm]"', file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:2] == ["bench"]:
        # Benchmarks run with the process settings of a library user: torch.nn as shipped, default denormals and
        # allocator. Only the training benchmark, baselines included, runs with the trainer's process settings.
        from statefeed import bench

        if sys.argv[2:3] == ["training"]:
            _trainer_process()
        sys.exit(bench.main(sys.argv[2:]))
    from statefeed.lm import cli

    _trainer_process()
    code = cli.main(sys.argv[1:])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Everything is saved. Threads of torch.distributed may outlive the group, and abort the process while Python
        # ends, after which torchrun would call the job failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _open_streams() -> None:
    """Open closed standard streams on the null device, and print `?` for characters that stdout cannot encode.

    The file number of a closed stream would be given to the next opened file, into which output would then be written.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _trainer_process() -> None:
    from statefeed.lm import cli

    cli.configure_process()


if __name__ == "__main__":
    main()
