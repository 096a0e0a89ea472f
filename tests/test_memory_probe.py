"""The memory probe, against sizes counted by hand."""

import torch
from torch.utils.checkpoint import checkpoint

from fedsp.memory_probe import LiveTensors, tensor_bytes

N = 100
SIZE = 4 * N * N


def layer(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (inputs @ weight).exp().cos()


def test_what_is_alive_at_once_counts_and_what_was_there_before_does_not() -> None:
    inputs = torch.randn(N, N)
    with LiveTensors() as live:
        one = inputs + 1
        one = one + 1
        del one
        two = [inputs * 2 for _ in range(3)]
        inputs.mul_(2)
    assert live.peak_bytes == 3 * SIZE
    assert len(two) == 3


def test_views_count_once() -> None:
    inputs = torch.randn(N, N)
    with LiveTensors() as live:
        made = inputs + 1
        views = [made.t(), made[:5], inputs.t()]
    assert live.peak_bytes == SIZE
    assert len(views) == 3


def test_the_backward_pass_counts_with_what_the_forward_kept() -> None:
    weight, inputs = torch.randn(N, N, requires_grad=True), torch.randn(N, N)
    with LiveTensors() as live:
        # kept for the backward: what cos read; beside it its sine, that negated, and the gradient
        layer(inputs, weight).sum().backward()
    scalars = 2 * 4
    assert 4 * SIZE <= live.peak_bytes <= 4 * SIZE + scalars


def test_recomputed_layers_take_less() -> None:
    weight = (torch.randn(N, N) / N).requires_grad_()
    inputs = torch.randn(N, N)
    peaks = []
    for run in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=False)):
        with LiveTensors() as live:
            hidden = inputs
            for _ in range(8):
                hidden = run(hidden, weight)
            hidden.sum().backward(inputs=[weight])
        peaks.append(live.peak_bytes)
    assert peaks[1] < 0.8 * peaks[0]


def test_nested_tensors_count_once() -> None:
    tensor = torch.zeros(3)
    tree = {"a": [tensor, tensor], "b": (torch.zeros(2, dtype=torch.bfloat16), "text", None)}
    assert tensor_bytes(tree) == 3 * 4 + 2 * 2
