"""Train the nano language model that `make quickstart` uses, on text that installations carry.

Run from the repository's root (deterministic for the same installed versions and thread count):

    OMP_NUM_THREADS=1 PYTHONPATH=src python scripts/train_nano.py --steps 2400

The corpus is plain text: whole docstrings, each by itself, and the source of functions that have no
docstring. A definition is never followed by its docstring, and nothing comes from the packages of
the quickstart's clients, so that the quickstart's task and its clients' data stay unseen.
"""

import argparse
import ast
import hashlib
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedsp.docstrings import parse_file, read_docstrings, source_files, summary

# fmt: off
CLIENT_PACKAGES = [
    "numpy", "pandas", "datasets", "huggingface_hub", "torchmetrics", "lightning", "peft", "rich",
    "fsspec", "wandb",
]
# No machine learning and no data frames: what the clients' packages are about is news to the model.
CORPUS_PACKAGES = [
    "sympy", "networkx", "mpmath", "hypothesis", "mypy", "coverage", "pip", "setuptools", "click",
    "typer", "jsonargparse", "docstring_parser", "pydantic", "attr", "aiohttp", "yarl", "multidict",
    "anyio", "httpx", "requests", "urllib3", "werkzeug", "jinja2", "markdown", "markdown_it",
    "pygments", "absl", "filelock", "platformdirs", "packaging", "tqdm", "yaml", "psutil", "dill",
    "multiprocess", "dateutil", "google", "grpc", "virtualenv", "distlib", "identify",
]
# fmt: on
# Other people's interactive programs and shims, or modules that only print a joke.
SKIPPED_STDLIB = frozenset({"antigravity", "distutils", "idlelib", "lib2to3", "this", "turtledemo"})
END = "<|endoftext|>"
CONTEXT = 256
HELD_OUT_PERCENT = 2
# What a docstring says comes first; the rest is mostly examples.
MAX_DOCSTRING_CHARS = 2000
# One file in so many also gives code, so that most of the corpus is documentation.
CODE_FILES_STRIDE = 4
MAX_CODE_LINES = 24
WARMUP_STEPS = 100
GRADIENT_CLIP_NORM = 1.0
WEIGHT_DECAY = 0.1
REPORT_EVERY = 100


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("src/fedsp/assets/docstring-nano"))
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps, at least 1")
    parser.add_argument("--batch_size", type=int, default=8, help=f"rows of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--width", type=int, default=128, help="embedding size")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens of the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def corpus_files() -> dict[str, list[Path]]:
    """List the Python files of the corpus.

    Returns:
        `stdlib` (all its modules that come as files) and every corpus package -> its files.

    Raises:
        ValueError: If a package is not installed.
    """
    stdlib: list[Path] = []
    for name in sorted(sys.stdlib_module_names - SKIPPED_STDLIB):
        try:
            stdlib += source_files(name)
        except ValueError:  # built in, frozen or not for this system
            continue
    return {"stdlib": stdlib} | {name: source_files(name) for name in CORPUS_PACKAGES}


def documents(tree: ast.Module, *, with_code: bool) -> Iterator[str]:
    """Yield a file's docstrings, each by itself, and the code of functions without any docstring.

    Args:
        tree: A parsed file.
        with_code: Whether to yield code at all.

    Yields:
        Plain texts.
    """
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    documented = functions | ast.ClassDef
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | documented):
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring[:MAX_DOCSTRING_CHARS]
        elif with_code and isinstance(node, functions):
            # A documented function inside would show the very pair that the model must not see.
            inner = (part for part in ast.walk(node) if isinstance(part, documented))
            if not any(ast.get_docstring(part) for part in inner):
                yield "\n".join(ast.unparse(node).splitlines()[:MAX_CODE_LINES])


def read_corpus() -> tuple[list[str], list[str], dict[str, int]]:
    """Read the corpus and split it by a hash of each text.

    Returns:
        Training documents, held-out documents, characters read from each package.
    """
    client_summaries = {row["completion"] for row in read_docstrings(CLIENT_PACKAGES)}
    seen: set[str] = set()
    train: list[str] = []
    held_out: list[str] = []
    num_chars: dict[str, int] = {}
    for package, files in corpus_files().items():
        for path in files:
            tree = parse_file(path)
            if tree is None:
                continue
            with_code = int(_digest(path.name), 16) % CODE_FILES_STRIDE == 0
            for text in documents(tree, with_code=with_code):
                key = re.sub(r"\W+", " ", text)
                if len(text) < 20 or not text.isascii() or key in seen:
                    continue
                seen.add(key)
                if summary(text) in client_summaries:
                    continue
                is_held_out = int(_digest(text), 16) % 100 < HELD_OUT_PERCENT
                (held_out if is_held_out else train).append(text)
                num_chars[package] = num_chars.get(package, 0) + len(text)
    return train, held_out, num_chars


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose end token also pads.

    Args:
        texts: Training documents.
        vocab_size: Number of tokens, the end token and all 256 bytes included.

    Returns:
        The tokenizer; it adds no special tokens by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def to_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Put documents end to end and cut them into rows.

    Args:
        texts: Documents, in the order in which they are joined.
        tokenizer: Tokenizer with an end token.

    Returns:
        [N, T] int64, T = CONTEXT; the remainder is dropped.
    """
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts)):
        ids += [*encoding.ids, tokenizer.eos_token_id]
    num_rows = len(ids) // CONTEXT
    return torch.tensor(ids[: num_rows * CONTEXT]).view(num_rows, CONTEXT)


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up, then cosine decay to a twentieth of the peak."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_model(options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Build the model with random weights, without dropout."""
    config = GPT2Config(
        vocab_size=options.vocab_size,
        n_positions=CONTEXT,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        # The same function as gelu_new, but fused: a third faster on CPU.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def loss_of(model: GPT2LMHeadModel, batch: Tensor) -> Tensor:
    """Mean loss of predicting each token of rows [B, T] but the first, in nats, as [] scalar."""
    # Rows have no padding: without a mask, attention takes the fast causal path.
    logits = model(batch[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, rows: Tensor) -> float:
    """Mean loss over rows [N, T], in nats a token."""
    losses = [loss_of(model, batch) * len(batch) for batch in rows.split(16)]
    return float(torch.stack(losses).sum() / len(rows))


def build_optimizer(model: GPT2LMHeadModel) -> torch.optim.Optimizer:
    """AdamW that decays matrices and embeddings, but no bias and no norm."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0}],
        betas=(0.9, 0.95),
    )


def batches(rows: Tensor, options: argparse.Namespace) -> Iterator[Tensor]:
    """Yield [B, T] batches without end, in a new order on every pass; a pass's rest is dropped."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for chosen in order.split(options.batch_size):
            if len(chosen) == options.batch_size:
                yield rows[chosen]


def train(
    model: GPT2LMHeadModel, rows: Tensor, held_out: Tensor, options: argparse.Namespace
) -> float:
    """Train in place and print the losses.

    Args:
        model: The model.
        rows: [N, T] training rows, at least a batch.
        held_out: [M, T] rows never trained on.
        options: The command line.

    Returns:
        Mean training loss of the last 100 steps, in nats a token.
    """
    optimizer = build_optimizer(model)
    losses: list[float] = []
    start = time.monotonic()
    for step, batch in zip(range(options.steps), batches(rows, options), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % REPORT_EVERY == 0:
            rate = (step + 1) * batch.numel() / (time.monotonic() - start)
            print(
                f"step {step + 1}: train {sum(losses[-REPORT_EVERY:]) / REPORT_EVERY:.3f}, "
                f"part of held-out {held_out_loss(model, held_out[:32]):.3f}, {rate:.0f} tokens/s",
                flush=True,
            )
    return sum(losses[-REPORT_EVERY:]) / len(losses[-REPORT_EVERY:])


CARD = """\
---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [fedsp, docstrings]
---

# docstring-nano

A GPT-2-style language model of {num_parameters:,} parameters ({layers} layers, width {width},
{heads} heads, {vocab_size:,} byte-level BPE tokens, context {context}) that has read little but
Python documentation. It is the global model of fedsp's `make quickstart`, small enough to train
prompts on a laptop in minutes and good for nothing else.

## Training

    {command}

{steps:,} steps of AdamW (peak rate {lr:g}, {warmup_steps} steps of warm-up, cosine to a twentieth;
weight decay {weight_decay}; gradient norm clipped at {gradient_clip_norm}), each on {batch_size} x
{context} tokens, in float32: {tokens_seen:,} tokens seen of a corpus of {corpus_tokens:,}
({epochs:.2f} passes), {minutes:.0f} minutes on {threads} CPU thread(s)
({tokens_per_second:,.0f} tokens a second). Weights are stored in bfloat16.

| loss, nats a token | |
|---|---|
| training, last 100 steps | {train_loss:.3f} |
| held-out {held_out_tokens:,} tokens, float32 weights | {held_out_loss:.3f} |
| held-out, weights rounded to bfloat16 as stored | {rounded_loss:.3f} |

## Data

Plain text, {corpus_chars:,} characters: docstrings (up to {max_docstring_chars:,} characters), each
by itself, and the source (up to {max_code_lines} lines) of functions without a docstring in one
file of {code_files_stride}, from the installed files of the packages below and the standard
library. No definition is followed by its docstring, so the quickstart's task is unseen; the
packages of its clients ({clients}) are left out, and so is every docstring whose first paragraph
occurs in them. {held_out_percent} % of the texts, chosen by hash, are held out.

Python {python} standard library; {versions}.

## Licence

Weights: Apache-2.0, as fedsp. The corpus is documentation and source of open-source packages under
their own permissive or weak-copyleft licences (BSD, MIT, Apache-2.0, MPL-2.0, PSF); none of it is
redistributed here.

## Limits

It knows names and phrases of Python documentation, not facts. Do not use it to write documentation.
"""


def package_versions() -> str:
    """Name the distributions of the corpus with their versions."""
    distributions = packages_distributions()
    names = {name for package in CORPUS_PACKAGES for name in distributions[package][:1]}
    return ", ".join(f"{name} {version(name)}" for name in sorted(names, key=str.lower))


def write_card(options: argparse.Namespace, figures: dict[str, float]) -> None:
    """Write the model card beside the model.

    Args:
        options: The command line.
        figures: Measured values that the card names.
    """
    constants = {name.lower(): value for name, value in globals().items() if name.isupper()}
    threads = torch.get_num_threads()
    card = CARD.format_map(
        constants
        | figures
        | vars(options)
        | {
            "threads": threads,
            "clients": ", ".join(CLIENT_PACKAGES),
            "python": sys.version.split()[0],
            "versions": package_versions(),
            "command": f"OMP_NUM_THREADS={threads} PYTHONPATH=src python {' '.join(sys.argv)}",
        }
    )
    (options.out / "README.md").write_text(card)


def main() -> None:
    """Read the corpus, train, and write model, tokenizer and card."""
    options = parse_arguments()
    torch.manual_seed(options.seed)
    train_texts, held_out_texts, num_chars = read_corpus()
    print("characters:", num_chars)
    # By hash, so that every row mixes packages and the held-out rows are no single package's.
    tokenizer = train_tokenizer(sorted(train_texts, key=_digest), options.vocab_size)
    rows = to_rows(sorted(train_texts, key=_digest), tokenizer)
    held_out = to_rows(sorted(held_out_texts, key=_digest), tokenizer)
    model = build_model(options, tokenizer)
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens", flush=True)
    start = time.monotonic()
    train_loss = train(model, rows, held_out, options)
    seconds = time.monotonic() - start
    tokens_seen = options.steps * options.batch_size * CONTEXT
    figures = {
        "train_loss": train_loss,
        "held_out_loss": held_out_loss(model, held_out),
        "rounded_loss": held_out_loss(model.bfloat16().float(), held_out),
        "minutes": seconds / 60,
        "tokens_seen": tokens_seen,
        "tokens_per_second": tokens_seen / seconds,
        "epochs": tokens_seen / rows.numel(),
        "corpus_tokens": rows.numel(),
        "held_out_tokens": held_out.numel(),
        "corpus_chars": sum(num_chars.values()),
        "num_parameters": model.num_parameters(),
    }
    print(figures)
    model.bfloat16().save_pretrained(options.out)
    # safetensors writes for the owner only; a package's files are for everybody
    (options.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(options.out)
    write_card(options, figures)


if __name__ == "__main__":
    main()
