"""A trimmed vocabulary: the tokens that an auxiliary model has rows for, and what others become.

Axis letters: V tokens of the full vocabulary, n kept tokens, E embedding size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED_LABEL = -100
_CHUNK = 8192


class Vocabulary(nn.Module):
    """Maps token ids of the full vocabulary to rows of a smaller table of embeddings.

    A token without a row of its own is read as a kept one; it is never predicted.

    Source: Abdaoui et al. 2020, arXiv 2010.05609 (keeping only the embeddings that are used).
    """

    kept: Tensor
    row_of: Tensor
    known: Tensor

    def __init__(self, kept: Tensor, row_of: Tensor) -> None:
        """Keep the two maps, which are all of a hand-out that the trimming adds.

        Args:
            kept: [n] Token ids, in rising order; token `kept[i]` has row i.
            row_of: [V] Row that each token of the full vocabulary is read as.
        """
        super().__init__()
        self.register_buffer("kept", kept.to(torch.int32))
        self.register_buffer("row_of", row_of.to(torch.int32))
        known = torch.zeros(len(row_of), dtype=torch.bool, device=kept.device)
        known[kept] = True
        self.register_buffer("known", known, persistent=False)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the row that each token is read as.

        Args:
            ids: [...] int64 token ids.

        Returns:
            [...] int64.
        """
        return self.row_of[ids].long()

    def labels(self, labels: Tensor) -> Tensor:
        """Return labels as rows; tokens without a row of their own are not to be predicted.

        Args:
            labels: [...] int64 token ids, -100 where nothing is to be predicted.

        Returns:
            [...] int64, -100 also where the token is unknown.
        """
        ids = labels.clamp(min=0)
        counts = (labels != IGNORED_LABEL) & self.known[ids]
        return torch.where(counts, self.rows(ids), IGNORED_LABEL)

    def logits(self, logits: Tensor) -> Tensor:
        """Return a full model's scores of the kept tokens only.

        Args:
            logits: [..., V].

        Returns:
            [..., n].
        """
        return logits.index_select(-1, self.kept)


@torch.no_grad()
def trim(embeddings: Tensor, counts: Tensor, num_tokens: int) -> Vocabulary:
    """Keep the most frequent tokens; every other one is read as the kept one most like it.

    Args:
        embeddings: [V, E] The full table; of two tokens with equal counts the lower id comes first.
        counts: [V] How often each token occurs.
        num_tokens: n, at most V.

    Returns:
        The vocabulary, on the device of `embeddings`.
    """
    order = torch.sort(counts.to(embeddings.device), descending=True, stable=True).indices
    kept = order[:num_tokens].sort().values
    table = F.normalize(embeddings.float(), dim=1)
    nearest = [(part @ table[kept].T).argmax(dim=1) for part in table.split(_CHUNK)]
    row_of = torch.cat(nearest)
    row_of[kept] = torch.arange(len(kept), device=kept.device)
    return Vocabulary(kept, row_of)
