"""Docstrings are read as text: what becomes a row, what is left out, and the errors."""

import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedsp.docstrings import parse_file, read_docstrings, source_files, summary

SOURCE = '''"""The module's own docstring is no row."""
import nothing_of_this_name

def plain(a, *, b: int = 2) -> str:
    """Return the text
    of both numbers.

    A second paragraph is no summary.
    """
    def inner():
        """Hide inside of another function."""

async def fetch(url):
    """Fetch one page over HTTP."""

class Shape(Base, metaclass=Meta):
    """A shape with an area."""

    @property
    def area(self):
        """Area of this very shape."""

    def _private(self):
        """Private names are never rows."""

    def __len__(self):
        """Special names are never rows."""

class Bare:
    """A class without bases."""

class _Hidden:
    """A private class is no row."""

    def method(self):
        """Nor is any of its methods."""

if True:
    def conditional(): "Defined under a condition here."

def silent(): pass
def short(): "Too short."
def accented(): "Beyond pl\\u00e4in ASCII text."
def titled(): """Returns the
-------
number of them."""
def raises(): ":raises ValueError: in every case"
'''


def long_source(num_functions: int) -> str:
    return "".join(
        f'def function_{i}():\n    """Return the number {i}."""\n' for i in range(num_functions)
    )


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an importable package named `sample_pkg`."""
    folder = tmp_path / "sample_pkg"
    folder.mkdir()
    (folder / "__init__.py").write_text('raise RuntimeError("was imported")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_rows_are_definition_lines_and_first_paragraphs(package: Path) -> None:
    (package / "code.py").write_text(SOURCE)
    rows = read_docstrings(["sample_pkg"])
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        (
            'def plain(a, *, b: int=2) -> str:\n    """',
            "Return the text of both numbers.",
        ),
        ('async def fetch(url):\n    """', "Fetch one page over HTTP."),
        ('class Shape(Base, metaclass=Meta):\n    """', "A shape with an area."),
        ('def area(self):\n    """', "Area of this very shape."),
        ('class Bare:\n    """', "A class without bases."),
        ('def conditional():\n    """', "Defined under a condition here."),
    ]
    assert {row["package"] for row in rows} == {"sample_pkg"}


def test_package_is_never_imported(package: Path) -> None:
    (package / "code.py").write_text(SOURCE)
    read_docstrings(["sample_pkg"])
    assert "sample_pkg" not in sys.modules


def test_tests_and_vendored_code_are_skipped(package: Path) -> None:
    for name in ("tests/a.py", "_vendor/b.py", "test_c.py", "conftest.py", "deep/kept.py"):
        path = package / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'def f():\n    """Found in {name} of all."""\n')
    completions = [row["completion"] for row in read_docstrings(["sample_pkg"])]
    assert completions == ["Found in deep/kept.py of all."]


@pytest.mark.parametrize(
    "damage",
    [b"def broken(:\n", b"\0\0", b"# coding: utf-8\n\xff\xfe", b"# coding: no-such\n"],
    ids=["syntax", "null-bytes", "not-utf8", "unknown-coding"],
)
def test_damaged_file_is_skipped(package: Path, damage: bytes) -> None:
    (package / "good.py").write_text(SOURCE)
    (package / "bad.py").write_bytes(damage)
    assert parse_file(package / "bad.py") is None
    assert len(read_docstrings(["sample_pkg"])) == 6


def test_file_that_vanishes_is_skipped(package: Path) -> None:
    (package / "good.py").write_text(SOURCE)
    (package / "gone.py").symlink_to(package / "nowhere.py")
    assert len(read_docstrings(["sample_pkg"])) == 6


def test_old_escapes_in_a_file_raise_no_warning(package: Path) -> None:
    (package / "old.py").write_text('X = "\\d"\ndef f():\n    """Find a digit somewhere."""\n')
    assert len(read_docstrings(["sample_pkg"])) == 1


def test_repeated_rows_and_long_signatures_are_left_out(package: Path) -> None:
    arguments = ", ".join(f"argument_{i}" for i in range(20))
    (package / "a.py").write_text(
        'def f():\n    """Say the same twice."""\n'
        'def f():\n    """Say the same twice."""\n'
        f'def long({arguments}):\n    """Have too many arguments."""\n'
    )
    assert [row["completion"] for row in read_docstrings(["sample_pkg"])] == ["Say the same twice."]


def test_max_rows_is_a_part_of_all_rows_and_does_not_depend_on_file_order(package: Path) -> None:
    for name in random.Random(0).sample("abcdefgh", 8):
        (package / f"{name}.py").write_text(long_source(10).replace("number", f"number {name}"))
    all_rows = read_docstrings(["sample_pkg"])
    some = read_docstrings(["sample_pkg"], max_rows=12)
    assert len(all_rows) == 80
    assert len(some) == 12
    assert [row for row in all_rows if row in some] == some
    assert read_docstrings(["sample_pkg"], max_rows=12) == some


def test_standard_library_can_be_read() -> None:
    rows = read_docstrings(["json", "textwrap"])
    assert [row["package"] for row in rows] == sorted(row["package"] for row in rows)
    dumps = [row for row in rows if row["prompt"].startswith("def dumps(")]
    assert [row["completion"] for row in dumps] == [
        "Serialize ``obj`` to a JSON formatted ``str``."
    ]


def test_source_files_of_a_single_module_is_its_file() -> None:
    assert [path.name for path in source_files("textwrap")] == ["textwrap.py"]


def test_summary_of_an_empty_docstring_is_empty() -> None:
    assert summary("  \n") == ""


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        (["no_such_package_here"], "`packages` names 'no_such_package_here', which is not inst"),
        (["os.path"], "top-level import names such as 'numpy', got 'os.path'"),
        ([""], "top-level import names such as 'numpy', got ''"),
        (["sys"], "`packages` names 'sys', which has no Python source"),
        (["json", "json"], "`packages` must name each package once, got 'json' twice"),
        (["sample_pkg"], "`packages` names 'sample_pkg', which has no public definition"),
    ],
)
def test_unusable_package_is_named(package: Path, packages: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_docstrings(packages)


def test_module_without_a_spec_counts_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "specless", ModuleType("specless"))
    with pytest.raises(ValueError, match="'specless', which is not installed"):
        read_docstrings(["specless"])


def test_string_instead_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="`packages` must be a list of import names, got 'json'"):
        read_docstrings("json")


def test_max_rows_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="`max_rows` must be at least 1 or null, got 0"):
        read_docstrings(["json"], max_rows=0)
