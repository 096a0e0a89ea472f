"""How much memory a piece of work takes beyond what was there before it, on any device."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fedsp.shards import own_share


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make inside a `with` block, while they live.

    What was there before counts nothing, views count once with what they look at, and the backward
    pass counts like the forward. What an operation needs only inside itself is not seen.

    Attributes:
        peak_bytes: Most bytes that were alive at once.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count what it made."""
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)
        output = func(*args, **(kwargs or {}))
        for storage in _storages(output):
            if storage not in self._known:
                self._known[storage] = True
                self._live_bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        return output

    def _free(self, num_bytes: int) -> None:
        self._live_bytes -= num_bytes


def tensor_bytes(tree: Any) -> int:
    """Return the bytes of all tensors in nested dictionaries, lists and tuples, each counted once.

    Of a tensor that is divided among processes, this process' part counts.

    Args:
        tree: Nested state; what is no tensor counts nothing.
    """
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return sum(own_share(tensor).nbytes for tensor in tensors.values())


def _storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()
