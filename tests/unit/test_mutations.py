"""The list of seeded bugs keeps up with the code: each can be planted, and the tests that it names exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.why)
def test_a_bug_can_be_planted(mutation):
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file}: give tests/mutations.py the new text of this bug"
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    for name in mutation.tests.partition("|")[0].split():
        file, _, function = name.partition("::")
        source = (ROOT / "tests" / file).read_text()
        assert not function or f"def {function}(" in source, f"tests/mutations.py names {name}"
