"""Seeded bugs that the fast tests must catch: sign flips, shifts by one, lost cuts of gradients, reused keys.

    python tests/mutations.py            # all of them, one after the other, each in a copy of the repository
    python tests/mutations.py --only 3 7

Each mutation names the tests that a reader would expect to fail. Prints one line for each, then caught / all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """In ``file``, the text ``old``, which occurs once, becomes ``new``. tests: arguments of pytest."""

    why: str
    file: str
    old: str
    new: str
    tests: str


LOSSES, DISTRIBUTIONS, REPLAY = (
    "tests/unit/test_losses.py",
    "tests/unit/test_distributions.py",
    "tests/unit/test_replay.py",
)
OPTIMISERS, GOLDEN, AGENTS = (
    "tests/unit/test_optimisers.py",
    "tests/unit/test_golden.py",
    "tests/conformance/test_agents.py",
)
SEEDS, PROGRAMS, CHUNKS = (
    "tests/equivalence/test_seeds.py",
    "tests/equivalence/test_programs.py",
    "tests/equivalence/test_chunks.py",
)
ENSEMBLE = "tests/unit/test_ensemble.py"
MODELS = "tests/conformance/test_world_models.py -k rssm"

MUTATIONS = [
    Mutation("lambda weighs the value instead of the return", "mbrl/losses.py",
             "((1 - mix) * v + mix * future)", "((1 - mix) * future + mix * v)", f"{LOSSES} -k lambda"),
    Mutation("rewards of the departure, not of the arrival", "mbrl/losses.py",
             "inputs = jax.tree.map(lambda x: x[1:],", "inputs = jax.tree.map(lambda x: x[:-1],", f"{LOSSES} -k lambda"),
    Mutation("the dynamics KL trains the posterior", "mbrl/losses.py",
             "dyn = OneHot(sg(posterior.log_probs)).kl(prior).sum(-1)", "dyn = posterior.kl(prior).sum(-1)", f"{LOSSES} -k kl"),
    Mutation("prior and posterior swapped in the representation KL", "mbrl/losses.py",
             "rep = posterior.kl(OneHot(sg(prior.log_probs))).sum(-1)",
             "rep = OneHot(sg(prior.log_probs)).kl(posterior).sum(-1)", f"{LOSSES} -k kl"),
    Mutation("free nats clip from above", "mbrl/losses.py",
             '{"dyn": jnp.maximum(dyn, free_nats)', '{"dyn": jnp.minimum(dyn, free_nats)', f"{LOSSES} -k nats"),
    Mutation("a time limit ends the return as a terminal does", "mbrl/losses.py",
             "cont = discount * (1.0 - is_terminal.astype(jnp.float32))",
             "cont = discount * (1.0 - is_last.astype(jnp.float32))", f"{LOSSES} -k returns"),
    Mutation("entropy is punished", "mbrl/losses.py",
             "-(log_prob * sg(advantage) + scale * entropy)", "-(log_prob * sg(advantage) - scale * entropy)", f"{LOSSES} -k reinforce"),
    Mutation("the policy's gradient reaches the advantage", "mbrl/losses.py",
             "-(log_prob * sg(advantage) + scale * entropy)", "-(log_prob * advantage + scale * entropy)", f"{LOSSES} -k reinforce"),
    Mutation("small returns are blown up", "mbrl/losses.py",
             "return jnp.maximum(1.0, self.high - self.low)", "return self.high - self.low", f"{LOSSES} -k norm"),
    Mutation("two-hot weights exchanged", "mbrl/distributions.py",
             "weight = (target - low) / (high - low)", "weight = (high - target) / (high - low)", f"{DISTRIBUTIONS} -k twohot"),
    Mutation("too much of the uniform", "mbrl/distributions.py",
             "unimix / logits.shape[-1])", "unimix)", f"{DISTRIBUTIONS} -k unimix"),
    Mutation("no straight-through gradient", "mbrl/distributions.py",
             "return onehot + (probs - sg(probs))", "return onehot", f"{DISTRIBUTIONS} -k straight"),
    Mutation("adaptive clipping per element (as in rejax)", "mbrl/optimisers.py",
             "return g / jnp.maximum(1.0, jnp.linalg.norm(g.ravel()) / limit)", "return jnp.clip(g, -limit, limit)",
             f"{OPTIMISERS} -k clip"),
    Mutation("warm-up begins one update early", "mbrl/optimisers.py",
             "count / config.warmup)", "(count + 1) / config.warmup)", f"{OPTIMISERS} -k warmup"),
    Mutation("no bias correction of the squared gradients", "mbrl/optimisers.py",
             "eps_in_sqrt=False, bias_correction=True", "eps_in_sqrt=False, bias_correction=False", f"{OPTIMISERS} -k laprop"),
    Mutation("the newest sequence is never sampled", "mbrl/replay.py",
             "oldest, state.inserted - length + 1)", "oldest, state.inserted - length)", f"{REPLAY} -k uniform_sampling"),
    Mutation("sequences cross the write head", "mbrl/replay.py",
             "oldest = jnp.maximum(0, state.inserted - capacity)", "oldest = jnp.maximum(0, state.inserted - capacity - 1)",
             f"{REPLAY} -k list"),
    Mutation("one key for environments and starts", "mbrl/replay.py",
             "env_key, start_key = jax.random.split(key)", "env_key, start_key = key, key", f"{REPLAY} -k uniform_sampling"),
    Mutation("an abandoned episode seems to go on", "mbrl/replay.py",
             "is_last=traj.is_last | ended)", "is_last=traj.is_last)", f"{REPLAY} -k list"),
    Mutation("a fault of an environment counts as a terminal", "mbrl/envs/pool.py",
             "is_terminal &= ~faulty", "is_terminal |= faulty", "tests/unit/test_envs_pool.py"),
    Mutation("checkpoints are cast to another dtype", "mbrl/checkpoints.py",
             'for field in ("shape", "dtype"):', 'for field in ("shape",):', "tests/reliability/test_checkpoints.py -k fit"),
    Mutation("the recurrent gate is inverted", "world_models/rssm.py",
             "return update * cand + (1 - update) * deter", "return (1 - update) * cand + update * deter", f"{GOLDEN} -k rssm"),
    Mutation("memory survives an episode's start", "world_models/rssm.py",
             'deter = jnp.where(is_first[:, None], 0, state["deter"])', 'deter = state["deter"]', MODELS),
    Mutation("a time limit teaches the continue head", "mbrl/latent_model.py",
             "target = (1.0 - traj.is_terminal.", "target = (1.0 - traj.is_last.", f"{MODELS} and continue"),
    Mutation("acting and imagining with one key", "mbrl/imagination.py",
             "act_key, step_key = jax.random.split(key)", "act_key, step_key = key, key",
             "tests/unit/test_imagination.py tests/unit/test_keys.py"),
    Mutation("the slow critic is the critic (as in JaxGCRL)", "mbrl/agents/dreamer.py",
             'optax.incremental_update(params["critic"], train.slow, config.slow_rate)',
             'optax.incremental_update(params["critic"], train.slow, 1.0)', f"{AGENTS} -k moving"),
    Mutation("behaviour learning changes the world model", "mbrl/agents/dreamer.py",
             'frozen = sg(params["model"])', 'frozen = params["model"]', f"{AGENTS} -k touch"),
    Mutation("training begins with the latent of the wrong row", "mbrl/agents/dreamer.py",
             "state = jax.tree.map(lambda x: x[0], traj.latent)", "state = jax.tree.map(lambda x: x[1], traj.latent)",
             f"{AGENTS} -k context"),
    Mutation("updates that are not finite are accepted", "mbrl/programs.py",
             "accept = good & ~health.frozen", "accept = ~health.frozen", f"{SEEDS} -k batch or nan"),
    Mutation("every chunk trains with the keys of the first", "mbrl/programs.py",
             "key_i = stream(key, UPDATE, iteration + i)", "key_i = stream(key, UPDATE, i)", CHUNKS),
    Mutation("the first action of an episode is the last of the one before", "mbrl/collect.py",
             "jnp.where(ended[:, None], 0.0, action),", "action,", f"{PROGRAMS} -k rows or collectors"),
    Mutation("evaluation counts rewards after the end", "mbrl/evaluation.py",
             "returns = returns + jnp.where(done, 0.0, timestep.reward)", "returns = returns + timestep.reward",
             "tests/unit/test_evaluation.py"),
    Mutation("TS-infinity draws another member at every step", "world_models/ensemble.py",
             "member = jnp.where(keep, state.member, drawn)", "member = drawn", f"{ENSEMBLE} -k rollout"),
    Mutation("held-out transitions are learned from", "world_models/ensemble.py",
             "jnp.where(held[..., None], 0, weights)", "weights", f"{ENSEMBLE} -k weights"),
    Mutation("the elites are the worst members", "world_models/ensemble.py",
             'top_k(-params["statistics"]["error"]', 'top_k(params["statistics"]["error"]', f"{ENSEMBLE} -k elites"),
    Mutation("plans explore in evaluation too", "mbrl/agents/planning.py",
             'explore is None or mode == "eval"', "explore is None", "tests/unit/test_uncertainty.py -k exploration"),
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


def caught(mutation: Mutation, timeout: float) -> str:
    """How the mutation ended: the first failing test, or ``SURVIVED``."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        copy(target)
        path = target / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            raise SystemExit(f"{mutation.file} holds {text.count(mutation.old)} times: {mutation.old}")
        path.write_text(text.replace(mutation.old, mutation.new))
        files, _, words = mutation.tests.partition(" -k ")
        command = [sys.executable, "-m", "pytest", *files.split(), "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-k", words] if words else []
        try:
            done = subprocess.run(
                command,
                cwd=target,
                env=os.environ | {"PYTHONPATH": str(target)},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return "caught: the tests did not end"
    if done.returncode == 1:
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return f"caught: {failed[0][:110] if failed else 'a test failed'}"
    if done.returncode == 0:
        return "SURVIVED"
    raise SystemExit(f"pytest could not run {mutation.tests}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutations, from 1")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests of one mutation")
    options = parser.parse_args()
    numbers = options.only or range(1, len(MUTATIONS) + 1)
    found = 0
    for number in numbers:
        mutation, began = MUTATIONS[number - 1], time.perf_counter()
        result = caught(mutation, options.timeout)
        found += result.startswith("caught")
        print(f"{number:2} {mutation.why}: {result} ({time.perf_counter() - began:.0f} s)", flush=True)
    print(f"{found}/{len(numbers)} caught")
    raise SystemExit(found < 0.95 * len(numbers))


if __name__ == "__main__":
    main()
