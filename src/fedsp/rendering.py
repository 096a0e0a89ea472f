"""A row as text, a prompt and what may follow it, and how that becomes tokens.

What a row's fields mean is decided elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fedsp.examples import Example
from fedsp.tokenization import tokenize


@dataclass(frozen=True)
class RenderedRow:
    """A row as text.

    Args:
        prompt: What is given; may be empty.
        choices: Texts that may follow, each with the space it begins with.
        answer: Index of the right one.
        num_chars: Characters of each choice without what the task puts before it, at least 1.
    """

    prompt: str
    choices: list[str]
    answer: int
    num_chars: list[int]


def encode_rendered(
    rendered: Sequence[RenderedRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    start: list[int],
    add_eos: bool = False,
) -> list[Example]:
    """Tokenise rendered rows all at once.

    A completion's tokens are those of the joint text behind the prompt's, as in lm-eval; where a
    token would straddle the border it is tokenised by itself, since generation starts from the
    prompt's tokens.

    Args:
        rendered: Rows as text.
        tokenizer: Tokenizer of the model.
        start: Token ids that lead every prompt.
        add_eos: End every completion with the end-of-text token.

    Raises:
        ValueError: If `add_eos` is asked of a tokenizer without such a token.
    """
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            "`data.task.add_eos` needs an end-of-text token, which `data.tokenizer` lacks. Set it "
            "to false."
        )
    choices = [choice for row in rendered for choice in row.choices]
    joint = [row.prompt + choice for row in rendered for choice in row.choices]
    prompt_ids = tokenize(tokenizer, [row.prompt for row in rendered])
    choice_ids = iter(tokenize(tokenizer, choices))
    joint_ids = iter(tokenize(tokenizer, joint))
    end = [tokenizer.eos_token_id] if add_eos else []
    examples = []
    for row, prompt in zip(rendered, prompt_ids, strict=True):
        completions = []
        for _ in row.choices:
            whole, alone = next(joint_ids), next(choice_ids)
            behind = whole[len(prompt) :] if whole[: len(prompt)] == prompt else alone
            completions.append(behind + end)
        examples.append(Example(start + prompt, completions, row.answer, row.num_chars))
    return examples
