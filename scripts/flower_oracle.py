"""Write what Flower's strategies make of given updates, for tests/test_aggregation.py.

From the repository's root, with the development tools installed:

    python scripts/flower_oracle.py

The inputs stand in the file beside the results, so that the tests need neither Flower nor its seed;
one test runs this script and compares.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    MultiKrum,
)
from flwr.supercore.differential_privacy import compute_clip_model_update
from flwr.supercore.task_identity import TaskIdentity

FILE = Path(__file__).parents[1] / "tests" / "data" / "flower_aggregates.json"
NUMBERS = 6
ROBUST: dict[str, Callable[[], Any]] = {
    "median": FedMedian,
    "trimmed_mean 0.2": lambda: FedTrimmedAvg(beta=0.2),
    "trimmed_mean 0.4": lambda: FedTrimmedAvg(beta=0.4),
    "krum 1": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=1),
    "multi_krum 1 2": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2),
    "krum 2": lambda: MultiKrum(num_malicious_nodes=2, num_nodes_to_select=1),
    "multi_krum 2 4": lambda: MultiKrum(num_malicious_nodes=2, num_nodes_to_select=4),
}
NEEDS = {"krum 2": 7, "multi_krum 2 4": 8}
SERVER_OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    # tau would stand where torch has none: Flower adds it before the second moment is corrected
    "FedAdam": lambda: FedAdam(eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-12),
    "FedAdagrad": lambda: FedAdagrad(eta=0.1, tau=1e-3),
}


def aggregate(strategy: Any, updates: np.ndarray, round_idx: int = 0) -> list[float]:
    """Run a strategy on one round's updates, [clients, numbers], of one example each."""
    replies = []
    for update in updates:
        arrays = ArrayRecord({"prefix": Array(update)})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
        replies.append(Message(content, dst_node_id=1, message_type="train"))
    # counted from 0: Flower's FedAdam corrects the moments of round n by n + 1
    combined, _ = strategy.aggregate_train(round_idx, replies)
    numbers: list[float] = combined["prefix"].numpy().tolist()
    return numbers


def robust_cases() -> list[dict[str, Any]]:
    """Return every rule on cohorts of several sizes, some with far-off updates."""
    cases = []
    for clients in (5, 6, 7, 10):
        rng = np.random.default_rng(clients)
        updates = rng.normal(size=(clients, NUMBERS))
        updates[:1] += 50.0
        results = {
            name: aggregate(make(), updates)
            for name, make in ROBUST.items()
            if clients >= NEEDS.get(name, 5)
        }
        cases.append({"updates": updates.tolist(), "results": results})
    return cases


def clipping_cases() -> list[dict[str, Any]]:
    """Return updates with their changes clipped."""
    rng = np.random.default_rng(0)
    reference = rng.normal(size=NUMBERS)
    cases = []
    for scale in (0.1, 1.0, 10.0):
        update = reference + scale * rng.normal(size=NUMBERS)
        clipped = [update.copy()]
        compute_clip_model_update(clipped, [reference], 1.5)
        case = {"reference": reference, "update": update, "result": clipped[0]}
        cases.append({name: array.tolist() for name, array in case.items()} | {"max_norm": 1.5})
    return cases


def optimizer_cases() -> dict[str, Any]:
    """Return three rounds of each server optimizer from the same start, on the same means."""
    rng = np.random.default_rng(1)
    start, means = rng.normal(size=NUMBERS), rng.normal(size=(3, NUMBERS))
    results = {}
    for name, make in SERVER_OPTIMIZERS.items():
        strategy, current, path = make(), start, []
        for round_idx, mean in enumerate(means):
            # what `configure_train` keeps, which wants a running grid; as arrays or as a record
            record = ArrayRecord({"prefix": Array(current)})
            strategy.current_arrays = record if name == "FedAvgM" else {"prefix": current}
            path.append(aggregate(strategy, mean[None], round_idx))
            current = np.array(path[-1])
        results[name] = path
    return {"start": start.tolist(), "means": means.tolist(), "results": results}


def main() -> None:
    """Write the file."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    content = {
        "source": f"flwr {version('flwr')}, written by scripts/flower_oracle.py",
        "robust": robust_cases(),
        "clipping": clipping_cases(),
        "server_optimizers": optimizer_cases(),
    }
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
