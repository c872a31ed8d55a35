"""The training loop: one clock for all seeds; collect, store, update; log, evaluate, save when due.

Runs in iterations of `mbrl.programs`. While iteration t computes, the metrics of t-1 are fetched and logged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from mbrl import checkpoints, evaluation, plots, published, replay
from mbrl.collect import Episodes
from mbrl.drivers import DeviceDriver, HostDriver, Source, make_pool
from mbrl.logger import Logger, Progress, read_metrics, results_table
from mbrl.memory import check_memory
from mbrl.programs import EVALUATE, Clock, LoopConfig, make_programs, stream
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds
from mbrl.statistics import bootstrap_interval, iqm
from mbrl.types import Agent


def train(
    agent: Agent,
    source: Source,
    seeds: Seeds,
    config: LoopConfig,
    clock: Clock,
    folder: RunFolder,
    length: int,
    resume: bool = False,
) -> dict[str, Any]:
    """Runs a whole run and returns the summary that it also writes to the run folder.

    length: rows per sampled sequence: batch_length, plus one where replay supplies the latent context.
    resume: continue from the newest checkpoint of ``folder``.
    """
    timer = Timer()
    ring = replay.make(clock.capacity, config.num_envs, config.batch_size, length, config.replay_online)
    programs = make_programs(agent, ring, source.spec, source.env, seeds, config, clock)
    keys = seeds.keys()
    check_memory(jax.eval_shape(programs.init, keys), print)
    driver, evaluate = _environments(agent, source, seeds, config, clock, programs)
    eval_keys = seeds.program(lambda key: stream(key, EVALUATE, 0))(keys)
    with timer("compile"):
        state = jax.block_until_ready(programs.init(keys))
    iteration, evaluations = 0, []  # evaluations: (frames, returns [S, episodes])
    if resume:
        restored = checkpoints.restore(folder.checkpoints, state)
        state, meta = restored.state, restored.meta
        iteration, evaluations = meta["iteration"], meta["evaluations"]
        timer.seconds = meta["seconds"] | {"compile": timer.seconds["compile"] + meta["seconds"]["compile"]}
        driver.set_state(restored.extra)

    every = {"log": config.log_every, "evaluate": config.eval_every, "save": config.checkpoint_every}
    due = {k: clock.every(v, driver.stride) if v else clock.total for k, v in every.items()}
    episodes = Episodes(np.zeros(len(seeds)), np.zeros(len(seeds)))
    latest = np.full(len(seeds), np.nan)
    frozen = np.zeros(len(seeds), bool)
    first_calls = {iteration, max(iteration, clock.prefill)}
    with (
        Logger(folder, seeds.seeds) as logger,
        Progress(clock.total * clock.frames, iteration * clock.frames) as progress,
    ):
        if resume:
            logger.truncate_to(iteration * clock.frames)
        while iteration < clock.total:
            compiling = iteration in first_calls
            with timer("compile" if compiling else "train"):
                learning = iteration >= clock.prefill
                state, metrics, ended = driver.advance(state, keys, iteration, learning)
                if compiling:
                    jax.block_until_ready(state)
                iteration += driver.stride
                frames = iteration * clock.frames
                episodes = Episodes(*(a + np.asarray(b) for a, b in zip(episodes, ended, strict=True)))
                if iteration % due["log"] == 0 or iteration == clock.total:
                    # Fetching waits for this iteration; every other one is left to run behind.
                    values = {k: np.asarray(v, np.float64) for k, v in (metrics or {}).items()}
                    values |= _episode_values(episodes)
                    latest = np.where(episodes.count > 0, values["episode_return"], latest)
                    episodes = Episodes(np.zeros(len(seeds)), np.zeros(len(seeds)))
                    frozen = _report_frozen(progress, seeds, frozen, values, frames)
            updates = max(0, iteration - clock.prefill) * clock.updates
            progress.update(frames, latest, updates)
            if iteration % due["log"] == 0 or iteration == clock.total:
                logger.log(frames, values | {"updates": updates, "time/train": timer.seconds["train"]})
            if (learning and iteration % due["evaluate"] == 0) or iteration == clock.total:
                with timer("evaluate"):
                    returns = evaluate(state.train, eval_keys)
                evaluations.append([frames, returns.tolist()])
                logger.log(frames, {"eval_return": returns.mean(1)})
                summary = summarise(evaluations, timer, updates, state.train, seeds)
                progress.say(_evaluation_line(frames, returns, timer))
                folder.write_summary(summary)
            if iteration % due["save"] == 0 or iteration == clock.total:
                logger.flush()
                meta = {"iteration": iteration, "evaluations": evaluations, "seconds": timer.seconds}
                with timer("save"):
                    checkpoints.save(folder.checkpoints, frames, state, driver.get_state(), meta)
    return summary


def _environments(agent, source: Source, seeds: Seeds, config: LoopConfig, clock: Clock, programs):
    """The driver, and the evaluation function, for either side of the border."""
    if source.env is not None:
        evaluate = evaluation.make_device(agent, source.env, seeds, config.eval_episodes)
        return DeviceDriver(programs, config.chunk), evaluate
    pool = make_pool(source, seeds, config.num_envs, purpose=0)
    eval_pool = make_pool(source, seeds, config.eval_episodes, purpose=1)
    evaluate = evaluation.make_host(agent, eval_pool, seeds, config.eval_episodes)
    return HostDriver(programs, pool, seeds, config.num_envs, clock.rows), evaluate


class Timer:
    """Wall seconds by purpose; a context manager per purpose. compile includes the first calls' work."""

    def __init__(self):
        self.began = time.perf_counter()
        self.seconds = {"compile": 0.0, "train": 0.0, "evaluate": 0.0, "save": 0.0}

    @contextmanager
    def __call__(self, name: str):
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


def _episode_values(episodes: Episodes) -> dict[str, np.ndarray]:
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(episodes.count > 0, episodes.returns / episodes.count, np.nan)
    return {"episode_return": mean, "episodes": episodes.count}


def _report_frozen(progress, seeds: Seeds, before, values: Mapping[str, Any], frames: int):
    """Says once which seeds have stopped learning because their updates were not finite."""
    now = np.asarray(values.get("frozen", before)) > 0
    for seed in np.array(seeds.seeds)[now & ~before]:
        progress.say(f"seed {seed} is frozen at {frames:,} frames: its updates are not finite; others go on")
    return now


def _evaluation_line(frames: int, returns: np.ndarray, timer: Timer) -> str:
    per_seed = ", ".join(f"{mean:.0f}" for mean in returns.mean(1))
    return (
        f"evaluation at {frames:,} frames, {timer.seconds['train']:.0f} s of training: return {per_seed} "
        f"(mean of {returns.shape[1]} episodes{' per seed' if len(returns) > 1 else ''})"
    )


def summarise(evaluations, timer: Timer, updates: int, train, seeds: Seeds) -> dict[str, Any]:
    """The contents of ``summary.json``; seconds are wall time, ``eval_return`` is the latest evaluation."""
    frames, returns = evaluations[-1]
    per_seed = np.mean(returns, 1)
    low, high = bootstrap_interval(per_seed)
    return {
        "env_steps": frames,
        "wall_seconds": sum(timer.seconds.values()),
        "train_seconds": timer.seconds["train"],
        "evaluate_seconds": timer.seconds["evaluate"],
        "compile_seconds": timer.seconds["compile"],
        "updates": updates,
        "params": sum(x.size for x in jax.tree.leaves(train.params)) // len(seeds),
        "seeds": list(seeds.seeds),
        "eval_return": {
            "per_seed": per_seed,
            "episodes": returns,
            "mean": per_seed.mean(),
            "iqm": iqm(per_seed),
            "ci": [low, high],
        },
        "evaluations": [{"env_steps": step, "per_seed": np.mean(values, 1)} for step, values in evaluations],
    }


def finish(folder: RunFolder, summary: dict[str, Any], task: str, title: str) -> None:
    """Draws ``curve.png`` beside the published curve of the task and prints the results table."""
    from rich.console import Console

    seeds = summary["seeds"]
    evaluations = [
        [(e["env_steps"], e["per_seed"][i]) for e in summary["evaluations"]] for i in range(len(seeds))
    ]
    rows = [row for row in read_metrics(folder) if row.get("episode_return") is not None]
    training = [[(r["step"], r["episode_return"]) for r in rows if r["seed"] == seed] for seed in seeds]
    plots.save_curve(folder.curve, evaluations, training, published.curve(task), title)
    score = published.score_at(task, summary["env_steps"])
    returns, wall = summary["eval_return"]["episodes"], summary["wall_seconds"]
    Console().print(results_table(task, summary["env_steps"], returns, wall, score, seeds))
    print(f"curve, metrics and checkpoints: {folder.path}")
