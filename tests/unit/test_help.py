"""``--help`` shows what most people need, ``--help-all`` every setting."""

from __future__ import annotations

import pytest

from tests.helpers import script

SHORT = {"dreamer_dmc": "--task --steps --resume --world-model --loop.* --agent.* --help-all presets"}
SHORT |= {"tdmpc_dmc": "--task --planner --search.* --agent.*", "memory": "--gap --probe.* --model.*"}
SHORT |= {"pets": "--task --planner --plan.* --model.* --agent.*"}
SHORT |= {"mpc_true_model": "--planner --plan.* --search.*"}


@pytest.mark.parametrize("name", SHORT)
def test_help_fits_on_a_page(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        script(name)(["--help"])
    assert not end.value.code
    text = capsys.readouterr().out
    assert all(word in text for word in SHORT[name].split()), text
    assert f"python experiments/{name}.py" in text  # an example
    assert "--model.dtype" not in text and len(text.splitlines()) < 75


def test_all_settings_with_units_and_defaults(capsys):
    with pytest.raises(SystemExit):
        script("dreamer_dmc")(["--preset", "xs", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.free-nats" in text and "nats per time step" in text and "--agent.optimiser.agc" in text
