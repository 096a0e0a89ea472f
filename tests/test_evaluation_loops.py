"""An evaluation against sums over full logits."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.auxiliary import KeptLayers
from fedsp.collate import collate_choices
from fedsp.evaluation_loops import evaluate
from fedsp.examples import Example
from fedsp.scoring import Scores, score
from fedsp.server import ServerModule
from tiny import examples, loaded_client, loaded_server


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def full_log_probs(
    server: ServerModule, ids: list[int], prefix: Tensor | None, num_labels: int
) -> Tensor:
    """Log-probability of each of the last tokens, from the logits of every position, no padding."""
    tokens = torch.tensor([ids])
    hidden = server.require_model()[0].hidden_states(tokens, torch.ones_like(tokens), prefix)
    logits = server.require_model()[0].logits(hidden)[0].double()
    probabilities = logits.softmax(-1)[torch.arange(len(ids) - 1), tokens[0, 1:]].log()
    return probabilities[-num_labels:]


def mixed_examples() -> list[Example]:
    """Prompt and completion, of various lengths."""
    return [
        example
        for idx, (prompt, completion) in enumerate([(6, 3), (2, 7), (9, 1), (4, 4), (1, 2)])
        for example in examples(1, idx, prompt, completion)
    ]


@torch.no_grad()
def test_the_loss_of_completions_is_the_mean_over_all_their_tokens(
    tmp_path: Path, fabric: Fabric
) -> None:
    server = loaded_server(tmp_path).eval()
    prefix = server.require_model()[1].prefix()
    rows = mixed_examples()
    batches = [collate_choices(part, pad_id=256) for part in (rows[:2], rows[2:])]
    seen: list[int] = []
    measured = evaluate(fabric, server.validation_step, batches, on_step=seen.append)
    logs = [
        full_log_probs(server, ex.prompt_ids + ex.completions[0], prefix, len(ex.completions[0]))
        for ex in rows
    ]
    expected = -float(torch.cat(logs).mean())
    assert measured.keys() == {"loss", "perplexity"}
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert seen == [1, 2]


def choices(count: int = 12) -> list[Example]:
    """Questions of two to four choices whose lengths in tokens and characters differ."""
    questions = []
    for idx in range(count):
        generator = torch.Generator().manual_seed(idx)
        sizes = torch.randint(1, 6, (2 + idx % 3,), generator=generator).tolist()
        prompt, *answers = (
            torch.randint(1, 250, (size,), generator=generator).tolist() for size in (5, *sizes)
        )
        chars = torch.randint(1, 12, (len(sizes),), generator=generator).tolist()
        questions.append(Example(prompt, answers, idx % len(sizes), chars))
    return questions


@torch.no_grad()
def test_accuracies_and_loss_of_choices_equal_those_by_hand(tmp_path: Path, fabric: Fabric) -> None:
    server = loaded_server(tmp_path).eval()
    prefix = server.require_model()[1].prefix() * 30
    server.require_model()[1].load_prefix(prefix)
    rows = choices()
    right, right_by_chars, tokens = 0, 0, []
    for example in rows:
        logs = [
            full_log_probs(server, example.prompt_ids + choice, prefix, len(choice))
            for choice in example.completions
        ]
        sums = [float(log.sum()) for log in logs]
        by_chars = [total / n for total, n in zip(sums, example.num_chars, strict=True)]
        right += sums.index(max(sums)) == example.answer
        right_by_chars += by_chars.index(max(by_chars)) == example.answer
        tokens.append(logs[example.answer])
    batches = [collate_choices(rows[i : i + 5], pad_id=256) for i in (0, 5, 10)]
    measured = evaluate(fabric, server.validation_step, batches)
    assert right != right_by_chars
    assert measured["accuracy"] == pytest.approx(right / 12)
    assert measured["accuracy_norm"] == pytest.approx(right_by_chars / 12)
    assert measured["loss"] == pytest.approx(-float(torch.cat(tokens).mean()), rel=1e-5)


def test_an_evaluation_trains_nothing_and_builds_no_graph(tmp_path: Path, fabric: Fabric) -> None:
    server = loaded_server(tmp_path, dropout=0.5).eval()
    before = {name: tensor.clone() for name, tensor in server.state_dict().items()}
    generator_state = torch.get_rng_state()
    seen: list[Tensor] = []

    def watched(batch: dict[str, Tensor], batch_idx: int) -> Any:
        scores = server.validation_step(batch, batch_idx)
        seen.extend(scores.values())
        return scores

    evaluate(fabric, watched, [collate_choices(mixed_examples(), pad_id=256)])
    assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in seen)
    assert all(torch.equal(tensor, before[n]) for n, tensor in server.state_dict().items())
    assert all(parameter.grad is None for parameter in server.parameters())
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert torch.is_grad_enabled()


def test_the_bare_model_is_measured_without_a_prompt(tmp_path: Path, fabric: Fabric) -> None:
    server = loaded_server(tmp_path).eval()
    backbone = server.require_model()[0]
    rows = mixed_examples()

    def bare(batch: dict[str, Tensor], batch_idx: int) -> Any:
        return score(backbone, batch, None)

    measured = evaluate(fabric, bare, [collate_choices(rows, pad_id=256)])
    with torch.no_grad():
        logs = [
            full_log_probs(server, ex.prompt_ids + ex.completions[0], None, len(ex.completions[0]))
            for ex in rows
        ]
    assert measured["loss"] == pytest.approx(-float(torch.cat(logs).mean()), rel=1e-5)


def test_a_client_is_measured_as_a_server_is(tmp_path: Path, fabric: Fabric) -> None:
    """The same auxiliary model through both: with every layer kept it is the global model."""
    server = loaded_server(tmp_path, auxiliary=KeptLayers(layers=[0, 1, 2, 3])).eval()
    client = loaded_client(server)
    client.eval()
    batches = [collate_choices(choices(), pad_id=256)]
    steps: list[Callable[..., Any]] = [server.validation_step, client.validation_step]
    measured = [evaluate(fabric, step, batches) for step in steps]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)


def test_a_hopeless_model_has_a_finite_perplexity(tmp_path: Path, fabric: Fabric) -> None:
    batch = collate_choices(mixed_examples(), pad_id=256)

    def hopeless(batch: dict[str, Tensor], batch_idx: int) -> Scores:
        return {"token_losses": torch.full((17,), 1e5), "log_likelihood": torch.full((5,), -1e5)}

    measured = evaluate(fabric, hopeless, [batch])
    assert measured["loss"] == 1e5
    assert math.isfinite(measured["perplexity"])
