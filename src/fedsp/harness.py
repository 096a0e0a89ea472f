"""EleutherAI's lm-evaluation-harness on the global model with its soft prompt.

The only module that knows `lm_eval`, an optional extra; what is measured there is its business.
"""

import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedsp.backbone import Backbone
from fedsp.generation import generate
from fedsp.server import ServerModule
from fedsp.state_files import write_text_atomically

_NUM_SUGGESTIONS = 8


@dataclass(frozen=True)
class Harness:
    """What lm-evaluation-harness runs.

    Args:
        tasks: Name of a task, group or tag of lm-eval or of `include_path`, or a list of names.
        include_path: Folder of task files (YAML) beside lm-eval's own; null: none.
        num_fewshot: Solved examples before every question; null: as the task says.
        limit: First rows of every task that are used; null: all.
        batch_size: Requests run at once, at least 1.
        log_samples: Also write every row's requests and answers to `harness_samples.jsonl`.
    """

    tasks: str | list[str]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    log_samples: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If a number is out of its range or no task is named.
        """
        for name, least in (("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            number = vars(self)[name]
            if number is not None and number < least:
                raise ValueError(f"`harness.{name}` must be at least {least}, got {number}.")
        if not self.names:
            raise ValueError(f"`harness.tasks` must name at least one task, got {self.tasks!r}.")

    @property
    def names(self) -> list[str]:
        """The tasks as a list."""
        return [self.tasks] if isinstance(self.tasks, str) else list(self.tasks)


def find_tasks(harness: Harness) -> Any:
    """Make sure that lm-eval is there and knows the tasks; no data is read.

    Args:
        harness: What is to be run.

    Returns:
        lm-eval's task manager.

    Raises:
        ModuleNotFoundError: If lm-eval is not installed.
        ValueError: If there is no such folder or no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            "`harness` needs lm-evaluation-harness, which is not installed. Install it with "
            '`pip install "fedsp[eval]"`, or leave `harness` out.'
        )
    from lm_eval.tasks import TaskManager

    folder = harness.include_path
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"`harness.include_path` must be a folder, got {folder!r}.")
    manager = TaskManager(include_path=folder)
    for name in harness.names:
        if name not in manager.all_tasks:
            raise ValueError(_unknown(name, manager.all_tasks, folder))
    return manager


def _unknown(name: str, known: list[str], folder: str | None) -> str:
    close = difflib.get_close_matches(name, known, _NUM_SUGGESTIONS, cutoff=0.5)
    close += [other for other in known if name in other and other not in close]
    hint = f"Close ones: {', '.join(close[:_NUM_SUGGESTIONS])}. " if close else ""
    where = f"lm-eval and {folder} have" if folder else "lm-eval has"
    return (
        f"`harness.tasks` names {name!r}, which {where} not among {len(known)} tasks, groups and "
        f"tags. {hint}`lm_eval ls tasks` lists all; files of your own go into "
        "`harness.include_path`."
    )


class PromptedModel(nn.Module):
    """Backbone and prefix as the transformers model that lm-eval takes them to be."""

    def __init__(self, backbone: Backbone, tokenizer: Any, prefix: Tensor | None) -> None:
        """Keep the parts.

        Args:
            backbone: The model.
            tokenizer: The transformers tokenizer of its texts.
            prefix: [L, 2, K, P, D] soft prompt, or None for the bare model.
        """
        super().__init__()
        self.backbone, self.tokenizer, self.prefix = backbone, tokenizer, prefix
        self.config = backbone.model.config
        self.name_or_path = backbone.spec.name_or_path

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.model.device

    def tie_weights(self) -> None:
        """Do nothing: the backbone's weights are as they should be."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """Score every token.

        Args:
            input_ids: [B, T] int64, padded on the right.
            attention_mask: [B, T] or None: what is padded does not matter to what comes before.

        Returns:
            An object with `logits` [B, T, V].
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.backbone.hidden_states(input_ids, mask, self.prefix)
        return SimpleNamespace(logits=self.backbone.logits(hidden))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_length: int,
        stopping_criteria: Iterable[Any],
        **options: Any,
    ) -> Tensor:
        """Continue texts one by one: lm-eval's stopping rules count the places of a whole batch.

        Args:
            input_ids: [B, T] int64, padded on the left.
            attention_mask: [B, T], 1 where a token is real.
            max_length: Most tokens of a row, padding included.
            stopping_criteria: lm-eval's, each with the `sequence` that ends a text.
            options: For transformers' `generate`.

        Returns:
            [B, T + new] int64, padded on the right.
        """
        from lm_eval.models.utils_hf import stop_sequences_criteria

        ends = [criterion.sequence for criterion in stopping_criteria]
        rows = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            text = ids[mask][None]
            length = text.shape[1]
            new = generate(
                self.backbone,
                text,
                torch.ones_like(text),
                self.prefix,
                max_new_tokens=max_length - len(ids),
                stopping_criteria=stop_sequences_criteria(self.tokenizer, ends, length, 1),
                **options,
            )
            rows.append(torch.cat([ids, new[0, length:]]))
        pad_id = self.tokenizer.pad_token_id
        return pad_sequence(rows, batch_first=True, padding_value=pad_id)


@torch.no_grad()
def run_harness(
    fabric: Fabric, server: ServerModule, harness: Harness, manager: Any
) -> dict[str, Any]:
    """Run lm-evaluation-harness on a server.

    Args:
        fabric: Where to run.
        server: The global model with its soft prompt.
        harness: What to run.
        manager: What `find_tasks` returned for it.

    Returns:
        lm-eval's own results, as `lm_eval.simple_evaluate` gives them.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    server.eval()
    model: Any = HFLM(
        pretrained=PromptedModel(server.require_deployed(), server.tokenizer, server.prefix()),
        tokenizer=server.tokenizer,
        # the prompt's positions are not there for text; see docs/footguns.md#20
        max_length=server.text_room(),
        batch_size=harness.batch_size,
        backend="causal",
    )
    with fabric.autocast():
        results: Any = simple_evaluate(
            model=model,
            tasks=harness.names,
            task_manager=manager,
            num_fewshot=harness.num_fewshot,
            limit=harness.limit,
            log_samples=harness.log_samples,
            # the global random streams are not lm-eval's to seed
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    return dict(results)


def write_harness(results: Mapping[str, Any], report: Path, samples: Path) -> str:
    """Write lm-eval's results, and its rows where they were kept.

    Args:
        results: What `run_harness` returned.
        report: JSON file of the figures.
        samples: JSON-lines file of the rows.

    Returns:
        lm-eval's own table of the figures.
    """
    from lm_eval.utils import handle_non_serializable, make_table

    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    figures = {name: results[name] for name in kept if results.get(name)}
    text = json.dumps(figures, indent=2, default=handle_non_serializable)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(report, text + "\n")
    if "samples" in results:
        lines = (
            json.dumps({"task": task, **row}, default=handle_non_serializable, ensure_ascii=False)
            for task, rows in results["samples"].items()
            for row in rows
        )
        write_text_atomically(samples, "".join(f"{line}\n" for line in lines))
    return make_table(dict(results))
