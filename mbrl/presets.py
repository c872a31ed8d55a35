"""Named settings of the agents: the published sizes, and small ones for a CPU. Flags override any field.

A preset maps the parts of an experiment's config to field values. Of Dreamer, "model" holds fields that
every latent world model has, "rssm" and the like those of one backbone; "agent/transformer" and the like what
behaviour needs with that backbone; "camera" those of pictures; "search" holds settings by planner.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Preset = dict[str, dict[str, Any]]


ATTENTION = ("transformer", "storm", "transdreamer")
FRAME = ("s4wm", "r2i", "koopman", *ATTENTION)  # with a posterior from the frame alone


def _attention(fields: dict[str, Any]) -> Preset:
    """The transformers, whose memory is too large to store with every step."""
    without = {f"agent/{name}": {"replay_context": False} for name in ATTENTION}
    return {name: dict(fields) for name in ATTENTION} | without


def _published(deter: int, hidden: int, classes: int) -> Preset:
    """DreamerV3 size presets (danijar/dreamerv3 configs.yaml); 32 latents and 8 blocks at every size. The
    loop is the one that made the published DMC curves: action repeat 2, train ratio 512."""
    return {
        "model": {"stoch": 32, "classes": classes, "units": hidden, "image_depth": hidden // 16},
        "rssm": {"deter": deter, "hidden": hidden, "blocks": 8},
        "s4wm": {"width": hidden, "hidden": hidden},
        "r2i": {"width": hidden, "hidden": hidden, "deter": deter},
        "koopman": {"width": hidden, "hidden": hidden, "modes": 2 * hidden},
        **_attention({"width": hidden, "hidden": hidden, "heads": max(4, hidden // 64)}),
        "agent": {"units": hidden},
        "optimiser": {},
        "loop": {},
        "search": {},
    }


SMALL_SEARCH: Preset = {
    "mppi": {"horizon": 5, "samples": 64, "elites": 16, "policy_samples": 24, "iterations": 3}
}
"""A planner for CPU cores beside a policy."""


def _small(deter: int, stoch: int, classes: int, layers: int) -> Preset:
    """For CPU cores: narrow and unblocked, a few random starts instead of all, the actor's gradient through
    the dynamics, Adam with a decaying learning rate. docs/results.md has the measurements behind it."""
    # Narrower than the GRU, because an MLP follows in every layer.
    stack = {"width": 3 * deter // 4, "hidden": deter, "layers": 2, "prior_layers": 1}
    return {
        "model": {
            "stoch": stoch,
            "classes": classes,
            "units": deter,
            "encoder_layers": layers,
            "decoder_layers": layers,
            "image_depth": deter // 16,
            "image_reading": "mlp",
            "bins": 63,
            "bin_limit": 8.0,
        },
        "rssm": {"deter": deter, "hidden": deter, "blocks": 1, "prior_layers": 1},
        "s4wm": stack | {"ssm_size": deter // 2, "ssm_blocks": 4},
        # Norms in front and an MLP in every layer, which R2I has not: so narrow a stack learns too slowly
        # without (docs/world_models.md).
        "r2i": stack
        | {"ssm_size": deter // 2, "ssm_blocks": 4, "deter": deter, "prenorm": True, "mlp": True},
        "koopman": {"width": deter, "hidden": deter, "modes": 2 * deter, "prior_layers": 1},
        **_attention(stack | {"heads": 4, "window": 16}),
        "agent": {
            "units": deter,
            "actor_layers": layers,
            "critic_layers": layers,
            "actor_grad": "dynamics",
            "actor_lr_scale": 0.3,
            "noise_correlation": 0.9,
            "imag_starts": 64,
            "replay_bootstrap": "value",
            "scale_rec": 10.0,
            "bins": 63,
            "bin_limit": 8.0,
        },
        "optimiser": {
            "name": "adam",
            "learning_rate": 1e-3,
            "warmup": 200,
            "decay": "linear",
            "agc": 0.0,
            "clip_norm": 10.0,
            "eps": 1e-8,
        },
        "loop": {
            "num_envs": 4,
            "collect_steps": 8,
            "batch_size": 16,
            "batch_length": 16,
            "train_ratio": 256.0,
            "prefill": 2000,
            "replay_size": 500_000,
        },
        "search": SMALL_SEARCH,
    }


def _s() -> Preset:
    """A latent inferred from the frame alone must say all of it, where RSSM's adds to what h predicts: it
    gets three times the bits or more, and dynamics that must predict them to a tenth of a nat."""
    preset = _small(deter=64, stoch=8, classes=4, layers=2)
    for name in FRAME:
        preset[name] |= {"stoch": 16, "classes": 8, "free_nats": 0.1}
        preset[f"agent/{name}"] = preset.get(f"agent/{name}", {}) | {"scale_rec": 30.0}
    preset["koopman"] |= {"stoch": 32}
    return preset


def _s_pixels() -> Preset:
    """`_s` for small pictures. Reconstruction weighs as much as that of states with RSSM: with a tenth of it,
    nothing but the mean picture is drawn for long (docs/pixels.md)."""
    preset = _s()
    for name in FRAME:
        preset[f"agent/{name}"] |= {"scale_rec": preset["agent"]["scale_rec"]}
    return preset | {"camera": {"size": 32}}


def _xs() -> Preset:
    preset = _small(deter=32, stoch=4, classes=4, layers=1)
    preset["agent"] |= {"imag_starts": 16, "horizon": 10}
    preset["loop"] |= {"batch_size": 8, "train_ratio": 64.0, "prefill": 1000}
    return preset


def _memory() -> Preset:
    """For memory tasks, whose episodes are short and whose actions are discrete. Attention sees 128 steps."""
    preset = _small(deter=64, stoch=8, classes=4, layers=1)
    preset["model"] |= {"bins": 15, "bin_limit": 1.0}
    for name in ("s4wm", "r2i", *ATTENTION):
        preset[name] |= {"width": 64}
    for name in ATTENTION:
        preset[name] |= {"window": 128}
    # One observation in an episode shows the cue and one reward asks for it: both must count.
    preset["agent"] |= {"actor_grad": "reinforce", "bins": 15, "bin_limit": 1.0, "scale_reward": 100.0}
    preset["loop"] |= {"batch_length": 64, "eval_episodes": 100}
    preset["optimiser"] |= {"decay": "constant"}
    preset["s4wm"] |= {"discretise": "unit"}
    preset["probe"] = {
        "scale_rec": 10.0,
        "scale_reward": 100.0,
        "optimiser": preset["optimiser"] | {"warmup": 0},
    }
    return preset


MEMORY = _memory()
"""For `experiments/memory.py`, which trains a world model alone by "probe", and for agents."""

DREAMER: dict[str, Preset] = {
    "xs": _xs(),
    "s": _s(),
    "memory": MEMORY,
    "s_pixels": _s_pixels(),
    "size1m": _published(deter=512, hidden=64, classes=4),
    "size12m": _published(deter=2048, hidden=256, classes=16),
    "size25m": _published(deter=3072, hidden=384, classes=24),
    "size50m": _published(deter=4096, hidden=512, classes=32),
    "size100m": _published(deter=6144, hidden=768, classes=48),
    "size200m": _published(deter=8192, hidden=1024, classes=64),
    "size400m": _published(deter=12288, hidden=1536, classes=96),
}


def _tdmpc(
    layers: int, encoder: int, units: int, latent: int, critics: int, search: Preset, loop: dict[str, Any]
) -> Preset:
    """Sizes of TD-MPC2. layers: hidden ones of the encoder."""
    return {
        "model": {"encoder_layers": layers, "encoder_units": encoder, "units": units, "latent": latent},
        "agent": {"units": units, "critics": critics},
        "search": search,
        "loop": {"prefill_random": True, "replay_online": False, "batch_length": 3} | loop,
    }


def _tdmpc_published(layers: int, encoder: int, units: int, latent: int, critics: int) -> Preset:
    """TD-MPC2 model sizes (nicklashansen/tdmpc2) with the schedule that made the published DMC curves: 2500
    random steps, 2500 updates, then one update per agent step."""
    loop = {
        "num_envs": 1,
        "batch_size": 256,
        "train_ratio": 768.0,
        "prefill": 2500,
        "pretrain": 2500,
        "replay_size": 1_000_000,
    }
    return _tdmpc(layers, encoder, units, latent, critics, {}, loop)


def _tdmpc_small() -> Preset:
    """For CPU cores: narrow, a higher learning rate that falls in the second half, one update per two agent
    steps. An eighth of the candidates and half of the iterations, but plans of five steps: the critics are
    the weakest part of what learned from so little (docs/results.md)."""
    loop = {
        "num_envs": 4,
        "batch_size": 128,
        "train_ratio": 192.0,
        "prefill": 2000,
        "pretrain": 1000,
        "replay_size": 500_000,
    }
    preset = _tdmpc(1, 128, 128, 64, 2, SMALL_SEARCH, loop)
    fast = {"learning_rate": 1e-3, "decay": "linear", "decay_start": 0.5, "final_fraction": 0.1}
    # At the published entropy weight and this learning rate, the policy's deviation runs into its upper limit
    # before the critics know anything, where tanh passes no gradient back.
    # The published 96 of several tasks would be wider than the latent.
    preset["model"] |= {"image_channels": 8, "task_size": 16}
    preset["agent"] |= {"dropout": 0.0, "entropy": 1e-5, "optimiser": fast, "actor_optimiser": fast}
    return preset


TDMPC: dict[str, Preset] = {
    "s": _tdmpc_small(),
    "1M": _tdmpc_published(1, 256, 384, 128, 2),
    "5M": _tdmpc_published(1, 256, 512, 512, 5),
    "19M": _tdmpc_published(2, 1024, 1024, 768, 5),
    "48M": _tdmpc_published(3, 1792, 1792, 768, 5),
    "317M": _tdmpc_published(4, 4096, 4096, 1376, 8),
}


def _pets(model: dict[str, Any], search: Preset, plan: dict[str, Any], loop: dict[str, Any]) -> Preset:
    """PETS: one environment, random actions first, then a plan for every step. Four frames per step in
    dm_control, so that a short plan sees far."""
    common = {"num_envs": 1, "action_repeat": 4, "batch_length": 4}
    loop = common | {"prefill_random": True, "replay_online": False} | loop
    return {"model": model, "agent": {}, "search": search, "plan": plan, "loop": loop}


SHORT = {"horizon": 25, "samples": 64, "elites": 8, "iterations": 3}

PETS: dict[str, Preset] = {
    # For CPU cores: narrow networks, short plans of few candidates, one particle for each member.
    "s": _pets(
        {"layers": 2, "units": 64},
        {name: SHORT for name in ("cem", "icem", "mppi")},
        {"particles": 5},
        {
            "batch_size": 64,
            "train_ratio": 256.0,
            "prefill": 500,
            "pretrain": 500,
            "eval_every": 5000,
            "eval_episodes": 3,
            "log_every": 1000,
        },
    ),
    # PETS' own sizes and planner; it learns all the time instead of for five epochs after each episode.
    "paper": _pets(
        {},
        {},
        {"particles": 20},
        {"batch_size": 64, "train_ratio": 256.0, "prefill": 500, "pretrain": 500},
    ),
}


class About(NamedTuple):
    """What to expect of a preset, on cartpole_swingup and 2 CPU cores without a GPU: docs/results.md and
    docs/performance.md have the measurements."""

    parameters: str
    cost: str
    reached: str


UNTRIED = "published size, not run here"
ABOUT: dict[str, dict[str, About]] = {
    "DreamerV3": {
        "xs": About("26 k", "not measured", "for tests; not meant to solve a task"),
        "s": About("110 k", "7 min for 80,000 frames", "859 after 80,000 frames (IQM of 3 runs)"),
        "memory": About("90 k", "not measured", "for memory tasks (docs/memory.md)"),
        "s_pixels": About(
            "0.5 M",
            "25 ms per update, 20 from the state",
            "pendulum_dense: 509 after 12,000 frames, state 530 (IQM of 3)",
        ),
        "size1m": About("0.6 M", "0.2 s per update of 16 x 64", "244 after 24,000 frames, changed for a CPU"),
        "size12m": About("9.7 M", "1.6 s per update of 16 x 64", "published: 500 after 100,000 frames"),
        "size25m": About("22 M", "for accelerators", UNTRIED),
        "size50m": About("39 M", "for accelerators", UNTRIED),
        "size100m": About("87 M", "for accelerators", UNTRIED),
        "size200m": About("154 M", "for accelerators", UNTRIED),
        "size400m": About("345 M", "for accelerators", UNTRIED),
    },
    "TD-MPC2": {
        "s": About("0.2 M", "9 min for 100,000 frames, one core", "838 after 100,000 frames (IQM of 5 runs)"),
        "1M": About("1.2 M", "for accelerators", UNTRIED),
        "5M": About("4.9 M", "for accelerators", "published: 839 after 100,000 frames"),
        "19M": About("18 M", "for accelerators", UNTRIED),
        "48M": About("47 M", "for accelerators", UNTRIED),
        "317M": About("312 M", "for accelerators", UNTRIED),
    },
    "PETS": {
        "s": About(
            "32 k", "1 min for 12,000 frames, one core", "811 after 12,000 frames (mean of 3 runs, iCEM)"
        ),
        "paper": About("0.5 M", "for accelerators", UNTRIED),
    },
}
"""By agent and preset, as ``python -m mbrl presets`` prints it."""
