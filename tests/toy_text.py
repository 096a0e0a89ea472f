"""A tokenizer that needs no download: one token a byte, so that tests can count by hand."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """Make it; with `bos` it puts `<s>` before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: idx for idx, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_byte_tokenizer(folder: Path, *, bos: bool = False) -> str:
    """Save it and return the folder."""
    byte_tokenizer(bos=bos).save_pretrained(folder)
    return str(folder)
