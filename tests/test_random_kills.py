"""The benchmark of random kills: a short run survives them, and what would be wrong is found."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tiny import fit_with_states

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from random_kills import compare, ledger_differences, survive

ROUNDS = 3


def test_a_run_that_is_killed_at_random_moments_loses_nothing(tmp_path: Path) -> None:
    outcome = survive(tmp_path, partial(fit_with_states, tmp_path, num_rounds=ROUNDS), seed=1)
    assert outcome.kills >= 1
    assert outcome.rounds == ROUNDS
    assert outcome.differences == []
    killed, quiet = tmp_path / "killed", tmp_path / "quiet"
    (killed / ".left.tmp").touch()
    assert compare(quiet, killed) == ["files that are left: .left.tmp"]
    (killed / ".left.tmp").unlink()
    results = (killed / "results.json").rename(tmp_path / "results.json")
    assert compare(quiet, killed) == ["files that are missing: results.json"]
    results.rename(killed / "results.json")
    lines = (killed / "rounds.jsonl").read_text().splitlines(keepends=True)
    (killed / "rounds.jsonl").write_text("".join([*lines, lines[-1]]))
    assert compare(quiet, killed) == ["the rounds in rounds.jsonl"]


def row(round_idx: int, client: int, attempt: int = 0, digest: str = "a") -> dict[str, Any]:
    return {"round": round_idx, "client": client, "attempt": attempt, "sha256": digest}


@pytest.mark.parametrize(
    ("killed", "found"),
    [
        # cut off after the first client of round 1, and repeated
        ([row(0, 1), row(0, 2), row(1, 1), row(1, 1, 1), row(1, 2, 1)], []),
        # the last attempt came to the first client only
        ([row(0, 1), row(0, 2), row(1, 1), row(1, 2), row(1, 1, 1)], ["last attempt at round 1"]),
        ([row(0, 1), row(0, 2)], ["last attempt at round 1"]),
        # other bytes, another client or an answer more than in peace
        ([row(0, 1), row(0, 2), row(1, 1, 0, "b"), row(1, 1, 1), row(1, 2, 1)], ["an attempt at"]),
        ([row(0, 2), row(0, 1, 1), row(0, 2, 1), row(1, 1, 1), row(1, 2, 1)], ["an attempt at"]),
        ([row(0, 1), row(0, 2), row(1, 1), row(1, 2), row(1, 2)], ["last attempt", "an attempt"]),
        ([row(0, 1), row(0, 2), row(1, 1), row(1, 2), row(2, 1)], ["last attempt", "an attempt"]),
    ],
)
def test_a_ledger_that_does_not_balance_is_found(
    killed: list[dict[str, Any]], found: list[str]
) -> None:
    quiet = [row(0, 1), row(0, 2), row(1, 1), row(1, 2)]
    came = ledger_differences(quiet, killed)
    assert len(came) == len(found), came
    assert all(part in text for part, text in zip(found, came, strict=True))
