"""What a row means: rows of fields become text, and tokenised examples.

Nothing here reads files, splits data or makes batches.
"""

import string
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fedsp.examples import Example, join_into_blocks
from fedsp.rendering import RenderedRow, encode_rendered
from fedsp.templates import Row, check_template, field, fields_of, fill
from fedsp.tokenization import chat_turn, leading_ids, tokenize

_ENCODED_AT_ONCE = 1000


class Task(ABC):
    """Turns rows into examples. A task's `repr` names everything that shapes its examples."""

    add_eos: bool

    @abstractmethod
    def render(self, row: Row, row_idx: int) -> RenderedRow:
        """Lay out one row as text.

        Args:
            row: Field name to value.
            row_idx: Index of the row in its source, for error messages.

        Raises:
            ValueError: If a field is missing, empty (null) or of the wrong kind.
        """

    def prompt_fields(self) -> list[str]:
        """Return the names of the fields that a prompt is made of, if a template names them."""
        return []

    def render_prompt(self, row: Row, row_idx: int) -> str:
        """Lay out what is given of one row, which needs no other fields where templates allow it.

        Args:
            row: Field name to value.
            row_idx: Index of the row in its source, for error messages.

        Raises:
            ValueError: As `render`.
        """
        return self.render(row, row_idx).prompt

    def encode_prompts(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
    ) -> list[list[int]]:
        """Tokenise what is given of each row, as `encode` would.

        Args:
            rows: The rows.
            tokenizer: Tokenizer of the model.

        Raises:
            ValueError: As `render`.
        """
        prompts = [self.render_prompt(row, row_idx) for row_idx, row in enumerate(rows)]
        start = leading_ids(tokenizer)
        return [start + ids for ids in tokenize(tokenizer, prompts)]

    def references_of(self, row: Row, row_idx: int = 0) -> list[str]:
        """Return the texts that are right for a row, without space around them.

        Args:
            row: Field name to value.
            row_idx: Index of the row in its source, for error messages.

        Raises:
            ValueError: As `render`.
        """
        rendered = self.render(row, row_idx)
        return [rendered.choices[rendered.answer].strip()]

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, first_row: int = 0
    ) -> list[Example]:
        """Tokenise a batch of rows, an example each.

        Args:
            rows: The rows.
            tokenizer: Tokenizer of the model; a fast one does the whole batch at once.
            first_row: Index of `rows[0]` in its source, for error messages.

        Raises:
            ValueError: As `render`.
        """
        rendered = [self.render(row, first_row + idx) for idx, row in enumerate(rows)]
        start = leading_ids(tokenizer)
        return encode_rendered(rendered, tokenizer, start=start, add_eos=self.add_eos)

    def encode_all(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
        """Tokenise all rows of a data set, some at a time.

        Args:
            dataset: The rows.
            tokenizer: Tokenizer of the model.

        Raises:
            ValueError: As `render`.
        """
        first_row = 0
        for columns in dataset.iter(batch_size=_ENCODED_AT_ONCE):
            values = zip(*columns.values(), strict=True)
            rows = [dict(zip(columns, row, strict=True)) for row in values]
            yield from self.encode(rows, tokenizer, first_row=first_row)
            first_row += len(rows)

    def pack(
        self, examples: Sequence[Example], max_tokens: int | None
    ) -> tuple[list[Example], list[int] | None]:
        """Regroup one owner's examples; by default they stay as they are.

        Args:
            examples: All examples of one owner.
            max_tokens: Longest example the model takes, None without limit.

        Returns:
            The examples, and the index in `examples` that each comes from, None if they are
            regrouped.

        Raises:
            ValueError: If the task's own length is above `max_tokens`.
        """
        del max_tokens
        return list(examples), list(range(len(examples)))


@dataclass(frozen=True)
class PromptCompletion(Task):
    """A prompt and the text that completes it, from templates over the row's fields.

    Args:
        prompt: Template with field names in braces, as of Python's `str.format`; `{{` is a brace.
        completion: Template of the completion. It is taken as it stands: it should begin with the
            space or line break that separates it from the prompt.
        references: Field with the list of all right answers, to score generated text against. None:
            only the completion is right.
        add_eos: End every completion with the end-of-text token, so that generation learns to stop.
    """

    prompt: str = "{prompt}"
    completion: str = "{completion}"
    references: str | None = None
    add_eos: bool = True

    def __post_init__(self) -> None:
        check_template("prompt", self.prompt, needs_field=False)
        check_template("completion", self.completion, needs_field=True)

    def render(self, row: Row, row_idx: int) -> RenderedRow:
        """Fill both templates; a row without its right answers is found out here."""
        prompt = fill("prompt", self.prompt, row, row_idx)
        completion = fill("completion", self.completion, row, row_idx)
        if self.references is not None:
            self.references_of(row, row_idx)
        return RenderedRow(prompt, [completion], 0, [max(1, len(completion.strip()))])

    def prompt_fields(self) -> list[str]:
        """Return the fields that the prompt's template names."""
        return fields_of(self.prompt)

    def render_prompt(self, row: Row, row_idx: int) -> str:
        """Fill the prompt's template alone."""
        return fill("prompt", self.prompt, row, row_idx)

    def references_of(self, row: Row, row_idx: int = 0) -> list[str]:
        """Return all right answers of the row's `references`, else its completion."""
        if self.references is None:
            return [fill("completion", self.completion, row, row_idx).strip()]
        answers = field("references", self.references, row, row_idx)
        if not answers or not _are_texts(answers):
            raise ValueError(
                f"`data.task.references`={self.references!r} must give a list of non-empty texts, "
                f"got {answers!r} in row {row_idx}."
            )
        return [answer.strip() for answer in answers]


@dataclass(frozen=True)
class ChatCompletion(Task):
    """A user's turn and the assistant's answer, laid out by a chat template; the answer is learned.

    What ends the assistant's turn is part of the answer. Space around the texts is left out, as the
    template brings its own.

    Args:
        prompt: Template of the user's turn over the row's fields, as of Python's `str.format`.
        completion: Template of the answer.
        system: Text of the system's turn, not a template. None: no such turn.
        template: Chat template in Jinja. None: that of the tokenizer.
    """

    prompt: str = "{prompt}"
    completion: str = "{completion}"
    system: str | None = None
    template: str | None = None
    add_eos = False

    def __post_init__(self) -> None:
        check_template("prompt", self.prompt, needs_field=True)
        check_template("completion", self.completion, needs_field=True)

    def render(self, row: Row, row_idx: int) -> RenderedRow:
        """Fill both templates; the chat's own marks come with `encode`, from the tokenizer."""
        prompt = fill("prompt", self.prompt, row, row_idx).strip()
        completion = fill("completion", self.completion, row, row_idx).strip()
        return RenderedRow(prompt, [completion], 0, [max(1, len(completion))])

    def prompt_fields(self) -> list[str]:
        """Return the fields that the user's turn names."""
        return fields_of(self.prompt)

    def render_prompt(self, row: Row, row_idx: int) -> str:
        """Fill the user's turn alone."""
        return fill("prompt", self.prompt, row, row_idx).strip()

    def encode_prompts(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
    ) -> list[list[int]]:
        """Tokenise conversations up to where the assistant's answer begins."""
        prompts = [self.render_prompt(row, row_idx) for row_idx, row in enumerate(rows)]
        # any answer will do: what comes before it does not depend on it, or `chat_turn` refuses
        turns = [chat_turn(tokenizer, self._turns(text, "."), self.template) for text in prompts]
        return tokenize(tokenizer, [before for before, _ in turns])

    def _turns(self, prompt: str, answer: str) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        user = {"role": "user", "content": prompt}
        return [*system, user, {"role": "assistant", "content": answer}]

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, first_row: int = 0
    ) -> list[Example]:
        """Tokenise a batch of conversations; the template brings the start token if it has one."""
        rendered = []
        for row_idx, row in enumerate(rows, first_row):
            plain = self.render(row, row_idx)
            messages = self._turns(plain.prompt, plain.choices[0])
            before, answer = chat_turn(tokenizer, messages, self.template)
            rendered.append(RenderedRow(before, [answer], 0, plain.num_chars))
        return encode_rendered(rendered, tokenizer, start=[])


@dataclass(frozen=True)
class MultipleChoice(Task):
    """A question with choices of which one is right; trained on the right one, scored on all.

    Args:
        question: Template of the prompt over the row's fields, as of Python's `str.format`;
            `{context?}` is empty where a row lacks that field.
        choices: Field that holds the list of choices (`choices.text`: a field inside a field), or a
            list of fields that hold one choice each.
        answer: Field with the right choice: an index counted from 0, or one of the labels.
        labels: Field with the choices' labels. None: A, B, C, … in order.
        choice_prefix: Put before every choice; not counted in its characters.
        add_eos: End every choice with the end-of-text token. Off as in lm-eval, which scores the
            bare choices.
    """

    question: str = "{question}"
    choices: str | list[str] = "choices"
    answer: str = "answer"
    labels: str | None = None
    choice_prefix: str = " "
    add_eos: bool = False

    def __post_init__(self) -> None:
        check_template("question", self.question, needs_field=True)

    def render(self, row: Row, row_idx: int) -> RenderedRow:
        """Fill the question and look up choices and answer."""
        question = fill("question", self.question, row, row_idx)
        choices = self._choices(row, row_idx)
        answer = self._answer(row, row_idx, len(choices))
        texts = [self.choice_prefix + choice for choice in choices]
        return RenderedRow(question, texts, answer, [max(1, len(choice)) for choice in choices])

    def prompt_fields(self) -> list[str]:
        """Return the fields that the question's template names."""
        return fields_of(self.question)

    def render_prompt(self, row: Row, row_idx: int) -> str:
        """Fill the question's template alone."""
        return fill("question", self.question, row, row_idx)

    def _choices(self, row: Row, row_idx: int) -> list[str]:
        if isinstance(self.choices, str):
            choices = field("choices", self.choices, row, row_idx)
        else:
            choices = [field("choices", name, row, row_idx) for name in self.choices]
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(
                f"`data.task.choices`={self.choices!r} must give at least two choices, got "
                f"{choices!r} in row {row_idx}."
            )
        if not _are_texts(choices):
            raise ValueError(
                f"`data.task.choices`={self.choices!r} must give non-empty texts, got {choices!r} "
                f"in row {row_idx}."
            )
        return choices

    def _answer(self, row: Row, row_idx: int, num_choices: int) -> int:
        value = field("answer", self.answer, row, row_idx)
        labels = self._labels(row, row_idx, num_choices)
        # an index is not looked for among labels that are numbers themselves: 1 of "1", "2" is the
        # first
        indexable = self.labels is None or not any(label.isdecimal() for label in labels)
        if str(value) in labels:
            answer = labels.index(str(value))
        elif indexable and (isinstance(value, int) or str(value).isdecimal()):
            answer = int(value)
        else:
            answer = -1
        if not 0 <= answer < num_choices:
            raise ValueError(
                f"`data.task.answer`={self.answer!r} must give one of the labels "
                f"{', '.join(labels)} or an index from 0 to {num_choices - 1}, got {value!r} in "
                f"row {row_idx}. Labels of another field are named by `data.task.labels`."
            )
        return answer

    def _labels(self, row: Row, row_idx: int, num_choices: int) -> list[str]:
        if self.labels is None:
            return list(string.ascii_uppercase[:num_choices])
        labels = field("labels", self.labels, row, row_idx)
        if not isinstance(labels, list) or len(labels) != num_choices:
            raise ValueError(
                f"`data.task.labels`={self.labels!r} must give one label for each of the "
                f"{num_choices} choices, got {labels!r} in row {row_idx}."
            )
        return [str(label) for label in labels]


@dataclass(frozen=True)
class RawText(Task):
    """Plain text, every token of which is learned.

    Args:
        text: Template of a document over the row's fields, as of Python's `str.format`.
        block_size: Tokens of an example: all documents of an owner are joined and cut into blocks,
            of which the last is shorter. None: a document is an example, and one that is too long
            is cut into several.
        add_eos: End every document with the end-of-text token.
    """

    text: str = "{text}"
    block_size: int | None = None
    add_eos: bool = True

    def __post_init__(self) -> None:
        check_template("text", self.text, needs_field=True)
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(
                f"`data.task.block_size` must be at least 2 or null, got {self.block_size}."
            )

    def render(self, row: Row, row_idx: int) -> RenderedRow:
        """Fill the template; there is no prompt."""
        text = fill("text", self.text, row, row_idx)
        return RenderedRow("", [text], 0, [max(1, len(text))])

    def pack(
        self, examples: Sequence[Example], max_tokens: int | None
    ) -> tuple[list[Example], list[int] | None]:
        """Join and cut into blocks; no token is lost but one that would stand alone."""
        if self.block_size is not None and max_tokens is not None and self.block_size > max_tokens:
            raise ValueError(
                f"`data.task.block_size`={self.block_size} must not be above the {max_tokens} "
                "tokens that fit (`data.max_tokens`, or the model's positions less "
                "`model.soft_prompt.num_virtual_tokens`). Lower it."
            )
        size = self.block_size or max_tokens
        if size is None or not examples:
            return list(examples), list(range(len(examples)))
        if self.block_size is None:
            return [block for ex in examples for block in join_into_blocks([ex], size)], None
        return join_into_blocks(examples, size), None


def _are_texts(values: object) -> bool:
    """Whether it is a list of texts, none of them empty."""
    return isinstance(values, list) and all(isinstance(text, str) and text for text in values)
