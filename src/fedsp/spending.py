"""What noise costs a run, and who takes part as far as the budgets last."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedsp.display import Rows, plural


def plan_spending(trainer: Any, client: Any) -> tuple[list[list[int]], dict[str, dict[str, Any]]]:
    """Say who takes part in a whole run as far as budgets last, and what noise costs it.

    Args:
        trainer: Gives rounds, sampler, seed, data and rules.
        client: The `ClientModule` that stands for every client.

    Returns:
        The cohort of every round that is paid for, without clients that sit out; and by `central`
        (noise at the server) and `local` (at the clients), where there is any, `epsilon`, `delta`,
        `max_epsilon` and the `releases` that count, as `results.json` has them.
    """
    central, local = trainer.rules.privacy, client.privacy
    cohorts = [trainer.cohort(round_idx) for round_idx in range(trainer.num_rounds)]
    spent: dict[str, dict[str, Any]] = {}
    if central is not None:
        sizes = len(trainer.cohort(0)), trainer.data.num_clients
        rounds, releases, epsilon = central.planned(cohorts, sizes)
        cohorts = cohorts[:rounds]
        spent["central"] = _entry(central, epsilon, releases)
    if local is not None:
        answers: Counter[int] = Counter()
        for idx, cohort in enumerate(cohorts):
            cohorts[idx] = [it for it in cohort if local.affords(answers[it])]
            answers.update(cohorts[idx])
        most = max(answers.values(), default=0)
        spent["local"] = _entry(local, local.epsilon(most), most)
    return cohorts, spent


def _entry(privacy: Any, epsilon: float, releases: int) -> dict[str, Any]:
    return {
        "epsilon": epsilon,
        "delta": privacy.delta,
        "max_epsilon": privacy.max_epsilon,
        "releases": releases,
    }


def spending_texts(spent: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what is spent of either budget in words, by `central` and `local`.

    Args:
        spent: As `plan_spending` returns it, or `differential_privacy` of `results.json`.
    """
    whose = {"central": "of a client, server's noise", "local": "of a client, its own noise"}
    texts = {}
    for where, found in spent.items():
        budget = "" if found["max_epsilon"] is None else f" of {found['max_epsilon']:.4g}"
        texts[where] = (
            f"epsilon {found['epsilon']:.4g}{budget} at delta {found['delta']:.3g}, "
            f"{whose[where]}, {plural(found['releases'], 'release')}"
        )
    return texts


def budget_rows(rounds: int, num_rounds: int) -> Rows:
    """Say where a run ends before its last round; nothing where it does not.

    Args:
        rounds: Rounds that the server's budget pays for.
        num_rounds: Rounds that were asked for.
    """
    if rounds == num_rounds:
        return []
    return [("rounds", f"{rounds} of {num_rounds}: `trainer.privacy.max_epsilon` pays for no more")]
