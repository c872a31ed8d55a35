"""The training loop: one clock for all seeds; collect, store, update; log, evaluate, save when due.

Runs in iterations of `mbrl.programs`. Rows of metrics are fetched while the next iteration computes; on a CPU
a call returns when it is done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np

from mbrl import checkpoints, evaluation, finished, multitask, plots, published, replay, report
from mbrl import video as video_module
from mbrl.collect import Episodes
from mbrl.diagnose import make_dumper
from mbrl.drivers import DeviceDriver, HostDriver, OfflineDriver, Source, make_pool, make_workers
from mbrl.envs.pool import HostPool
from mbrl.errors import UserError
from mbrl.host_replay import HostReplay, allocate
from mbrl.images import is_image
from mbrl.interruption import Interrupted, Interruption
from mbrl.logger import Logger, Progress, read_metrics, results_table
from mbrl.processes import agree
from mbrl.programs import EVALUATE, Clock, LoopConfig, Programs, RunState, example_row, make_programs, stream
from mbrl.replay import Replay
from mbrl.results import settings_of
from mbrl.run_folder import RunFolder
from mbrl.seeds import Seeds
from mbrl.sinks import Sink
from mbrl.statistics import over_seeds
from mbrl.types import Agent, ArraySpec, EnvSpec, HostEnv, Trajectory


@dataclass(frozen=True, eq=False)
class Run:
    """What a run is made of. length: rows per sampled sequence, batch_length plus one where replay supplies
    the latent context. recorded: rows [N, E, ...] that replay begins with where nothing is collected.
    place: where images of replay lie (`mbrl.memory.place_images`)."""

    agent: Agent
    source: Source
    seeds: Seeds
    config: LoopConfig
    clock: Clock
    length: int
    recorded: Trajectory | None = None
    place: Literal["device", "host", "disk"] = "device"

    @property
    def beside(self) -> dict[str, ArraySpec]:
        """Observations that replay does not hold on the device."""
        obs = self.source.spec.obs
        return {} if self.place == "device" else {k: entry for k, entry in obs.items() if is_image(entry)}

    def ring(self) -> Replay:
        c = self.config
        return replay.make(self.clock.capacity, c.num_envs, c.batch_size, self.length, c.replay_online)

    def programs(self) -> Programs:
        source, seeds, config, clock = self.source, self.seeds, self.config, self.clock
        return make_programs(
            self.agent, self.ring(), source.spec, source.env, seeds, config, clock, self.beside
        )

    def host_replay(self, folder: Path) -> HostReplay | None:
        """Room for the images of replay where they do not lie on the device; in ``folder`` where on disk."""
        if not self.beside:
            return None
        rows = len(self.seeds), self.clock.capacity, self.config.num_envs
        images = allocate(self.beside, rows, folder if self.place == "disk" else None)
        return HostReplay(images, self.ring(), self.seeds, self.clock)

    @cached_property
    def shapes(self) -> RunState:
        """The whole state of the run, abstract: nothing is allocated."""
        return jax.eval_shape(lambda: self.programs().init(self.seeds.keys()))

    def chunk_shapes(self) -> tuple[Any, ...]:
        """The arguments of `Programs.chunk`, and of `Programs.update`, abstract."""
        return self._spread(self.shapes), self.seeds.keys(), np.int32(0)

    def learn_shapes(self) -> tuple[Any, ...]:
        """The arguments of `Programs.learn`, abstract."""
        members, rows = len(self.seeds), self.clock.rows
        row = jax.eval_shape(lambda: example_row(self.agent, self.source.spec, self.config.num_envs))
        of = lambda tree, *axes: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype), tree
        )
        latents = [self._spread(of(row.latent, members)) for _ in range(rows)]
        seen = of(row._replace(latent=()), members, rows)
        seen = seen if jax.process_count() == 1 else self._spread(seen)
        return self._spread(self.shapes), seen, latents, self.seeds.keys(), np.int32(0)

    def step_shapes(self) -> tuple[Any, ...]:
        """The arguments of `Programs.step`, abstract."""
        batch = len(self.seeds), self.length, self.config.batch_size
        images = {k: jax.ShapeDtypeStruct((*batch, *x.shape), x.dtype) for k, x in self.beside.items()}
        key_data = jax.eval_shape(lambda: jax.random.key_data(self.seeds.keys()))
        return tuple(self._spread(tree) for tree in (self.shapes, images, key_data))

    def _spread(self, tree: Any) -> Any:
        """Abstract arrays [S, ...] on the devices of the run."""
        at = self.seeds.sharding
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree)


def train(
    run: Run,
    folder: RunFolder,
    resume: bool = False,
    video: bool = False,
    learned: Mapping[str, Any] = MappingProxyType({}),
    made: tuple[Programs, float] | None = None,
    sinks: Sequence[Sink] = (),
) -> dict[str, Any]:
    """Trains to the end of the clock and returns the summary that it also writes to the run folder.

    resume: continue from the newest checkpoint of ``folder``. video: film one episode of the final policy.
    learned: what `mbrl.finished.learned_by` took from another run; the optimiser and replay start afresh.
    made: the programs of ``run``, where they exist already, and the seconds that compiling them took.
    sinks: get the metrics, beside the files of the folder.
    Raises Interrupted after SIGTERM or Ctrl-C, when the checkpoint is written, and UserError when no seed
    learns any more.
    """
    config, clock, seeds, spec = run.config, run.clock, run.seeds, run.source.spec
    programs, compiling_seconds = made or (run.programs(), 0.0)
    timer, keys = Timer(compiling_seconds), seeds.keys()
    images, vary = run.host_replay(folder.path), folder.config.get("vary", {})
    programs = programs if images is None else images.programs(programs)
    driver, (evaluate, filmed) = _driver(run, programs), _evaluation(run, video)
    film = filmed if video and _can_film(filmed) else None
    dump = make_dumper(run.agent, run.ring(), seeds, images)
    eval_keys = seeds.program(lambda key: stream(key, EVALUATE, 0))(keys)
    with timer("compile"):
        state = jax.block_until_ready(programs.init(keys))
    if learned:
        state = state._replace(train=finished.start_from(learned, state.train))
    if run.recorded is not None:
        state = programs.fill(state, run.recorded)
    iteration, evaluations, segments = 0, [], []  # evaluations: (frames, returns [S, episodes])
    if resume:
        # Abstract: two states at once may not fit.
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        del state
        restored = checkpoints.restore(folder.checkpoints, images.whole(like) if images else like)
        state = images.part(restored.state) if images else restored.state
        meta, segments = restored.meta, restored.segments
        iteration, evaluations = meta["iteration"], meta["evaluations"]
        timer.seconds = meta["seconds"] | {"compile": timer.seconds["compile"] + meta["seconds"]["compile"]}
        driver.set_state(restored.extra)

    every = {"log": config.log_every, "evaluate": config.eval_every, "save": config.checkpoint_every}
    due = {k: clock.every(v, driver.stride) if v else clock.total for k, v in every.items()}
    first_calls = {iteration, max(iteration, clock.prefill)}
    unit = "steps" if clock.unit == "frames" else clock.unit
    with (
        Logger(folder, seeds.seeds, sinks=sinks) as logger,
        Progress(clock.total * clock.frames, iteration * clock.frames, unit=unit) as progress,
        Interruption() as interruption,
    ):
        monitor = Monitor(seeds, logger, progress, clock.unit)
        if resume:
            logger.truncate_to(iteration * clock.frames)
            monitor.set_pending(meta["pending"])
            if iteration >= clock.total:
                progress.say("this run is finished: its results again (--from-run starts a new one from it)")
        while iteration < clock.total:
            learning, compiling = iteration >= clock.prefill, iteration in first_calls
            if iteration == clock.prefill and clock.pretrain:
                progress.say(f"{clock.pretrain:,} updates on what was collected so far")
                with timer("train"):
                    state, _ = jax.block_until_ready(programs.pretrain(state, keys))
            with timer("compile" if compiling else "train"):
                state, metrics, ended = driver.advance(state, keys, iteration, learning)
                monitor.flush()  # the previous rows, while this iteration computes
                iteration += driver.stride
                frames, end = iteration * clock.frames, iteration == clock.total
                updates = clock.updates_until(iteration)
                monitor.add(frames, updates, metrics, ended, driver.faults())
                if compiling or end:
                    jax.block_until_ready(state)
                    monitor.show(compiled=compiling)
            close = clock.total - iteration < due["evaluate"] // 2  # the final evaluation says it all
            evaluating = end or (learning and not close and iteration % due["evaluate"] == 0)
            scheduled, stop = end or iteration % due["save"] == 0, agree(interruption.number or 0)
            if scheduled or evaluating or iteration % due["log"] == 0:
                monitor.request(timer.seconds["train"])
            if evaluating and evaluate is not None:
                with timer("train"):
                    jax.block_until_ready(state)
                monitor.flush()
                with timer("evaluate"):
                    returns = evaluate(state.train, eval_keys)
                progress.skip(timer.latest)
                evaluations.append([frames, returns.tolist()])
                each = multitask.by_task(spec, returns)
                by_name = {f"eval_return/{name}": mean for name, mean in each.items()}
                logger.log(frames, {"eval_return": returns.mean(1)} | by_name)
                progress.say(_evaluation_line(frames, returns, each, timer, clock.unit))
                folder.write_summary(
                    summarise(frames, evaluations, timer, updates, state.train, seeds, spec, vary)
                )
            if scheduled or stop:
                monitor.flush()
                logger.flush()
                meta = {"iteration": iteration, "evaluations": evaluations, "seconds": timer.seconds}
                meta["pending"] = monitor.pending()
                with timer("save"):
                    extra, whole = driver.get_state(), images.whole(state) if images else state
                    saved = checkpoints.save(
                        folder.checkpoints, frames, whole, extra, meta, segments=segments
                    )
                if stop and not end:
                    raise Interrupted.at(f"{frames:,} {clock.unit}", folder.path, saved, stop)
            for seed in monitor.newly_frozen():
                where = dump(state, keys, seed, folder, frames)
                progress.say(f"seed {seeds.seeds[seed]}: {where}")
            if monitor.frozen.all():
                raise UserError(
                    f"no seed learns any more at {frames:,} {clock.unit}: none of their updates is finite; "
                    "lower optimiser.learning_rate, or look at what was dumped"
                )
    if film is not None and evaluate is not None:
        path = folder.videos / f"{clock.total * clock.frames}.mp4"
        video_module.record(path, film, lambda watch: evaluate(state.train, eval_keys, watch))
    total = clock.total * clock.frames
    return summarise(total, evaluations, timer, clock.total_updates, state.train, seeds, spec, vary)


def _driver(run: Run, programs: Programs) -> OfflineDriver | DeviceDriver | HostDriver:
    """What advances the run, for either side of the border and for neither."""
    source, seeds, config = run.source, run.seeds, run.config
    if not run.clock.rows:
        return OfflineDriver(programs, len(seeds.own))
    if source.env is not None:
        return DeviceDriver(programs, config.chunk)
    pool = make_workers(source, seeds, config.num_envs, 0, config)
    return HostDriver(programs, pool, seeds, config.num_envs, run.clock.rows)


def _evaluation(run: Run, video: bool):
    """The evaluation function and its first host environment; None where there is none."""
    agent, source, seeds, config = run.agent, run.source, run.seeds, run.config
    if not source.playable:
        return None, None
    if source.env is not None:
        return evaluation.make_device(agent, source.env, seeds, config.eval_episodes), None
    episodes = config.eval_episodes * multitask.count(source.spec)
    # What is filmed must be in this process.
    make = make_pool if video else partial(make_workers, config=config)
    pool = make(source, seeds, episodes, purpose=1)
    filmed = pool.envs[0] if isinstance(pool, HostPool) else None
    return evaluation.make_host(agent, pool, seeds, episodes), filmed


def _can_film(env: HostEnv | None) -> bool:
    reason = (
        "video is skipped: only dm_control and gymnasium render" if env is None else video_module.problem(env)
    )
    if reason:
        print(reason)
    return reason is None


class Monitor:
    """Turns what iterations return into rows of metrics, fetched while the next iteration computes."""

    def __init__(self, seeds: Seeds, logger: Logger, progress: Progress, unit: str = "frames"):
        self.seeds, self.logger, self.progress, self.unit = seeds, logger, progress, unit
        self.returns = np.full(len(seeds), np.nan)  # of the latest episodes
        self.frozen = np.zeros(len(seeds), bool)
        self._news: list[int] = []  # positions of seeds that froze and were not asked for yet
        self.warned = False  # of terminals that are not learned
        self.faults = np.zeros(len(seeds.own), int)  # of environments, since the start of this process
        self.now: tuple[int, int, Any] | None = None  # frames, updates, metrics of the latest iteration
        self.shown = False  # whether that iteration was
        self.ended: list[Episodes] = []
        self.due: tuple[Any, ...] | None = None

    def add(self, frames: int, updates: int, metrics, ended: Episodes, faults: np.ndarray) -> None:
        """The results of an iteration, possibly still being computed; those before it are waited for, so that
        one is under way and speeds are of what was computed."""
        if self.now is not None:
            jax.block_until_ready(self.now[2])
            if not self.shown:
                self.show()
        self.now, self.shown = (frames, updates, metrics), False
        self.ended.append(ended)
        self.faults = faults

    def show(self, compiled: bool = False) -> None:
        """Shows how far the latest iteration came; it must be computed. compiled: speeds count from here."""
        assert self.now is not None
        if compiled:
            self.progress.compiled()
        frames, updates, _ = self.now
        self.progress.update(frames, self.returns, updates)
        self.shown = True

    def newly_frozen(self) -> list[int]:
        """Positions of the seeds that froze since the last call."""
        news, self._news = self._news, []
        return news

    def pending(self) -> dict[str, list[float]]:
        """Episodes that the next row will count, JSON-like, for a checkpoint between two rows."""
        count, total = self._total(self.ended) if self.ended else (np.zeros(0), np.zeros(0))
        return {"count": count.tolist(), "returns": total.tolist()}

    def set_pending(self, pending: dict[str, list[float]]) -> None:
        count, total = np.array(pending["count"], int), np.array(pending["returns"], np.float32)
        own = slice(self.seeds.own.start, self.seeds.own.stop)
        self.ended = [Episodes(count[own], total[own])] if count.size else []

    def request(self, train_seconds: float) -> None:
        """Asks for a row of the latest iteration."""
        assert self.now is not None
        self.due = (*self.now, self.ended, train_seconds)
        self.ended = []

    def flush(self) -> None:
        """Writes the row that was asked for, waiting for its numbers."""
        if self.due is None:
            return
        frames, updates, metrics, ended, train_seconds = self.due
        self.due = None
        count, total = self._total(ended)
        episode_return = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        self.returns = np.where(count > 0, episode_return, self.returns)
        fetched = self.seeds.fetch(metrics or {})
        values = {name: np.asarray(value, np.float64) for name, value in fetched.items()}
        values |= {"episode_return": episode_return, "episodes": count, "updates": updates}
        faults = self.seeds.fetch(self.faults)
        values |= {"env_faults": faults} if faults.any() else {}
        self.logger.log(frames, values | {"time/train": train_seconds})
        self._report_frozen(frames, values.get("frozen", self.frozen) > 0)
        if np.any(values.get("unlearned_terminals", 0) > 0) and not self.warned:
            self.warned = True
            self.progress.say(
                "warning: episodes of this task terminate, and this world model does not learn when: start "
                "again with --model.episodic"
            )

    def _total(self, ended: list[Episodes]) -> tuple[np.ndarray, np.ndarray]:
        """Number and summed return of episodes [S], added one after the other: a resumed run adds the
        same."""
        ended = [self.seeds.fetch_own(e) for e in ended]
        count = np.asarray(sum(e.count for e in ended))
        total = np.asarray(sum((e.returns.astype(np.float32) for e in ended), np.float32(0)))
        return self.seeds.fetch((count, total))

    def _report_frozen(self, frames: int, frozen) -> None:
        for i in np.flatnonzero(frozen & ~self.frozen):
            self.progress.say(
                f"seed {self.seeds.seeds[i]} learns no more from {frames:,} {self.unit}: its updates are not "
                "finite; others go on"
            )
            self._news.append(int(i))
        self.frozen = np.asarray(frozen)


class Timer:
    """Wall seconds by purpose; a context manager per purpose. What is compiled meanwhile counts as compile,
    which also includes the first calls' work. latest: seconds of the latest purpose, all told."""

    def __init__(self, compiling: float = 0.0):
        self.seconds = {"compile": compiling, "train": 0.0, "evaluate": 0.0, "save": 0.0}
        self.latest = 0.0

    @contextmanager
    def __call__(self, name: str):
        began, compiled = time.perf_counter(), _compiled.seconds
        yield
        self.latest, compiling = time.perf_counter() - began, _compiled.seconds - compiled
        self.seconds[name] += self.latest - compiling
        self.seconds["compile"] += compiling


class _Compiled:
    """Seconds that XLA has compiled in this process."""

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self.count)

    def count(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds += duration_secs


_compiled = _Compiled()


def _evaluation_line(
    frames: int, returns: np.ndarray, each: Mapping[str, np.ndarray], timer: Timer, unit: str
) -> str:
    shown = lambda means: ", ".join(f"{mean:.0f}" for mean in means)
    over = f"{returns.shape[1]} episodes{' per seed' if len(returns) > 1 else ''}"
    return (
        f"evaluation at {frames:,} {unit}, {timer.seconds['train']:.0f} s of training: return "
        f"{shown(returns.mean(1))} (mean of {over})"
        + "".join(f"; {name} {shown(means)}" for name, means in each.items())
    )


def summarise(
    frames: int, evaluations, timer: Timer, updates: int, train, seeds: Seeds, spec: EnvSpec, vary: Any = ()
) -> dict[str, Any]:
    """The contents of ``summary.json``; seconds are wall time, ``eval_return`` is the latest evaluation, and
    is missing where there is none. Of several tasks it is their mean, and "tasks" has that of each [S].
    vary: settings in which seeds differ, if they do: then nothing is aggregated over them."""
    summary = {
        "env_steps": frames,
        "wall_seconds": sum(timer.seconds.values()),
        "train_seconds": timer.seconds["train"],
        "evaluate_seconds": timer.seconds["evaluate"],
        "compile_seconds": timer.seconds["compile"],
        "updates": updates,
        "params": sum(x.size for x in jax.tree.leaves(train.params)) // len(seeds),
        "seeds": list(seeds.seeds),
    }
    if not evaluations:
        return summary
    returns = evaluations[-1][1]
    per_seed = np.mean(returns, 1)
    each = lambda returns: {"tasks": multitask.by_task(spec, returns)} if spec.tasks else {}
    latest = {"per_seed": per_seed, "episodes": returns} | over_seeds(per_seed, vary)
    return summary | {
        "eval_return": latest | each(returns),
        "evaluations": [
            {"env_steps": step, "per_seed": np.mean(values, 1)} | each(values) for step, values in evaluations
        ],
    }


def finish(folder: RunFolder, summary: dict[str, Any], task: str, title: str, unit: str = "frames") -> None:
    """Draws ``curve.png`` beside the published curve of the task and prints the results table."""
    from rich.console import Console

    if "evaluations" not in summary:
        folder.write_summary(summary)
        print(
            "nothing was evaluated, as there is no environment (--task names one); "
            f"metrics and checkpoints: {folder.path}"
        )
        return
    comparable = unit == "frames"  # published curves count frames

    seeds = summary["seeds"]
    evaluations = [
        [(e["env_steps"], e["per_seed"][i]) for e in summary["evaluations"]] for i in range(len(seeds))
    ]
    rows = [row for row in read_metrics(folder) if row.get("episode_return") is not None]
    training = [[(r["step"], r["episode_return"]) for r in rows if r["seed"] == seed] for seed in seeds]
    method = published.method_of(folder.config)
    curve = published.curve(task, method) if comparable else None
    vary = folder.config.get("vary", {})
    plots.save_curve(folder.curve, evaluations, training, curve, title, unit, alike=not vary)
    score = published.score_at(task, summary["env_steps"], method) if comparable else None
    returns, wall = summary["eval_return"]["episodes"], summary["wall_seconds"]
    tasks = summary["eval_return"].get("tasks", {})
    at, each = summary["env_steps"], settings_of(vary)
    Console().print(results_table(task, at, returns, wall, score, seeds, unit, tasks, each))
    report.write_at_end(folder)
    print(f"report.html, curve, metrics and checkpoints: {folder.path}")
