"""One FedSP round on GPT-2 in plain PyTorch: no framework and nothing of fedsp, only the maths.

What fedsp's own round is measured against (`round_overhead.py`) and compared with
(`tests/test_bare_loop.py`). Everything stays in memory: no message, no ledger, no checkpoint. It
does what a careful person would: texts are padded to their batch, logits are made only where a
label is, frozen weights are cast once and not in every step.

Axis letters: B batch, T text tokens, P virtual tokens, L layers, K heads, D head size, E embedding
size, V vocabulary, N label positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

Weights = dict[str, Tensor]
IGNORED = -100


def gelu_tanh(inner: Tensor) -> Tensor:
    """Return GPT-2's activation in its tanh approximation."""
    return F.gelu(inner, approximate="tanh")


@dataclass(frozen=True)
class Gpt2:
    """The weights of a GPT-2 under transformers' names, and how it reads token ids.

    Args:
        outside: `wte.weight` [V, E], `wpe.weight`, `ln_f.weight`, `ln_f.bias`, `head` [V, E].
        layers: L times the weights of a layer; a projection has `weight` [in, out], or `down`
            [r, in] and `up` [out, r], and a `bias` [out]. One tensor may be in several layers.
        num_heads: K.
        row_of: Row of the embeddings that each token id is read as; None: its own.
        kept: Token ids with a row of their own; None: all.
        activation: Of the MLP; OPT's is another one.
    """

    outside: Weights
    layers: list[Weights]
    num_heads: int
    row_of: Tensor | None = None
    kept: Tensor | None = None
    activation: Callable[[Tensor], Tensor] = gelu_tanh

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> "Gpt2":
        """Return it with every weight changed, the same tensor in several places once."""
        done: dict[tuple[int, bool], Tensor] = {}

        def once(name: str, tensor: Tensor) -> Tensor:
            # the head may be the embeddings' tensor and is still cast by itself
            key = (id(tensor), name == "head")
            if key not in done:
                done[key] = change(name, tensor)
            return done[key]

        layers = [{name: once(name, tensor) for name, tensor in w.items()} for w in self.layers]
        outside = {name: once(name, tensor) for name, tensor in self.outside.items()}
        return replace(self, layers=layers, outside=outside)


def read_gpt2(
    named: Mapping[str, Tensor],
    num_heads: int,
    row_of: Tensor | None = None,
    kept: Tensor | None = None,
) -> Gpt2:
    """Sort the parameters of a transformers GPT-2 by layer; nothing is copied.

    Args:
        named: `dict(model.named_parameters(remove_duplicate=False))`.
        num_heads: K.
        row_of: As in `Gpt2`.
        kept: As in `Gpt2`.
    """
    plain = {id(tensor): tensor.detach() for tensor in named.values()}
    layers: dict[int, Weights] = {}
    outside: Weights = {}
    for name, tensor in named.items():
        parts = name.removeprefix("transformer.").split(".", 2)
        if parts[0] == "h":
            layers.setdefault(int(parts[1]), {})[parts[2]] = plain[id(tensor)]
        else:
            outside["head" if parts[0] == "lm_head" else ".".join(parts)] = plain[id(tensor)]
    return Gpt2(outside, [layers[idx] for idx in sorted(layers)], num_heads, row_of, kept)


def cast_once(model: Gpt2) -> Gpt2:
    """Return it with what autocast would cast to bfloat16 in every step cast already.

    Norms and embeddings are not matrix products: autocast leaves them as they are.
    """

    def cast(name: str, tensor: Tensor) -> Tensor:
        is_product = name == "head" or name.startswith(("attn.", "mlp."))
        return tensor.detach().bfloat16() if is_product else tensor

    return model.mapped(cast)


def label_logits(
    model: Gpt2, texts: Sequence[Tensor], num_prompt: Sequence[int], prefix: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the model behind a soft prompt and score the vocabulary where a label is.

    Args:
        model: The weights.
        texts: B times [tokens] int64, a prompt and its completion.
        num_prompt: Tokens of each prompt; what follows is to be predicted.
        prefix: [L, 2, K, P, D] soft prompt.

    Returns:
        [N, V] logits and [N] int64 rows of the right tokens.
    """
    ids = pad_sequence(list(texts), batch_first=True)
    device = ids.device
    place = torch.arange(ids.shape[1], device=device)
    length = torch.tensor([len(text) for text in texts], device=device)[:, None]
    real = place < length
    is_label = real & (place >= torch.tensor(num_prompt, device=device)[:, None])
    targets = ids
    if model.row_of is not None and model.kept is not None:
        is_label &= torch.isin(ids, model.kept)
        targets = ids = model.row_of[ids]
    rows, columns = is_label[:, 1:].nonzero(as_tuple=True)
    num_virtual = prefix.shape[3]
    positions = torch.minimum(place, length - 1) + num_virtual
    sees = F.pad(place[:, None] >= place, (num_virtual, 0), value=True)
    sees = sees & F.pad(real, (num_virtual, 0), value=True)[:, None, None]
    outside = model.outside
    hidden = F.embedding(ids, outside["wte.weight"]).to(model.layers[0]["ln_1.weight"].dtype)
    hidden = hidden + F.embedding(positions, outside["wpe.weight"])
    for weights, (keys, values) in zip(model.layers, prefix, strict=True):
        hidden = hidden + _attention(model, weights, hidden, sees, keys, values)
        inner = _project(weights, "mlp.c_fc", _norm(weights, "ln_2", hidden))
        hidden = hidden + _project(weights, "mlp.c_proj", model.activation(inner))
    last = _norm(outside, "ln_f", hidden)[rows, columns]
    return F.linear(last.to(outside["head"].dtype), outside["head"]), targets[rows, columns + 1]


def _attention(
    model: Gpt2, weights: Weights, hidden: Tensor, sees: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Attend to the soft prompt's [K, P, D] keys and values and to the text before."""
    batch, length, size = hidden.shape
    packed = _project(weights, "attn.c_attn", _norm(weights, "ln_1", hidden))
    heads = (batch, length, model.num_heads, size // model.num_heads)
    query, key, value = (part.view(heads).transpose(1, 2) for part in packed.split(size, dim=2))
    key = torch.cat([keys.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([values.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=sees)
    return _project(weights, "attn.c_proj", mixed.transpose(1, 2).reshape(batch, length, size))


def _norm(weights: Weights, name: str, hidden: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.layer_norm(hidden, weight.shape, weight, weights[f"{name}.bias"])


def _project(weights: Weights, name: str, inputs: Tensor) -> Tensor:
    bias = weights[f"{name}.bias"]
    if f"{name}.down" in weights:
        inner = F.linear(inputs, weights[f"{name}.down"])
        return F.linear(inner, weights[f"{name}.up"], bias)
    weight = weights[f"{name}.weight"]
    flat = torch.addmm(bias, inputs.view(-1, inputs.shape[-1]), weight)
    return flat.view(*inputs.shape[:-1], -1)


@dataclass(frozen=True)
class Training:
    """How a stage is trained.

    Args:
        optimizer: Makes the optimizer of the trained tensors; its state lasts over the rounds.
        clip_norm: Largest total gradient norm.
        bf16: Autocast to bfloat16.
    """

    optimizer: Callable[[list[Tensor]], Optimizer]
    clip_norm: float = 1.0
    bf16: bool = False


@dataclass
class Party:
    """The server or a client: a model, its texts and what it keeps from round to round.

    Args:
        model: Its weights.
        texts: [tokens] int64 of each example.
        num_prompt: Prompt tokens of each example.
        prompt: [L, 2, K, P, D] its soft prompt; it gets a copy.
        trains_model: Whether it trains all of the model but embeddings and head, on a copy.
    """

    model: Gpt2
    texts: Sequence[Tensor]
    num_prompt: Sequence[int]
    prompt: Tensor
    trains_model: bool = False
    trained: list[Tensor] = field(default_factory=list)
    optimizers: dict[str, Optimizer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompt = self.prompt.clone().requires_grad_(True)
        if self.trains_model:
            self.model = self.model.mapped(self._copy)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if name in ("wte.weight", "wpe.weight", "head"):
            return tensor
        self.trained.append(tensor.clone())
        return self.trained[-1]

    def train_model(self, batches: Sequence[Sequence[int]], training: Training) -> None:
        """Train the auxiliary model behind a fixed soft prompt, one step a batch."""
        for tensor in self.trained:
            tensor.requires_grad_(True)
        self._train("model", self.trained, self.model, self.prompt.detach(), batches, training)
        for tensor in self.trained:
            tensor.requires_grad_(False)

    def train_prompt(self, batches: Sequence[Sequence[int]], training: Training) -> None:
        """Train the soft prompt on the frozen model, one step a batch."""
        model = cast_once(self.model) if training.bf16 and self.trains_model else self.model
        self._train("prompt", [self.prompt], model, self.prompt, batches, training)

    def _train(
        self,
        name: str,
        trained: list[Tensor],
        model: Gpt2,
        prompt: Tensor,
        batches: Sequence[Sequence[int]],
        training: Training,
    ) -> None:
        if name not in self.optimizers:
            self.optimizers[name] = training.optimizer(trained)
        optimizer = self.optimizers[name]
        for batch in batches:
            texts = [self.texts[idx] for idx in batch]
            num_prompt = [self.num_prompt[idx] for idx in batch]
            with torch.autocast(prompt.device.type, torch.bfloat16, enabled=training.bf16):
                logits, targets = label_logits(model, texts, num_prompt, prompt)
                losses = F.cross_entropy(logits.float(), targets, reduction="sum")
            (losses / max(1, len(targets))).backward()
            clip_grad_norm_(trained, training.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Batches:
    """Which examples form the batches of a round, for each party and stage in turn.

    Args:
        model: By client, the auxiliary stage's batches, each a list of the client's examples.
        prompt: By client, the prompt stage's batches.
        server: The server's batches.
    """

    model: Sequence[Sequence[Sequence[int]]]
    prompt: Sequence[Sequence[Sequence[int]]]
    server: Sequence[Sequence[int]]


def run_round(
    server: Party, clients: Sequence[Party], batches: Batches, trainings: Mapping[str, Training]
) -> Tensor:
    """Run one round: clients from the server's prompt, their mean, the server's own steps.

    Args:
        server: Its prompt is broadcast and trained in place.
        clients: All take part and count alike.
        batches: What each trains on this round.
        trainings: Of `model`, `prompt` and `server`.

    Returns:
        [L, 2, K, P, D] the server's prompt after the round.
    """
    total = torch.zeros_like(server.prompt, dtype=torch.float64)
    for client, of_model, of_prompt in zip(clients, batches.model, batches.prompt, strict=True):
        with torch.no_grad():
            client.prompt.copy_(server.prompt)
        if of_model:
            client.train_model(of_model, trainings["model"])
        client.train_prompt(of_prompt, trainings["prompt"])
        total += client.prompt.detach()
    with torch.no_grad():
        server.prompt.copy_(total / len(clients))
    server.train_prompt(batches.server, trainings["server"])
    return server.prompt.detach()
