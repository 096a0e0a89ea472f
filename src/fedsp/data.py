"""The data of a federation: four splits, and a partition for every client.

Rows are read, carved, partitioned, tokenised and batched here by the parts of the layer below.
Rounds, cohorts and models are unknown here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fedsp.batching import Batching, StepBatches, eval_batches, make_loader
from fedsp.collate import collate, collate_choices, collate_prompts
from fedsp.examples import TokenStore
from fedsp.partition import Parties, Partitioner, carve
from fedsp.portions import Limit, Portion, check_filled, fit_portion, pool, warn_of_losses
from fedsp.pretrained import BackboneSpec, check_vocabulary, load_tokenizer, resolve
from fedsp.run_folder import cache_folder
from fedsp.sources import DataSource, content_hash
from fedsp.tasks import Task
from fedsp.token_cache import load_or_build
from fedsp.tokenization import leading_ids, tokenizer_hash

Split = DataSource | int | float | str | None
# The order in which rows are carved out: a split is the same whatever comes after it.
_SPLITS = ("test", "selection", "server", "public")
_DEFAULT_BATCHING = Batching()


class FederatedDataModule(LightningDataModule):
    """Every split and every client's partition, and the loaders over them."""

    def __init__(  # noqa: PLR0913  (the signature is the configuration schema)
        self,
        clients: DataSource | None,
        task: Task,
        partitioner: Partitioner,
        server: Split = None,
        public: Split = None,
        selection: Split = 0.1,
        test: Split = 0.1,
        pool_clients: bool = False,
        public_task: Task | None = None,
        batching: Batching = _DEFAULT_BATCHING,
        tokenizer: str | None = None,
        max_tokens: int | None = None,
        cache_dir: str | None = None,
        seed: int | None = None,
    ) -> None:
        """Store the configuration; nothing is read before `prepare_data` or `setup`.

        Args:
            clients: Source of the clients' data. Null: it is with the clients of a live federation
                (docs/federation.md).
            task: What a row means.
            partitioner: Who owns which row of the clients' data, of what is left after carving.
            server: Data the server trains on: a source of its own; carved out of the clients'
                source, as a number of rows or as a fraction in (0, 1); or the name of another split
                of the clients' data set. Null: none.
            public: Data for distilling the auxiliary model, as `server`, or `server` itself: the
                server's data once more. Clients' examples must not occur in it.
            selection: Data that chooses the best round, as `server`.
            test: Data that is only scored at the end, as `server`.
            pool_clients: Let the server train on all clients' examples besides its own: centralised
                training, which no federation reaches and against which it is measured.
            public_task: What a row of the public data means. Null: as `task`.
            batching: How examples are put together.
            tokenizer: Folder, hub id or `fedsp://NAME`. Null: that of the global model.
            max_tokens: Longest example in tokens; longer prompts are cut on the left. Null: what
                the model's positions leave beside the virtual tokens.
            cache_dir: Folder for tokenised data. Null: `$FEDSP_CACHE`, else `~/.cache/fedsp`; an
                empty string keeps none.
            seed: Seed of carving, partitioning and the order of batches. Null: `seed_everything`.
        """
        super().__init__()
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"`data.max_tokens` must be at least 2 or null, got {max_tokens}.")
        if clients is None and not isinstance(partitioner, Parties):
            raise ValueError(
                "`data.clients` may be null only with `data.partitioner` fedsp.partition.Parties, "
                "at the server of a live federation. Give a source."
            )
        self.task, self.public_task, self.partitioner = task, public_task or task, partitioner
        self.clients, self.batching, self.seed = clients, batching, seed or 0
        self._public_is_servers = public == "server"
        if self._public_is_servers and (server is None or public_task is not None):
            raise ValueError(
                "`data.public`=server is the server's data once more, which needs `data.server` "
                f"and no `data.public_task`, got {server} and {public_task}."
            )
        wanted: dict[str, Split] = {
            "test": test,
            "selection": selection,
            "server": server,
            "public": None if self._public_is_servers else public,
        }
        self.splits = {name: self._resolve(name, split) for name, split in wanted.items()}
        self.pool_clients = pool_clients
        self.tokenizer_name, self.max_tokens = tokenizer, max_tokens
        self.cache_dir = cache_folder(cache_dir)
        self.client_names: list[str] = []
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._datasets: dict[str, Dataset] = {}
        self._portions: dict[str, Portion] = {}
        self._clients: dict[int, Portion] = {}
        self._is_set_up = False

    def _resolve(self, role: str, split: Split) -> DataSource | int | float | None:
        if self.clients is None and isinstance(split, int | float | str):
            raise ValueError(
                f"`data.{role}` must be a source of its own or null where `data.clients` is null, "
                f"got {split!r}: there is nothing to carve it out of."
            )
        if self.clients is None or not isinstance(split, str):
            return cast(DataSource | int | float | None, split)
        with self._naming(role):
            return self.clients.other_split(split)

    def limit_tokens(self, max_tokens: int) -> None:
        """Take over what the model's positions leave for text; call it before `setup`.

        Args:
            max_tokens: The model's positions less its virtual tokens.

        Raises:
            ValueError: If `data.max_tokens` is above it, or nothing is left for text.
            RuntimeError: If the data is set up already without a limit.
        """
        if max_tokens < 2:
            raise ValueError(
                "`model.soft_prompt.num_virtual_tokens` (or `model.backbone.position_offset`) must "
                f"leave at least 2 of the model's positions for text, it leaves {max_tokens}."
            )
        if self.max_tokens is not None and self.max_tokens > max_tokens:
            raise ValueError(
                f"`data.max_tokens` must be at most {max_tokens}, the model's positions less "
                f"`model.soft_prompt.num_virtual_tokens`, got {self.max_tokens}. Lower one of "
                "the two."
            )
        if self.max_tokens is None:
            if self._is_set_up:
                raise RuntimeError("`limit_tokens` must be called before `setup`.")
            self.max_tokens = max_tokens

    def default_tokenizer(self, name: str, vocab_size: int) -> None:
        """Use the global model's tokenizer where `data.tokenizer` is null; call it before `setup`.

        Args:
            name: Folder, hub id or `fedsp://NAME`.
            vocab_size: The model's number of embeddings.

        Raises:
            ValueError: If the tokenizer gives ids that the model has no embedding for.
        """
        self.tokenizer_name = self.tokenizer_name or name
        check_vocabulary(self.tokenizer, vocab_size, "data.tokenizer")

    def prepare_data(self) -> None:
        """Download, read and tokenise, so that other processes find everything in the caches."""
        if not self._is_set_up:
            self._read()
            for role, dataset in self._datasets.items():
                self._encode(role, dataset)

    def setup(self, stage: str | None = None) -> None:
        """Read, carve, partition and tokenise once; all stages share the result.

        Args:
            stage: Lightning's stage; without effect.

        Raises:
            ValueError: If the data cannot be what the configuration says.
        """
        if self._is_set_up:
            return
        self._read()
        if self.clients is None:
            self._fill({})
            self.client_names = self.partitioner.names(Dataset.from_dict({}))
        else:
            self._divide(self._datasets["clients"])
        self._is_set_up = True

    def _divide(self, source: Dataset) -> None:
        """Carve the held-out rows off the clients' source and hand the rest out."""
        sizes = {name: size for name, size in self.splits.items() if isinstance(size, int | float)}
        carved, left = carve(
            source, sizes, stratify_by=self.partitioner.stratify_by, seed=self.seed
        )
        rest = source.select(left)
        parts = [[left[row] for row in part] for part in self.partitioner(rest, self.seed)]
        self.client_names = self.partitioner.names(rest)
        stored = self._encode("clients", source)
        self._fill({name: self._carved(name, stored, rows) for name, rows in carved.items()})
        # the other parties of a live federation have no rows here
        owned = {idx: part for idx, part in enumerate(parts) if part}
        self._clients = {idx: self._portion("clients", stored, part) for idx, part in owned.items()}
        warn_of_losses("data.clients", list(self._clients.values()), self.max_tokens)
        for idx, portion in self._clients.items():
            owner = f"Client {self.client_names[idx]!r} of `data.clients`"
            check_filled(owner, portion, self.max_tokens)
        if self.pool_clients:
            server = [self._portions["server"]] if "server" in self._portions else []
            self._portions["server"] = pool([*server, *self._clients.values()])

    def _fill(self, carved: dict[str, Portion]) -> None:
        """Make the splits, of what is carved and of the sources of their own."""
        for name in _SPLITS:
            if name in carved:
                portion = carved[name]
            elif name in self._datasets:
                own = self._encode(name, self._datasets[name])
                portion = self._portion(name, own, list(range(len(own))))
            else:
                continue
            warn_of_losses(f"data.{name}", [portion], self.max_tokens)
            check_filled(f"`data.{name}`", portion, self.max_tokens)
            self._portions[name] = portion
        if self._public_is_servers:
            self._portions["public"] = self._portions["server"]

    def _read(self) -> None:
        for role, source in {"clients": self.clients, **self.splits}.items():
            if isinstance(source, DataSource) and role not in self._datasets:
                with self._naming(role):
                    self._datasets[role] = source.load()

    def _encode(self, role: str, dataset: Dataset) -> TokenStore:
        task, tokenizer = self._task(role), self.tokenizer
        with self._naming(role):
            if self.cache_dir is None:
                return TokenStore.from_examples(task.encode_all(dataset, tokenizer))
            key = f"{content_hash(dataset)}/{task!r}/{tokenizer_hash(tokenizer)}"
            return load_or_build(self.cache_dir, key, lambda: task.encode_all(dataset, tokenizer))

    def _carved(self, name: str, stored: TokenStore, rows: list[int]) -> Portion:
        if self._task(name) is not self.task:
            stored = self._encode(name, self._datasets["clients"].select(rows))
            rows = list(range(len(rows)))
        return self._portion(name, stored, rows)

    def _portion(self, name: str, stored: TokenStore, rows: list[int]) -> Portion:
        with self._naming(name):
            documents = [stored[row] for row in rows]
            examples, origins = self._task(name).pack(documents, self.max_tokens)
        limit = Limit(self.max_tokens, num_leading=len(leading_ids(self.tokenizer)))
        return fit_portion(examples, origins, limit, origin=stored, origin_rows=rows)

    def _task(self, role: str) -> Task:
        return self.public_task if role == "public" else self.task

    @contextmanager
    def _naming(self, role: str) -> Iterator[None]:
        """Put the option whose data is at fault in front of an error."""
        try:
            yield
        except ValueError as error:
            text = str(error)
            if self._task(role) is not self.task:
                text = text.replace("`data.task.", "`data.public_task.")
            raise ValueError(f"`data.{role}`: {text}") from error

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for.

        Raises:
            ValueError: If `data.tokenizer` is not set or names no tokenizer.
        """
        if self._tokenizer is None:
            if self.tokenizer_name is None:
                raise ValueError(
                    "`data.tokenizer` must name a folder, a hub id or fedsp://NAME, got null. Give "
                    "that of the global model (`model.backbone.name_or_path`)."
                )
            files = ("tokenizer.json", "tokenizer_config.json")
            folder = resolve(self.tokenizer_name, option="data.tokenizer", files=files)
            self._tokenizer = load_tokenizer(BackboneSpec(name_or_path=folder, tokenizer=folder))
        return self._tokenizer

    @property
    def num_clients(self) -> int:
        """Number of clients; where the partitioner needs the data to tell, only after `setup`.

        Raises:
            RuntimeError: If it is not known yet.
        """
        known = self.partitioner.num_clients
        if known is None:
            self._require_setup()
            return len(self._clients)
        return known

    def client_num_examples(self, client_id: int) -> int:
        """Return the number of a client's training examples."""
        return len(self._client(client_id).store)

    def client_tokens_a_batch(self, client_id: int) -> float:
        """Return the mean number of text tokens in a client's training batches."""
        lengths = self._client(client_id).store.lengths()
        return float(lengths.sum()) / -(-len(lengths) // self.batching.batch_size)

    def num_examples(self, split: str) -> int:
        """Return the number of examples of a split, 0 where there is no such split.

        Args:
            split: `server`, `public`, `selection` or `test`.
        """
        self._require_setup()
        return len(self._portions[split].store) if split in self._portions else 0

    def num_tokens(self, split: str) -> int:
        """Return the text tokens of a split, all choices included, 0 where there is none."""
        self._require_setup()
        return self._portions[split].store.num_tokens if split in self._portions else 0

    def has_choices(self, split: str) -> bool:
        """Whether some example of an existing split has several completions to choose from."""
        return any(len(example.completions) > 1 for example in self._existing(split).store)

    def chance(self, split: str) -> float:
        """Return the accuracy of guessing among the choices of an existing split's examples."""
        shares = [1 / len(example.completions) for example in self._existing(split).store]
        return sum(shares) / len(shares)

    def fingerprint(self, split: str) -> str:
        """Return a hash of an existing split's token ids, for artefacts that depend on them."""
        return self._existing(split).store.digest()

    def describe(self) -> dict[str, Any]:
        """Return the number of examples of every split and client, and of those cut or left out."""
        self._require_setup()
        counts: dict[str, Any] = {name: self.num_examples(name) for name in _SPLITS}
        named = {self.client_names[idx]: portion for idx, portion in self._clients.items()}
        counts["clients"] = {name: len(portion.store) for name, portion in named.items()}
        owners = {"clients": [*named.values()], **{name: [p] for name, p in self._portions.items()}}
        for key in ("num_cut", "num_left_out"):
            counts[key] = {
                name: sum(getattr(p, key) for p in owned) for name, owned in owners.items()
            }
        return counts

    def sample_ids(self, num_tokens: int) -> list[int]:
        """Return the first token ids of text that the server may see, to initialise a prompt from.

        Args:
            num_tokens: At most so many.

        Returns:
            Examples of the server's split, else the public, else the selection split, joined;
            empty if there is none of these splits.
        """
        self._require_setup()
        for name in ("server", "public", "selection"):
            if name in self._portions:
                return self._portions[name].store.head(num_tokens)
        return []

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return how often each token occurs in the server's and the public data together.

        Args:
            vocab_size: V.

        Returns:
            [V] int64, all zero where there is neither split.
        """
        self._require_setup()
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for name in ("server", "public"):
            if name in self._portions:
                counts += torch.from_numpy(self._portions[name].store.counts(vocab_size))
        return counts

    def public_overlap(self) -> int:
        """Return how many public examples have the same tokens as some client's example."""
        self._require_setup()
        if "public" not in self._portions:
            return 0
        marks = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id}
        owned = {text for portion in self._clients.values() for text in portion.texts(marks)}
        return sum(text in owned for text in self._portions["public"].texts(marks))

    def raw_row(self, row_idx: int, split: str = "test") -> dict[str, Any]:
        """Return the fields of a split's row by the `row` of a batch of prompts."""
        return dict(self._datasets[split if split in self._datasets else "clients"][row_idx])

    def _require_setup(self) -> None:
        if not self._is_set_up:
            raise RuntimeError("The data is not read yet: call `setup` first.")

    def _existing(self, name: str) -> Portion:
        self._require_setup()
        if name not in self._portions:
            raise ValueError(
                f"`data.{name}` is null, but its data is needed. Give it a source of its own, a "
                "number of rows or a fraction of `data.clients`."
            )
        return self._portions[name]

    def _client(self, client_id: int) -> Portion:
        self._require_setup()
        if not 0 <= client_id < len(self.client_names):
            raise ValueError(
                f"A client id must be in [0, {len(self.client_names)}), got {client_id}."
            )
        if client_id not in self._clients:
            raise ValueError(f"The data of client {self.client_names[client_id]!r} is not here.")
        return self._clients[client_id]

    def client_dataloader(
        self, client_id: int, *, start_step: int, num_steps: int
    ) -> DataLoader[Any]:
        """Return the batches of some steps of a client's endless stream.

        Args:
            client_id: Index of the client.
            start_step: First step, counted from 0 over all rounds.
            num_steps: Number of batches.
        """
        store = self._client(client_id).store
        return self._train_loader(store, "client", client_id, start_step, num_steps)

    def server_dataloader(self, *, start_step: int, num_steps: int) -> DataLoader[Any]:
        """Return batches of the server's endless stream; see `client_dataloader`."""
        store = self._existing("server").store
        return self._train_loader(store, "server", -1, start_step, num_steps)

    def public_dataloader(self, *, start_step: int, num_steps: int) -> DataLoader[Any]:
        """Return batches of the public data's endless stream; see `client_dataloader`."""
        store = self._existing("public").store
        return self._train_loader(store, "public", -1, start_step, num_steps)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return one epoch of the server's data; without any, of all clients' data together."""
        self._require_setup()
        if "server" in self._portions:
            return self._train_loader(self._portions["server"].store, "server", -1, 0, None)
        examples = chain.from_iterable(portion.store for portion in self._clients.values())
        union = TokenStore.from_examples(examples)
        return self._train_loader(union, "all-clients", -1, 0, None)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the selection split once, a question with all its choices a row."""
        return self._eval_loader(self._existing("selection").store)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test split once, a question with all its choices a row."""
        return self._eval_loader(self._existing("test").store)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test split's prompts once, padded on the left, each with its raw row."""
        return self.prompt_dataloader("test")

    def prompt_dataloader(self, split: str, new_tokens: int = 0) -> DataLoader[Any]:
        """Return the prompts of `selection` or `test` once, padded on the left, each with its row.

        Args:
            split: Which split.
            new_tokens: Room that must be left behind the longest prompt.

        Raises:
            ValueError: If the task gives no prompts, or the room is not there.
        """
        portion = self._existing(split)
        prompts = [len(example.prompt_ids) for example in portion.store]
        if portion.rows is None or 0 in prompts:
            raise ValueError(
                "`fedsp predict` and `trainer.evaluation.generate_tokens` continue prompts, and "
                "`data.task` gives examples without one. Use a task with a prompt, such as "
                "fedsp.tasks.PromptCompletion."
            )
        if self.max_tokens is not None and max(prompts) + new_tokens > self.max_tokens:
            raise ValueError(
                f"`trainer.evaluation.generate_tokens` must be at most "
                f"{self.max_tokens - max(prompts)}, what the longest prompt of `data.{split}` "
                f"leaves of {self.max_tokens} tokens, got {new_tokens}."
            )
        batches = eval_batches(prompts, [1] * len(prompts), self.batching.eval_batch_size)
        pad_id, rows, store = self._pad_id(), portion.rows, portion.store

        def collate_rows(indices: list[int]) -> dict[str, Tensor]:
            return collate_prompts([store[i] for i in indices], pad_id, [rows[i] for i in indices])

        return make_loader(range(len(prompts)), batches, collate_rows)

    def _train_loader(
        self, store: TokenStore, owner: str, client_id: int, start_step: int, num_steps: int | None
    ) -> DataLoader[Any]:
        batches = StepBatches(
            store.lengths(),
            self.batching,
            seed=self.seed,
            owner=owner,
            client_id=client_id,
            start_step=start_step,
            num_steps=num_steps,
        )
        return make_loader(store, batches, partial(collate, pad_id=self._pad_id()))

    def _eval_loader(self, store: TokenStore) -> DataLoader[Any]:
        lengths = [example.num_packed_tokens for example in store]
        num_choices = [len(example.completions) for example in store]
        batches = eval_batches(lengths, num_choices, self.batching.eval_batch_size)
        return make_loader(store, batches, partial(collate_choices, pad_id=self._pad_id()))

    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)
