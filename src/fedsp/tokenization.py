"""What a tokenizer does to texts: ids, the start token, chat templates, and a hash of it all."""

import hashlib
import json
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without any special tokens around it.

    Args:
        tokenizer: Tokenizer of the model; a fast one does all texts at once.
        texts: The texts, possibly none.
    """
    if not texts:
        return []
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, **options)["input_ids"]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the tokenizer puts before every text: the start token, or nothing.

    Args:
        tokenizer: Tokenizer of the model.
    """
    bos = tokenizer.bos_token_id
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] else []


def chat_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str | None
) -> tuple[str, str]:
    """Lay out a conversation and divide it where the last message's answer begins.

    Args:
        tokenizer: Tokenizer of the model.
        messages: Roles and contents; the last one is the assistant's.
        template: Chat template in Jinja; None: the tokenizer's own.

    Returns:
        All that comes before the answer, and the answer with whatever ends its turn.

    Raises:
        ValueError: If there is no template, it refuses the messages, or what comes before the
            answer depends on the answer.
    """
    if template is None and not tokenizer.chat_template:
        raise ValueError(
            "`data.task.template` must be a chat template in Jinja, since `data.tokenizer` has "
            "none of its own, got null. Give one, or use fedsp.tasks.PromptCompletion."
        )

    def layout(turns: Sequence[Message], *, to_go_on: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(turns), chat_template=template, add_generation_prompt=to_go_on, tokenize=False
        )
        return str(text)

    try:
        before, whole = layout(messages[:-1], to_go_on=True), layout(messages, to_go_on=False)
    except TemplateError as error:
        raise ValueError(
            "The chat template (`data.task.template`, else the tokenizer's) refuses the roles "
            f"{', '.join(message['role'] for message in messages[:-1])}: {error}."
        ) from error
    if not whole.startswith(before) or whole == before:
        raise ValueError(
            "The chat template (`data.task.template`, else the tokenizer's) must lay out a "
            f"conversation as its prompt and the answer behind it, got the prompt {before!r} and "
            f"the whole {whole!r}. Give a template that does."
        )
    return before, whole[len(before) :]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that decides a text's token ids.

    Args:
        tokenizer: A tokenizer; its padding and truncation settings change with use and do not
            count.

    Returns:
        64 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    content.pop("padding", None)
    content.pop("truncation", None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, leading_ids(tokenizer)]
    parts = [type(tokenizer).__name__, special, tokenizer.chat_template, content]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
