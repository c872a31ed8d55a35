"""What a checkpoint costs: its size, the seconds to write it, and their share of a run that saves regularly.

    python benchmarks/checkpoint.py --preset s --steps 80000 --every 300

The state is that of a run of ``--steps`` frames of walker_walk with a full replay of random bits, which do
not compress.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import jax
import numpy as np
from train_step import WALKER, configs

from mbrl import checkpoints
from mbrl.agents import dreamer
from mbrl.drivers import Source
from mbrl.memory import num_bytes
from mbrl.programs import make_clock
from mbrl.seeds import Seeds
from mbrl.train import Run
from world_models import rssm


def random_state(run: Run):
    """A state of the right shapes, in bits that do not compress."""
    rng = np.random.default_rng(0)

    def fill(x):
        data = rng.integers(0, 255, (*x.shape, x.dtype.itemsize), np.uint8)
        return (
            jax.device_put(data.view(x.dtype).reshape(x.shape))
            if x.dtype != bool
            else np.zeros(x.shape, bool)
        )

    return jax.tree.map(fill, run.shapes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="s")
    parser.add_argument("--steps", type=int, default=80_000, help="frames of the run")
    parser.add_argument("--every", type=float, default=300, help="seconds between two checkpoints")
    options = parser.parse_args()
    model, config, loop = configs(options.preset)
    length = loop.batch_length + config.replay_context
    clock, seeds = make_clock(loop, options.steps, length), Seeds.make(0, 1)
    made = rssm.make(model, WALKER)
    agent = dreamer.make(config, WALKER, made, model.discount, clock.total_updates)
    run = Run(agent, Source(WALKER), seeds, loop, clock, length)
    state = random_state(run)
    parts = {name: num_bytes(getattr(state, name)) / 2**20 for name in state._fields}
    latent = num_bytes(state.replay.data.latent) / 2**20
    total = sum(parts.values())
    print(
        f"{total:.0f} MiB: learner {parts['train']:.0f}, replay {parts['replay']:.0f} (latents {latent:.0f})"
    )
    with tempfile.TemporaryDirectory() as folder:
        for step in (1, 2, 3):
            began, computing = time.perf_counter(), time.process_time()
            assert checkpoints.save(folder, step, state)
            wall, cpu = time.perf_counter() - began, time.process_time() - computing
            share = 100 * wall / (options.every + wall)
            print(
                f"save {step}: {wall:.2f} s ({cpu:.2f} s of computation), {total / wall:.0f} MiB/s, "
                f"{share:.2f} % of a run that saves every {options.every:.0f} s"
            )


if __name__ == "__main__":
    main()
