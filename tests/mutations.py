"""Seeded bugs that the fast tests must catch: sign flips, shifts by one, lost cuts of gradients, reused keys.

    python tests/mutations.py               # all, one after the other, in a copy of the repository
    python tests/mutations.py --only 3 7    # some of them
    python tests/mutations.py --named       # a bug that its own tests miss is not tried on the whole fast suite

Each bug names the tests that should catch it. First, these run without any bug and must pass, else their failure
would prove nothing. Prints a line for each bug, then caught / all; exit code 1 when under 95 % are caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """In ``file``, the text ``old``, which occurs once, becomes ``new``. tests: names of tests below
    ``tests/``, separated by blanks, and an expression for pytest's -k behind a "|"."""

    why: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # Losses and returns.
    Mutation("lambda weighs the value instead of the return", "mbrl/losses.py",
             "((1 - mix) * v + mix * future)",
             "((1 - mix) * future + mix * v)",
             "unit/test_losses.py::test_lambda_return_limits"),
    Mutation("rewards of the departure, not of the arrival", "mbrl/losses.py",
             "inputs = jax.tree.map(lambda x: x[1:],",
             "inputs = jax.tree.map(lambda x: x[:-1],",
             "unit/test_losses.py::test_lambda_return_limits"),
    Mutation("the dynamics KL trains the posterior", "mbrl/losses.py",
             "dyn = OneHot(sg(posterior.log_probs)).kl(prior).sum(-1)",
             "dyn = posterior.kl(prior).sum(-1)",
             "unit/test_losses.py::test_kl_gradients_are_split"),
    Mutation("prior and posterior swapped in the representation KL", "mbrl/losses.py",
             "rep = posterior.kl(OneHot(sg(prior.log_probs))).sum(-1)",
             "rep = OneHot(sg(prior.log_probs)).kl(posterior).sum(-1)",
             "unit/test_losses.py::test_kl_gradients_are_split"),
    Mutation("free nats clip from above", "mbrl/losses.py",
             '{"dyn": jnp.maximum(dyn, free_nats)',
             '{"dyn": jnp.minimum(dyn, free_nats)',
             "unit/test_losses.py::test_free_nats_clip_the_sum_of_the_factors"),
    Mutation("a time limit ends the return as a terminal does", "mbrl/losses.py",
             "cont = discount * (1.0 - is_terminal.astype(jnp.float32))",
             "cont = discount * (1.0 - is_last.astype(jnp.float32))",
             "unit/test_losses.py::test_replay_returns_at_episode_ends"),
    Mutation("a truncation does not cut the trace", "mbrl/losses.py",
             "lam * (1.0 - is_last.astype(jnp.float32)))",
             "lam)",
             "unit/test_losses.py::test_replay_returns_at_episode_ends"),
    Mutation("entropy is punished", "mbrl/losses.py",
             "-(log_prob * sg(advantage) + scale * entropy)",
             "-(log_prob * sg(advantage) - scale * entropy)",
             "unit/test_losses.py::test_reinforce_gradients"),
    Mutation("the policy's gradient reaches the advantage", "mbrl/losses.py",
             "-(log_prob * sg(advantage) + scale * entropy)",
             "-(log_prob * advantage + scale * entropy)",
             "unit/test_losses.py::test_reinforce_gradients"),
    Mutation("small returns are blown up", "mbrl/losses.py",
             "return jnp.maximum(1.0, self.high - self.low)",
             "return self.high - self.low",
             "unit/test_losses.py::test_return_norm"),
    Mutation("an imagined state weighs as if it were surely reached", "mbrl/losses.py",
             "return sg(jnp.cumprod(cont, 0))",
             "return sg(jnp.cumprod(cont, 0) / cont)",
             "unit/test_losses.py::test_trajectory_weight"),
    # Distributions and networks.
    Mutation("two-hot weights exchanged", "mbrl/distributions.py",
             "weight = (target - low) / (high - low)",
             "weight = (high - target) / (high - low)",
             "unit/test_distributions.py::test_twohot_round_trip"),
    Mutation("too much of the uniform", "mbrl/distributions.py",
             "+ unimix / logits.shape[-1]",
             "+ unimix",
             "unit/test_distributions.py::test_one_hot_frequencies"),
    Mutation("no straight-through gradient", "mbrl/distributions.py",
             "return onehot + (probs - sg(probs))",
             "return onehot",
             "unit/test_distributions.py::test_one_hot_straight_through"),
    Mutation("the simplices of SimNorm are strided", "mbrl/networks.py",
             "reshape(*x.shape[:-1], -1, group)\n    return jax.nn.softmax(groups)",
             "reshape(*x.shape[:-1], group, -1)\n    return jax.nn.softmax(groups)",
             "unit/test_tdmpc.py::test_simnorm"),
    Mutation("dropout in every layer", "mbrl/networks.py",
             "if i == 0 and self.dropout and",
             "if self.dropout and",
             "unit/test_tdmpc.py::test_dropout"),
    Mutation("RMSNorm centres", "mbrl/networks.py",
             "jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-4",
             "jnp.var(y, -1, keepdims=True) + 1e-4",
             "unit/test_networks.py::test_rms_norm"),
    # Optimisers.
    Mutation("adaptive clipping per element (as in rejax)", "mbrl/optimisers.py",
             "return g / jnp.maximum(1.0, jnp.linalg.norm(g.ravel()) / limit)",
             "return jnp.clip(g, -limit, limit)",
             "unit/test_optimisers.py::test_adaptive_clip_is_per_tensor"),
    Mutation("warm-up begins one update early", "mbrl/optimisers.py",
             "count / config.warmup)",
             "(count + 1) / config.warmup)",
             "unit/test_optimisers.py::test_warmup_then_constant"),
    Mutation("no bias correction of the squared gradients", "mbrl/optimisers.py",
             "eps_in_sqrt=False, bias_correction=True",
             "eps_in_sqrt=False, bias_correction=False",
             "unit/test_optimisers.py::test_laprop_against_numpy"),
    Mutation("biases and scales decay", "mbrl/optimisers.py",
             'weight_decay if name.endswith("kernel") else 0.0',
             "weight_decay",
             "unit/test_optimisers.py::test_weight_decay"),
    # Replay and collecting.
    Mutation("the newest sequence is never sampled", "mbrl/replay.py",
             "oldest, inserted - length + 1)",
             "oldest, inserted - length)",
             "unit/test_replay.py::test_uniform_sampling"),
    Mutation("sequences cross the write head", "mbrl/replay.py",
             "oldest = jnp.maximum(0, inserted - capacity)",
             "oldest = jnp.maximum(0, inserted - capacity - 1)",
             "unit/test_replay.py::test_replay_against_a_list"),
    Mutation("one key for environments and starts", "mbrl/replay.py",
             "env_key, start_key = jax.random.split(key)",
             "env_key, start_key = key, key",
             "unit/test_replay.py::test_uniform_sampling"),
    Mutation("an abandoned episode seems to go on", "mbrl/replay.py",
             "is_last=traj.is_last | ended,",
             "is_last=traj.is_last,",
             "unit/test_replay.py::test_replay_against_a_list"),
    Mutation("latents are written to the row before", "mbrl/replay.py",
             "time = sampled.time[-x.shape[0] :]",
             "time = sampled.time[: x.shape[0]]",
             "unit/test_replay.py::test_write_latent"),
    Mutation("images that came while others were gathered are missed", "mbrl/host_replay.py",
             "added % self.clock.capacity).any(1)",
             "added % self.clock.capacity).all(1)",
             "equivalence/test_replay_place.py::test_rows_that_come_after_the_first_batch_was_gathered"),
    Mutation("the host forgets which sequences were served", "mbrl/host_replay.py",
             "self.served = burst.drawn.result()[0]",
             "pass",
             "equivalence/test_replay_place.py::test_training_is_bit_equal"),
    Mutation("the first action of an episode is the last of the one before", "mbrl/collect.py",
             "jnp.where(ended[:, None], 0.0, action),",
             "action,",
             "equivalence/test_programs.py::test_collectors_give_the_same_rows equivalence/test_programs.py::test_rows"),
    Mutation("returns run on over episodes", "mbrl/collect.py",
             "jnp.where(ended, 0.0, carry.episode_return) + timestep.reward",
             "carry.episode_return + timestep.reward",
             "equivalence/test_programs.py::test_collectors_give_the_same_rows equivalence/test_programs.py::test_rows"),
    Mutation("the simulators of a resumed run start afresh", "mbrl/collect.py",
             'self.pool.set_state({k[5:]: v for k, v in state.items() if k.startswith("pool/")})',
             "pass",
             "equivalence/test_programs.py::test_host_collector_resumes"),
    Mutation("a fault of an environment counts as a terminal", "mbrl/envs/pool.py",
             "is_terminal &= ~faulty",
             "is_terminal |= faulty",
             "unit/test_envs_pool.py::test_fault_truncates_only_its_own_environment"),
    Mutation("evaluation counts rewards after the end", "mbrl/evaluation.py",
             "returns = returns + jnp.where(done, 0.0, timestep.reward)",
             "returns = returns + timestep.reward",
             "unit/test_evaluation.py::test_device_counts_whole_episodes_and_nothing_after_them"),
    Mutation("every evaluation has other start states", "mbrl/evaluation.py",
             "pool.set_state(start)  #",
             "pass  #",
             "unit/test_evaluation.py::test_host_counts_whole_episodes_and_nothing_after_them"),
    # World models.
    Mutation("the recurrent gate is inverted", "world_models/rssm.py",
             "return update * cand + (1 - update) * deter",
             "return (1 - update) * cand + update * deter",
             "unit/test_golden.py::test_rssm"),
    Mutation("the update gate has no bias", "world_models/rssm.py",
             "jax.nn.sigmoid(update - 1)",
             "jax.nn.sigmoid(update)",
             "unit/test_golden.py::test_rssm"),
    Mutation("memory survives an episode's start", "world_models/rssm.py",
             'deter, stoch = (clear(is_first, state[name]) for name in ("deter", "stoch"))',
             'deter, stoch = state["deter"], clear(is_first, state["stoch"])',
             "conformance/test_world_models.py::test_the_past_is_forgotten_at_is_first | rssm"),
    Mutation("imagination starts from the posterior's prediction", "world_models/rssm.py",
             'call(params, "prior", deter).sample(key).astype(dtype)}\n\n    return',
             'state["stoch"]}\n\n    return',
             "conformance/test_world_models.py::test_imagination_draws_its_latents | rssm"),
    Mutation("a time limit teaches the continue head", "mbrl/latent_model.py",
             "target = (1.0 - traj.is_terminal.",
             "target = (1.0 - traj.is_last.",
             "conformance/test_world_models.py::test_continue_head_learns_the_discount | rssm"),
    Mutation("the scan forgets that an episode began", "mbrl/recurrence.py",
             "jnp.where(first[..., None], reset, state) + b",
             "state + b",
             "unit/test_recurrence.py::test_resets_are_exact"),
    Mutation("acting with a state-space model forgets that an episode began", "world_models/s4wm.py",
             "state = jnp.where(is_first[..., None], reset, state)",
             "state = state",
             "conformance/test_world_models.py::test_sequence_mode_equals_step_mode | s4wm"),
    Mutation("imagination sees one step more than the window", "world_models/transformer.py",
             "(age + i + 1 < window)",
             "(age + i < window)",
             "conformance/test_world_models.py::test_imagination_along_the_taken_actions | transformer"),
    Mutation("a query does not see itself", "world_models/transformer.py",
             "seen = (age[:, None] >= 0) & (age[:, None] < visible)",
             "seen = (age[:, None] > 0) & (age[:, None] < visible + 1)",
             "conformance/test_world_models.py::test_sequence_mode_equals_step_mode | transformer"),
    Mutation("the modes' inputs are not normalised", "world_models/koopman.py",
             "return self.spectrum()[1] * jax.lax.complex(real, imag)",
             "return jax.lax.complex(real, imag)",
             "unit/test_koopman.py::test_dynamics_against_numpy"),
    # Dreamer.
    Mutation("acting and imagining with one key", "mbrl/imagination.py",
             "act_key, step_key = jax.random.split(key)",
             "act_key, step_key = key, key",
             "unit/test_keys.py::test_rollout"),
    Mutation("the slow critic is the critic (as in JaxGCRL)", "mbrl/agents/dreamer.py",
             'optax.incremental_update(params["critic"], train.slow, config.slow_rate)',
             'optax.incremental_update(params["critic"], train.slow, 1.0)',
             "conformance/test_agents.py::test_moving_averages"),
    Mutation("the average follows the policy at once", "mbrl/agents/dreamer.py",
             "average, 1 - config.actor_average)",
             "average, config.actor_average)",
             "conformance/test_agents.py::test_moving_averages"),
    Mutation("behaviour learning changes the world model", "mbrl/agents/dreamer.py",
             'frozen = sg(params["model"])',
             'frozen = params["model"]',
             "conformance/test_agents.py::test_behaviour_does_not_touch_the_model"),
    Mutation("advantages are not normalised", "mbrl/agents/dreamer.py",
             "advantage = (returns - baseline[:-1]) / norm.scale",
             "advantage = returns - baseline[:-1]",
             "conformance/test_agents.py::test_advantages_are_measured_by_the_spread_of_returns"),
    Mutation("the critic learns across the end of an episode", "mbrl/agents/dreamer.py",
             "weight = 1.0 - traj.is_last[:-1].astype(jnp.float32)",
             "weight = jnp.ones_like(traj.reward[:-1])",
             "conformance/test_agents.py::test_the_critic_learns_nothing_across_the_end_of_an_episode"),
    Mutation("training begins with the latent of the wrong row", "mbrl/agents/dreamer.py",
             "state = jax.tree.map(lambda x: x[0], traj.latent)",
             "state = jax.tree.map(lambda x: x[1], traj.latent)",
             "conformance/test_agents.py::test_context_row"),
    # TD-MPC2.
    Mutation("the target takes the larger of two critics", "mbrl/agents/tdmpc.py",
             "features, action).mean().min(0)",
             "features, action).mean().max(0)",
             "unit/test_tdmpc.py::test_model_loss"),
    Mutation("the target comes from the critics that learn", "mbrl/agents/tdmpc.py",
             "values(two_of(train.target, pair_key)",
             'values(two_of(train.params["critic"], pair_key)',
             "unit/test_tdmpc.py::test_model_loss"),
    Mutation("the target critics follow the critics before the update", "mbrl/agents/tdmpc.py",
             'optax.incremental_update(learned["critic"], train.target',
             'optax.incremental_update(train.params["critic"], train.target',
             "unit/test_tdmpc.py::test_critics_learn_from_the_latest_and_policy_from_them"),
    Mutation("the policy's entropy is punished", "mbrl/agents/tdmpc.py",
             "-value / scale - config.entropy * entropy",
             "-value / scale + config.entropy * entropy",
             "unit/test_tdmpc.py::test_policy_loss"),
    Mutation("a terminal bootstraps", "mbrl/losses.py",
             "discount * (1.0 - is_terminal.astype(jnp.float32)) * next_value",
             "discount * next_value",
             "unit/test_tdmpc.py::test_model_loss"),
    Mutation("the first transition weighs rho", "mbrl/losses.py",
             "rho ** jnp.maximum(age - 1.0, 0.0)",
             "rho ** jnp.maximum(age * 1.0, 0.0)",
             "unit/test_tdmpc.py::test_ages_and_weights"),
    Mutation("consistency pulls the encoder to the prediction", "world_models/tdmpc.py",
             "(predicted - sg(z))",
             "(predicted - z)",
             "unit/test_tdmpc.py::test_consistency_moves_the_prediction_not_its_target"),
    Mutation("the reward is that of the latent it arrives at", "world_models/tdmpc.py",
             "reward_dist(params, state.source, state.task, state.action)",
             "reward_dist(params, state.z, state.task, state.action)",
             "unit/test_tdmpc.py::test_prediction_follows_the_taken_actions"),
    Mutation("targets of all tasks have the discount of the first", "mbrl/agents/tdmpc.py",
             "jnp.asarray(gammas)[traj.obs[TASK]]",
             "jnp.asarray(gammas)[0]",
             "unit/test_multitask.py::test_targets_and_entropy_are_those_of_each_task"),
    Mutation("the entropy counts actions that a task does not have", "mbrl/agents/tdmpc.py",
             "count = dist.mask.sum(-1) if spec.tasks else size",
             "count = size",
             "unit/test_multitask.py::test_targets_and_entropy_are_those_of_each_task"),
    Mutation("a plan goes on where termination is likely", "mbrl/agents/tdmpc.py",
             "> 0.5 * discount, discount, 0.0)",
             "> -1, discount, 0.0)",
             "unit/test_tdmpc.py::test_a_plan_ends_where_termination_is_likely"),
    # Planners.
    Mutation("the value behind the horizon is not discounted", "mbrl/planning.py",
             "(step[0] + step[1] * score, None)",
             "(step[0] + score, None)",
             "unit/test_planning.py::test_the_score_of_a_rollout"),
    Mutation("a plan is scored by the states it departs from", "mbrl/planning.py",
             "said = simulator.predict(params, jax.tree.map(lambda x: x[1:], states))",
             "said = simulator.predict(params, jax.tree.map(lambda x: x[:-1], states))",
             "unit/test_planning.py::test_the_score_of_a_rollout"),
    Mutation("the worst particles are the best", "mbrl/planning.py",
             "jnp.sort(scores, 1)[:, :tail]",
             "jnp.sort(scores, 1)[:, -tail:]",
             "unit/test_planning.py::test_particles_and_risk"),
    Mutation("a score that is not finite wins", "mbrl/planning.py",
             "scores = jnp.where(finite, scores, -jnp.inf)",
             "scores = jnp.where(finite, scores, jnp.inf)",
             "unit/test_planning.py::test_scores_that_are_not_finite_never_win"),
    Mutation("a new episode begins with the plan of the last", "mbrl/planning.py",
             "warm = where_env(is_first, init(batch), warm)",
             "warm = where_env(is_first & False, init(batch), warm)",
             "unit/test_planning.py::test_the_warm_start_is_forgotten_at_is_first"),
    Mutation("the first action of a plan is done again and again", "mbrl/planning.py",
             "jnp.arange(batch), executed - warm.left]",
             "jnp.arange(batch), 0]",
             "unit/test_planning.py::test_blocks_and_replanning"),
    Mutation("the worst candidates are the elites", "planners/common.py",
             "scores, index = jax.lax.top_k(scores, count)",
             "scores, index = jax.lax.top_k(-scores, count)",
             "unit/test_planning.py::test_mppi_step_as_in_tdmpc2"),
    Mutation("the next search begins with the plan unshifted", "planners/common.py",
             "jnp.concatenate([sequence[steps:], tail])",
             "sequence",
             "unit/test_planning.py"),
    Mutation("the temperature divides", "planners/mppi.py",
             "jax.nn.softmax(config.temperature * scores)",
             "jax.nn.softmax(scores / config.temperature)",
             "unit/test_planning.py::test_mppi_step_as_in_tdmpc2"),
    Mutation("the search collapses to a point", "planners/mppi.py",
             "std = jnp.clip(std, config.min_std, config.max_std)",
             "std = jnp.clip(std, 0.0, config.max_std)",
             "unit/test_planning.py::test_mppi_spread_has_limits"),
    Mutation("old and new mean exchanged in CEM", "planners/cem.py",
             "config.smoothing * old + (1 - config.smoothing) * new",
             "(1 - config.smoothing) * old + config.smoothing * new",
             "unit/test_planning.py::test_cem_step_as_in_pets"),
    Mutation("iCEM's noise is white", "planners/icem.py",
             "frequency ** (-beta / 2)",
             "frequency ** (0 * beta)",
             "unit/test_planning.py::test_icem_noise"),
    Mutation("iCEM forgets its elites", "planners/icem.py",
             "pool, scores = jnp.concatenate([candidates, search.kept]), jnp.concatenate([scores, search.scores])",
             "pool = candidates",
             "unit/test_planning.py::test_icem_keeps_elites_and_shrinks"),
    # The loop.
    Mutation("updates that are not finite are accepted", "mbrl/programs.py",
             "accept = good & ~health.frozen",
             "accept = ~health.frozen",
             "equivalence/test_seeds.py::test_nan_parameters_stay_in_their_seed equivalence/test_seeds.py::test_a_bad_batch_never_reaches_the_parameters"),
    Mutation("latents of a rejected update are stored", "mbrl/programs.py",
             "kept = jax.tree.map(lambda new, old: jnp.where(accept, new, old), info.latent, stored)",
             "kept = info.latent",
             "equivalence/test_seeds.py::test_a_bad_batch_never_reaches_the_parameters"),
    Mutation("a seed freezes one update late", "mbrl/programs.py",
             "consecutive >= freeze_after",
             "consecutive > freeze_after",
             "equivalence/test_seeds.py::test_a_seed_freezes_at_the_update_that_was_one_too_many"),
    Mutation("sampling and update share a key", "mbrl/programs.py",
             "sample_key, update_key = jax.random.split(key)",
             "sample_key, update_key = key, key",
             "unit/test_keys.py::test_programs"),
    Mutation("every chunk trains with the keys of the first", "mbrl/programs.py",
             "update(state, key, iteration + i)",
             "update(state, key, i)",
             "equivalence/test_chunks.py"),
    Mutation("seeds are numbered from 0", "mbrl/seeds.py",
             "return make(np.array(self.seeds))",
             "return make(np.arange(len(self.seeds)))",
             "equivalence/test_seeds.py::test_members_do_not_depend_on_the_number_of_seeds"),
    Mutation("updates are counted from the start of prefill", "mbrl/programs.py",
             "self.pretrain + (iteration - self.prefill) * self.updates",
             "self.pretrain + iteration * self.updates",
             "equivalence/test_programs.py::test_clock_keeps_the_train_ratio equivalence/test_programs.py::test_burst_of_updates_counts_from_the_first_iteration_that_learns"),
    # Bookkeeping.
    Mutation("checkpoints are cast to another dtype", "mbrl/checkpoints.py",
             'for field in ("shape", "dtype"):',
             'for field in ("shape",):',
             "reliability/test_checkpoints.py::test_what_does_not_fit_is_refused_and_never_cast"),
    Mutation("altered files are not noticed", "mbrl/checkpoints.py",
             "if found != expected:\n            raise Damaged",
             "if False:\n            raise Damaged",
             "reliability/test_checkpoints.py::test_every_damaged_file_is_found_and_the_previous_step_used"),
    Mutation("a resumed log forgets the row of the checkpoint", "mbrl/logger.py",
             "if at <= step))",
             "if at < step))",
             "unit/test_logger.py::test_resume_has_no_step_twice"),
    Mutation("episodes before a stop are not counted after it", "mbrl/train.py",
             'monitor.set_pending(meta["pending"])',
             'meta.pop("pending")',
             "reliability/test_interruption.py::test_a_signal_saves_and_the_run_goes_on_exactly reliability/test_interruption.py::test_a_kill_loses_at_most_one_interval"),
    Mutation("two processes share a run folder", "mbrl/run_folder.py",
             "fcntl.LOCK_EX | fcntl.LOCK_NB",
             "fcntl.LOCK_SH | fcntl.LOCK_NB",
             "unit/test_run_folder.py::test_a_second_process_is_refused_and_a_stale_lock_recovered"),
    Mutation("the IQM trims a third", "mbrl/statistics.py",
             "cut = int(0.25 * x.size)",
             "cut = int(0.34 * x.size)",
             "unit/test_statistics.py::test_iqm_is_scipys_trim_mean_as_in_rliable"),
    # PETS.
    Mutation("TS-infinity draws another member at every step", "world_models/ensemble.py",
             "member = jnp.where(keep, state.member, drawn)",
             "member = drawn",
             "unit/test_ensemble.py::test_who_imagines_a_rollout"),
    Mutation("held-out transitions are learned from", "world_models/ensemble.py",
             "jnp.where(held[..., None], 0, weights)",
             "weights",
             "unit/test_ensemble.py::test_bootstrap_weights"),
    Mutation("the elites are the worst members", "world_models/ensemble.py",
             'top_k(-params["statistics"]["error"]',
             'top_k(params["statistics"]["error"]',
             "unit/test_ensemble.py::test_elites_have_the_smallest_errors"),
    Mutation("plans explore in evaluation too", "mbrl/agents/planning.py",
             'explore is None or mode == "eval"',
             "explore is None",
             "unit/test_uncertainty.py | exploration"),
]  # fmt: skip


def copy(target: Path) -> None:
    """The tracked and new files of the repository, as they are on disk."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def arguments(tests: str) -> list[str]:
    """Of pytest, for the tests of a mutation."""
    names, _, words = tests.partition("|")
    return [f"tests/{name}" for name in names.split()] + (["-k", words.strip()] if words else [])


def pytest(folder: Path, timeout: float, *more: str) -> tuple[int, str]:
    """Exit code and the first test that failed; tests that do not end have failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *more]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return 1, "the tests did not end"
    if done.returncode not in (0, 1):  # no test has this name, or pytest itself failed
        raise SystemExit(
            f"pytest could not run {' '.join(more)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0].partition(" - ")[0].split("/", 1)[-1] if failed else ""


def check_sound(mutations: list[Mutation], folder: Path, timeout: float) -> None:
    """SystemExit unless the tests of these mutations pass without them."""
    names: dict[str, set[str]] = {}
    for mutation in mutations:
        tests, _, words = mutation.tests.partition("|")
        names.setdefault(words, set()).update(tests.split())
    for words, tests in names.items():
        code, failed = pytest(folder, timeout, *arguments(f"{' '.join(sorted(tests))}|{words}".rstrip("|")))
        if code:
            raise SystemExit(f"without any bug, {failed} fails")


@contextmanager
def planted(mutation: Mutation, folder: Path):
    """The bug is in the copy in ``folder`` meanwhile."""
    path = folder / mutation.file
    text = path.read_text()
    if (count := text.count(mutation.old)) != 1:
        raise SystemExit(f"{mutation.file} holds this {count} times, it must be once: {mutation.old}")
    path.write_text(text.replace(mutation.old, mutation.new))
    # Python keeps compiled modules by size and second of the last change: never those of another bug.
    shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
    try:
        yield
    finally:
        path.write_text(text)
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)


def catch(mutation: Mutation, folder: Path, timeout: float, whole: bool) -> str:
    """The first test that fails with the bug, or ""."""
    with planted(mutation, folder):
        code, failed = pytest(folder, timeout, *arguments(mutation.tests))
        if code == 0 and whole:
            code, failed = pytest(folder, 10 * timeout)
    return failed if code else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutations, from 1")
    parser.add_argument("--named", action="store_true", help="run no other tests than those that a bug names")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests that a bug names")
    options = parser.parse_args()
    numbers = options.only or list(range(1, len(MUTATIONS) + 1))
    found = 0
    with tempfile.TemporaryDirectory() as target:
        folder = Path(target)
        copy(folder)
        check_sound([MUTATIONS[number - 1] for number in numbers], folder, 10 * options.timeout)
        for number in numbers:
            mutation, began = MUTATIONS[number - 1], time.perf_counter()
            failed = catch(mutation, folder, options.timeout, not options.named)
            found += bool(failed)
            seconds = time.perf_counter() - began
            print(f"{number:3} {mutation.why:66} {failed or 'SURVIVED'} ({seconds:.0f} s)", flush=True)
    print(f"{found}/{len(numbers)} caught")
    raise SystemExit(found < 0.95 * len(numbers))


if __name__ == "__main__":
    main()
