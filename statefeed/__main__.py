"""Command-line entry point: `statefeed` and `python -m statefeed`."""

import io
import os
import signal
import sys
from importlib.util import find_spec

from statefeed import __version__

_APPLICATION = ("jsonargparse", "matplotlib", "numpy", "rich", "safetensors", "tokenizers", "yaml")


def main() -> None:
    """Run the command line and exit with its code; 2, with an error message, if the application is not installed."""
    _open_streams()
    if sys.argv[1:] == ["--version"]:
        sys.exit(_print_version())
    if missing := [name for name in _APPLICATION if find_spec(name) is None]:
        print(f'statefeed: the command line needs {missing[0]}: pip install "statefeed[lm]"', file=sys.stderr)
        sys.exit(2)
    from statefeed.lm import cli

    if sys.argv[1:2] == ["bench"]:
        from statefeed import bench

        sys.exit(bench.main(sys.argv[2:], cli.configure_process))
    code = cli.main(sys.argv[1:], cli.configure_process)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Everything is saved. Threads of torch.distributed may outlive the group, and abort the process while Python
        # ends, after which torchrun would call the job failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _print_version() -> int:
    """Print the version; returns the exit code, as that of every command where stdout is closed or full."""
    try:
        print(f"statefeed {__version__}", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"statefeed: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


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


if __name__ == "__main__":
    main()
