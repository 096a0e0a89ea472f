"""Write a server's completions of given prompts to a file."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor

from fedsp.server import ServerModule
from fedsp.state_files import write_text_atomically


def check_output(path: str) -> Path:
    """Make sure that completions can be written to a file, before any work.

    Args:
        path: As the user typed it.

    Returns:
        The file, which may not exist yet.

    Raises:
        ValueError: If it is there already: what it holds may be somebody's data.
    """
    file = Path(path).expanduser()
    if file.exists():
        kind = "folder" if file.is_dir() else "file"
        raise ValueError(f"`--output` must be a new file, got the {kind} {file}, which exists.")
    return file


@torch.no_grad()
def write_predictions(
    fabric: Fabric,
    server: ServerModule,
    batches: Iterable[dict[str, Tensor]],
    path: Path,
    *,
    max_new_tokens: int,
) -> int:
    """Complete every prompt greedily and write one JSON line each, in the order of the rows.

    Args:
        fabric: Where to run.
        server: The global model with its soft prompt.
        batches: `input_ids`, `attention_mask` [B, T], left-padded, and `row` [B].
        path: The file; its folder is created.
        max_new_tokens: Longest completion in tokens, at least 1.

    Returns:
        Number of completions.
    """
    server.eval()
    completions: dict[int, str] = {}
    for batch_idx, batch in enumerate(batches):
        moved = fabric.to_device(batch)
        with fabric.autocast():
            texts = server.predict_step(moved, batch_idx, max_new_tokens=max_new_tokens)
        completions |= dict(zip(batch["row"].tolist(), texts, strict=True))
    lines = (
        json.dumps({"row": row, "completion": text}, ensure_ascii=False)
        for row, text in sorted(completions.items())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, "".join(f"{line}\n" for line in lines))
    return len(completions)
