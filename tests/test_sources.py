"""Sources: what is read, and what each kind of broken file is told."""

import gzip
import json
import re
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from fedsp.docstrings import read_docstrings
from fedsp.layouts import arc
from fedsp.sources import Docstrings, Files, Hub, content_hash

ROWS = [{"prompt": "a\u2028b", "completion": " c"}, {"prompt": "d", "completion": ' "e",\nf'}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
CSV = 'prompt,completion\na\u2028b, c\nd," ""e"",\nf"\n'
SHARED = Path(__file__).parents[2] / "shared" / "data"


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.json", LINES),
        ("rows.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n")),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.jsonl.gz", gzip.compress(LINES.encode())),
        ("my.rows.v2.csv", CSV),
        ("rows.csv.gz", gzip.compress(("\ufeff" + CSV).encode())),
    ],
)
def test_text_files_give_their_rows(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert list(Files(write(tmp_path / name, content)).load()) == ROWS


def test_a_parquet_file_gives_its_rows(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert list(Files(str(tmp_path / "rows.parquet")).load()) == ROWS


def test_files_are_joined_in_order_and_missing_columns_are_empty(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", '{"a": 1}')
    second = write(tmp_path / "2.jsonl", '{"a": 2, "b": ["x"]}')
    rows = list(Files([first, second]).load())
    assert rows == [{"a": 1, "b": None}, {"a": 2, "b": ["x"]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "x", "must end in .jsonl, .json, .csv, .parquet"),
        ("rows.parquet.gz", "x", "must end in .jsonl, .json, .csv, .parquet"),
        ("rows.jsonl", None, "does not exist (looked from "),
        ("rows.jsonl", "", "rows.jsonl is empty."),
        ("rows.jsonl", " \n\n", "rows.jsonl holds no rows."),
        ("rows.csv", "a,b\n", "rows.csv holds no rows."),
        ("rows.jsonl.gz", gzip.compress(b""), "rows.jsonl.gz holds no rows."),
        (
            "rows.jsonl",
            '{"a": 1}\n\n{"a": 2\n',
            "rows.jsonl, line 3, column 8: malformed JSON: Expecting",
        ),
        ("rows.json", '[{"a": 1},\n {"a" 2}]', "rows.json, line 2, column 7: malformed JSON"),
        ("rows.jsonl", '{"a": 1}\n3\n', "line 2: a JSON object with named fields is wanted, got 3"),
        ("rows.json", '[{"a": 1}, "b"]', "entry 1: a JSON object with named fields is wanted"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "rows.jsonl, line 2: not UTF-8 text"),
        ("rows.jsonl.gz", b"plain", "rows.jsonl.gz cannot be read: Not a gzipped file"),
        ("rows.csv", "a,b\n1,2\n1\n", "rows.csv, line 3: 2 fields are wanted as in line 1, got 1."),
        ("rows.csv", "a,b\n1,2,3\n", "rows.csv, line 2: 2 fields are wanted as in line 1, got 3."),
        ("rows.csv", "a,a\n1,2\n", "line 1: every column needs a name of its own, got ['a', 'a']"),
        ("rows.csv", 'a,b\n1,"2"3\n', "rows.csv, line 2: malformed CSV"),
        ("rows.parquet", "PAR1", "rows.parquet is no readable Parquet file"),
        ("rows.jsonl", '{"a": 1}\n{"a": "x"}\n', "Field 'a' holds values of several kinds in"),
        ("rows.jsonl", "{}\n", "No rows with fields in"),
    ],
)
def test_a_bad_file_is_named_with_the_place(
    name: str, content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Files(str(path)).load()
    assert name in str(caught.value)


def test_a_cut_off_gzip_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", gzip.compress(LINES.encode())[:-9])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz cannot be read"):
        Files(path).load()


def test_no_files_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="must name at least one file"):
        Files([]).load()


def test_a_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    source = Files(write(tmp_path / "one.jsonl", LINES))
    same = Files(write(tmp_path / "two.csv", CSV))
    other = Files(write(tmp_path / "three.jsonl", LINES.replace(" c", " C")))
    assert source.fingerprint() == same.fingerprint() == content_hash(source.load())
    assert source.fingerprint() != other.fingerprint()


def test_a_fingerprint_of_chosen_rows_is_theirs(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    assert content_hash(dataset.select([1])) == content_hash(Dataset.from_list(ROWS[1:]))
    assert content_hash(dataset.select([1, 0])) != content_hash(dataset)


def test_a_folder_laid_out_like_a_hub_data_set_is_read(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", LINES)
    datasets.disable_progress_bars()
    rows = list(Hub(str(tmp_path)).load())
    assert rows == ROWS


def test_a_hub_data_set_out_of_reach_names_what_was_asked_for() -> None:
    message = r"`name`='nobody/nothing', `subset`=None, `split`='dev', `revision`='v1' cannot be"
    with pytest.raises(ValueError, match=message):
        Hub("nobody/nothing", split="dev", revision="v1").load()


def test_a_layout_brings_rows_into_the_form_of_a_task(tmp_path: Path) -> None:
    row = {"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    file = Path(write(tmp_path / "train.jsonl", json.dumps(row)))
    datasets.disable_progress_bars()
    source = Hub(str(tmp_path), layout=arc)
    assert list(source.load()) == [{"question": "q", "choices": ["x", "y"], "answer": 1}]
    write(file, json.dumps({**row, "answerKey": "C"}))
    message = (
        r"split 'train': row 0 does not fit `layout`=arc: ValueError.* Its fields are question"
    )
    with pytest.raises(ValueError, match=message):
        source.load()


def test_a_folder_takes_the_place_of_the_hub_split_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl.gz", gzip.compress(LINES.encode()))
    write(tmp_path / "dev.csv", CSV)
    source = Hub("nobody/nothing", layout=arc, folder=str(tmp_path))
    assert list(source.load()) == ROWS
    assert list(source.other_split("dev").load()) == ROWS
    for split, found in (("test", "none"), ("train", "train.jsonl, train.jsonl.gz")):
        write(tmp_path / "train.jsonl", LINES)
        message = f"must hold one file of the split '{split}', named {split} with one of"
        with pytest.raises(ValueError, match=f"{message}.*; found: {re.escape(found)} "):
            source.other_split(split).load()


def test_only_a_data_set_with_splits_has_another_one() -> None:
    with pytest.raises(ValueError, match=r"'test' names a split of `data\.clients`, and Files has"):
        Files("rows.jsonl").other_split("test")


def test_docstrings_are_the_readers_rows_package_by_package() -> None:
    dataset = Docstrings(["json", "bisect"], max_rows_per_package=3).load()
    assert list(dataset) == read_docstrings(["json", "bisect"], max_rows=3)
    assert dataset.column_names == ["package", "prompt", "completion"]


def test_docstrings_of_no_package_are_an_error() -> None:
    with pytest.raises(ValueError, match="must name at least one"):
        Docstrings([]).load()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data")
@pytest.mark.parametrize(
    ("name", "num_rows"), [("arc_easy/train", 2251), ("webquestions/test", 2032)]
)
def test_real_files_have_the_stated_numbers_of_rows(name: str, num_rows: int) -> None:
    assert len(Files(str(SHARED / f"{name}.jsonl.gz")).load()) == num_rows


def test_an_empty_cell_of_a_csv_file_is_null(tmp_path: Path) -> None:
    rows = Files(write(tmp_path / "rows.csv", 'a,b\n1,\n2,""\n3,x\n')).load()
    assert rows["b"] == [None, None, "x"]
