"""A few planted bugs of every tier, run for real: each must be noticed by the right codes, the clean tree be silent."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ledgerproof.mutants.patches import FOLDER, load_all
from ledgerproof.mutants.runner import Runner
from ledgerproof.mutants.workshop import SOURCE

BY_ID = {mutant.header.id: mutant for mutant in load_all(SOURCE / FOLDER)}
CHOSEN = [
    # One trigger, and so one control, for all bugs of the service: `make mutants` runs the rest.
    "ledger-stake-in-another-match",
    "matcher-forgets-winnings",
    "projector-tells-the-next-seq",
    "harness-server-not-read",
    "harness-late-by-one",
    "harness-history-cut",
]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    # Below the checkout and not in the system's temporary folder, which may be memory: fsync must be real.
    root = Path(__file__).parents[2] / ".ledgerproof" / "tests"
    started = Runner(root, lambda _: None)
    yield started
    started.close()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", CHOSEN)
def test_planted_bug_is_killed_by_the_right_codes(runner: Runner, name: str) -> None:
    row = runner.row(BY_ID[name])
    assert row.control == "silent"
    assert row.killed or row.why.startswith("it took"), row.why  # how fast is for the matrix, on a machine of its own
    assert set(row.must) <= set(row.codes)
