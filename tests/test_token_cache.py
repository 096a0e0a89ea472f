"""The token cache: nothing is tokenised twice, and a bad file or folder stops no run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedsp.examples import Example
from fedsp.token_cache import load_or_build

EXAMPLES = [Example([1, 2], [[3], [4, 5]], 1, [7, 8]), Example([], [[70_000]], 0, [9])]


def build() -> list[Example]:
    return EXAMPLES


def forbidden() -> list[Example]:
    raise AssertionError("tokenised again")


def test_a_second_call_reads_the_file(tmp_path: Path) -> None:
    assert list(load_or_build(tmp_path / "new", "key", build)) == EXAMPLES
    assert list(load_or_build(tmp_path / "new", "key", forbidden)) == EXAMPLES


def test_another_key_is_built(tmp_path: Path) -> None:
    load_or_build(tmp_path, "key", build)
    assert list(load_or_build(tmp_path, "other", lambda: EXAMPLES[:1])) == EXAMPLES[:1]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def empty(data: bytes) -> bytes:
    del data
    return b""


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_file_is_built_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    load_or_build(tmp_path, "key", build)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"token cache .* is unusable and built anew"):
        assert list(load_or_build(tmp_path, "key", build)) == EXAMPLES
    assert list(load_or_build(tmp_path, "key", forbidden)) == EXAMPLES


def test_a_process_that_comes_second_changes_nothing(tmp_path: Path) -> None:
    def build_while_another_finishes() -> list[Example]:
        load_or_build(tmp_path, "key", build)
        return EXAMPLES

    assert list(load_or_build(tmp_path, "key", build_while_another_finishes)) == EXAMPLES
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"cannot be cached in .*`data\.cache_dir`"):
        store = load_or_build(tmp_path / "file" / "folder", "key", build)
    assert list(store) == EXAMPLES


def test_an_error_while_building_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> list[Example]:
        raise ValueError("row 3")

    with pytest.raises(ValueError, match="row 3"):
        load_or_build(tmp_path, "key", fail)
    assert list(tmp_path.iterdir()) == []
