"""What a checkpoint costs: its size, the seconds to write it, and their share of a run that saves regularly.

    python benchmarks/checkpoint.py --preset s --steps 80000 --every 300 --fresh 20000

The state is that of a run of ``--steps`` frames of walker_walk with a full replay of random bits, which do
not compress. The first save writes all of it, the next ones what ``--fresh`` frames add (rows of replay that
were saved before stay in their files), and the last one all of it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

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

    return jax.tree.map(fill, run.shapes)


def with_pictures(state, side: int):
    """The state with a picture in every row of replay, on the host; as it is where ``side`` is 0."""
    if not side:
        return state
    shape = (*state.replay.data.reward.shape, side, side, 3)
    picture = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    data = state.replay.data._replace(obs=state.replay.data.obs | {"image": picture})
    return state._replace(replay=state.replay._replace(data=data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="s")
    parser.add_argument("--steps", type=int, default=80_000, help="frames of the run")
    parser.add_argument("--every", type=float, default=300, help="seconds between two checkpoints")
    parser.add_argument("--fresh", type=int, default=20_000, help="frames between two checkpoints")
    parser.add_argument("--pixels", type=int, default=0, help="also a picture of so many pixels a side")
    parser.add_argument("--no-context", action="store_true", help="replay stores no latents")
    options = parser.parse_args()
    model, config, loop = configs(options.preset)
    config = dataclasses.replace(config, replay_context=not options.no_context)
    length = loop.batch_length + config.replay_context
    clock, seeds = make_clock(loop, options.steps, length), Seeds.make(0, 1)
    made = rssm.make(model, WALKER)
    agent = dreamer.make(config, WALKER, made, model.discount, clock.total_updates)
    run = Run(agent, Source(WALKER), seeds, loop, clock, length)
    state = with_pictures(random_state(run), options.pixels)
    parts = {name: num_bytes(getattr(state, name)) / 2**20 for name in state._fields}
    latent = num_bytes(state.replay.data.latent) / 2**20
    print(
        f"{sum(parts.values()):.0f} MiB: learner {parts['train']:.0f}, replay {parts['replay']:.0f} "
        f"(latents {latent:.0f})"
    )
    inserted, fresh = clock.capacity, options.fresh // loop.num_envs // loop.action_repeat
    with tempfile.TemporaryDirectory() as folder:
        known = []
        for step, segments in enumerate([known, known, known, None]):
            count = np.full(len(seeds), inserted + step * fresh, np.int32)
            state = state._replace(replay=state.replay._replace(inserted=count))
            began, computing, files = time.perf_counter(), time.process_time(), listing(folder)
            assert checkpoints.save(folder, step, state, segments=segments)
            wall, cpu = time.perf_counter() - began, time.process_time() - computing
            written = sum(size for name, size in listing(folder).items() if name not in files) / 2**20
            print(
                f"save {step}: {written:.0f} MiB in {wall:.2f} s ({cpu:.2f} s of computation), "
                f"{100 * wall / (options.every + wall):.2f} % of a run that saves every {options.every:.0f} s"
            )


def listing(folder: str) -> dict[Path, int]:
    """Bytes of all files."""
    return {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
