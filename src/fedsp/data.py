"""The data of a federation: four splits, and a partition for every client.

Rows are read here; the layers below divide, tokenise and batch them. Rounds, cohorts and models are
unknown here.
"""

from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fedsp.batching import Batching
from fedsp.division import Division, Encoder, divide, naming
from fedsp.examples import TokenStore
from fedsp.loaders import Loaders
from fedsp.partition import Parties, Partitioner
from fedsp.portions import Portion, pool
from fedsp.pretrained import BackboneSpec, check_vocabulary, load_tokenizer, resolve
from fedsp.run_folder import cache_folder
from fedsp.sources import DataSource
from fedsp.tasks import Task

Split = DataSource | int | float | str | None
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
        self._division: Division | None = None

    def _resolve(self, role: str, split: Split) -> DataSource | int | float | None:
        if self.clients is None and isinstance(split, int | float | str):
            raise ValueError(
                f"`data.{role}` must be a source of its own or null where `data.clients` is null, "
                f"got {split!r}: there is nothing to carve it out of."
            )
        if self.clients is None or not isinstance(split, str):
            return cast(DataSource | int | float | None, split)
        with naming(role):
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
            if self._division is not None:
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
        if self._division is None:
            self._read()
            encoder = self._encoder()
            for role, dataset in self._datasets.items():
                encoder.encode(role, dataset)

    def setup(self, stage: str | None = None) -> None:
        """Read, carve, partition and tokenise once; all stages share the result.

        Args:
            stage: Lightning's stage; without effect.

        Raises:
            ValueError: If the data cannot be what the configuration says.
        """
        if self._division is not None:
            return
        self._read()
        sizes = {name: size for name, size in self.splits.items() if isinstance(size, int | float)}
        encoder = self._encoder()
        division = divide(self._datasets, sizes, self.partitioner, encoder, seed=self.seed)
        splits = dict(division.splits)
        if self._public_is_servers:
            splits["public"] = splits["server"]
        if self.pool_clients and self.clients is not None:
            server = [splits["server"]] if "server" in splits else []
            splits["server"] = pool([*server, *division.clients.values()])
        self.client_names = division.client_names
        self._division = replace(division, splits=splits)

    def _read(self) -> None:
        for role, source in {"clients": self.clients, **self.splits}.items():
            if isinstance(source, DataSource) and role not in self._datasets:
                with naming(role):
                    self._datasets[role] = source.load()

    def _encoder(self) -> Encoder:
        tasks = (self.task, self.public_task)
        return Encoder(*tasks, self.tokenizer, self.max_tokens, self.cache_dir)

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
            return len(self._divided().clients)
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
        splits = self._divided().splits
        return len(splits[split].store) if split in splits else 0

    def num_tokens(self, split: str) -> int:
        """Return the text tokens of a split, all choices included, 0 where there is none."""
        splits = self._divided().splits
        return splits[split].store.num_tokens if split in splits else 0

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
        return self._divided().describe()

    def sample_ids(self, num_tokens: int) -> list[int]:
        """Return the first token ids of text that the server may see, to initialise a prompt from.

        Args:
            num_tokens: At most so many.

        Returns:
            Examples of the server's split, else the public, else the selection split, joined;
            empty if there is none of these splits.
        """
        splits = self._divided().splits
        for name in ("server", "public", "selection"):
            if name in splits:
                return splits[name].store.head(num_tokens)
        return []

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return how often each token occurs in the server's and the public data together.

        Args:
            vocab_size: V.

        Returns:
            [V] int64, all zero where there is neither split.
        """
        splits = self._divided().splits
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for name in ("server", "public"):
            if name in splits:
                counts += torch.from_numpy(splits[name].store.counts(vocab_size))
        return counts

    def public_overlap(self) -> int:
        """Return how many public examples have the same tokens as some client's example."""
        division = self._divided()
        return division.public_overlap({self.tokenizer.bos_token_id, self.tokenizer.eos_token_id})

    def raw_row(self, row_idx: int, split: str = "test") -> dict[str, Any]:
        """Return the fields of a split's row by the `row` of a batch of prompts."""
        return dict(self._datasets[split if split in self._datasets else "clients"][row_idx])

    def _divided(self) -> Division:
        if self._division is None:
            raise RuntimeError("The data is not read yet: call `setup` first.")
        return self._division

    def _existing(self, name: str) -> Portion:
        splits = self._divided().splits
        if name not in splits:
            raise ValueError(
                f"`data.{name}` is null, but its data is needed. Give it a source of its own, a "
                "number of rows or a fraction of `data.clients`."
            )
        return splits[name]

    def _client(self, client_id: int) -> Portion:
        clients = self._divided().clients
        if not 0 <= client_id < len(self.client_names):
            raise ValueError(
                f"A client id must be in [0, {len(self.client_names)}), got {client_id}."
            )
        if client_id not in clients:
            raise ValueError(f"The data of client {self.client_names[client_id]!r} is not here.")
        return clients[client_id]

    def _loaders(self) -> Loaders:
        self._divided()  # before `setup` that is what is missing, not the tokenizer
        return Loaders(self.batching, int(self.tokenizer.pad_token_id), self.seed)

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
        return self._loaders().stream(
            store, "client", client_id, start_step=start_step, num_steps=num_steps
        )

    def server_dataloader(self, *, start_step: int, num_steps: int) -> DataLoader[Any]:
        """Return batches of the server's endless stream; see `client_dataloader`."""
        store = self._existing("server").store
        return self._loaders().stream(store, "server", start_step=start_step, num_steps=num_steps)

    def public_dataloader(self, *, start_step: int, num_steps: int) -> DataLoader[Any]:
        """Return batches of the public data's endless stream; see `client_dataloader`."""
        store = self._existing("public").store
        return self._loaders().stream(store, "public", start_step=start_step, num_steps=num_steps)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return one epoch of the server's data; without any, of all clients' data together."""
        division = self._divided()
        if "server" in division.splits:
            return self._loaders().stream(division.splits["server"].store, "server")
        examples = chain.from_iterable(portion.store for portion in division.clients.values())
        return self._loaders().stream(TokenStore.from_examples(examples), "all-clients")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the selection split once, a question with all its choices a row."""
        return self._loaders().evaluation(self._existing("selection").store)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test split once, a question with all its choices a row."""
        return self._loaders().evaluation(self._existing("test").store)

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
        return self._loaders().prompts(
            self._existing(split), split, max_tokens=self.max_tokens, new_tokens=new_tokens
        )
