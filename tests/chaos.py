"""Kills a training run with SIGKILL at random moments, saving included, and continues it each time.

    python tests/chaos.py --kills 25

Its final state and its log must equal those of a run that nobody killed, to the last bit. The run is tiny and
saves every few iterations, so that many kills hit a save. Every process is forked from one that has imported the
libraries and has not started JAX: else their import would be most of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Of the processes that are started, too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers", "tensorboardX"])


def make_run(iterations: int):
    from mbrl import envs
    from mbrl.drivers import Source
    from tests.helpers import FRAMES, on_one_device, tiny_run

    env = envs.make_jax("pendulum", max_steps=6)
    every = {"log_every": FRAMES * 10, "eval_every": FRAMES * 100, "checkpoint_every": FRAMES * 20}
    return tiny_run(Source(env.spec, env), on_one_device(0), iterations, eval_episodes=2, **every)


def child(path: Path, iterations: int) -> None:
    """One process: starts the run, or continues it where there is a checkpoint."""
    from mbrl.run_folder import RunFolder
    from mbrl.seeds import use_compilation_cache
    from mbrl.train import train

    use_compilation_cache()
    resume = any(path.glob("checkpoints/[0-9]*/manifest.json"))
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        RunFolder.open_for_resume(path) if resume else RunFolder.create(path, {}) as folder,
    ):
        train(make_run(iterations), folder, resume)


def start(path: Path, iterations: int) -> BaseProcess:
    process = CONTEXT.Process(target=child, args=(path, iterations))
    process.start()
    return process


def newest(path: Path) -> int:
    return max((int(p.parent.name) for p in path.glob("checkpoints/[0-9]*/manifest.json")), default=0)


def finish(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run ended with {process.exitcode}")


def kill_once(path: Path, iterations: int, rng) -> float | None:
    """Waits for a new checkpoint, then a random while, then kills. Seconds since the last checkpoint, or None
    when the run ended before."""
    before, process = newest(path), start(path, iterations)
    while newest(path) == before and process.is_alive():
        time.sleep(0.05)
    time.sleep(float(rng.uniform(0, 0.5)))
    if not process.is_alive():
        finish(process)
        return None
    process.kill()
    process.join()
    if newest(path) <= before:
        raise SystemExit(f"a committed checkpoint is gone: {newest(path)} after {before}")
    return time.time() - (path / "checkpoints" / f"{newest(path):012d}" / "manifest.json").stat().st_mtime


def compare(a: Path, b: Path, iterations: int) -> None:
    """SystemExit unless final states and logs are equal."""
    import jax

    from mbrl import checkpoints
    from mbrl.logger import read_metrics
    from tests.helpers import as_numpy

    shapes = make_run(iterations).shapes
    x, y = (checkpoints.restore(folder / "checkpoints", shapes) for folder in (a, b))
    assert x.step == y.step
    leaves = zip(*(jax.tree.leaves(as_numpy(r.state)) for r in (x, y)), strict=True)
    if not all(p.tobytes() == q.tobytes() for p, q in leaves):
        raise SystemExit("the final states differ")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]
        for folder in (a, b)
    ]
    if rows[0] != rows[1]:
        raise SystemExit("the logs differ")
    print(f"{len(jax.tree.leaves(x.state))} leaves bit-equal, {len(rows[0])} rows of metrics equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--iterations", type=int, help="of the run, 8 frames each; 100 per kill by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    options.iterations = options.iterations or 100 * options.kills
    rng, lost, torn = np.random.default_rng(options.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        for _ in range(options.kills):
            seconds = kill_once(killed, options.iterations, rng)
            if seconds is None:
                raise SystemExit(f"the run ended after {len(lost)} kills: give more --iterations")
            lost.append(seconds)
            torn += (killed / "checkpoints" / ".saving").exists()
            print(
                f"kill {len(lost)} at {newest(killed):,} frames, {seconds:.2f} s after the checkpoint",
                flush=True,
            )
        finish(start(killed, options.iterations))
        finish(start(whole, options.iterations))
        compare(whole, killed, options.iterations)
    print(
        f"{len(lost)}/{options.kills} kills survived, {torn} in a save, {np.mean(lost):.2f} s lost on average"
    )


if __name__ == "__main__":
    main()
