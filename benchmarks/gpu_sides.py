"""The models of the GPU benchmark and their three stages, in fedsp and in the bare loop.

Both sides start from the same weights and the same prompt and get the same batches in the same
order. Random weights; the sizes are those of the published models.

Axis letters: B batch, T text tokens, P virtual tokens, L layers, K heads, D head size, E embedding
size, V vocabulary.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from bare_loop import Gpt2, Party, Training, Weights, cast_once, read_gpt2
from gpu_flops import StageName, StepSizes
from lightning.fabric import Fabric
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from fedsp.auxiliary import SharedCell
from fedsp.backbone import Backbone, load_backbone
from fedsp.client import ClientModule
from fedsp.messages import ServerBroadcast
from fedsp.phases import ClientTurn, Optimization, train_client, train_server
from fedsp.pretrained import BackboneSpec
from fedsp.server import ServerModule
from fedsp.soft_prompt import SoftPrompt
from fedsp.stages import Stage

Batch = dict[str, Tensor]
# Room for T = 1,024 behind 40 virtual tokens: GPT2-XL itself has 1,024 positions in all.
POSITIONS = 2_048
GPT2_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model.

    Args:
        kind: `gpt2` or `opt`.
        num_layers: L.
        num_heads: K.
        width: E.
        vocabulary: V.
    """

    kind: str
    num_layers: int
    num_heads: int
    width: int
    vocabulary: int

    @property
    def config(self) -> dict[str, Any]:
        """The transformers configuration; the MLP is four times as wide as the model."""
        if self.kind == "gpt2":
            sizes = {"n_layer": self.num_layers, "n_head": self.num_heads, "n_embd": self.width}
            # the fused tanh approximation on both sides
            sizes |= {"n_positions": POSITIONS, "activation_function": "gelu_pytorch_tanh"}
            return {"model_type": "gpt2", **sizes, **GPT2_NO_DROPOUT, **self._vocabulary()}
        sizes = {"num_hidden_layers": self.num_layers, "num_attention_heads": self.num_heads}
        sizes |= {"hidden_size": self.width, "ffn_dim": 4 * self.width}
        sizes |= {"word_embed_proj_dim": self.width, "max_position_embeddings": POSITIONS}
        return {"model_type": "opt", **sizes, "dropout": 0.0, **self._vocabulary()}

    def _vocabulary(self) -> dict[str, int]:
        return {"vocab_size": self.vocabulary, "bos_token_id": 0, "eos_token_id": 0}


PUBLISHED = {
    "OPT-1.3B": Architecture("opt", 24, 32, 2_048, 50_272),
    "GPT2-XL": Architecture("gpt2", 48, 25, 1_600, 50_257),
}


@dataclass(frozen=True)
class Text:
    """Sizes of a batch: random text whose last tokens of each row are labels.

    Args:
        batch: B.
        tokens: T.
        labels: Label positions a row.
    """

    batch: int
    tokens: int
    labels: int

    def draw(self, vocabulary: int, count: int, seed: int) -> list[Batch]:
        """Return batches on the CPU, where a data loader would leave them."""
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(count):
            shape = (self.batch, self.tokens)
            ids = torch.randint(2, vocabulary, shape, generator=generator)
            labels = ids.clone()
            labels[:, : -self.labels] = -100
            mask = torch.ones_like(ids)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        return batches


def adamw(parameters: Iterable[Tensor]) -> Optimizer:
    """Return AdamW as the race uses it on both sides."""
    return AdamW(parameters, lr=1e-3, weight_decay=0.0)


def sgd(parameters: Iterable[Tensor]) -> Optimizer:
    """Return an optimizer whose steps are as close as the gradients are."""
    return SGD(parameters, lr=1.0)


def load(
    architecture: Architecture, num_virtual_tokens: int, fabric: Fabric, dtype: Any
) -> tuple[Backbone, Tensor]:
    """Return a frozen model on the device and a random prompt [L, 2, K, P, D] on the CPU."""
    backbone = load_backbone(BackboneSpec(config=architecture.config, dtype=dtype))
    shape = SoftPrompt(backbone.kv_shape, num_virtual_tokens).shape
    prefix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return fabric.to_device(backbone), prefix


@dataclass
class FedspSide:
    """A stage as fedsp's own rounds run it: `train_server` or `train_client`.

    Args:
        fabric: Where, and in which precision.
        backbone: The global model, on the device.
        prefix: [L, 2, K, P, D] the prompt to start from.
        stage: Which.
        steps: Of every run.
        optimizer: Of what is trained.
    """

    fabric: Fabric
    backbone: Backbone
    prefix: Tensor
    stage: StageName
    steps: int
    optimizer: Any = adamw
    runs: int = field(default=0, init=False)
    state: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Make the role with its model and its prompt."""
        training = Stage(self.steps, self.optimizer)
        self.server = ServerModule(training=training)
        self.server.backbone = self.backbone
        prompt = SoftPrompt(self.backbone.kv_shape, self.prefix.shape[3])
        prompt.load_prefix(self.prefix)
        self.server.soft_prompt = self.fabric.to_device(prompt)
        if self.stage == "server prompt":
            self.server.start_tuning()
            tuned = self.server.tuned_parameters()
            self.optimization = Optimization.of(training, tuned, self.steps)
        else:
            off, of_prompt = Stage(0), self.stage == "client prompt"
            stages = (off, training) if of_prompt else (training, off)
            self.client = ClientModule(*stages)
            self.client.install(SharedCell().build(self.backbone), self.prefix.shape[3])
            self.fabric.to_device(self.client)
            self.client.receive(ServerBroadcast(0, {"soft_prompt": self.prefix}))
        self.initial = self.trained()

    def run(self, batches: list[Batch]) -> None:
        """Train on the batches."""
        if self.stage == "server prompt":
            train_server(
                self.fabric, self.server, self.optimization, batches, seed=0, round_idx=self.runs
            )
        else:
            turn = ClientTurn(0, self.runs, 0, 1, lambda start, count: batches)
            _, self.state = train_client(self.fabric, self.client, self.state, turn)
        self.runs += 1

    def trained(self) -> Tensor:
        """Return on the CPU what was trained: the prompt, or one matrix of the auxiliary model."""
        if self.stage == "server prompt":
            return self.server.payload()["soft_prompt"]
        auxiliary, prompt = self.client.require_model()
        if self.stage == "client prompt":
            return prompt.prefix().cpu()
        return read(auxiliary.backbone).layers[0]["mlp.c_fc.weight"].float().cpu().clone()


@dataclass
class BareSide:
    """The same stage in the bare loop, from what a `FedspSide` starts with; make it before a run.

    Args:
        fedsp: The side to be compared with, not run yet.
        bf16: Autocast to bfloat16, with weights cast once where they are frozen.
    """

    fedsp: FedspSide
    bf16: bool

    def __post_init__(self) -> None:
        """Read the model's weights; the trained ones are copied."""
        side = self.fedsp
        self.trains_model = side.stage == "client auxiliary"
        on_server = side.stage == "server prompt"
        source = side.backbone if on_server else side.client.require_model()[0].backbone
        model = read(source)
        if self.bf16 and not self.trains_model:
            model = cast_once(model)
        prompt = side.fabric.to_device(side.prefix)
        self.party = Party(model, [], [], prompt, self.trains_model)

    def run(self, batches: list[Batch]) -> None:
        """Train on the batches."""
        ids = self.fedsp.fabric.to_device(torch.cat([batch["input_ids"] for batch in batches]))
        size = len(batches[0]["input_ids"])
        self.party.texts = list(ids)
        num_prompt = int((batches[0]["labels"][0] == -100).sum())
        self.party.num_prompt = [num_prompt] * len(ids)
        rows = [list(range(start, start + size)) for start in range(0, len(ids), size)]
        training = Training(self.fedsp.optimizer, bf16=self.bf16)
        train = self.party.train_model if self.trains_model else self.party.train_prompt
        train(rows, training)

    def trained(self) -> Tensor:
        """Return what `FedspSide.trained` returns."""
        if self.trains_model:
            return self.party.model.layers[0]["mlp.c_fc.weight"].detach().float().cpu()
        return self.party.prompt.detach().cpu()


def step_sizes(architecture: Architecture, text: Text, num_virtual_tokens: int) -> StepSizes:
    """Return what the operations of a step are counted from."""
    return StepSizes(
        num_layers=architecture.num_layers,
        width=architecture.width,
        inner=4 * architecture.width,
        vocabulary=architecture.vocabulary,
        batch=text.batch,
        tokens=text.tokens,
        num_virtual_tokens=num_virtual_tokens,
        labels=text.labels,
    )


def read(backbone: Backbone) -> Gpt2:
    """Return a GPT-2's or an OPT's weights as the bare loop takes them."""
    named = dict(backbone.model.named_parameters(remove_duplicate=False))
    num_heads = backbone.kv_shape.num_kv_heads
    if backbone.model.config.model_type == "gpt2":
        return read_gpt2(named, num_heads)
    return read_opt(named, num_heads)


OPT_OUTSIDE = {
    "lm_head.weight": "head",
    "embed_tokens.weight": "wte.weight",
    "embed_positions.weight": "wpe.weight",
    "final_layer_norm.weight": "ln_f.weight",
    "final_layer_norm.bias": "ln_f.bias",
}
OPT_LAYER = {
    "self_attn_layer_norm": "ln_1",
    "self_attn.out_proj": "attn.c_proj",
    "final_layer_norm": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}


def read_opt(named: Mapping[str, Tensor], num_heads: int) -> Gpt2:
    """Return an OPT as a GPT-2 with another activation.

    Its three projections become one, its matrices are turned to [in, out] (a view), and the two
    rows of its positions that no token has are cut off.

    Args:
        named: `dict(model.named_parameters(remove_duplicate=False))`.
        num_heads: K.
    """
    found: dict[int, dict[str, Tensor]] = {}
    outside: Weights = {}
    plain = {id(tensor): tensor.detach() for tensor in named.values()}
    for name, tensor in named.items():
        short = name.removeprefix("model.decoder.")
        if short.startswith("layers."):
            _, layer, inner = short.split(".", 2)
            found.setdefault(int(layer), {})[inner] = plain[id(tensor)]
        else:
            outside[OPT_OUTSIDE[short]] = plain[id(tensor)]
    outside["wpe.weight"] = outside["wpe.weight"][2:]
    # layers of a shared cell must stay the same tensors
    cells = {id(layer["fc1.weight"]): layer for layer in found.values()}
    made = {key: _opt_layer(layer) for key, layer in cells.items()}
    layers = [made[id(found[idx]["fc1.weight"])] for idx in sorted(found)]
    return Gpt2(outside, layers, num_heads, activation=F.relu)


def _opt_layer(layer: Weights) -> Weights:
    weights: Weights = {}
    for theirs, ours in OPT_LAYER.items():
        weight = layer[f"{theirs}.weight"]
        weights[f"{ours}.weight"] = weight if weight.dim() == 1 else weight.t()
        weights[f"{ours}.bias"] = layer[f"{theirs}.bias"]
    parts = [f"self_attn.{name}_proj" for name in ("q", "k", "v")]
    weights["attn.c_attn.weight"] = torch.cat([layer[f"{part}.weight"] for part in parts]).t()
    weights["attn.c_attn.bias"] = torch.cat([layer[f"{part}.bias"] for part in parts])
    return weights
