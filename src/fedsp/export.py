"""Write what was tuned for use outside: a soft prompt as a peft adapter with a model card.

Axes: L layers, K key/value heads, P virtual tokens, D head size.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedsp.backbone import Backbone
from fedsp.pretrained import resolve
from fedsp.rotation import rotate_keys
from fedsp.server import ServerModule
from fedsp.state_files import remove_temporary_files, write_bytes_atomically

WEIGHTS = "adapter_model.safetensors"
_ON_CARD = ("selection", "test", "differential_privacy")


def export_adapter(
    prefix: Tensor, backbone: Backbone, folder: Path, *, base_model: str, results: dict[str, Any]
) -> Path:
    """Write an adapter that gives identical logits in peft.

    Args:
        prefix: [L, 2, K, P, D] The soft prompt in its key/value form.
        backbone: The global model; a prompt whose text starts at position 0 is converted by
            rotating its keys.
        folder: Created where missing; an adapter there is replaced.
        base_model: Folder or hub id of the global model, as `PeftModel` users will load it.
        results: Plain data for the card: methods and measured figures.

    Returns:
        The folder.

    Raises:
        ValueError: If the prompt has no virtual tokens, or was trained with `position_offset` on a
            model with learned positions, which peft cannot express.
    """
    # peft takes about as long to import as everything else together; only an export needs it
    from peft import PrefixTuningConfig

    num_layers, _, num_heads, num_tokens, head_dim = prefix.shape
    if num_tokens == 0:
        raise ValueError(
            "`model.soft_prompt.num_virtual_tokens` must be above 0 for an adapter, got 0: the "
            "global model itself is the result."
        )
    offset = backbone.spec.position_offset
    if offset is not None and offset != num_tokens:
        prefix = rotate_keys(backbone, prefix, num_tokens - offset)
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(folder)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model if backbone.spec.config else resolve(base_model),
        num_virtual_tokens=num_tokens,
        num_layers=num_layers,
        token_dim=num_heads * head_dim,
        num_attention_heads=num_heads,
        num_transformer_submodules=1,
        encoder_hidden_size=num_heads * head_dim,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    embeddings = prefix.detach().float().cpu().permute(3, 0, 1, 2, 4).reshape(num_tokens, -1)
    data = save({"prompt_embeddings": embeddings.contiguous()})
    # not the library's own file writer: it lets nobody but the owner read the file
    write_bytes_atomically(folder / WEIGHTS, data)
    (folder / "README.md").write_text(_card(base_model, num_tokens, results), encoding="utf-8")
    return folder


def check_exportable(server: ServerModule) -> None:
    """Refuse what was tuned on another model than the global one.

    Raises:
        ValueError: If it was.
    """
    if server.deploy_auxiliary:
        raise ValueError(
            "`model.deploy_auxiliary` tunes the auxiliary model, which peft cannot load: only what "
            "was tuned on the global model can be exported."
        )


def export_tuned(server: ServerModule, folder: Path, results: dict[str, Any]) -> None:
    """Write what a server has tuned: a prompt or LoRA as a peft adapter, other weights as they are.

    Args:
        server: With its model loaded.
        folder: Created where missing; an adapter there is replaced.
        results: What `results.json` holds, for the card.

    Raises:
        ValueError: As `export_adapter`.
    """
    backbone, prompt = server.require_model()
    base_model = server.backbone_spec.name_or_path
    if server.tuned_weights is not None:
        folder.mkdir(parents=True, exist_ok=True)
        server.tuned_weights.export(server.weights(), backbone, folder, base_model)
        if not prompt.num_virtual_tokens:
            return
    figures = {name: value for name, value in results.items() if name in _ON_CARD}
    export_adapter(prompt.prefix(), backbone, folder, base_model=base_model, results=figures)


def import_adapter(folder: Path) -> Tensor:
    """Read the key/value form back from an adapter that `export_adapter` or peft wrote.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        [L, 2, K, P, D] fp32.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    embeddings = load_file(folder / WEIGHTS)["prompt_embeddings"]
    num_heads = config["num_attention_heads"]
    head_dim = config["token_dim"] // num_heads
    shape = (config["num_virtual_tokens"], config["num_layers"], 2, num_heads, head_dim)
    return embeddings.to(torch.float32).reshape(shape).permute(1, 2, 3, 0, 4).contiguous()


def _card(base_model: str, num_tokens: int, results: dict[str, Any]) -> str:
    lines = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        "library_name: peft",
        "tags: [fedsp, prefix-tuning, federated-learning]",
        "---",
        "",
        "# Soft prompt trained with FedSP",
        "",
        f"{num_tokens} virtual tokens at every layer of `{base_model}`, tuned by a federation in",
        "which only soft prompts travelled: the global model never left the server, the data never",
        "left the clients (arXiv 2311.06805).",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{base_model}")',
        'model = PeftModel.from_pretrained(model, "this folder")',
        "```",
        "",
    ]
    figures = [f"| {name} | {value} |" for name, value in _leaves(results)]
    return "\n".join([*lines, *(["| | |", "|---|---|", *figures, ""] if figures else [])])


def _leaves(results: dict[str, Any], *above: str) -> Iterator[tuple[str, str]]:
    """Rows of a table from nested figures."""
    for name, value in results.items():
        if isinstance(value, dict):
            yield from _leaves(value, *above, name)
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            yield ", ".join([*above, name]), text
