"""Terms of losses and qualities in plain sums over tokens."""

import torch
from torch import Tensor

from fedsp.backbone import Backbone


@torch.no_grad()
def closed_forms(
    teacher: Backbone, student: Backbone, batch: dict[str, Tensor], temperature: float = 1.0
) -> dict[str, Tensor]:
    """Every term by sums over tokens, from the models' own full logits."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    hidden, full = [], []
    for model in (teacher, student):
        output = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        hidden.append(output.hidden_states[-1])
        full.append(output.logits)
    squares, scale, lm, divergence, count = 0.0, 0.0, 0.0, 0.0, 0
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            if mask[row, column]:
                squares = squares + (hidden[1] - hidden[0])[row, column].pow(2).sum()
                scale = scale + hidden[0][row, column].pow(2).sum()
            if column and labels[row, column] != -100:
                p, q = ((f[row, column - 1] / temperature).softmax(-1) for f in full)
                divergence = divergence + (p * (p / q).log()).sum() * temperature**2
                lm = lm - full[1][row, column - 1].softmax(-1)[labels[row, column]].log()
                count += 1
    return {"hidden": squares / scale, "logit": divergence / count, "lm": lm / count}
