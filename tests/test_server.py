from pathlib import Path

import lightning
import pytest
import torch

from fedsp.losses import token_cross_entropy
from fedsp.server import ServerModule, SoftPromptSpec
from fedsp.stages import Stage
from tiny import make_data, make_server


@pytest.fixture
def server(tmp_path: Path) -> ServerModule:
    module = make_server(tmp_path)
    module.configure_model()
    return module


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# the frozen global model is in evaluation mode on purpose
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
def test_a_plain_lightning_trainer_fits_the_server(tmp_path: Path) -> None:
    """Centralised prefix tuning: the loss falls and the global model keeps every bit."""
    server, data = make_server(tmp_path, training=Stage(steps=1)), make_data(tmp_path)
    server.configure_model()
    backbone, prompt = server.require_model()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    prefix = prompt.prefix()
    batch = _batch()
    loss = server.eval().training_step(batch, 0).item()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data.limit_tokens(32)
    trainer.fit(server, datamodule=data)
    assert trainer.global_step > 3
    assert not torch.equal(prompt.prefix(), prefix)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert server.eval().training_step(batch, 0).item() != loss


def test_training_step_equals_the_full_logits_cross_entropy(server: ServerModule) -> None:
    batch = _batch()
    backbone, prompt = server.eval().require_model()
    hidden = backbone.hidden_states(batch["input_ids"], batch["attention_mask"], prompt())
    logits = backbone.logits(hidden)[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert torch.allclose(server.training_step(batch, 0), expected, atol=1e-6)


def test_only_the_soft_prompt_is_given_to_the_optimizer(server: ServerModule) -> None:
    optimizer = server.configure_optimizers()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert trained == list(server.require_model()[1].parameters())


def test_a_twin_shares_the_global_model_and_owns_its_prompt(server: ServerModule) -> None:
    twin = server.twin()
    assert twin.require_model()[0] is server.require_model()[0]
    with torch.no_grad():
        for parameter in twin.require_model()[1].parameters():
            parameter.add_(1.0)
    assert not torch.equal(twin.require_model()[1].prefix(), server.require_model()[1].prefix())


def test_a_prompt_of_no_tokens_is_the_bare_global_model(tmp_path: Path) -> None:
    server = make_server(tmp_path, soft_prompt=SoftPromptSpec(num_virtual_tokens=0))
    server.configure_model()
    backbone, _ = server.eval().require_model()
    batch = _batch()
    bare = token_cross_entropy(*backbone.label_logits(batch, None)[:2]).mean()
    assert torch.equal(server.training_step(batch, 0), bare)


def test_a_server_without_a_model_says_what_to_call(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="call `configure_model\\(\\)` first"):
        make_server(tmp_path).payload()
