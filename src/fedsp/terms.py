"""The settings that server and clients of a live federation must share, compared by checksums.

A checksum tells that two sides differ, and where, but not what the other one has.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# what the method is made of; not who runs it where, nor whose data it is
SECTIONS = (
    "client",
    "model.soft_prompt.num_virtual_tokens",
    "model.auxiliary",
    "model.tuned_weights",
    "model.backbone.dtype",
    "model.backbone.position_offset",
    "trainer.communication.wire_dtype",
    "data.task",
    "data.batching",
)
# a client may promise its people more than the others do
_OWN = ("client.privacy",)


def terms(config: Mapping[str, Any]) -> dict[str, str]:
    """Return a checksum of every section that both sides must share.

    Args:
        config: The configuration as `fedsp fit --print_config` shows it; empty where a run was made
            in Python.
    """
    plain = _without_class_levels(config)
    for option in _OWN:
        *path, last = option.split(".")
        holder = _find(plain, path)
        if isinstance(holder, dict):
            holder.pop(last, None)
    return {section: _checksum(_find(plain, section.split("."))) for section in SECTIONS}


def differing(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return the sections whose settings are not the same on both sides."""
    return sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))


def _without_class_levels(tree: Any) -> Any:
    """Lift `init_args` up: options are spoken of without them, as in `model.soft_prompt`."""
    if isinstance(tree, list):
        return [_without_class_levels(value) for value in tree]
    if not isinstance(tree, Mapping):
        return tree
    plain = {name: _without_class_levels(value) for name, value in tree.items()}
    arguments = plain.pop("init_args", None)
    return {**plain, **arguments} if isinstance(arguments, dict) else plain


def _find(tree: Any, path: list[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
