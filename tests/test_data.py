"""The data module: splits, partitions, streams and every refusal, on rows written by hand."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from fedsp.batching import Batching
from fedsp.data import FederatedDataModule
from fedsp.partition import IID, ByColumn, BySizes
from fedsp.sources import Files, Hub
from fedsp.tasks import MultipleChoice, PromptCompletion, RawText, Task
from toy_text import byte_tokenizer, save_byte_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
EOS = 1
ROWS = [
    {
        "site": "ab"[idx % 3 == 0],
        "prompt": f"{idx:03d}:" + "p" * (idx % 7),
        "completion": f" c{idx}",
    }
    for idx in range(60)
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    return save_byte_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def make(tmp_path: Path, tokenizer: str, rows_file: str) -> Any:
    def make_module(**changes: Any) -> FederatedDataModule:
        settings: dict[str, Any] = {
            "clients": Files(rows_file),
            "task": PromptCompletion(),
            "partitioner": IID(3),
            "batching": Batching(batch_size=4, eval_batch_size=5),
            "tokenizer": tokenizer,
            "cache_dir": str(tmp_path / "cache"),
        }
        return FederatedDataModule(**{**settings, **changes})

    return make_module


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def decoded(loader: Any) -> list[str]:
    tokenizer = byte_tokenizer()
    return [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def texts_of(data: FederatedDataModule, client_id: int) -> list[str]:
    steps = -(-data.client_num_examples(client_id) // 4)
    return decoded(data.client_dataloader(client_id, start_step=0, num_steps=steps))


def test_splits_and_clients_share_out_all_rows(make: Any) -> None:
    data = make(server=6, public=0.2)
    data.setup()
    owned = [text for client_id in range(3) for text in texts_of(data, client_id)]
    for loader in (
        data.val_dataloader(),
        data.test_dataloader(),
        data.server_dataloader(start_step=0, num_steps=2),
        data.public_dataloader(start_step=0, num_steps=3),
    ):
        owned += decoded(loader)
    assert sorted(owned) == sorted(row["prompt"] + row["completion"] for row in ROWS)
    assert data.describe() == {
        "test": 6,
        "selection": 6,
        "server": 6,
        "public": 12,
        "clients": {"client-0": 10, "client-1": 10, "client-2": 10},
        "num_cut": dict.fromkeys(["clients", "test", "selection", "server", "public"], 0),
        "num_left_out": dict.fromkeys(["clients", "test", "selection", "server", "public"], 0),
    }


def test_a_natural_partition_keeps_names_and_is_in_every_split(make: Any) -> None:
    data = make(partitioner=ByColumn("site"), test=0.2)
    with pytest.raises(RuntimeError, match="call `setup` first"):
        _ = data.num_clients
    data.setup()
    assert (data.num_clients, data.client_names) == (2, ["a", "b"])
    # 40 rows of a and 20 of b: in proportion, 8 and 4 to test, 4 and 2 to selection
    assert data.describe()["clients"] == {"a": 28, "b": 14}
    sites = {row["prompt"] + row["completion"]: row["site"] for row in ROWS}
    assert sorted(sites[text] for text in decoded(data.test_dataloader())) == ["a"] * 8 + ["b"] * 4
    assert {sites[text] for text in texts_of(data, 1)} == {"b"}


def test_a_split_may_have_a_source_of_its_own_or_be_absent(make: Any, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", ROWS[:7])
    data = make(server=Files(own), selection=None, test=None)
    data.setup()
    assert data.describe()["clients"] == dict.fromkeys(["client-0", "client-1", "client-2"], 20)
    assert [data.num_examples(name) for name in ("server", "public", "selection")] == [7, 0, 0]
    for loader in (data.val_dataloader, data.test_dataloader, data.predict_dataloader):
        with pytest.raises(ValueError, match=r"`data\.(selection|test)` is null, but its data"):
            loader()
    with pytest.raises(ValueError, match=r"`data\.public` is null"):
        data.public_dataloader(start_step=0, num_steps=1)


def test_a_split_may_be_another_one_of_the_clients_data_set(make: Any, tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:30]), ("dev", ROWS[30:40]), ("final", ROWS[40:45])):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    data = make(clients=Hub("x/y", folder=str(tmp_path)), selection="dev", test="final", server=6)
    data.setup()
    sizes = [data.num_examples(name) for name in ("server", "selection", "test")]
    assert (sizes, data.describe()["clients"]) == ([6, 10, 5], {f"client-{i}": 8 for i in range(3)})
    expected = {row["prompt"] + row["completion"] for row in ROWS[40:45]}
    assert set(decoded(data.test_dataloader())) == expected
    message = r"`data\.test`: `folder`=.* must hold one file of the split 'nope'"
    with pytest.raises(ValueError, match=message):
        make(clients=Hub("x/y", folder=str(tmp_path)), test="nope").setup()
    with pytest.raises(ValueError, match=r"`data\.selection`: 'dev' names a split of `data\.clie"):
        make(selection="dev")


def test_public_data_may_be_the_servers_once_more(make: Any) -> None:
    data = make(server=10, public="server")
    data.setup()
    same = [set(decoded(loader(start_step=0, num_steps=3)))
            for loader in (data.server_dataloader, data.public_dataloader)]  # fmt: skip
    assert same[0] == same[1]
    assert len(same[0]) == data.num_examples("public") == 10
    assert data.public_overlap() == 0
    for changes in ({"server": None}, {"server": 10, "public_task": RawText("{prompt}")}):
        with pytest.raises(ValueError, match=r"`data\.public`=server is the server's data once"):
            make(public="server", **changes)


def test_labels_are_the_completion_and_its_end(make: Any) -> None:
    data = make()
    data.setup()
    batch = next(iter(data.client_dataloader(0, start_step=0, num_steps=1)))
    tokenizer = byte_tokenizer()
    for ids, mask, labels in zip(*batch.values(), strict=True):
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert labels[mask.bool()][-1] == EOS
        assert (labels[~mask.bool()] == -100).all()
        prompt, completion = tokenizer.decode(ids[mask.bool()][:-1]).split(" ")
        assert tokenizer.decode(labels[labels != -100][:-1]) == " " + completion
        assert prompt in {row["prompt"] for row in ROWS}


@pytest.mark.parametrize("owner", ["client", "server", "public"])
def test_five_steps_twice_are_ten_steps_over_an_epochs_border(owner: str, make: Any) -> None:
    def read(data: FederatedDataModule, start: int, num: int) -> list[dict[str, torch.Tensor]]:
        if owner == "client":
            return list(data.client_dataloader(1, start_step=start, num_steps=num))
        loaders = {"server": data.server_dataloader, "public": data.public_dataloader}
        return list(loaders[owner](start_step=start, num_steps=num))

    data, resumed = make(server=14, public=14), make(server=14, public=14)
    data.setup()
    resumed.setup()
    whole, parts = read(data, 0, 10), read(data, 0, 5) + read(resumed, 5, 5)
    assert len(whole) == len(parts) == 10
    assert all(is_same(one, other) for one, other in zip(whole, parts, strict=True))


def test_the_global_random_stream_is_left_alone(make: Any) -> None:
    before = torch.get_rng_state()
    data = make(server=6)
    data.setup()
    for loader in (
        data.client_dataloader(0, start_step=0, num_steps=5),
        data.train_dataloader(),
        data.val_dataloader(),
        data.predict_dataloader(),
    ):
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_carves_and_partitions_anew(make: Any) -> None:
    one, other = make(), make(seed=1)
    one.setup()
    other.setup()
    assert set(decoded(one.test_dataloader())) != set(decoded(other.test_dataloader()))
    assert set(texts_of(one, 0)) != set(texts_of(other, 0))


def test_one_epoch_of_training_is_the_servers_data_or_all_clients(make: Any) -> None:
    data, union = make(server=10), make()
    data.setup()
    union.setup()
    assert isinstance(data, LightningDataModule)
    assert len(decoded(data.train_dataloader())) == 10
    expected = [text for client_id in range(3) for text in texts_of(union, client_id)]
    assert sorted(decoded(union.train_dataloader())) == sorted(expected)


def test_prompts_to_predict_know_their_raw_rows(make: Any, tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", [{"prompt": "x" * 50, "completion": "y" * 50}, *ROWS])
    for test in (0.2, Files(own)):
        data = make(test=test, max_tokens=60)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.setup()
        tokenizer = byte_tokenizer()
        num_seen = 0
        for batch in data.predict_dataloader():
            assert batch["attention_mask"][:, -1].all()
            for ids, mask, row in zip(*batch.values(), strict=True):
                prompt = data.raw_row(int(row))["prompt"]
                assert prompt.endswith(tokenizer.decode(ids[mask.bool()]))
                num_seen += 1
        assert num_seen == data.num_examples("test")


def test_raw_text_has_no_prompts_to_predict(make: Any) -> None:
    data = make(task=RawText("{prompt}{completion}"))
    data.setup()
    with pytest.raises(ValueError, match=r"continue prompts, and `data.task` gives"):
        data.predict_dataloader()


def test_long_prompts_are_cut_and_counted_once_a_split(make: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "abcdefgh", "completion": " x"}] * 4
    rows += [{"prompt": "a", "completion": " x"}] * 4 + [{"prompt": "a", "completion": " " * 20}]
    own = write_rows(tmp_path / "own.jsonl", rows)
    data = make(clients=Files(own), server=Files(own), selection=None, test=None)
    data.limit_tokens(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup()
        data.setup()
    assert [str(warning.message)[:50] for warning in caught] == [
        "`data.server`: 4 of 9 examples are longer than `da",
        "`data.server`: 1 of 9 examples are left out: a com",
        "`data.clients`: 4 of 9 examples are longer than `d",
        "`data.clients`: 1 of 9 examples are left out: a co",
    ]
    texts = set(decoded(data.server_dataloader(start_step=0, num_steps=2)))
    assert texts == {"defgh x", "a x"}
    assert data.describe()["num_cut"] == {"clients": 4, "server": 4}
    assert data.describe()["num_left_out"] == {"clients": 1, "server": 1}


def test_the_start_token_stays_when_a_prompt_is_cut(make: Any, tmp_path: Path) -> None:
    tokenizer = save_byte_tokenizer(tmp_path / "with-bos", bos=True)
    data = make(tokenizer=tokenizer, max_tokens=8)
    with pytest.warns(UserWarning, match="are cut on the left"):
        data.setup()
    batch = next(iter(data.val_dataloader()))
    assert (batch["input_ids"][:, 0] == 0).all()


def test_a_client_left_without_examples_is_named(make: Any, tmp_path: Path) -> None:
    rows = [{"site": "b", "prompt": "a", "completion": " " * 20}] * 3
    own = write_rows(tmp_path / "own.jsonl", [*rows, {**rows[0], "site": "a", "completion": "c"}])
    data = make(
        clients=Files(own), partitioner=ByColumn("site"), selection=None, test=None, max_tokens=8
    )
    with (
        pytest.warns(UserWarning, match="3 of 4 examples are left out"),
        pytest.raises(ValueError, match=r"^Client 'b' of `data\.clients` has no example"),
    ):
        data.setup()


def test_the_models_limit_is_taken_over_or_must_not_be_exceeded(make: Any) -> None:
    data = make(max_tokens=20)
    data.limit_tokens(30)
    assert data.max_tokens == 20
    with pytest.raises(ValueError, match=r"`data\.max_tokens` must be at most 16.*got 20\. Lower"):
        data.limit_tokens(16)
    late = make()
    late.setup()
    with pytest.raises(RuntimeError, match="must be called before `setup`"):
        late.limit_tokens(30)
    with pytest.raises(ValueError, match=r"`data\.max_tokens` must be at least 2 or null, got 1"):
        make(max_tokens=1)


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts = [0]
    encode = Task.encode

    def counting(self: Task, rows: Any, *args: Any, **kwargs: Any) -> Any:
        counts[0] += len(rows)
        return encode(self, rows, *args, **kwargs)

    monkeypatch.setattr(Task, "encode", counting)
    return counts


def test_a_text_is_tokenised_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_encoded(monkeypatch)
    make(server=5).prepare_data()
    assert counts == [60]
    again = make(partitioner=IID(2), seed=3, max_tokens=30)
    again.prepare_data()
    again.setup("fit")
    assert counts == [60]
    make(task=PromptCompletion(add_eos=False)).setup()
    assert counts == [120]
    make(cache_dir="").setup()
    assert counts == [180]


def test_the_cache_is_where_the_environment_says(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDSP_CACHE", str(tmp_path / "elsewhere"))
    make(cache_dir=None).prepare_data()
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_choices_stay_together_and_know_the_answer(make: Any, tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "choices": ["x" * i for i in range(1, n)], "answer": n - 3}
            for n in range(4, 9)] * 4  # fmt: skip
    data = make(
        clients=Files(write_rows(tmp_path / "own.jsonl", rows)),
        task=MultipleChoice("{question}"),
        test=0.5,
    )
    data.setup()
    num_questions = 0
    for batch in data.test_dataloader():
        assert len(batch["question"]) <= 5 or len(set(batch["question"].tolist())) == 1
        for question in batch["question"].unique():
            own = batch["question"] == question
            num_choices = int(own.sum())
            assert batch["num_chars"][own].tolist() == list(range(1, num_choices + 1))
            assert batch["is_answer"][own].nonzero().flatten().tolist() == [num_choices - 2]
            num_questions += 1
    assert num_questions == 10


def test_public_data_may_be_raw_text_from_the_same_file(make: Any) -> None:
    data = make(public=12, public_task=RawText("{prompt}{completion}", block_size=16))
    data.setup()
    batches = list(data.public_dataloader(start_step=0, num_steps=3))
    assert {batch["input_ids"].shape[1] for batch in batches} == {16}
    assert all(
        ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all() for batch in batches
    )
    with pytest.raises(ValueError, match=r"`data\.public_task\.block_size`=16 must not be above"):
        make(public=12, public_task=data.public_task, max_tokens=15).setup()


def test_public_examples_that_a_client_holds_are_counted(make: Any, tmp_path: Path) -> None:
    texts = [{"text": row["prompt"] + row["completion"]} for row in ROWS[:10]]
    public = write_rows(tmp_path / "public.jsonl", [*texts, {"text": "of its own"}])
    data = make(public=Files(public), public_task=RawText(block_size=8), selection=None, test=None)
    data.setup()
    assert data.public_overlap() == 10
    disjoint = make(public=0.2)
    disjoint.setup()
    assert disjoint.public_overlap() == 0
    without = make()
    without.setup()
    assert without.public_overlap() == 0


def test_sample_ids_are_the_servers_first_texts(make: Any, tmp_path: Path) -> None:
    own = Files(write_rows(tmp_path / "own.jsonl", [{"prompt": "abc", "completion": " d"}] * 3))
    tokenizer = byte_tokenizer()
    expected = [*tokenizer("abc d")["input_ids"], EOS] * 3
    for changes in ({"server": own}, {"public": own}, {"selection": own}):
        data = make(**changes)
        data.setup()
        assert data.sample_ids(8) == expected[:8]
        assert data.sample_ids(99) == expected
    none = make(selection=None)
    none.setup()
    assert none.sample_ids(3) == []


def test_a_fingerprint_follows_the_tokens(make: Any) -> None:
    modules = [make(public=10), make(public=10), make(public=10, seed=1), make(public=11)]
    for data in modules:
        data.setup()
    first, same, *others = [data.fingerprint("public") for data in modules]
    assert first == same
    assert first not in others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "`data.tokenizer` must name a folder, a hub id or fedsp://NAME, got"),
        ({"tokenizer": "/no/such/folder"}, "`data.tokenizer` must be a folder"),
        ({"clients": Files("/no/rows.jsonl")}, "`data.clients`: Data file /no/rows.jsonl does not"),
        ({"test": Files("/no/rows.jsonl")}, "`data.test`: Data file /no/rows.jsonl does not exist"),
        (
            {"task": PromptCompletion("{ask}")},
            "`data.clients`: `data.task.prompt` names the field 'ask', which row 0 lacks",
        ),
        (
            {"public": 5, "public_task": RawText()},
            "`data.public`: `data.public_task.text` names the field 'text', which row 0 lacks",
        ),
        ({"partitioner": IID(49)}, "49 clients need at least 49 rows, but only 48 rows are left"),
        ({"partitioner": ByColumn("who")}, "its columns are site, prompt, completion."),
        ({"partitioner": BySizes([40, 9])}, "asks for 49 rows, but 48 are left"),
        ({"test": 1.0}, "`data.test` as a fraction must be in (0, 1), got 1.0"),
        ({"server": 50}, "are 62 rows (`data.test`: 6, `data.selection`: 6, `data.server`: 50)"),
    ],
)
def test_data_that_cannot_be_is_refused(changes: dict[str, Any], message: str, make: Any) -> None:
    data = make(**changes)
    with pytest.raises(ValueError, match="^" * message.startswith("`data.") + re.escape(message)):
        data.setup()


def test_only_existing_clients_have_data(make: Any) -> None:
    data = make()
    data.setup()
    for client_id in (-1, 3):
        with pytest.raises(ValueError, match=r"A client id must be in \[0, 3\), got"):
            data.client_num_examples(client_id)


def test_a_configuration_file_is_all_it_takes(
    tmp_path: Path, tokenizer: str, rows_file: str
) -> None:
    config = {
        "clients": {"class_path": "fedsp.sources.Files", "init_args": {"paths": rows_file}},
        "task": {"class_path": "fedsp.tasks.PromptCompletion"},
        "partitioner": {
            "class_path": "fedsp.partition.BySizes",
            "init_args": {"sizes": [0.5, 0.5]},
        },
        "server": {"class_path": "fedsp.sources.Files", "init_args": {"paths": [rows_file]}},
        "public": 5,
        "selection": 0.2,
        "test": None,
        "tokenizer": tokenizer,
        "cache_dir": str(tmp_path / "cache"),
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FederatedDataModule, "data")
    arguments = ["--data", json.dumps(config), "--data.batching.batch_size", "3"]
    parsed = parser.parse_args(arguments)
    data = parser.instantiate(parsed).data
    data.setup()
    assert (data.num_clients, data.num_examples("public"), data.num_examples("selection")) == (
        2,
        5,
        12,
    )
    assert data.batching == Batching(batch_size=3)
    # `test: null` is not the default and must come back, so a saved configuration keeps its nulls
    assert parser.parse_string(parser.dump(parsed, skip_unset=False)) == parsed


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data")
def test_real_questions_of_three_to_five_choices_are_read(make: Any) -> None:
    data = make(
        clients=Files(str(SHARED / "arc_easy" / "validation.jsonl.gz")),
        task=MultipleChoice("Question: {question}\nAnswer:"),
        test=0.5,
    )
    data.setup()
    num_choices = [
        count for batch in data.test_dataloader() for count in batch["question"].bincount().tolist()
    ]
    assert len(num_choices) == 285
    assert set(num_choices) <= {3, 4, 5}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data")
def test_ten_thousand_rows_lose_nothing(make: Any) -> None:
    data = make(
        clients=Files(str(SHARED / "sciq_qa" / "train.jsonl.gz")),
        partitioner=BySizes([0.7, 0.2, 0.1]),
        selection=Files(str(SHARED / "sciq_qa" / "validation.jsonl.gz")),
        test=None,
    )
    data.setup()
    described = data.describe()
    assert sum(described["clients"].values()) == 11_679
    assert described["selection"] == 1000
    assert described["num_left_out"] == {"clients": 0, "selection": 0}
