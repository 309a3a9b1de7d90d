"""Command line: runs every stage in a separate process with a time limit, and reports failures."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from statefeed.bench.gpu.records import Records, nvidia_smi
from statefeed.bench.gpu.stage import STAGES

# Seconds after which a stage is killed, and after which it starts no new work.
LIMIT, BUDGET = 230.0, 180.0


def main(argv: Sequence[str]) -> int:
    """Run the named stages, all by default.

    Args:
        argv: stages and flags.

    Returns:
        Exit code: 0; 1 if a stage or one of its records failed; 2 for a user error.
    """
    parser = argparse.ArgumentParser(prog="statefeed/bench/gpu.sh", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"among {', '.join(STAGES)}; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that it runs")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one repetition: not how fast")
    parser.add_argument(
        "--output", type=Path, help="folder of the records; results/bench/<GPU> by default, a temporary one on a CPU"
    )
    options = parser.parse_args(argv)
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"STAGE must be among {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device must be cpu here, got cuda: torch sees no GPU")
    output = options.output or _folder(options.device)
    output.mkdir(parents=True, exist_ok=True)
    print(f"records in {output}", flush=True)
    names = [name for name in STAGES if name in options.stages or not options.stages]
    failed = [name for name in names if not run_stage(name, options.device, options.smoke, output)]
    print(f"failed: {', '.join(failed)}" if failed else f"{len(names)} stages passed")
    return 1 if failed else 0


def run_stage(name: str, device: str, smoke: bool, output: Path, limit: float = LIMIT) -> bool:
    """Run one stage in a new process, and record its failure if the stage cannot do so itself.

    Args:
        name: name of the stage.
        device: cpu or cuda.
        smoke: tiny shapes.
        output: folder of the records.
        limit: seconds after which the process is killed.

    Returns:
        Whether it finished in time and without a failure.
    """
    # Without the kernels a stage would measure torch; "on" raises instead. A CPU runs Triton's interpreter.
    environment = {"STATEFEED_KERNELS": "on"}
    if device == "cpu":
        environment = {"TRITON_INTERPRET": "1"}
    budget = min(BUDGET, limit)
    command = [sys.executable, "-m", "statefeed.bench.gpu.stage", name, device, str(output), str(budget)]
    process = subprocess.Popen(
        command + ["smoke"] * smoke,
        env={**environment, **os.environ},
        start_new_session=True,  # so that the processes of a stage are killed with it
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        Records(name, device, output).append({"failed": f"not finished after {limit:.0f} s; ended"})
        return False
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if code not in (0, 1):  # 1: the stage has recorded the failure
        Records(name, device, output).append({"failed": f"the process ended with exit code {code}"})
    return code == 0


def _folder(device: str) -> Path:
    """Default folder of the records."""
    if device == "cpu":
        return Path(tempfile.mkdtemp(prefix="statefeed-gpu-"))
    name = nvidia_smi("name") or torch.cuda.get_device_name()
    return Path("results", "bench", re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
