"""What a run is said to cost before it, against what it has cost after it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsp.ledger import read_ledger
from fedsp.sampling import UniformSampler
from fedsp.spending import budget_rows, plan_spending, spending_texts
from noisy import SECRET, by_hand, central, local
from tiny import fit, make_client

Options = dict[str, Any]


def without_noise() -> Options:
    return {}


def every_client() -> Options:
    return {"privacy": central()}


def some_clients_for_a_budget() -> Options:
    return {"privacy": central(max_epsilon=by_hand(1.0, 2)), "sampler": UniformSampler(2)}


def secret_clients_for_a_budget() -> Options:
    privacy = central(noise_multiplier=4.0, amplification="sampling", max_epsilon=2.0)
    return {"privacy": privacy, "sampler": UniformSampler(1), "seed": SECRET}


def clients_with_budgets() -> Options:
    budget = (by_hand(2.0, 2) + by_hand(2.0, 3)) / 2
    return {
        "client": make_client(privacy=local(max_epsilon=budget)),
        "sampler": UniformSampler(2),
    }


def both() -> Options:
    return {
        "privacy": central(max_epsilon=by_hand(1.0, 3)),
        "client": make_client(privacy=local(max_epsilon=by_hand(2.0, 2) + 1e-6)),
    }


@pytest.mark.parametrize(
    "options",
    [
        without_noise,
        every_client,
        some_clients_for_a_budget,
        secret_clients_for_a_budget,
        clients_with_budgets,
        both,
    ],
)
def test_what_is_planned_is_what_the_run_did(
    tmp_path: Path, options: Callable[[], Options]
) -> None:
    run = fit(tmp_path, tmp_path / "run", num_rounds=5, **options())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found: dict[str, Any] = results.get("differential_privacy", {})
    cohorts, spent = plan_spending(run, run.client)
    assert len(cohorts) == run.history.rounds_done
    rows = read_ledger(run.folder.ledger)
    answers = {(row["round"], row["client"]) for row in rows if row["kind"] == "client_update"}
    assert answers == {(idx, client) for idx, cohort in enumerate(cohorts) for client in cohort}
    assert spent.keys() == found.keys()
    for where, planned in spent.items():
        assert planned == {name: found[where][name] for name in planned}
        assert planned["epsilon"] > 0
    assert spending_texts(spent) == spending_texts(found)


def test_a_budget_ends_some_of_these_runs(tmp_path: Path) -> None:
    run = fit(tmp_path, tmp_path / "run", num_rounds=5, **both())
    cohorts, spent = plan_spending(run, run.client)
    assert cohorts == [[0, 1, 2], [0, 1, 2], []]
    assert spent["central"]["epsilon"] == pytest.approx(by_hand(1.0, 3), rel=1e-12)
    assert spent["local"]["epsilon"] == pytest.approx(by_hand(2.0, 2), rel=1e-12)


def test_only_a_run_that_ends_early_is_told_of() -> None:
    assert budget_rows(3, 3) == []
    assert budget_rows(2, 3) == [
        ("rounds", "2 of 3: `trainer.privacy.max_epsilon` pays for no more")
    ]
