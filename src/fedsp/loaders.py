"""Loaders over one owner's examples: a training stream, an evaluation, prompts to continue.

Whose examples they are is decided elsewhere.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from fedsp.batching import Batching, StepBatches, eval_batches, make_loader
from fedsp.collate import collate, collate_choices, collate_prompts
from fedsp.examples import TokenStore
from fedsp.portions import Portion


@dataclass(frozen=True)
class Loaders:
    """Makes the loaders of a run.

    Args:
        batching: How examples are put together.
        pad_id: Token id at padded places.
        seed: The run's seed.
    """

    batching: Batching
    pad_id: int
    seed: int

    def stream(
        self,
        store: TokenStore,
        owner: str,
        client_id: int = -1,
        *,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> DataLoader[Any]:
        """Return batches of an owner's endless stream; see `fedsp.batching.StepBatches`.

        Args:
            store: The owner's examples.
            owner: Whose stream, such as `"server"`.
            client_id: Index of the client, -1 for the other owners.
            start_step: First step, counted from 0 over all rounds.
            num_steps: Number of batches; None: one epoch.
        """
        batches = StepBatches(
            store.lengths(),
            self.batching,
            seed=self.seed,
            owner=owner,
            client_id=client_id,
            start_step=start_step,
            num_steps=num_steps,
        )
        return make_loader(store, batches, partial(collate, pad_id=self.pad_id))

    def evaluation(self, store: TokenStore) -> DataLoader[Any]:
        """Return the examples once, a question with all its choices a row."""
        lengths = [example.num_packed_tokens for example in store]
        num_choices = [len(example.completions) for example in store]
        batches = eval_batches(lengths, num_choices, self.batching.eval_batch_size)
        return make_loader(store, batches, partial(collate_choices, pad_id=self.pad_id))

    def prompts(
        self, portion: Portion, split: str, *, max_tokens: int | None, new_tokens: int
    ) -> DataLoader[Any]:
        """Return the prompts once, padded on the left, each with its row.

        Args:
            portion: Of the split.
            split: Its name, for error messages.
            max_tokens: Most tokens of a prompt and what continues it, None without limit.
            new_tokens: Room that must be left behind the longest prompt.

        Raises:
            ValueError: If the task gives no prompts, or the room is not there.
        """
        prompts = [len(example.prompt_ids) for example in portion.store]
        if portion.rows is None or 0 in prompts:
            raise ValueError(
                "`fedsp predict` and `trainer.evaluation.generate_tokens` continue prompts, and "
                "`data.task` gives examples without one. Use a task with a prompt, such as "
                "fedsp.tasks.PromptCompletion."
            )
        if max_tokens is not None and max(prompts) + new_tokens > max_tokens:
            raise ValueError(
                f"`trainer.evaluation.generate_tokens` must be at most "
                f"{max_tokens - max(prompts)}, what the longest prompt of `data.{split}` "
                f"leaves of {max_tokens} tokens, got {new_tokens}."
            )
        batches = eval_batches(prompts, [1] * len(prompts), self.batching.eval_batch_size)
        rows, store = portion.rows, portion.store

        def collate_rows(indices: list[int]) -> dict[str, Tensor]:
            examples = [store[i] for i in indices]
            return collate_prompts(examples, self.pad_id, [rows[i] for i in indices])

        return make_loader(range(len(prompts)), batches, collate_rows)
