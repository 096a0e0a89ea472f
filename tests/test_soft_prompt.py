"""The soft prompt: exact loading, both parameterisations, dropout, initialisers, resizing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsp.soft_prompt import (
    NormalInit,
    PromptInitializer,
    SoftPrompt,
    TextInit,
    ZerosInit,
    pool_layers,
    spread_layers,
)

KV_SHAPE = (3, 2, 4)
SHAPE = (3, 2, 2, 5, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_prefix(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=generator(seed))


def plain(**settings: Any) -> SoftPrompt:
    return SoftPrompt(KV_SHAPE, 5, **settings)


def reparameterized(**settings: Any) -> SoftPrompt:
    return SoftPrompt(KV_SHAPE, 5, reparameterization_size=7, generator=generator(3), **settings)


BOTH = pytest.mark.parametrize("make", [plain, reparameterized])
Make = Callable[..., SoftPrompt]


def train_one_step(prompt: SoftPrompt) -> None:
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    prompt().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@BOTH
def test_a_loaded_prompt_comes_back_bit_for_bit(make: Make) -> None:
    prompt = make()
    for seed in range(3):
        prompt.load_prefix(some_prefix(seed))
        assert torch.equal(prompt(), some_prefix(seed))
        assert torch.equal(prompt.prefix(), some_prefix(seed))
        train_one_step(prompt)


@BOTH
def test_a_new_prompt_is_zero(make: Make) -> None:
    assert torch.equal(make()(), torch.zeros(SHAPE))


@BOTH
def test_training_moves_the_prompt(make: Make) -> None:
    prompt = make()
    prompt.load_prefix(some_prefix())
    train_one_step(prompt)
    assert not torch.equal(prompt.prefix(), some_prefix())


def test_a_plain_prompt_takes_the_step_of_gradient_descent() -> None:
    prompt = plain()
    prompt.load_prefix(some_prefix())
    train_one_step(prompt)
    # The gradient of the sum of squares is 2 x, the step is 0.1 of it.
    torch.testing.assert_close(prompt.prefix(), some_prefix() * 0.8)


def test_every_part_of_the_network_gets_a_gradient() -> None:
    prompt = reparameterized()
    prompt.load_prefix(some_prefix())
    prompt().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompt.parameters())


def test_the_network_is_a_two_layer_tanh_network_over_an_embedding() -> None:
    prompt = reparameterized()
    before = prompt.prefix()
    network = prompt.network
    assert network is not None
    with torch.no_grad():
        network.embedding.mul_(2)
        hidden = torch.tanh(network.embedding @ network.hidden.weight.T + network.hidden.bias)
        flat = hidden @ network.output.weight.T + network.output.bias
        expected = flat.view(5, 3, 2, 2, 4).permute(1, 2, 3, 0, 4)
    moved = prompt.prefix() - before
    torch.testing.assert_close(moved, expected - prompt.origin)


def test_the_network_keeps_its_weights_when_a_prompt_is_loaded() -> None:
    prompt = reparameterized()
    before = {name: p.detach().clone() for name, p in prompt.named_parameters()}
    prompt.load_prefix(some_prefix())
    assert all(torch.equal(p, before[name]) for name, p in prompt.named_parameters())


def test_the_network_computes_in_float32_under_autocast() -> None:
    prompt = reparameterized()
    prompt.load_prefix(some_prefix())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prompt(), some_prefix())


def test_the_networks_first_weights_come_from_the_generator() -> None:
    first, second = reparameterized(), reparameterized()
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    other = SoftPrompt(KV_SHAPE, 5, reparameterization_size=7, generator=generator(4))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@BOTH
def test_the_state_dict_carries_the_whole_prompt(make: Make) -> None:
    prompt, other = make(), make()
    prompt.load_prefix(some_prefix())
    train_one_step(prompt)
    other.load_state_dict(prompt.state_dict())
    assert torch.equal(other.prefix(), prompt.prefix())


@BOTH
def test_the_prefix_is_a_copy_without_gradient(make: Make) -> None:
    prompt = make()
    prompt.load_prefix(some_prefix())
    prompt.prefix().zero_()
    assert torch.equal(prompt.prefix(), some_prefix())
    assert not prompt.prefix().requires_grad


@BOTH
def test_dropout_acts_on_entries_in_training_only(make: Make) -> None:
    prompt = make(dropout=0.25)
    prompt.load_prefix(torch.ones(SHAPE))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = prompt.train()()
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert torch.equal(prompt.prefix(), torch.ones(SHAPE))
    assert torch.equal(prompt.eval()(), torch.ones(SHAPE))


@pytest.mark.parametrize("size", [None, 7])
def test_a_prompt_of_no_tokens_is_allowed(size: int | None) -> None:
    prompt = SoftPrompt(KV_SHAPE, 0, dropout=0.1, reparameterization_size=size)
    assert prompt().shape == (3, 2, 2, 0, 4)
    prompt.load_prefix(torch.zeros(3, 2, 2, 0, 4))
    assert prompt.prefix().shape == (3, 2, 2, 0, 4)


def test_a_bfloat16_prompt_is_loaded_as_float32() -> None:
    prompt = plain()
    prompt.load_prefix(some_prefix().bfloat16())
    assert prompt.prefix().dtype == torch.float32
    assert torch.equal(prompt.prefix(), some_prefix().bfloat16().float())


def test_a_prompt_of_another_shape_is_refused() -> None:
    prompt = plain()
    with pytest.raises(ValueError, match=r"\[3, 2, 2, 5, 4\] was expected, got \[3, 2, 2, 6, 4\]"):
        prompt.load_prefix(torch.zeros(3, 2, 2, 6, 4))


@pytest.mark.parametrize(
    ("num_virtual_tokens", "settings", "message"),
    [
        (-1, {}, "`num_virtual_tokens` must be at least 0, got -1"),
        (5, {"dropout": 1.0}, r"`dropout` of the soft prompt must be in \[0, 1\), got 1.0"),
        (5, {"dropout": -0.1}, "got -0.1"),
        (5, {"reparameterization_size": 0}, "`reparameterization_size` must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(
    num_virtual_tokens: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SoftPrompt(KV_SHAPE, num_virtual_tokens, **settings)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`kv_shape` must be three positive sizes"):
        SoftPrompt((0, 2, 4), 5)


def fake_keys_values(ids: Tensor) -> Tensor:
    """Every entry of a token's keys and values is its id."""
    return ids[0][:, None].expand(3, 2, 2, ids.shape[1], 4).to(torch.bfloat16)


def initialize(
    init: PromptInitializer, num_virtual_tokens: int = 5, sample: Any = (7, 8)
) -> Tensor:
    return init(KV_SHAPE, num_virtual_tokens, generator(1), fake_keys_values, sample)


def test_normal_start_has_the_spread_and_is_repeatable() -> None:
    big = NormalInit(std=0.5)((8, 4, 32), 50, generator(1), fake_keys_values, ())
    assert big.std().item() == pytest.approx(0.5, rel=0.01)
    assert torch.equal(initialize(NormalInit()), initialize(NormalInit()))
    assert initialize(NormalInit()).shape == SHAPE


def test_zero_start_is_zero() -> None:
    assert torch.equal(initialize(ZerosInit()), torch.zeros(SHAPE))


@pytest.mark.parametrize(
    ("sample", "expected"), [((7, 8), [7, 8, 7, 8, 7]), (range(9), [0, 1, 2, 3, 4])]
)
def test_text_start_repeats_or_cuts_the_text(sample: Any, expected: list[int]) -> None:
    prefix = initialize(TextInit(), sample=sample)
    assert prefix.shape == SHAPE
    assert prefix.dtype == torch.float32
    assert prefix[0, 0, 0, :, 0].tolist() == expected


def test_text_start_of_no_tokens_does_not_run_the_model() -> None:
    assert initialize(TextInit(), 0, ()).shape == (3, 2, 2, 0, 4)


def test_text_start_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="TextInit needs at least one token"):
        initialize(TextInit(), sample=())


def test_a_negative_spread_is_refused() -> None:
    with pytest.raises(ValueError, match="`std` of NormalInit must be at least 0, got -1"):
        NormalInit(-1)


def test_scattered_layers_go_back_to_where_they_came_from() -> None:
    full = some_prefix()
    small = pool_layers(full, [[0], [2]])
    assert torch.equal(small, torch.stack([full[0], full[2]]))
    back = spread_layers(small + 1, [[0], [2]], full)
    assert torch.equal(back, torch.stack([full[0] + 1, full[1], full[2] + 1]))
    assert torch.equal(full, some_prefix())


def test_gathering_passes_gradients() -> None:
    full = some_prefix().requires_grad_()
    pool_layers(full, [[1]]).sum().backward()
    assert full.grad is not None
    assert full.grad.sum((1, 2, 3, 4)).tolist() == [0.0, 80.0, 0.0]


def test_a_layer_that_stands_for_several_reads_their_mean_and_writes_to_all() -> None:
    full = some_prefix()
    small = pool_layers(full, [[0, 2], [1]])
    assert torch.allclose(small[0], (full[0] + full[2]) / 2)
    back = spread_layers(small, [[0, 2], [1]], full)
    assert torch.equal(back, torch.stack([small[0], full[1], small[0]]))


def test_slots_that_do_not_fit_are_refused() -> None:
    full = some_prefix()
    with pytest.raises(ValueError, match=r"\[0, 2\] for 3 layers, got \[\[0\], \[3\]\]"):
        pool_layers(full, [[0], [3]])
    with pytest.raises(ValueError, match=r"every layer at most once, got \[\[1\], \[1\]\]"):
        spread_layers(full[:2], [[1], [1]], full)
    with pytest.raises(ValueError, match=r"\[1, 2, 2, 5, 4\] were expected, got \[2, 2, 2, 5, 4\]"):
        spread_layers(full[:2], [[1]], full)
