from pathlib import Path

import pytest
import torch

from fedsp.auxiliary import KeptLayers, SharedCell
from fedsp.client import ClientModule
from fedsp.messages import ServerBroadcast
from fedsp.recipes import WholeModel
from fedsp.stages import Stage
from fedsp.tuned import LoRA
from tiny import make_client, make_server


def _installed(tmp_path: Path, recipe: SharedCell | KeptLayers, **options: object) -> ClientModule:
    server = make_server(tmp_path)
    server.configure_model()
    client = make_client(**options)
    client.install(recipe.build(server.require_model()[0]), num_virtual_tokens=4)
    return client


def _broadcast() -> ServerBroadcast:
    prefix = torch.randn(4, 2, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    return ServerBroadcast(3, {"soft_prompt": prefix})


def test_an_untrained_client_returns_the_broadcast_bit_for_bit(tmp_path: Path) -> None:
    for recipe in (SharedCell(), KeptLayers(layers=[0, 3])):
        for size in (None, 5):
            client = _installed(tmp_path, recipe, reparameterization_size=size)
            client.receive(_broadcast())
            update = client.update(client_id=1, num_examples=7)
            assert (update.round_idx, update.client_id, update.num_examples) == (3, 1, 7)
            assert torch.equal(update.payload["soft_prompt"], _broadcast().payload["soft_prompt"])


def test_what_is_handed_out_does_not_hold_what_the_client_tunes_beside_it(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    server.configure_model()
    auxiliary = WholeModel().build(server.require_model()[0])
    before = auxiliary.handout()
    client = make_client(auxiliary=Stage(0))
    client.install(auxiliary, num_virtual_tokens=4, tuned_weights=LoRA(rank=2))
    assert all(".lora_" in name for name in client.weights())
    after = client.require_model()[0].handout()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_layers_that_the_auxiliary_lacks_keep_the_servers_values(tmp_path: Path) -> None:
    client = _installed(tmp_path, KeptLayers(layers=[0, 3]))
    client.receive(_broadcast())
    with torch.no_grad():
        client.require_model()[1].values.add_(1.0)
    prefix = client.update(0, 1).payload["soft_prompt"]
    assert torch.equal(prefix[1:3], _broadcast().payload["soft_prompt"][1:3])
    assert torch.equal(prefix[[0, 3]], _broadcast().payload["soft_prompt"][[0, 3]] + 1.0)


@pytest.mark.parametrize("stage", ["auxiliary", "soft_prompt"])
def test_a_stage_trains_its_part_and_freezes_the_other(tmp_path: Path, stage: str) -> None:
    client = _installed(tmp_path, SharedCell())
    client.receive(_broadcast())
    client.set_stages([stage])
    ids = torch.randint(1, 250, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    client.training_step(batch, 0).backward()
    auxiliary, prompt = client.require_model()
    trained = {"auxiliary": auxiliary.trainable().values(), "soft_prompt": prompt.parameters()}
    for name, parameters in trained.items():
        for parameter in parameters:
            assert (parameter.grad is not None) == (name == stage)
    assert auxiliary.training == (stage == "auxiliary")
    assert prompt.training == (stage == "soft_prompt")


def test_private_state_round_trips(tmp_path: Path) -> None:
    client = _installed(tmp_path, SharedCell(), reparameterization_size=5)
    before = client.private_state()
    with torch.no_grad():
        for parameter in client.parameters():
            parameter.add_(1.0)
    client.load_private_state(before)
    after = client.private_state()
    assert all(torch.equal(after["auxiliary"][k], v) for k, v in before["auxiliary"].items())
    assert all(torch.equal(after["soft_prompt"][k], v) for k, v in before["soft_prompt"].items())


def test_a_client_that_trains_no_auxiliary_keeps_none(tmp_path: Path) -> None:
    assert _installed(tmp_path, SharedCell(), auxiliary=Stage(steps=0)).private_state() == {}


def test_an_update_before_a_broadcast_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call `receive\\(\\)` first"):
        _installed(tmp_path, SharedCell()).update(0, 1)


# --- FedProx --------------------------------------------------------------------------------------


def _moved(tmp_path: Path, **options: object) -> tuple[ClientModule, dict[str, torch.Tensor]]:
    """A client whose prompt has left the broadcast by 0.5 in every number, and a batch."""
    client = _installed(tmp_path, KeptLayers(layers=[0, 3]), dropout=0.0, **options)
    client.receive(_broadcast())
    client.set_stages(["soft_prompt"])
    with torch.no_grad():
        client.require_model()[1].values.add_(0.5)
    ids = torch.randint(1, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    return client, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_the_proximal_term_and_its_gradient_are_the_closed_form(tmp_path: Path) -> None:
    """Half of mu times the squared distance, whose gradient is mu times the distance."""
    losses, gradients = {}, {}
    for weight in (0.0, 3.0):
        client, batch = _moved(tmp_path, proximal_weight=weight)
        losses[weight] = client.training_step(batch, 0)
        losses[weight].backward()
        gradients[weight] = client.require_model()[1].values.grad
    numbers = gradients[0.0].numel()
    assert numbers == 2 * 2 * 4 * 4 * 8  # only the layers that the auxiliary model has
    assert torch.allclose(losses[3.0] - losses[0.0], torch.tensor(1.5 * 0.25 * numbers))
    expected = gradients[0.0] + 3.0 * 0.5
    assert torch.allclose(gradients[3.0], expected, atol=1e-5)


def test_dropout_is_no_distance_and_an_unmoved_prompt_pays_nothing(tmp_path: Path) -> None:
    client, batch = _moved(tmp_path, proximal_weight=1e6)
    client.receive(_broadcast())
    client.require_model()[1].dropout = 0.5
    loss = client.training_step(batch, 0)
    assert loss < 20


def test_a_negative_proximal_weight_is_refused() -> None:
    message = "`client.proximal_weight` must be at least 0, got -1.0"
    with pytest.raises(ValueError, match=message):
        ClientModule(proximal_weight=-1.0)


def test_a_proximal_step_before_a_broadcast_is_refused(tmp_path: Path) -> None:
    client = _installed(tmp_path, SharedCell(), proximal_weight=1.0)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(RuntimeError, match="call `receive\\(\\)` first"):
        client.training_step({"input_ids": ids, "attention_mask": ids, "labels": ids}, 0)
