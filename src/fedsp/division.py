"""Who has which examples: rows are carved, partitioned, tokenised and cut into portions here.

Batches, rounds and models are unknown here.
"""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fedsp.examples import TokenStore
from fedsp.partition import Partitioner, carve
from fedsp.portions import Limit, Portion, check_filled, fit_portion, warn_of_losses
from fedsp.sources import content_hash
from fedsp.tasks import Task
from fedsp.token_cache import load_or_build
from fedsp.tokenization import leading_ids, tokenizer_hash

# The order in which rows are carved out: a split is the same whatever comes after it.
SPLITS = ("test", "selection", "server", "public")


@dataclass(frozen=True)
class Division:
    """Every owner's portion.

    Args:
        splits: Of the splits that there are, by name.
        clients: Of the clients whose rows are here, by index.
        client_names: Of all clients, in the order of their indices.
    """

    splits: dict[str, Portion]
    clients: dict[int, Portion]
    client_names: list[str]

    def describe(self) -> dict[str, Any]:
        """Return the number of examples of every owner, and of those cut or left out."""
        counts: dict[str, Any] = {
            name: len(self.splits[name].store) if name in self.splits else 0 for name in SPLITS
        }
        named = {self.client_names[idx]: portion for idx, portion in self.clients.items()}
        counts["clients"] = {name: len(portion.store) for name, portion in named.items()}
        splits = {name: [portion] for name, portion in self.splits.items()}
        owners = {"clients": [*named.values()], **splits}
        for key in ("num_cut", "num_left_out"):
            counts[key] = {
                name: sum(getattr(p, key) for p in owned) for name, owned in owners.items()
            }
        return counts

    def public_overlap(self, ignored_ids: Container[int | None]) -> int:
        """Return how many public examples have the same tokens as some client's example.

        Args:
            ignored_ids: Token ids that do not count, such as the start and end tokens.
        """
        if "public" not in self.splits:
            return 0
        portions = self.clients.values()
        owned = {text for portion in portions for text in portion.texts(ignored_ids)}
        return sum(text in owned for text in self.splits["public"].texts(ignored_ids))


@dataclass(frozen=True)
class Encoder:
    """How rows become examples.

    Args:
        task: What a row means.
        public_task: What a row of the public data means.
        tokenizer: Tokenizer of the model.
        max_tokens: Longest example in tokens, None without limit.
        cache_dir: Folder for tokenised data; None keeps none.
    """

    task: Task
    public_task: Task
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None
    cache_dir: Path | None

    def encode(self, role: str, dataset: Dataset) -> TokenStore:
        """Tokenise a whole source, or find it in the cache.

        Args:
            role: `clients` or the name of a split.
            dataset: Its rows.

        Raises:
            ValueError: If a row is not what the role's task takes.
        """
        (task, option), tokenizer = self._task(role), self.tokenizer
        with naming(role, option):
            if self.cache_dir is None:
                return TokenStore.from_examples(task.encode_all(dataset, tokenizer))
            key = f"{content_hash(dataset)}/{task!r}/{tokenizer_hash(tokenizer)}"
            return load_or_build(self.cache_dir, key, lambda: task.encode_all(dataset, tokenizer))

    def carved(self, name: str, source: Dataset, stored: TokenStore, rows: list[int]) -> Portion:
        """Make a split's portion of the clients' source.

        Args:
            name: Of the split.
            source: The clients' rows.
            stored: The same, tokenised.
            rows: Those of the split.

        Raises:
            ValueError: As `encode`.
        """
        if self._task(name)[0] is not self.task:
            stored = self.encode(name, source.select(rows))
            rows = list(range(len(rows)))
        return self.portion(name, stored, rows)

    def portion(self, role: str, stored: TokenStore, rows: list[int]) -> Portion:
        """Make one owner's portion of a source.

        Args:
            role: `clients` or the name of a split.
            stored: The source, tokenised.
            rows: Those of the owner.

        Raises:
            ValueError: If the task's own length is above `max_tokens`.
        """
        task, option = self._task(role)
        with naming(role, option):
            documents = [stored[row] for row in rows]
            examples, origins = task.pack(documents, self.max_tokens)
        limit = Limit(self.max_tokens, num_leading=len(leading_ids(self.tokenizer)))
        return fit_portion(examples, origins, limit, origin=stored, origin_rows=rows)

    def _task(self, role: str) -> tuple[Task, str]:
        """Return a role's task and the option that gives it."""
        if role == "public" and self.public_task is not self.task:
            return self.public_task, "data.public_task"
        return self.task, "data.task"


@contextmanager
def naming(role: str, task_option: str = "data.task") -> Iterator[None]:
    """Put the option whose data is at fault in front of an error.

    Args:
        role: `clients` or the name of a split.
        task_option: The option that gives the role's task.
    """
    try:
        yield
    except ValueError as error:
        text = str(error).replace("`data.task.", f"`{task_option}.")
        raise ValueError(f"`data.{role}`: {text}") from error


def divide(
    datasets: Mapping[str, Dataset],
    sizes: Mapping[str, int | float],
    partitioner: Partitioner,
    encoder: Encoder,
    *,
    seed: int,
) -> Division:
    """Carve the held-out rows off the clients' source and hand the rest out.

    Args:
        datasets: Rows of the clients' source as `clients`, where it is here, and of the splits that
            have a source of their own.
        sizes: Number of rows, or fraction, of each split that is carved off the clients' source.
        partitioner: Who owns which row of what is left.
        encoder: How rows become examples.
        seed: Seed of carving and partitioning.

    Raises:
        ValueError: If a split or a client gets no example that can be used, or its rows are not
            what its task takes.
    """
    source = datasets.get("clients")
    if source is None:
        splits = _splits({}, datasets, encoder)
        return Division(splits, {}, partitioner.names(Dataset.from_dict({})))
    carved, left = carve(source, dict(sizes), stratify_by=partitioner.stratify_by, seed=seed)
    rest = source.select(left)
    parts = [[left[row] for row in part] for part in partitioner(rest, seed)]
    names = partitioner.names(rest)
    stored = encoder.encode("clients", source)
    held_out = {name: encoder.carved(name, source, stored, rows) for name, rows in carved.items()}
    splits = _splits(held_out, datasets, encoder)
    # the other parties of a live federation have no rows here
    owned = {idx: part for idx, part in enumerate(parts) if part}
    clients = {idx: encoder.portion("clients", stored, part) for idx, part in owned.items()}
    warn_of_losses("data.clients", list(clients.values()), encoder.max_tokens)
    for idx, portion in clients.items():
        check_filled(f"Client {names[idx]!r} of `data.clients`", portion, encoder.max_tokens)
    return Division(splits, clients, names)


def _splits(
    carved: Mapping[str, Portion], datasets: Mapping[str, Dataset], encoder: Encoder
) -> dict[str, Portion]:
    """Put together what is carved and the sources of their own."""
    splits = {}
    for name in SPLITS:
        if name in carved:
            portion = carved[name]
        elif name in datasets:
            own = encoder.encode(name, datasets[name])
            portion = encoder.portion(name, own, list(range(len(own))))
        else:
            continue
        warn_of_losses(f"data.{name}", [portion], encoder.max_tokens)
        check_filled(f"`data.{name}`", portion, encoder.max_tokens)
        splits[name] = portion
    return splits
