"""Fields of a row: looked up by name, and filled into templates of Python's `str.format`.

A field name that ends in a question mark (`{context?}`) is empty where the row lacks the field.
"""

import string
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def check_template(option: str, template: str, *, needs_field: bool) -> None:
    """Check a template before any row is seen.

    Args:
        option: Option of the task, for error messages.
        template: The template.
        needs_field: Whether it must name a field.

    Raises:
        ValueError: If it is malformed, counts its fields, or names none where one is needed.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"`data.task.{option}`={template!r} is no template: {error}. Write field names in "
            "braces, a brace itself as '{{' or '}}'."
        ) from error
    if "" in names or any(name.isdecimal() for name in names):
        raise ValueError(f"`data.task.{option}`={template!r} must name its fields, not count them.")
    if needs_field and not names:
        raise ValueError(
            f"`data.task.{option}`={template!r} names no field. Write the field in braces, such as "
            f"'{{{template.strip() or 'text'}}}'."
        )


def fields_of(template: str) -> list[str]:
    """Return the fields of a row that a template reads, each once.

    Args:
        template: A template that `check_template` accepts.
    """
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    return list(dict.fromkeys(name.split("[")[0].split(".")[0].rstrip("?") for name in names))


def fill(option: str, template: str, row: Row, row_idx: int) -> str:
    """Fill a template from a row.

    Args:
        option: Option of the task, for error messages.
        template: A template that `check_template` accepts.
        row: Field name to value.
        row_idx: Index of the row in its source, for error messages.

    Raises:
        ValueError: If a field is missing or null and not optional, or cannot be formatted.
    """
    values = dict(row)
    for _, name, _, _ in string.Formatter().parse(template):
        if name is None:
            continue
        if name.endswith("?"):
            value = row.get(name[:-1])
            values[name] = "" if value is None else value
        else:
            field(option, name.split("[")[0].split(".")[0], row, row_idx)
    try:
        return template.format_map(values)
    except (AttributeError, LookupError, ValueError, TypeError) as error:
        raise ValueError(
            f"`data.task.{option}`={template!r} cannot be filled from row {row_idx}: {error!r}."
        ) from error


def field(option: str, path: str, row: Row, row_idx: int) -> Any:
    """Look up a field.

    Args:
        option: Option of the task, for error messages.
        path: Its name; `choices.text` is a field inside a field.
        row: Field name to value.
        row_idx: Index of the row in its source, for error messages.

    Raises:
        ValueError: If the row lacks it or leaves it null.
    """
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping) or value.get(name) is None:
            raise ValueError(
                f"`data.task.{option}` names the field {path!r}, which row {row_idx} lacks or "
                f"leaves empty (null). Its fields are {', '.join(row)}."
            )
        value = value[name]
    return value
