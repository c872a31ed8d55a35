"""The commands `experiments/dreamer_dmc.py` and `tdmpc_dmc.py`: bad input ends in one sentence, a run leaves
what it promises, a resumed run equals one that was never stopped."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import mbrl
from mbrl import checkpoints
from mbrl.errors import UserError
from mbrl.logger import read_metrics
from mbrl.seeds import use_determinism

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TINY = """
    --preset xs --loop.num-envs 2 --loop.prefill 64 --loop.batch-size 4 --loop.batch-length 8
    --loop.train-ratio 8 --loop.collect-steps 8 --loop.eval-episodes 2 --loop.log-every 64
    --loop.eval-every 192 --loop.checkpoint-every 192 --agent.imag-starts 4 --agent.horizon 3
""".split()  # noqa: SIM905
# The checkpoint before the last is the one after prefill, before the burst of updates.
TINY_TDMPC = """
    --preset s --loop.num-envs 2 --loop.prefill 64 --loop.pretrain 3 --loop.batch-size 4
    --loop.train-ratio 6 --loop.collect-steps 8 --loop.eval-episodes 2 --loop.log-every 32
    --loop.eval-every 0 --loop.checkpoint-every 128 --model.latent 8 --model.units 8
    --model.encoder-units 8 --agent.units 8 --search.samples 4 --search.elites 2
    --search.policy-samples 1 --search.iterations 2
""".split()  # noqa: SIM905
TINY_PETS = """
    --preset s --loop.num-envs 2 --loop.prefill 64 --loop.pretrain 3 --loop.batch-size 4
    --loop.train-ratio 8 --loop.collect-steps 8 --loop.eval-episodes 2 --loop.log-every 64
    --loop.eval-every 0 --loop.checkpoint-every 192 --model.units 8 --model.layers 1 --search.horizon 2
    --search.samples 4 --search.elites 2 --search.iterations 2
""".split()  # noqa: SIM905


def load(script: str):
    """``main(argv)`` of a script, run in this process."""
    spec = importlib.util.spec_from_file_location(f"{script}_command", EXPERIMENTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def command():
    return load("dreamer_dmc")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task walker_wlk", ["--task", "walker_wlk", "walker_walk"]),
        ("--preset size13m", ["--preset", "size13m", "size12m"]),
        ("--world-model rsm", ["--world-model", "rsm", "rssm"]),
        ("--loop.train-ratio 0.33333", ["loop.train_ratio", "0.33333"]),
        ("--loop.train-ratio -1", ["loop.train_ratio", "-1"]),
        ("--loop.collect-steps 3 --loop.train-ratio 5", ["loop.collect_steps", "multiple of"]),
        ("--steps 100", ["steps", "100", "prefill"]),
        ("--num-seeds 0", ["num_seeds", "0"]),
        ("--agent.bins 4", ["agent.bins", "4", "odd"]),
        ("--model.deter 10 --model.blocks 4", ["model.deter", "10", "model.blocks"]),
        ("--agent.replay-bootstrap imagined", ["agent.replay_bootstrap", "agent.imag_starts"]),
        ("--agent.lam 1.5", ["agent.lam", "1.5", "between 0 and 1"]),
        ("--agent.optimiser.learning-rate nan", ["optimiser.learning_rate", "nan"]),
        ("--task probe_action_discrete", ["agent.actor_grad", "dynamics", "discrete"]),
        ("--task tmaze:5 --obs pixels", ["--task", "tmaze:5", "no pictures", "pendulum"]),
        (
            "--task pendulum --obs pixels --camera.size 36 --model.image-reading conv",
            ["36 x 36", "multiples of"],
        ),
        (
            "--task pendulum --obs both --model.image-reading conv --model.image-blocks 3",
            ["model.image_blocks", "3", "divide"],
        ),
        ("--planner mpi", ["--planner", "mpi", "mppi", "none"]),
        ("--planner mppi --search.samples 8", ["search.policy_samples", "24", "search.samples"]),
        ("--debug --num-seeds 2", ["--debug", "num_seeds is 2"]),
        ("--loop.replay-size 4", ["loop.replay_size", "4"]),
        ("--task pendulum --loop.env-workers 2", ["loop.env_workers is 2", "pendulum", "must be 0"]),
        ("--loop.env-timeout 0", ["loop.env_timeout", "above 0"]),
        ("--task cartpole_swingup,cup_catch", ["cartpole_swingup,cup_catch", "2 tasks", "only TD-MPC2"]),
        ("--task cartpole_swingup,pendulum", ["--task", "on the host"]),
        ("--task cup_catch,cup_catch", ["cup_catch", "twice"]),
        ("--resume", ["run"]),
        ("--seed x", ["--seed", "whole number", "'x'"]),
    ],
)
def test_bad_input_is_one_sentence(command, tmp_path, flags, words):
    """Refused before anything is compiled or written, naming field, value and what is allowed."""
    folder = tmp_path / "run"
    extra = ["--steps", "20000"] if "--steps" not in flags else []
    with pytest.raises(UserError) as error:
        command(["--preset", "xs", *extra, "--run-dir", str(folder), *flags.split()])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not folder.exists()


@pytest.mark.parametrize("flags", ["--stps 3", "--agent.entropy x", "--agent.actor-grad both"])
def test_wrong_flags_exit_with_code_2(command, tmp_path, flags):
    """An unknown flag or a value of the wrong type is refused by the parser."""
    with pytest.raises(SystemExit) as error:
        command(["--preset", "xs", "--run-dir", str(tmp_path / "run"), *flags.split()])
    assert error.value.code == 2


def test_too_much_memory_is_refused_before_the_folder_is_made(command, tmp_path):
    """A replay of hundreds of GiB names itself as the largest part."""
    folder = tmp_path / "run"
    flags = "--loop.replay-size 2000000000 --steps 2000000000"
    with pytest.raises(UserError, match=r"needs .*iB of memory.*replay"):
        command([*TINY, "--run-dir", str(folder), *flags.split()])
    assert not folder.exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--critics 1",
        "--agent.critics 1",
        "--planner mpi",
        "--search.elites 65",
        "--model.latent 12",
        "--preset 5m",
        "--loop.pretrain -1",
        "--plan.uncertainty disagreement",
        "--plan.explore disagreement=1",
        "--task mt3 --loop.num-envs 4",
    ],
)
def test_bad_input_of_tdmpc(tmp_path, flags):
    """Its own flags are refused like Dreamer's."""
    folder = tmp_path / "run"
    with pytest.raises((UserError, SystemExit)) as error:
        load("tdmpc_dmc")(["--preset", "s", "--run-dir", str(folder), *flags.split()])
    if isinstance(error.value, UserError):
        name = flags.split()[-2].removeprefix("--").replace("-", "_")
        assert name in str(error.value).replace("-", "_") and "\n" not in str(error.value)
    else:
        assert error.value.code == 2 and flags.startswith("--critics")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--planner none", ["--planner", "none", "cem"]),
        ("--planner policy", ["--planner", "policy", "cem"]),
        ("--model.elites 3", ["model.elites", "3", "model.holdout"]),
        ("--model.propagation ts2", ["ts_inf"]),
        ("--plan.uncertainty doubt=-1", ["plan.uncertainty", "doubt", "aleatoric, disagreement"]),
    ],
)
def test_bad_input_of_pets(tmp_path, capsys, flags, words):
    folder = tmp_path / "run"
    with pytest.raises((UserError, SystemExit)) as error:
        load("pets")(["--preset", "s", "--run-dir", str(folder), "--task", "pendulum", *flags.split()])
    message = str(error.value) + capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not folder.exists()


def run(command, folder, *flags):
    command([*TINY, "--run-dir", str(folder), *flags])
    return folder


def dreamer(model: str, task: str, *more: str, marks=()):
    name = f"{model}-{task}{'-pixels' if 'pixels' in more else ''}"
    more = ("--world-model", model, *more)
    return pytest.param("dreamer_dmc", TINY, task, 600, more, id=name, marks=marks)


def tdmpc(task: str, *more: str, marks=()):
    return pytest.param("tdmpc_dmc", TINY_TDMPC, task, 224, more, id=f"tdmpc-{task}", marks=marks)


# A device environment and one on the host each; slow where the fast cases cover most of the same code.
CASES = [
    dreamer("rssm", "pendulum"),
    dreamer("rssm", "cartpole_swingup"),
    dreamer("rssm", "pendulum", "--obs", "pixels", "--camera.size", "16", marks=pytest.mark.slow),
    tdmpc("cartpole_swingup", "--loop.env-workers", "1"),
    tdmpc("cartpole_swingup,cup_catch"),
    tdmpc("pendulum", marks=pytest.mark.slow),
    pytest.param("pets", TINY_PETS, "pendulum", 600, (), id="pets-pendulum"),
    *(
        dreamer(model, task, marks=pytest.mark.slow)
        for model in ("s4wm", "r2i", "transformer", "koopman")
        for task in ("pendulum", "cartpole_swingup")
    ),
]


@pytest.mark.parametrize(("script", "tiny", "task", "steps", "more"), CASES)
def test_resume_is_exact(request, capsys, tmp_path, script, tiny, task, steps, more):
    """A run continued from its checkpoint ends in the same state and logs as one that was never stopped,
    with environments on the device, on the host and in a worker process, two seeds. The slow cases continue in a
    fresh process."""
    command = load(script)
    flags = [*tiny, "--task", task, "--num-seeds", "2", "--steps", str(steps), *more]
    whole = tmp_path / "whole"
    command([*flags, "--run-dir", str(whole)])
    assert (whole / "curve.png").stat().st_size > 10_000
    summary = json.loads((whole / "summary.json").read_text())
    tasks = task.split(",")
    returned = summary["eval_return"]
    assert np.shape(returned["episodes"]) == (2, 2 * len(tasks))
    if len(tasks) > 1:
        names = ["cartpole_swingup", "ball_in_cup_catch"]
        each = {name: np.array(returned["episodes"])[:, i::2].mean(1) for i, name in enumerate(names)}
        assert {name: list(mean) for name, mean in each.items()} == returned["tasks"]
        assert read_metrics(whole)[-1]["eval_return/cartpole_swingup"] == each["cartpole_swingup"][1]
    found = checkpoints.steps(whole / "checkpoints")
    assert len(found) == 2

    # Take the final checkpoint away: what is left is a run killed after its last but one checkpoint.
    part = tmp_path / "part"
    whole.rename(part)
    final = part / "checkpoints" / f"{found[-1]:012d}"
    expected, rows = leaves(final), timeless(part)
    shutil.rmtree(final)
    resume = [*flags, "--run-dir", str(part), "--resume"]
    if request.node.get_closest_marker("slow"):
        subprocess.run([sys.executable, str(EXPERIMENTS / f"{script}.py"), *resume], check=True)
        with capsys.disabled():
            print(f" {len(expected)} arrays, {len(rows)} rows", end=" ")
    else:
        command(resume)
    assert timeless(part) == rows
    assert leaves(final) == expected
    assert json.loads((part / "summary.json").read_text())["eval_return"] == summary["eval_return"]
    films = sorted(path.name for path in part.glob("videos/*"))
    assert films == (["open_loop_image.gif", "open_loop_image.png"] if "--obs" in more else [])
    assert ("data:image/gif;base64," in (part / "report.html").read_text()) == bool(films)
    assert mbrl.load(part).frames == found[-1]


@pytest.mark.slow
def test_resume_from_rendered_pixels_is_exact(tmp_path):
    """Pictures of dm_control, rendered by two processes, in a replay on the host: each command in a fresh process,
    the second in the middle of the run. The same run with its replay on the device ends alike too."""
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}

    def command(folder, place, *more):
        flags = [
            *TINY,
            "--task",
            "cartpole_swingup",
            "--obs",
            "pixels",
            "--camera.size",
            "16",
            "--steps",
            "600",
        ]
        flags += ["--num-seeds", "2", "--loop.env-workers", "2", "--loop.replay-place", place, *more]
        done = subprocess.run(
            [sys.executable, str(EXPERIMENTS / "dreamer_dmc.py"), *flags, "--run-dir", str(folder)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if "Rendering needs OpenGL" in done.stderr:
            pytest.skip(done.stderr)
        assert done.returncode == 0, done.stderr
        return folder / "checkpoints" / f"{checkpoints.steps(folder / 'checkpoints')[-1]:012d}"

    part = tmp_path / "part"
    final = command(part, "host")
    expected, rows = leaves(final), timeless(part)
    shutil.rmtree(final)
    assert command(part, "host", "--resume") == final
    assert timeless(part) == rows
    assert leaves(final) == expected
    assert leaves(command(tmp_path / "other", "device")) == expected
    pictures = np.frombuffer(expected[".replay.data.obs['image']"], np.uint8)
    print(f" {len(expected)} arrays, {len(rows)} rows, pictures {pictures.std():.0f}", end=" ")
    assert pictures.std() > 1


def test_xla_knows_the_flag_of_determinism(monkeypatch):
    """--deterministic sets it once, beside what is there; XLA ends a process whose flags it does not know. What
    the flag does needs a GPU."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    for _ in range(2):
        use_determinism()
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_force_host_platform_device_count=1",
        "--xla_gpu_deterministic_ops=true",
    ]
    subprocess.run([sys.executable, "-c", "import jax; jax.numpy.ones(1).sum()"], check=True)


@pytest.mark.slow
def test_processes_agree_and_sigterm_loses_nothing(tmp_path):
    """Two fresh processes with one config write the same bits, although one is ended by SIGTERM on the way and
    continued by a third: it exits with 143 within 30 seconds and says how to go on."""

    def start(folder, *more):
        flags = [*TINY, "--task", "pendulum", "--steps", "3000", "--run-dir", str(folder), *more]
        return subprocess.Popen(
            [sys.executable, str(EXPERIMENTS / "dreamer_dmc.py"), *flags], stderr=subprocess.PIPE, text=True
        )

    whole, part = tmp_path / "whole", tmp_path / "part"
    assert start(whole).wait() == 0
    process = start(part)
    while not checkpoints.steps(part / "checkpoints"):
        assert process.poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    process.terminate()
    errors = process.communicate()[1]
    print(f"ended {time.monotonic() - began:.1f} s after SIGTERM")
    assert process.returncode == 143 and time.monotonic() - began < 30
    assert f"--resume --run-dir {part}" in errors and "Traceback" not in errors
    assert start(part, "--resume").wait() == 0
    assert timeless(part) == timeless(whole)
    final = [
        folder / "checkpoints" / f"{checkpoints.steps(folder / 'checkpoints')[-1]:012d}"
        for folder in (part, whole)
    ]
    assert leaves(final[0]) == leaves(final[1])


def timeless(folder):
    """Rows of metrics without wall times."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(folder)]


def leaves(checkpoint):
    """Every array of a checkpoint as bytes, whatever its structure, those of simulators included."""
    body = checkpoints._verified(checkpoint, ("",))
    targets = {i: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for i, x in enumerate(body["leaves"])}
    arrays = checkpoints._read_leaves(checkpoint, body, targets)
    found = {leaf["path"]: np.asarray(x).tobytes() for leaf, x in zip(body["leaves"], arrays, strict=True)}
    with np.load(checkpoint / "extra.npz") as simulators:
        return found | {f"simulators/{name}": array.tobytes() for name, array in simulators.items()}


def test_a_folder_with_a_run_is_not_overwritten(command, tmp_path):
    """A second run needs another folder; resuming with other settings is refused too."""
    folder = run(command, tmp_path / "run", "--task", "pendulum", "--steps", "600")
    config = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        run(command, folder, "--task", "pendulum", "--steps", "600")
    with pytest.raises(UserError, match=r"agent\.lam differs"):
        run(command, folder, "--task", "pendulum", "--steps", "600", "--resume", "--agent.lam", "0.9")
    assert (folder / "config.json").read_bytes() == config
