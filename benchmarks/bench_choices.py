"""Time an evaluation batch whose choices share their prompt's run, against a run for each choice.

Run: python benchmarks/bench_choices.py [--repeats 7]

Prints the ratio of medians within this run, for questions of four short choices behind a long
prompt, of four long choices behind a short one, and for texts with nothing to share; the sides take
turns. The likelihoods of both are compared first.
"""

import argparse
from functools import partial

import torch
from figure import Figure
from torch import Tensor
from turns import take_turns

from fedsp.backbone import Backbone, load_backbone
from fedsp.collate import collate, collate_choices
from fedsp.examples import Example
from fedsp.losses import token_cross_entropy
from fedsp.pretrained import BackboneSpec
from fedsp.scoring import score

NUM_VIRTUAL_TOKENS, QUESTIONS = 40, 8
# tokens of the prompt, choices, tokens of a choice
SHAPES = {
    "long prompt, 4 short choices": (192, 4, 6),
    "short prompt, 4 long choices": (24, 4, 32),
    "one choice": (192, 1, 6),
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16_384,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}


def make_questions(prompt: int, choices: int, tokens: int) -> list[Example]:
    """Return questions of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def text(size: int) -> list[int]:
        return torch.randint(CONFIG["vocab_size"], (size,), generator=generator).tolist()

    return [
        Example(text(prompt), [text(tokens) for _ in range(choices)], 0, [1] * choices)
        for _ in range(QUESTIONS)
    ]


def shared(backbone: Backbone, prefix: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the choices' log-likelihoods, [choices], as an evaluation computes them."""
    return score(backbone, batch, prefix)["log_likelihood"]


def a_row_a_choice(backbone: Backbone, prefix: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Return the same, [choices], from rows that each repeat the prompt."""
    logits, targets, rows = backbone.label_logits(batch, prefix)
    losses = token_cross_entropy(logits, targets)
    return losses.new_zeros(len(batch["labels"])).index_add(0, rows, -losses)


@torch.no_grad()
def main() -> None:
    """Compare the likelihoods, then print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    backbone = load_backbone(BackboneSpec(config=CONFIG))
    num_layers, num_heads, head_dim = backbone.kv_shape
    prefix = torch.randn(num_layers, 2, num_heads, NUM_VIRTUAL_TOKENS, head_dim) * 0.1
    print(f"{QUESTIONS} questions, {num_layers} layers of width {CONFIG['hidden_size']}")
    for name, shape in SHAPES.items():
        questions = make_questions(*shape)
        rows = [Example(q.prompt_ids, [ids], 0, [1]) for q in questions for ids in q.completions]
        packed, repeated = collate_choices(questions, 0), collate(rows, 0)
        sides = {
            "shared": partial(shared, backbone, prefix, packed),
            "repeated": partial(a_row_a_choice, backbone, prefix, repeated),
        }
        difference = (sides["shared"]() - sides["repeated"]()).abs().max().item()
        if difference > 1e-3:
            raise SystemExit(f"the sides do not compute the same: they differ by {difference}")
        medians = take_turns(sides, repeats, warm_up=1)
        ratio = medians["repeated"] / medians["shared"]
        print(f"  {name} {shape}: a row a choice / shared prompt: {ratio:.2f}")
        print(Figure(f"evaluation, {name}: shared prompt / a row a choice", 1 / ratio).line())


if __name__ == "__main__":
    main()
