"""Ways to combine a cohort's updates that a few wrong ones cannot bend, as functions of matrices.

No message and no model is known here. Axes: C updates of a round, N numbers of an update.
"""

import torch
from torch import Tensor


def coordinate_median(updates: Tensor) -> Tensor:
    """Take the median of every number; of an even count the mean of the middle two.

    Args:
        updates: [C, N] One update a row, at least one.

    Returns:
        [N] float64.

    Source: Yin et al. 2018, arXiv 1803.01498, definition 1.
    """
    return _middle_mean(updates, (len(updates) - 1) // 2)


def trimmed_mean(updates: Tensor, trim_fraction: float) -> Tensor:
    """Drop the largest and the smallest values of every number and average the rest.

    Args:
        updates: [C, N] One update a row, at least one.
        trim_fraction: Share dropped at either end, in [0, 0.5), rounded down to whole updates.

    Returns:
        [N] float64.

    Source: Yin et al. 2018, arXiv 1803.01498, definition 2.
    """
    return _middle_mean(updates, num_trimmed(len(updates), trim_fraction))


def num_trimmed(num_updates: int, trim_fraction: float) -> int:
    """Return how many of `num_updates` values a trimmed mean drops at either end."""
    return int(trim_fraction * num_updates)


def krum_selection(updates: Tensor, num_malicious: int, num_selected: int) -> Tensor:
    """Choose the updates that lie closest to their neighbours.

    An update's score is the sum of its squared distances to its C - num_malicious - 2 nearest
    neighbours.

    Args:
        updates: [C, N] One update a row, with C of at least num_malicious + 3.
        num_malicious: Number of updates that may be anything at all.
        num_selected: Number of updates to choose.

    Returns:
        [num_selected] int64 rows, the lowest score first; of equal scores the first row.

    Source: Blanchard et al. 2017, arXiv 1703.02757, section 4.
    """
    # by difference and not by scalar products: prompts differ by little of their own length
    rows = updates.to(torch.float64)
    distances = torch.stack([(rows - row).square().sum(dim=1) for row in rows])
    distances.fill_diagonal_(torch.inf)
    num_neighbors = len(updates) - num_malicious - 2
    scores = distances.sort(dim=1).values[:, :num_neighbors].sum(dim=1)
    return scores.argsort(stable=True)[:num_selected]


def clip_change(update: Tensor, reference: Tensor, max_norm: float) -> Tensor:
    """Shorten an update's change to a norm, in its own direction.

    Args:
        update: [N] What came back.
        reference: [N] What was sent out.
        max_norm: Largest L2 norm of update - reference, above 0.

    Returns:
        [N] float64.
    """
    start = reference.to(torch.float64)
    change = update.to(torch.float64) - start
    norm = torch.linalg.vector_norm(change)
    return start + change * (max_norm / norm.clamp(min=max_norm))


def _middle_mean(updates: Tensor, num_dropped: int) -> Tensor:
    """Average every column but for its `num_dropped` largest and smallest values."""
    ordered = updates.sort(dim=0).values
    return ordered[num_dropped : len(ordered) - num_dropped].mean(dim=0, dtype=torch.float64)
