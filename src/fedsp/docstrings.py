"""Reading docstrings of installed packages as text: definition line -> summary, nothing imported.

No tokenising, no splitting among clients and no training lives here.
"""

import ast
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

# Other projects' code that a package carries along, and code that is not meant for its users.
_SKIPPED_FOLDERS = frozenset({"tests", "test", "vendor", "_vendor", "vendored", "__pycache__"})
_TEST_FILE = re.compile(r"test_.*|.*_test|tests|conftest")
_PLAIN_TEXT = re.compile(r"[ -~]+")
# Directives, examples, tables and underlined titles are no summaries.
_NO_SUMMARY = re.compile(r"(\.\. |>>>|[:@$%#*|\-=~]).*|.*(---|===|~~~).*")

_MIN_WORDS, _MAX_WORDS = 3, 40
# A longer signature would fill most of a small model's context by itself.
_MAX_DEFINITION_CHARS = 200
# With `max_rows`, so many times as many rows are read before the choice, so that no file rules it.
_CANDIDATES_PER_ROW = 2

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def read_docstrings(
    packages: Sequence[str], *, max_rows: int | None = None
) -> list[dict[str, str]]:
    """Read public definitions and their docstrings' summaries from installed packages' files.

    A row's prompt is the definition on one line, as it stands in the source but for line breaks and
    spaces, a colon, and the opening quotes of the docstring on the next line; its completion is
    the docstring's first paragraph on one line. Private names, tests, vendored code, signatures
    above 200 characters, summaries of fewer than 3 or more than 40 words or beyond printable ASCII
    and repeated rows are left out. Files that cannot be read or parsed are skipped.

    The same installed files give the same rows in the same order. Which rows `max_rows` picks
    depends on hashes of paths and texts, so another version of a package changes few of them.

    Args:
        packages: Top-level import names (`numpy`, `json`), also of the standard library.
        max_rows: At most so many rows of each package, at least 1. None takes all.

    Returns:
        Rows with the fields `package`, `prompt` and `completion`: packages in the order given,
        within one by file and line.

    Raises:
        TypeError: If `packages` is a single string.
        ValueError: If a package is dotted, not installed, without Python source, named twice or
            without a single row, or `max_rows` < 1.
    """
    if isinstance(packages, str):
        raise TypeError(f"`packages` must be a list of import names, got {packages!r}.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"`max_rows` must be at least 1 or null, got {max_rows}.")
    repeated = sorted({package for package in packages if list(packages).count(package) > 1})
    if repeated:
        raise ValueError(f"`packages` must name each package once, got {repeated[0]!r} twice.")
    files = {package: _source_files(package) for package in packages}
    seen: set[tuple[str, str]] = set()
    rows: list[dict[str, str]] = []
    for package in packages:
        rows += _package_rows(package, files[package], max_rows, seen)
    return rows


def source_files(package: str) -> list[Path]:
    """List a package's Python files, without tests and vendored code, sorted by path.

    Args:
        package: Top-level import name of an installed package or module; it is not imported.

    Returns:
        Paths that existed just now.

    Raises:
        ValueError: If the package is dotted, not installed or without Python source.
    """
    return [path for _, path in _source_files(package)]


def parse_file(path: Path) -> ast.Module | None:
    """Parse a Python file.

    Args:
        path: File in any encoding that its first lines declare.

    Returns:
        The syntax tree, or None if the file cannot be read or is no valid Python.
    """
    try:
        with warnings.catch_warnings():
            # Old escapes in others' strings are no concern of the caller, nor an error under -W.
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def summary(docstring: str) -> str:
    """Take a docstring's first paragraph on one line.

    Args:
        docstring: Cleaned text as `ast.get_docstring` gives it.

    Returns:
        The paragraph with every run of white space as one space; empty for an empty text.
    """
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())


def _source_files(package: str) -> list[tuple[str, Path]]:
    """List (path inside the package, path) of a package's files, sorted."""
    advice = "Install it or take it out of `packages`."
    if not package.isidentifier():
        # A dotted name would import its parent, which is never done here.
        raise ValueError(
            f"`packages` must hold top-level import names such as 'numpy', got {package!r}."
        )
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module in sys.modules without a spec
        spec = None
    if spec is None:
        raise ValueError(f"`packages` names {package!r}, which is not installed. {advice}")
    if spec.submodule_search_locations is None:
        origin = Path(spec.origin or "")
        files = [(origin.name, origin)] if origin.suffix == ".py" else []
    else:
        files = [
            (path.relative_to(location).as_posix(), path)
            for location in spec.submodule_search_locations
            for path in Path(location).rglob("*.py")
            if not _is_skipped(path.relative_to(location))
        ]
    if not files:
        raise ValueError(f"`packages` names {package!r}, which has no Python source. {advice}")
    return sorted(files)


def _is_skipped(relative: Path) -> bool:
    return (
        not _SKIPPED_FOLDERS.isdisjoint(relative.parts)
        or _TEST_FILE.fullmatch(relative.stem) is not None
    )


def _package_rows(
    package: str,
    files: list[tuple[str, Path]],
    max_rows: int | None,
    seen: set[tuple[str, str]],
) -> list[dict[str, str]]:
    """Read one package's rows; files are parsed only until there are candidates enough."""
    found: list[tuple[str, int, str, str]] = []
    for name, path in sorted(files, key=lambda file: _digest(package, file[0])):
        if max_rows is not None and len(found) >= _CANDIDATES_PER_ROW * max_rows:
            break
        tree = parse_file(path)
        if tree is None:
            continue
        for position, (prompt, completion) in enumerate(_tree_rows(tree)):
            if (prompt, completion) not in seen:
                seen.add((prompt, completion))
                found.append((name, position, prompt, completion))
    if not found:
        raise ValueError(
            f"`packages` names {package!r}, which has no public definition with a docstring of "
            f"{_MIN_WORDS} to {_MAX_WORDS} words. Take it out of `packages`."
        )
    chosen = sorted(found, key=lambda row: _digest(row[2], row[3]))[:max_rows]
    return [
        {"package": package, "prompt": prompt, "completion": completion}
        for _, _, prompt, completion in sorted(chosen)
    ]


def _tree_rows(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in _public_definitions(tree.body):
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        completion = summary(docstring)
        if not _is_usable(completion):
            continue
        definition = _definition_line(node)
        if len(definition) <= _MAX_DEFINITION_CHARS and _PLAIN_TEXT.fullmatch(definition):
            yield f'{definition}:\n    """', completion


def _public_definitions(body: Sequence[ast.stmt]) -> Iterator[Definition]:
    """Yield public functions, classes and methods in source order, not what a function hides."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _public_definitions([*node.body, *node.orelse])
        elif isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public_definitions(node.body)


def _definition_line(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"


def _is_usable(completion: str) -> bool:
    return (
        _MIN_WORDS <= len(completion.split()) <= _MAX_WORDS
        and _PLAIN_TEXT.fullmatch(completion) is not None
        and _NO_SUMMARY.fullmatch(completion) is None
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
