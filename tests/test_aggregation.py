from copy import deepcopy

import pytest
import torch
from torch import Tensor

from fedsp.aggregation import ServerOptimizer, StreamingMean
from fedsp.messages import ClientUpdate
from fedsp.payload import Payload

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
    mean.reset()
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
