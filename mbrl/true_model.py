"""Planning with the true dynamics: an environment written in JAX as simulator, and acting in it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mbrl.planning import Objective, Planner
from mbrl.types import Array, JaxEnv, Prediction, Simulator, State, TimeStep


class EnvState(NamedTuple):
    """An environment's state and what it shows there, [..., ]."""

    env: State
    timestep: TimeStep


def simulator_of_env(env: JaxEnv) -> Simulator:
    """Rolls the environment itself. It has no parameters; time limits do not end a plan, terminals do."""

    def imagine_step(params, ctx, state: EnvState, action, key):
        step, lead = env.step, action.shape[:-1]
        for _ in lead:
            step = jax.vmap(step)
        return EnvState(*step(state.env, action, jax.random.split(key, lead)))

    def predict(params, state: EnvState):
        return Prediction(state.timestep.reward, 1.0 - state.timestep.is_terminal, {})

    def features(params, state: EnvState):
        lead = state.timestep.reward.shape
        obs = [x.reshape(*lead, -1) for x in jax.tree.leaves(state.timestep.obs)]
        return jnp.concatenate(obs, -1)

    return Simulator(
        imagine_step=imagine_step,
        predict=predict,
        features=features,
    )


def control(
    env: JaxEnv,
    planner: Planner,
    objective: Objective,
    key: Array,
    num_envs: int,
    steps: int,
    warm: bool = True,
) -> tuple[Array, dict[str, Array]]:
    """Rewards [T, E] of ``steps`` steps of ``num_envs`` episodes, and the planner's traces [T, I, E].

    warm: whether a search begins where the last one ended. Rewards after an episode's end are 0.
    """
    reset_key, loop_key = jax.random.split(key)
    first = EnvState(*jax.vmap(env.reset)(jax.random.split(reset_key, num_envs)))

    def body(carry, inputs):
        state, plan, done = carry
        t, key = inputs
        plan_key, step_key = jax.random.split(key)
        fresh = jnp.full(num_envs, (t == 0) | (not warm))
        action, plan, traces = planner.plan((), objective, plan, state, fresh, plan_key, "eval")
        state = EnvState(*jax.vmap(env.step)(state.env, action, jax.random.split(step_key, num_envs)))
        reward = jnp.where(done, 0.0, state.timestep.reward)
        return (state, plan, done | state.timestep.is_last), (reward, traces)

    carry = first, planner.init(num_envs), jnp.zeros(num_envs, bool)
    _, (rewards, traces) = jax.lax.scan(body, carry, (jnp.arange(steps), jax.random.split(loop_key, steps)))
    return rewards, traces
