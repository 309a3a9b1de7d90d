"""A process that trains in forked children and kills them with SIGKILL at random moments, then lets the run end.

    python kill_and_resume.py FOLDER KILLS SEED ARGUMENTS...

leaves FOLDER/whole, a run that was never killed, and FOLDER/killed-0, -1, ..., runs that were killed KILLS times all
together and resumed each time. Forking spares every child the imports.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # which the first optimizer imports, for seconds

from statefeed.lm import cli


def start(arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(cli.main(["train", *arguments]))
    return child


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, kills, dice, arguments = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3])), sys.argv[4:]
    cli.configure_process()
    torch.set_num_threads(1)
    for name in ("whole", "again"):  # the first may have kernels to compile
        began = time.monotonic()
        assert end(start([*arguments, f"--run.dir={folder / name}"])) == 0
        usual = time.monotonic() - began
    killed = runs = 0
    while killed < kills:
        while True:
            run = folder / f"killed-{runs}"
            resume = ["--resume"] if (run / "config.yaml").exists() else []
            child = start([*arguments, f"--run.dir={run}", *resume])
            time.sleep(dice.uniform(0, usual))
            os.kill(child, signal.SIGKILL)
            code = end(child)
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            killed += 1
        runs += 1
    print(killed, runs)


if __name__ == "__main__":
    main()
