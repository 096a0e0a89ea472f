"""Time one prompt step against peft's prefix tuning, and label-only logits against full ones.

Run: python benchmarks/bench_prompt_step.py [--repeats 15]

peft's model computes logits at every position, as its loss needs them; fedsp only where a label is.
Prints ratios of medians within this run; the sides take turns, so that a machine that slows down
slows both. The same model, batch and loss on every side; the losses are compared first.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from figure import Figure
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor
from turns import take_turns

from fedsp.backbone import Backbone, load_backbone
from fedsp.losses import token_cross_entropy
from fedsp.pretrained import BackboneSpec
from fedsp.soft_prompt import SoftPrompt

SIZES = {"num_virtual_tokens": 40, "batch": 8, "tokens": 128, "completion": 16}
CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 16_384,
    "n_embd": 256,
    "n_layer": 12,
    "n_head": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def make_batch() -> dict[str, Tensor]:
    """Return random text whose last tokens of each row are labels, [B, T]."""
    generator = torch.Generator().manual_seed(0)
    shape = (SIZES["batch"], SIZES["tokens"])
    ids = torch.randint(0, CONFIG["vocab_size"], shape, generator=generator)
    labels = ids.clone()
    labels[:, : -SIZES["completion"]] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def label_only(backbone: Backbone, prompt: SoftPrompt, batch: dict[str, Tensor]) -> Tensor:
    """Return fedsp's loss: logits at label positions only."""
    logits, targets, _ = backbone.label_logits(batch, prompt())
    return token_cross_entropy(logits, targets).mean()


def full_logits(backbone: Backbone, prompt: SoftPrompt, batch: dict[str, Tensor]) -> Tensor:
    """Return the same loss from logits of every position."""
    hidden = backbone.hidden_states(batch["input_ids"], batch["attention_mask"], prompt())
    logits = backbone.logits(hidden)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def step(loss: Callable[[], Tensor]) -> None:
    """Run a forward and backward pass."""
    loss().backward()


def main() -> None:
    """Compare the losses, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    backbone = load_backbone(BackboneSpec(config=CONFIG))
    prompt = SoftPrompt(backbone.kv_shape, SIZES["num_virtual_tokens"]).eval()
    prefix = torch.randn(prompt.shape) * 0.1
    prompt.load_prefix(prefix)
    batch = make_batch()
    settings = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=SIZES["num_virtual_tokens"]
    )
    peft_model = get_peft_model(load_backbone(BackboneSpec(config=CONFIG)).model, settings).eval()
    embedding = peft_model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        embedding.copy_(prefix.permute(3, 0, 1, 2, 4).reshape(len(embedding), -1))
    sides = {
        "fedsp": lambda: label_only(backbone, prompt, batch),
        "full logits": lambda: full_logits(backbone, prompt, batch),
        "peft": lambda: peft_model(**batch).loss,
    }
    losses = {name: loss().detach().item() for name, loss in sides.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"the sides do not compute the same loss: {losses}")
    steps = {name: partial(step, loss) for name, loss in sides.items()}
    medians = take_turns(steps, repeats, warm_up=2)
    print(f"one prompt step, {CONFIG['n_layer']} layers of width {CONFIG['n_embd']}, {SIZES}")
    ratios = {name: medians[name] / medians["fedsp"] for name in ("full logits", "peft")}
    for name, ratio in ratios.items():
        print(f"  {name} / fedsp: {ratio:.2f}")
    for name, ratio in ratios.items():
        print(Figure(f"prompt step: fedsp / {name}", 1 / ratio).line())


if __name__ == "__main__":
    main()
