import json
import runpy
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from commands import changed, command, make_config, of_class, write_config
from fedsp.aggregation import (
    Aggregator,
    CoordinateMedian,
    MultiKrum,
    NormClipping,
    ServerOptimizer,
    StreamingMean,
    TrimmedMean,
)
from fedsp.messages import ClientUpdate
from fedsp.payload import Payload

ROOT = Path(__file__).parents[1]
FLOWER = json.loads((ROOT / "tests" / "data" / "flower_aggregates.json").read_text())
ROBUST: dict[str, Callable[[], Aggregator]] = {
    "median": CoordinateMedian,
    "trimmed_mean 0.2": lambda: TrimmedMean(0.2),
    "trimmed_mean 0.4": lambda: TrimmedMean(0.4),
    "krum 1": lambda: MultiKrum(num_malicious=1),
    "multi_krum 1 2": lambda: MultiKrum(num_malicious=1, num_selected=2),
    "krum 2": lambda: MultiKrum(num_malicious=2),
    "multi_krum 2 4": lambda: MultiKrum(num_malicious=2, num_selected=4),
}

SHAPE = (1, 2, 1, 1, 2)


def _prefix(*values: float) -> Tensor:
    return torch.tensor(values).reshape(SHAPE)


def _payload(prefix: Tensor) -> Payload:
    return {"soft_prompt": prefix}


def _update(client_id: int, num_examples: int, *values: float) -> ClientUpdate:
    return ClientUpdate(0, client_id, _payload(_prefix(*values)), num_examples)


UPDATES = [_update(0, 1, 1.0, 2.0, 3.0, 4.0), _update(1, 3, 5.0, 6.0, 7.0, 9.0)]


def test_fedavg_equals_the_mean_by_hand() -> None:
    mean = StreamingMean()
    for update in UPDATES:
        mean.add(update)
    assert torch.equal(mean.result()["soft_prompt"], _prefix(3.0, 4.0, 5.0, 6.5))


def test_weighted_mean_equals_the_mean_by_hand() -> None:
    mean = StreamingMean(weight_by_examples=True)
    for update in UPDATES:
        mean.add(update)
    assert torch.equal(mean.result()["soft_prompt"], _prefix(4.0, 5.0, 6.0, 7.75))


def test_the_mean_does_not_depend_on_the_order_of_a_thousand_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    prefixes = [torch.randn(SHAPE, generator=generator) for _ in range(1000)]
    updates = [ClientUpdate(0, i, _payload(prefix), 1) for i, prefix in enumerate(prefixes)]
    results = []
    for order in (updates, updates[::-1]):
        mean = StreamingMean()
        for update in order:
            mean.add(update)
        results.append(mean.result()["soft_prompt"])
    assert torch.equal(*results)


def test_reset_forgets_the_last_round() -> None:
    mean = StreamingMean()
    mean.add(UPDATES[0])
    mean.reset(UPDATES[0].payload)
    mean.add(UPDATES[1])
    assert torch.equal(mean.result()["soft_prompt"], UPDATES[1].payload["soft_prompt"])


def test_adding_does_not_change_the_updates() -> None:
    before = [update.payload["soft_prompt"].clone() for update in UPDATES]
    mean = StreamingMean()
    for update in UPDATES:
        mean.add(update)
    mean.result()["soft_prompt"]
    assert all(
        torch.equal(a, b.payload["soft_prompt"]) for a, b in zip(before, UPDATES, strict=True)
    )


def test_no_updates_have_no_mean() -> None:
    with pytest.raises(RuntimeError, match="at least one update"):
        StreamingMean().result()


def test_without_an_optimizer_the_aggregate_is_taken_as_it_is() -> None:
    aggregate = _prefix(1.0, 2.0, 3.0, 4.0)
    got = ServerOptimizer(None).step(_payload(torch.zeros(SHAPE)), _payload(aggregate))
    assert torch.equal(got["soft_prompt"], aggregate)


def test_sgd_at_rate_one_takes_the_aggregate_and_at_half_goes_half_way() -> None:
    old, aggregate = _prefix(0.0, 0.0, 2.0, 2.0), _prefix(2.0, 4.0, 2.0, 0.0)
    for rate, expected in ((1.0, aggregate), (0.5, _prefix(1.0, 2.0, 2.0, 1.0))):
        step = ServerOptimizer(lambda p, rate=rate: torch.optim.SGD(p, lr=rate)).step
        got = step(_payload(old), _payload(aggregate))
        assert torch.equal(got["soft_prompt"], expected)


def test_fedadam_equals_torch_adam_on_the_pseudo_gradient_by_hand() -> None:
    """Adam's update written out; the prompt moves between rounds as server training moves it."""
    rate, beta1, beta2, eps = 0.1, 0.9, 0.99, 1e-3
    optimizer = ServerOptimizer(
        lambda p: torch.optim.Adam(p, lr=rate, betas=(beta1, beta2), eps=eps)
    )
    old = [_prefix(0.0, 1.0, -1.0, 2.0), _prefix(0.3, 0.7, -1.5, 2.5)]
    mean = [_prefix(0.5, 1.5, -2.0, 2.0), _prefix(0.1, 0.2, -1.0, 3.0)]
    first = second = torch.zeros(SHAPE)
    for step in (1, 2):
        gradient = old[step - 1] - mean[step - 1]
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        denominator = (second / (1 - beta2**step)).sqrt() + eps
        expected = old[step - 1] - rate * (first / (1 - beta1**step)) / denominator
        got = optimizer.step(_payload(old[step - 1]), _payload(mean[step - 1]))
        assert torch.allclose(got["soft_prompt"], expected, atol=1e-6)


def test_a_resumed_server_optimizer_goes_on_with_its_moments() -> None:
    def make() -> ServerOptimizer:
        return ServerOptimizer(lambda p: torch.optim.Adam(p, lr=0.1))

    old, mean = torch.zeros(SHAPE), _prefix(1.0, -1.0, 2.0, 0.5)
    first, resumed, fresh = make(), make(), make()
    first.step(_payload(old), _payload(mean))
    resumed.load_state_dict(deepcopy(first.state_dict()), {"soft_prompt": SHAPE})
    expected = first.step(_payload(old), _payload(-mean))["soft_prompt"]
    assert torch.equal(resumed.step(_payload(old), _payload(-mean))["soft_prompt"], expected)
    assert not torch.equal(fresh.step(_payload(old), _payload(-mean))["soft_prompt"], expected)


# --- robust rules ---------------------------------------------------------------------------------


def _combine(aggregator: Aggregator, rows: list[list[float]], reference: Tensor) -> Tensor:
    shape = (1, 2, 1, 1, len(rows[0]) // 2)
    aggregator.reset(_payload(reference.reshape(shape)))
    for client_id, row in enumerate(rows):
        # the number of examples that a client claims must not count
        payload = _payload(torch.tensor(row).reshape(shape))
        aggregator.add(ClientUpdate(0, client_id, payload, 1 + client_id))
    result = aggregator.result()["soft_prompt"]
    assert result.shape == shape
    assert result.dtype == torch.float32
    return result.flatten()


@pytest.mark.parametrize("case", FLOWER["robust"], ids=lambda case: f"{len(case['updates'])}")
def test_a_robust_rule_gives_what_flower_gives(case: dict[str, Any]) -> None:
    assert FLOWER["source"].startswith("flwr 1.41.0")
    for name, expected in case["results"].items():
        got = _combine(ROBUST[name](), case["updates"], torch.zeros(6))
        assert torch.allclose(got, torch.tensor(expected), rtol=1e-6, atol=1e-6), name


def test_flowers_figures_are_those_that_the_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "GRPC_VERBOSITY", "error"
    )  # Flower's import sets it, the test's end undoes it
    script = runpy.run_path(str(ROOT / "scripts" / "flower_oracle.py"))
    monkeypatch.setitem(script["main"].__globals__, "FILE", tmp_path / "figures.json")
    script["main"]()
    found, structure = tree_flatten(json.loads((tmp_path / "figures.json").read_text()))
    kept, kept_structure = tree_flatten(FLOWER)
    assert structure == kept_structure
    # numpy rounds the last digits by the CPU's instructions
    for one, other in zip(found, kept, strict=True):
        assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-9))


@pytest.mark.parametrize("case", FLOWER["clipping"])
def test_a_clipped_update_is_what_flower_clips_it_to(case: dict[str, Any]) -> None:
    clipping = NormClipping(case["max_norm"])
    got = _combine(clipping, [case["update"]], torch.tensor(case["reference"]))
    assert torch.allclose(got, torch.tensor(case["result"]), rtol=1e-6, atol=1e-6)


def test_robust_rules_by_hand() -> None:
    rows = [[0.0, 1.0], [1.0, 3.0], [2.0, 0.0], [4.0, 2.0], [1000.0, -1000.0]]
    for aggregator, expected in (
        (CoordinateMedian(), [2.0, 1.0]),
        (TrimmedMean(0.2), [7 / 3, 1.0]),  # of 1, 2, 4 and of 0, 1, 2
        # squared distances to the two nearest: 5 + 5, 5 + 10, 5 + 8, 8 + 10
        (MultiKrum(num_malicious=1), [0.0, 1.0]),
        (MultiKrum(num_malicious=1, num_selected=2), [1.0, 0.5]),
    ):
        assert torch.equal(_combine(aggregator, rows, torch.zeros(2)), torch.tensor(expected))
    assert _combine(CoordinateMedian(), rows[:4], torch.zeros(2)).tolist() == [1.5, 1.5]
    assert _combine(CoordinateMedian(), rows[:1], torch.zeros(2)).tolist() == rows[0]


def test_krum_tells_apart_updates_that_differ_by_little_of_their_length() -> None:
    """In fp32 the scalar products of such prompts drown their distances."""
    steps = [0.0, 1 / 64, 3 / 64, 7 / 64, 5.0]
    rows = [[1000.0 + step, -1000.0] for step in steps]
    assert _combine(MultiKrum(1), rows, torch.zeros(2)).tolist() == rows[1]


def test_clipping_keeps_the_direction_and_short_changes_whole() -> None:
    reference = torch.tensor([1.0, 1.0])
    rows = [[4.0, 5.0], [1.0, 1.5], [1.0, 1.0]]  # changes of norm 5, 0.5 and 0
    for row, expected in zip(rows, [[2.2, 2.6], [1.0, 1.5], [1.0, 1.0]], strict=True):
        got = _combine(NormClipping(2.0), [row], reference)
        assert torch.allclose(got, torch.tensor(expected))
    got = _combine(NormClipping(2.0, CoordinateMedian()), rows, reference)
    assert torch.allclose(got, torch.tensor([1.0, 1.5]))


def test_a_robust_rule_forgets_the_last_round() -> None:
    for aggregator in (CoordinateMedian(), NormClipping(1e9, CoordinateMedian())):
        for rows in ([[1.0, 2.0], [3.0, 4.0]], [[7.0, 8.0]]):
            got = _combine(aggregator, rows, torch.zeros(2))
        assert got.tolist() == [7.0, 8.0]


@pytest.mark.parametrize("make", [CoordinateMedian, lambda: NormClipping(1.0, CoordinateMedian())])
def test_no_updates_have_no_robust_result(make: Callable[[], Aggregator]) -> None:
    aggregator = make()
    aggregator.reset(_payload(torch.zeros(SHAPE)))
    with pytest.raises(RuntimeError, match="at least one update"):
        aggregator.result()


def test_a_clipping_that_was_sent_nothing_is_refused() -> None:
    with pytest.raises(RuntimeError, match="call `reset\\(\\)` first"):
        NormClipping(1.0).add(UPDATES[0])


@pytest.mark.parametrize(
    ("make", "fewest"),
    [
        (StreamingMean, 1),
        (CoordinateMedian, 1),
        (lambda: TrimmedMean(0.2), 5),
        (lambda: TrimmedMean(0.3), 4),
        (lambda: TrimmedMean(1 / 49), 50),  # 49 times that float is below 1
        (lambda: MultiKrum(0), 3),
        (lambda: MultiKrum(2), 7),
        (lambda: MultiKrum(2, num_selected=4), 8),
        (lambda: NormClipping(1.0, MultiKrum(2)), 7),
    ],
)
def test_a_rule_knows_the_fewest_updates_it_works_on(
    make: Callable[[], Aggregator], fewest: int
) -> None:
    aggregator = make()
    assert aggregator.min_updates == fewest
    aggregator.check(fewest)
    aggregator.check(0)  # without clients only the server trains
    if fewest > 1:
        wanted = f"needs at least {fewest} updates a round, the first cohort has {fewest - 1}"
        with pytest.raises(ValueError, match=wanted):
            aggregator.check(fewest - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            of_class("fedsp.aggregation.MultiKrum", num_malicious=1),
            "`trainer.aggregator`: MultiKrum with `num_malicious` 1 and `num_selected` 1 (2 "
            "num_malicious + 3, and num_selected + num_malicious + 2) needs at least 5 updates a "
            "round, the first cohort has 2 clients. Raise `trainer.sampler.clients_per_round` (or "
            "the number of clients), or change it.",
        ),
        (
            of_class("fedsp.aggregation.TrimmedMean", trim_fraction=0.5),
            "`trainer.aggregator.trim_fraction` must be above 0 and below 0.5, got 0.5.",
        ),
        (
            of_class("fedsp.aggregation.MultiKrum", num_malicious=-1),
            "`trainer.aggregator.num_malicious` must be at least 0, got -1.",
        ),
        (
            of_class("fedsp.aggregation.NormClipping", max_norm=0.0),
            "`trainer.aggregator.max_norm` must be above 0, got 0.0.",
        ),
    ],
)
def test_a_rule_that_cannot_work_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = changed(make_config(tmp_path), {"trainer.aggregator": changes})
    outcome = command("fit", "--config", write_config(tmp_path / "config.yaml", config))
    assert outcome.err == f"fedsp: error: {message}\n"
    assert outcome.status == 1
    assert not (tmp_path / "run").exists()


# --- server optimizers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("FedAvgM", lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)),
        ("FedAdam", lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-12)),
        ("FedAdagrad", lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3)),
    ],
)
def test_a_torch_optimizer_makes_flowers_rule(name: str, optimizer: Any) -> None:
    case = FLOWER["server_optimizers"]
    prompt, server_optimizer = torch.tensor(case["start"]), ServerOptimizer(optimizer)
    for mean, expected in zip(case["means"], case["results"][name], strict=True):
        stepped = server_optimizer.step(_payload(prompt), _payload(torch.tensor(mean)))
        prompt = stepped["soft_prompt"]
        assert torch.allclose(prompt, torch.tensor(expected), rtol=1e-5, atol=1e-6)
