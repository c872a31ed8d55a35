"""The sweep: which settings, what shares a program, and the table at the end. No agent is trained here."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mbrl import experiment as experiments
from mbrl.agents.dreamer import DreamerConfig
from mbrl.drivers import NO_TASK
from mbrl.errors import UserError
from mbrl.experiment import Experiment, execute
from mbrl.run_folder import RunFolder
from tests.helpers import script
from tests.mesh import regression


@dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
    """Like an experiment's."""

    agent: DreamerConfig = field(default_factory=DreamerConfig)
    """Behaviour."""


@pytest.fixture
def sweep(monkeypatch):
    """``sweep(flags) -> runs``: the module's main with an experiment that makes its folder, and whose result
    is known: 100 x the entropy weight of a member, and its units."""
    main = script("sweep")
    runs = []

    def run(config, kind, make_agent, extra_rows, name, vary):
        runs.append((config, vary))
        if not config.resume:
            RunFolder.create(config.run_dir, {"config": asdict(config), "vary": vary}).close()
        entropies = vary.get("agent.entropy", [config.agent.entropy] * config.num_seeds)
        return {"eval_return": {"per_seed": [100 * x + config.agent.units for x in entropies]}}

    found = SimpleNamespace(config=Settings(), parts=("dreamer", None, 0, "Dreamer"), run=run)

    def experiment(path, flags):
        """Of the flags, --agent.units is obeyed."""
        units = [int(flag.partition("=")[2]) for flag in flags if flag.startswith("--agent.units=")]
        agent = replace(found.config.agent, units=units[-1] if units else found.config.agent.units)
        found.flags = flags
        return SimpleNamespace(**vars(found) | {"config": replace(found.config, agent=agent)})

    monkeypatch.setitem(main.__globals__, "experiment", experiment)

    def call(*flags):
        runs.clear()
        main(["some.py", *flags])
        return runs

    call.found = found
    return call


def test_numbers_share_a_program_and_shapes_do_not(sweep, tmp_path):
    """A grid of 2 x 2: one program for each width, with both weights in it; seeds are all different."""
    runs = sweep(
        *["--num-seeds", "2", "--sweep-dir", str(tmp_path)],
        *["--vary", "agent.entropy=0.1,0.2", "agent.units=8,16", "--", "--task", "pendulum"],
    )
    assert [(c.agent.units, c.seed, c.num_seeds) for c, _ in runs] == [(8, 0, 4), (16, 4, 4)]
    assert all(vary == {"agent.entropy": [0.1, 0.1, 0.2, 0.2]} for _, vary in runs)
    assert sweep.found.flags == ["--task", "pendulum", "--num-seeds", "8", "--agent.units=16"]
    rows = json.loads((tmp_path / "results.json").read_text())
    best = [(row["setting"]["agent.entropy"], row["setting"]["agent.units"], row["seeds"]) for row in rows]
    assert best == [(0.2, 16, [6, 7]), (0.2, 8, [2, 3]), (0.1, 16, [4, 5]), (0.1, 8, [0, 1])]
    assert rows[0]["iqm"] == pytest.approx(36) and rows[0]["run"] == "group1"
    with open(tmp_path / "results.csv") as file:
        table = list(csv.DictReader(file))
    assert [float(row["iqm"]) for row in table] == pytest.approx([36, 28, 26, 18])


def test_it_says_where_results_are_and_how_to_go_on(sweep, tmp_path, monkeypatch, capsys):
    """The folder that it makes where none is given."""
    monkeypatch.chdir(tmp_path)
    sweep("--vary", "agent.entropy=0.1,0.2")
    (folder,) = (tmp_path / "runs").iterdir()
    first, *_, last = (line for line in capsys.readouterr().out.splitlines() if f"runs/{folder.name}" in line)
    assert first.startswith("--sweep-dir") and last.startswith("results.json, results.csv")


def test_a_single_setting_is_an_ordinary_run(sweep, tmp_path):
    ((config, vary),) = sweep("--sweep-dir", str(tmp_path), "--vary", "agent.entropy=0.5")
    assert vary == {} and config.agent.entropy == 0.5 and config.num_seeds == 3


def test_random_search_draws_from_ranges_and_lists(sweep, tmp_path):
    """Within their limits, log-uniform where asked, the same for the same seed."""
    flags = ["--search", "random", "--trials", "200", "--num-seeds", "1", "--sweep-dir", str(tmp_path)]
    flags += ["--vary", "agent.entropy=log:1e-4:1e-2", "agent.lam=0.8:0.9", "agent.scale_rep=0.1,0.2"]
    ((_, vary),) = sweep(*flags)
    entropy, lam = np.array(vary["agent.entropy"]), np.array(vary["agent.lam"])
    assert 1e-4 <= entropy.min() < 2e-4 and 5e-3 < entropy.max() <= 1e-2
    assert np.log10(entropy).mean() == pytest.approx(-3, abs=0.15)
    assert 0.8 <= lam.min() < lam.max() <= 0.9 and set(vary["agent.scale_rep"]) == {0.1, 0.2}
    assert sweep(*flags)[0][1] == vary


RANDOM = ["--search", "random", "--vary"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vary", "agent.entrpy=1,2"], "agent.entrpy"),
        (["--vary", "agent.entropy"], "must be FIELD=VALUES"),
        (["--vary", "seed=1,2"], "as many as --num-seeds"),
        (["--vary", "agent.entropy=a,b"], "it must be float"),
        (["--vary", "agent.entropy=0.1:0.2"], "--search random"),
        (["--vary", "agent.entropy=0.1,0.2", "--", "--seed", "3"], "--seed belongs to the sweep"),
        (["--vary", "agent.entropy=0.1,0.2", "--", "--seed=0"], "--seed belongs to the sweep"),
        (["--vary", "agent.entropy=0.1,0.2", "--", "--num_seeds", "6"], "--num-seeds belongs to the sweep"),
        (["--vary", "agent.entropy=0.1,0.2", "--", "--run-dir=x"], "--run-dir belongs to the sweep"),
        (["--vary", "agent.entropy=0.1,0.2", "--", "--resume"], "--resume belongs to the sweep"),
        (["--vary", "agent.entropy=0.1,0.2", "--", "--distributed"], "--distributed is not for sweeps"),
        (["--vary", "agent.units=0.5"], "it must be int"),
        (["--vary", "run_dir=a,b"], "run_dir: this is the same for the whole sweep"),
        (["--vary", "resume=true,false"], "resume: this is the same for the whole sweep"),
        (["--vary", "agent=1,2"], "agent is DreamerConfig, it must be a number"),
        (["--vary", "agent.lam=0.1", "agent.lam=0.2"], "names agent.lam twice"),
        ([*RANDOM, "agent.entropy=1:2:3"], "a range is LOW:HIGH or log:LOW:HIGH"),
        ([*RANDOM, "agent.entropy=log:1"], "a range is LOW:HIGH or log:LOW:HIGH"),
        ([*RANDOM, "agent.entropy=0.1,0.2:0.3"], "it must be float"),
        ([*RANDOM, "agent.entropy=log:0:1"], "LOW must be below HIGH and above 0"),
        ([*RANDOM, "agent.entropy=0.2:0.1"], "LOW must be below HIGH"),
        ([*RANDOM, "agent.entropy=0.1:inf"], "LOW must be below HIGH"),
    ],
)
def test_mistakes_are_sentences(sweep, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        sweep("--sweep-dir", str(tmp_path), *flags)


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """``programs(vary, more) -> configs``: of the programs of a sweep over Dreamer, as its experiment makes
    them from flags; nothing is trained."""
    main, made = script("sweep"), []

    def train_group(found, base, group, seeds):
        made.append(base)
        return {"eval_return": {"per_seed": [0.0] * len(group) * seeds}}

    monkeypatch.setitem(main.__globals__, "train_group", train_group)

    def call(*vary, more=()):
        own = ["--sweep-dir", str(tmp_path), "--num-seeds", "1", "--vary", *vary]
        main(["experiments/dreamer_dmc.py", *own, "--", "--task", "pendulum", *more])
        return made

    return call


def test_what_a_setting_decides_follows(programs):
    """A preset and a world model bring their own settings, as by the flags of the experiment."""
    configs = programs("preset=xs,s", "world_model=rssm,s4wm", "agent.lam=0.8,0.9", more=["--preset=xs"])
    assert [(c.preset, c.world_model, c.num_seeds) for c in configs] == [
        *(("xs", "rssm", 2), ("xs", "s4wm", 2), ("s", "rssm", 2), ("s", "s4wm", 2))
    ]
    assert [c.agent.imag_starts for c in configs] == [16, 16, 64, 64]
    assert [hasattr(c.model, "ssm_size") for c in configs] == [False, True, False, True]
    assert configs[3].agent.scale_rec == 30.0


def test_switches_and_fields_that_a_planner_does_not_have(programs):
    configs = programs("agent.replay_context=true,false", more=["--preset", "xs"])
    assert [c.agent.replay_context for c in configs] == [True, False]
    with pytest.raises(UserError, match=r"search.temperature"):
        programs("planner=mppi,random", "search.temperature=0.2,0.5", more=["--preset", "xs"])
    assert len(configs) == 2  # before anything is trained


def test_a_folder_of_another_sweep_is_refused(sweep, tmp_path):
    (tmp_path / "group0").mkdir()
    stored = {"config": {"task": "another"}, "vary": {}}
    (tmp_path / "group0" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="of another sweep"):
        sweep("--sweep-dir", str(tmp_path), "--vary", "agent.entropy=0.1,0.2")


def test_nothing_to_compare_is_refused(sweep, tmp_path):
    """Before anything is trained: recorded episodes and no environment give no returns."""
    sweep.found.config = replace(sweep.found.config, offline="data", task=NO_TASK)
    with pytest.raises(UserError, match="--task"):
        sweep("--sweep-dir", str(tmp_path), "--vary", "agent.entropy=0.1,0.2")


def test_the_same_command_goes_on(sweep, tmp_path, monkeypatch):
    """In a relative folder, with absolute paths among the settings: what has a checkpoint is resumed, what was
    stopped before it starts anew, and its folder is kept."""
    monkeypatch.chdir(tmp_path)
    paths = {"offline": str(tmp_path / "data"), "from_run": str(tmp_path / "run")}
    sweep.found.config = replace(sweep.found.config, **paths)
    flags = ["--sweep-dir", "runs/x", "--vary", "agent.entropy=0.1,0.2", "agent.units=8,16"]
    first = list(sweep(*flags))
    checkpoint = Path("runs/x/group0/checkpoints/100/manifest.json")
    checkpoint.parent.mkdir()
    checkpoint.touch()
    for stopped in ("group1-stopped1", "group1-stopped2"):
        (resumed, vary), again = sweep(*flags)
        assert resumed == replace(first[0][0], resume=True) and vary == first[0][1] and again == first[1]
        assert RunFolder.config_of(f"runs/x/{stopped}")["vary"] == vary


def test_a_member_is_resumed_by_its_own_script(tmp_path, monkeypatch):
    """``execute`` without ``vary``, as an experiment calls it: the numbers are those of the run folder."""
    runs = []
    monkeypatch.setattr(experiments, "launch", lambda run, stored, *_: runs.append((run, stored)) or {})
    config = Settings(task="pendulum", num_seeds=2, run_dir=str(tmp_path))
    vary = {"agent.optimiser.learning_rate": [1e-3, 1e-2]}
    make = lambda config, spec, updates: regression(spec, 4, config.agent.optimiser)
    execute(config, "dreamer", make, 0, "Dreamer", vary)
    RunFolder.create(tmp_path, runs[0][1]).close()
    execute(replace(config, resume=True), "dreamer", make, 0, "Dreamer")
    for run, stored in runs:
        assert stored["vary"] == vary and run.shapes.train.hyper.keys() == vary.keys()
