"""Drivers advance a run by some iterations, whatever side of the border its environments live on."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mbrl import envs, multitask
from mbrl.collect import Episodes, HostCollector
from mbrl.config import choose, override
from mbrl.envs.pixels import CAMERA, CameraConfig, Shown
from mbrl.envs.pool import HostPool
from mbrl.envs.workers import WorkerPool
from mbrl.errors import UserError, check_at_least
from mbrl.processes import gather_bytes
from mbrl.programs import LoopConfig, Programs, RunState
from mbrl.seeds import Seeds
from mbrl.tasks import TASK_SETS
from mbrl.types import EnvSpec, HostEnv, JaxEnv


def _no_host(seed: int, index: int) -> HostEnv:
    raise ValueError("this environment lives on the device: it has no host version")


class Source(NamedTuple):
    """Where experience comes from. env: one JAX environment, or None; make_host(seed, index) -> one host
    environment, used when env is None, and sent to worker processes. index: its number in the pool, which
    says which of several tasks it has. With neither there is recorded experience only."""

    spec: EnvSpec
    env: JaxEnv | None = None
    make_host: Callable[[int, int], HostEnv] = _no_host

    @property
    def playable(self) -> bool:
        """Whether there is an environment."""
        return self.env is not None or self.make_host is not _no_host


NO_TASK = "none"
"""Instead of a task: nothing but recorded episodes."""


def make_source(
    task: str,
    action_repeat: int,
    shown: Shown = "state",
    camera: CameraConfig = CAMERA,
    backend: str = "host",
    padding: Sequence[int] = (),
) -> Source:
    """The environment of the task, on the device or on the host. shown: the state, what the camera sees, or
    both. backend: of dm_control's tasks, host or mjx (on the device); others have no choice. task: one,
    several separated by commas, or one of ``TASK_SETS``. padding: widths (observation, action) to which an
    agent of several tasks pads even a single one. UserError for unknown names, for tasks that do not fit
    together, and where nothing can be rendered."""
    check_at_least("loop.action_repeat", action_repeat, 1)
    task = TASK_SETS.get(task, task)
    if "," in task or padding:
        each = [make_source(t.strip(), action_repeat, shown, camera, backend) for t in task.split(",")]
        return _several(each, task, *padding)
    if task == NO_TASK:
        raise UserError("--task none needs --offline DATA: without an environment nothing can be collected")
    choose("env_backend", backend, ["host", "mjx"])
    if backend == "mjx" and shown != "state":
        raise UserError(f"--obs {shown} needs --env-backend host: nothing is rendered on the device by mjx")
    make_host = partial(envs.make_host, task, action_repeat=action_repeat, shown=shown, camera=camera)
    try:
        if backend == "mjx":
            from mbrl.envs import mjx

            env = mjx.make(task, action_repeat)
            return Source(env.spec, env)
        if envs.is_jax(task):
            env = envs.make_jax(task, shown, camera)
            return Source(env.spec, env)
        env = make_host(seed=0)
        if shown != "state":
            env.reset()
            env.close()
    except ValueError as error:
        raise UserError(f"--task: {error}") from None
    except RuntimeError as error:
        raise UserError(f"--obs {shown}: {error}") from None
    return Source(env.spec, make_host=partial(_make_alike, make_host))


def _make_alike(make: Callable[[int], HostEnv], seed: int, index: int) -> HostEnv:
    """One of environments that differ in their seed alone."""
    return make(seed)


def _several(sources: Sequence[Source], name: str, *padding: int) -> Source:
    """Environments of several tasks, of which number i has task i modulo their count."""
    if any(source.env is not None for source in sources):
        raise UserError(f"--task {name}: several tasks must all be environments on the host")
    name = name if len(sources) > 1 else sources[0].spec.name
    spec = multitask.join(name, [source.spec for source in sources], *padding)
    return Source(spec, make_host=partial(_make_padded, [s.make_host for s in sources], spec))


def _make_padded(
    makers: Sequence[Callable[[int, int], HostEnv]], spec: EnvSpec, seed: int, index: int
) -> HostEnv:
    task = index % len(makers)
    return multitask.Padded(makers[task](seed, index), task, spec)


def stored_source(stored: Mapping[str, Any]) -> Source:
    """The environment of a run, from what its ``config.json`` holds."""
    config = stored["config"]
    if config["task"] == NO_TASK and "spec" in stored:
        return Source(EnvSpec.of_json(stored["spec"]))
    camera = override(CAMERA, config.get("camera", {}))
    shown, backend = config.get("obs", "state"), config.get("env_backend", "host")
    repeat, padding = config["loop"]["action_repeat"], stored.get("padding", ())
    return make_source(config["task"], repeat, shown, camera, backend, padding)


class _Stateless:
    """A driver whose environments, where it has any, are part of the run's state and cannot fail."""

    def faults(self) -> np.ndarray:
        """Environment failures so far, per seed where they are counted."""
        return np.zeros(1, int)

    def get_state(self) -> dict[str, np.ndarray]:
        return {}

    def set_state(self, extra: dict[str, np.ndarray]) -> None:
        pass


class OfflineDriver(_Stateless):
    """Advances a run that learns from the recorded episodes in its replay."""

    stride = 1

    def __init__(self, programs: Programs, num_seeds: int):
        self.programs, self.num_seeds = programs, num_seeds

    def advance(self, state: RunState, keys, iteration: int, learning: bool):
        """As `DeviceDriver.advance`, with no episodes."""
        none = np.zeros(self.num_seeds)
        return *self.programs.update(state, keys, np.int32(iteration)), Episodes(none, none)


class DeviceDriver(_Stateless):
    """Advances a run whose environments are part of the compiled program."""

    def __init__(self, programs: Programs, chunk: int):
        self.programs, self.stride = programs, chunk

    def advance(self, state: RunState, keys, iteration: int, learning: bool):
        """``stride`` iterations -> (state, metrics or None, Episodes [S])."""
        if learning:
            return self.programs.chunk(state, keys, np.int32(iteration))
        state, episodes = self.programs.prefill(state, keys, np.int32(iteration))
        return state, None, episodes


class HostDriver:
    """Advances a run whose environments are Python objects: the policy and the updates are programs."""

    stride = 1

    def __init__(
        self, programs: Programs, pool: HostPool | WorkerPool, seeds: Seeds, num_envs: int, rows: int
    ):
        self.programs, self.rows, self.seeds = programs, rows, seeds
        self.collector = HostCollector(pool, len(seeds.own), num_envs)

    def advance(self, state: RunState, keys, iteration: int, learning: bool):
        policy = self.programs.act if learning else self.programs.act_random

        def act(actor, obs, is_first, i):
            seen, step = self.seeds.put((obs, is_first)), np.int32(iteration * self.rows + i)
            action, actor, latent = policy(state.train, actor, *seen, keys, step)
            return self.seeds.fetch_own(action), actor, latent

        actor, rows, latents, episodes = self.collector.collect(act, state.actor, self.rows)
        state, rows = state._replace(actor=actor), self.seeds.put(rows)
        if learning:
            return *self.programs.learn(state, rows, latents, keys, np.int32(iteration)), episodes
        return self.programs.store(state, rows, latents), None, episodes

    def faults(self) -> np.ndarray:
        """Environment failures so far [S], of the members in this process."""
        return self.collector.pool.faults.reshape(self.collector.shape).sum(1)

    def get_state(self) -> dict[str, np.ndarray]:
        """Of the environments of all processes, which must ask at the same time."""
        own = self.collector.get_state()
        if len(self.seeds.own) == len(self.seeds):
            return own
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **own)  # pyright: ignore[reportArgumentType]
        parts = [dict(np.load(io.BytesIO(data))) for data in gather_bytes(file.getvalue())]
        return join_states(parts, self.collector.pool.size)

    def set_state(self, extra: dict[str, np.ndarray]) -> None:
        size, own = self.collector.pool.size, self.seeds.own
        self.collector.set_state(state_part(extra, own, len(self.seeds), size))


def join_states(parts: list[dict[str, np.ndarray]], size: int) -> dict[str, np.ndarray]:
    """The state of a collector of all members, from those of collectors of some each, ``size`` environments
    in every one."""
    joined = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        found = re.fullmatch(r"pool/(\d+)/(.*)", name)
        if found is None:
            joined[name] = np.concatenate(values)
        else:
            number, key = int(found[1]), found[2]
            joined |= {f"pool/{number + i * size}/{key}": value for i, value in enumerate(values)}
    return joined


def state_part(state: dict[str, np.ndarray], own: range, total: int, size: int) -> dict[str, np.ndarray]:
    """The part of ``total`` members' collector state that belongs to ``own``, which have ``size``
    environments."""
    first, part = own.start * size // len(own), {}
    for name, value in state.items():
        found = re.fullmatch(r"pool/(\d+)/(.*)", name)
        if found is None:
            each = len(value) // total
            part[name] = value[own.start * each : own.stop * each]
        elif first <= int(found[1]) < first + size:
            part[f"pool/{int(found[1]) - first}/{found[2]}"] = value
    return part


def host_seed(seed: int, purpose: int, index: int) -> int:
    """Seed of one host environment, independent between members, purposes and environments."""
    return int(np.random.SeedSequence([seed, purpose, index]).generate_state(1)[0])


def make_pool(source: Source, seeds: Seeds, num_envs: int, purpose: int) -> HostPool:
    """Host environments [S x E], member by member, of the members that live here, in this process."""
    numbers = _host_seeds(seeds, num_envs, purpose)
    return HostPool([source.make_host(seed, index) for index, seed in enumerate(numbers)])


def make_workers(
    source: Source, seeds: Seeds, num_envs: int, purpose: int, config: LoopConfig
) -> HostPool | WorkerPool:
    """The same environments in ``config.env_workers`` processes, or in this one where that is 0."""
    if config.env_workers == 0:
        return make_pool(source, seeds, num_envs, purpose)
    numbers = _host_seeds(seeds, num_envs, purpose)
    return WorkerPool(source.spec, source.make_host, numbers, config.env_workers, config.env_timeout)


def _host_seeds(seeds: Seeds, num_envs: int, purpose: int) -> list[int]:
    members = [seeds.seeds[i] for i in seeds.own]
    return [host_seed(member, purpose, i) for member in members for i in range(num_envs)]
