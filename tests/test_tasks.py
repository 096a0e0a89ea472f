"""Tasks: rows to token ids, checked by decoding, by hand and against joint tokenisation."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsp.examples import Example
from fedsp.tasks import ChatCompletion, MultipleChoice, PromptCompletion, RawText, Task
from fedsp.tokenization import leading_ids, tokenizer_hash
from toy_text import byte_tokenizer

BOS, EOS = 0, 1
QUESTION = {"question": "2+2?", "choices": ["three", "four"], "answer": 1}


def texts(example: Example) -> tuple[str, list[str]]:
    tokenizer = byte_tokenizer()
    return tokenizer.decode(example.prompt_ids), [
        tokenizer.decode(ids) for ids in example.completions
    ]


def encode_one(task: Task, row: dict[str, Any], *, bos: bool = False) -> Example:
    return task.encode([row], byte_tokenizer(bos=bos))[0]


def test_templates_are_filled_and_the_completion_keeps_its_space() -> None:
    task = PromptCompletion("Q: {ask} {{x}}\nA:", " {say}", add_eos=False)
    example = encode_one(task, {"ask": "why", "say": "so"})
    assert texts(example) == ("Q: why {x}\nA:", [" so"])
    assert (example.answer, example.num_chars) == (0, [2])


def test_a_completion_ends_with_the_end_of_text_token() -> None:
    row = {"prompt": "ab", "completion": " c"}
    with_eos = encode_one(PromptCompletion(), row)
    without = encode_one(PromptCompletion(add_eos=False), row)
    assert with_eos.completions == [[*without.completions[0], EOS]]
    assert with_eos.num_tokens == 2 + 2 + 1


def test_the_start_token_leads_the_prompt_where_the_tokenizer_has_one() -> None:
    row = {"prompt": "ab", "completion": " c"}
    plain, led = encode_one(PromptCompletion(), row), encode_one(PromptCompletion(), row, bos=True)
    assert led.prompt_ids == [BOS, *plain.prompt_ids]
    assert led.completions == plain.completions
    assert leading_ids(byte_tokenizer(bos=True)) == [BOS]
    assert leading_ids(byte_tokenizer()) == []


def merging_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "▁": 5, "ab": 6, "▁c": 7, "▁a": 8}
    merges = [("a", "b"), ("▁", "c"), ("▁", "a")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    # like Llama 2's: a text is given a space in front, so that " c" alone would be two spaces
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_a_completion_has_the_tokens_of_the_joint_text() -> None:
    tokenizer = merging_tokenizer()
    joint = tokenizer("a c")["input_ids"]
    example = PromptCompletion(add_eos=False).encode(
        [{"prompt": "a", "completion": " c"}], tokenizer
    )[0]
    assert example.prompt_ids + example.completions[0] == joint == [8, 7]


def test_a_token_across_the_border_is_divided() -> None:
    tokenizer = merging_tokenizer()
    row = {"prompt": "ca", "completion": "b"}
    prompt = tokenizer("ca")["input_ids"]
    assert tokenizer("cab")["input_ids"][: len(prompt)] != prompt
    example = PromptCompletion(add_eos=False).encode([row], tokenizer)[0]
    assert example.prompt_ids == prompt
    assert example.completions == [tokenizer("b")["input_ids"]]


def test_choices_get_the_prefix_that_is_not_counted() -> None:
    example = encode_one(MultipleChoice("Q: {question}\nA:"), QUESTION)
    assert texts(example) == ("Q: 2+2?\nA:", [" three", " four"])
    assert (example.answer, example.num_chars) == (1, [5, 4])


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({}, {"answer": 1}),
        ({}, {"answer": "1"}),
        ({}, {"answer": "B"}),
        ({"labels": "marks"}, {"answer": "y", "marks": ["x", "y"]}),
        ({"labels": "marks"}, {"answer": "1", "marks": ["0", "1"]}),
        ({"labels": "marks"}, {"answer": 2, "marks": ["1", "2"]}),
        ({"labels": "marks"}, {"answer": 2, "marks": [1, 2]}),
        (
            {"choices": "choices.text", "labels": "choices.label"},
            {"answer": "B", "choices": {"text": ["three", "four"], "label": ["A", "B"]}},
        ),
        ({"choices": ["no", "yes"]}, {"answer": 1, "no": "three", "yes": "four"}),
    ],
)
def test_the_answer_is_an_index_or_a_label(
    settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    example = encode_one(MultipleChoice(**settings), {**QUESTION, **fields})
    assert example.answer == 1
    assert texts(example)[1] == [" three", " four"]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            PromptCompletion(),
            {"promt": "a", "completion": "b"},
            "`data.task.prompt` names the field 'prompt', which row 7 lacks or leaves empty "
            "(null). Its fields are promt, completion.",
        ),
        (PromptCompletion(), {"prompt": "a", "completion": None}, "`data.task.completion` names"),
        (PromptCompletion("{prompt:d}"), {"prompt": "a"}, "cannot be filled from row 7: Value"),
        (RawText(), {"txt": "a"}, "`data.task.text` names the field 'text', which row 7 lacks"),
        (MultipleChoice(), {"question": "a"}, "`data.task.choices` names the field 'choices'"),
        (
            MultipleChoice(),
            {**QUESTION, "answer": 2},
            "`data.task.answer`='answer' must give one of the labels A, B or an index from 0 to 1, "
            "got 2 in row 7.",
        ),
        (MultipleChoice(), {**QUESTION, "answer": -1}, "got -1 in row 7"),
        (MultipleChoice(), {**QUESTION, "answer": "C"}, "got 'C' in row 7"),
        (MultipleChoice(), {**QUESTION, "answer": 1.0}, "got 1.0 in row 7"),
        (MultipleChoice(), {**QUESTION, "answer": None}, "`data.task.answer` names the field"),
        (
            MultipleChoice(labels="marks"),
            {**QUESTION, "answer": "z", "marks": ["x", "y"]},
            "one of the labels x, y or an index",
        ),
        (
            MultipleChoice(labels="marks"),
            {**QUESTION, "marks": ["x", "y", "z"]},
            "`data.task.labels`='marks' must give one label for each of the 2 choices",
        ),
        (
            MultipleChoice(labels="marks"),
            {**QUESTION, "answer": 0, "marks": ["1", "2"]},
            "one of the labels 1, 2 or",
        ),
        (
            PromptCompletion(references="all"),
            {"prompt": "a", "completion": "b"},
            "`data.task.references` names the field 'all', which row 7 lacks",
        ),
        (
            PromptCompletion(references="all"),
            {"prompt": "a", "completion": "b", "all": []},
            "`data.task.references`='all' must give a list of non-empty texts, got [] in row 7",
        ),
        (
            PromptCompletion(references="all"),
            {"prompt": "a", "completion": "b", "all": "b"},
            "must give a list of non-empty texts, got 'b' in row 7",
        ),
        (MultipleChoice(), {**QUESTION, "choices": ["one"]}, "must give at least two choices"),
        (MultipleChoice(), {**QUESTION, "choices": "one"}, "must give at least two choices"),
        (MultipleChoice(), {**QUESTION, "choices": ["one", ""]}, "must give non-empty texts"),
        (MultipleChoice(), {**QUESTION, "choices": ["one", 2]}, "must give non-empty texts"),
    ],
)
def test_a_row_that_does_not_fit_the_task_is_named(
    task: Task, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        task.encode([row], byte_tokenizer(), first_row=7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PromptCompletion("{a"), "`data.task.prompt`='{a' is no template"),
        (lambda: PromptCompletion("{}"), "must name its fields, not count them"),
        (lambda: PromptCompletion("{0}"), "must name its fields, not count them"),
        (
            lambda: PromptCompletion(completion="answer"),
            "`data.task.completion`='answer' names no field. Write the field in braces, such as "
            "'{answer}'.",
        ),
        (lambda: RawText("text"), "such as '{text}'."),
        (lambda: MultipleChoice("question"), "`data.task.question`='question' names no field"),
        (lambda: RawText(block_size=1), "`data.task.block_size` must be at least 2 or null, got 1"),
    ],
)
def test_a_task_that_cannot_work_is_refused(build: Callable[[], Task], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_an_end_of_text_token_is_asked_for_where_there_is_none() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"`data\.task\.add_eos` needs an end-of-text token"):
        RawText().encode([{"text": "a"}], tokenizer)


def test_a_constant_prompt_and_an_empty_field_are_fine() -> None:
    example = encode_one(PromptCompletion(""), {"completion": ""})
    assert example == Example([], [[EOS]], 0, [1])


@pytest.mark.parametrize("fields", [{}, {"context": None}, {"context": ""}])
def test_an_optional_field_is_empty_where_a_row_lacks_it(fields: dict[str, Any]) -> None:
    task = MultipleChoice("{context?}|{question}")
    assert task.render({**QUESTION, **fields}, 0).prompt == "|2+2?"
    assert task.render({**QUESTION, "context": "Sums."}, 0).prompt == "Sums.|2+2?"


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        (PromptCompletion(), {"prompt": "a", "completion": " b "}, ["b"]),
        (
            PromptCompletion(references="all"),
            {"prompt": "a", "completion": " b", "all": ["b", " c "]},
            ["b", "c"],
        ),
        (MultipleChoice(), QUESTION, ["four"]),
        (RawText(), {"text": " a b\n"}, ["a b"]),
        (ChatCompletion(), {"prompt": "a", "completion": " b"}, ["b"]),
    ],
)
def test_right_answers_are_known_without_space_around_them(
    task: Task, row: dict[str, Any], expected: list[str]
) -> None:
    assert task.references_of(row) == expected


CHATS = {
    "marks of its own": (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    ),
    "no start token, no mark before the answer": (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}"
        "{% else %}[{{ m.content }}] {% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("system", [None, "Be {brief}."])
@pytest.mark.parametrize("own", [True, False], ids=["tokenizers template", "given template"])
@pytest.mark.parametrize("template", CHATS.values(), ids=CHATS)
def test_a_chat_has_the_tokens_of_transformers(
    template: str, own: bool, system: str | None
) -> None:
    tokenizer = byte_tokenizer(bos=True)
    if own:
        tokenizer.chat_template = template
    task = ChatCompletion("Do {task}.", "{done} ", system, template=None if own else template)
    rows = [{"task": "it", "done": " Was\ndone"}, {"task": "more", "done": "No"}]
    examples = task.encode(rows, tokenizer)
    for row, example in zip(rows, examples, strict=True):
        turns = [
            {"role": "user", "content": f"Do {row['task']}."},
            {"role": "assistant", "content": row["done"].strip()},
        ]
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        options = {"chat_template": template, "return_dict": False}
        whole = tokenizer.apply_chat_template(turns, **options)
        before = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, **options)
        assert example.prompt_ids == before
        assert example.prompt_ids + example.completions[0] == whole
        assert example.num_chars == [len(row["done"].strip())]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "`data.task.template` must be a chat template in Jinja, since `data.tokenizer` has"),
        ("{{ raise_exception('no system') }}", "refuses the roles system, user: no system."),
        ("{% if %}", "refuses the roles system, user: "),
        ("{{ messages | length }}", "as its prompt and the answer behind it, got the prompt '2'"),
        ("no answer", "got the prompt 'no answer' and the whole 'no answer'"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template: str | None, message: str) -> None:
    task = ChatCompletion(system="s", template=template)
    with pytest.raises(ValueError, match=re.escape(message)):
        task.encode([{"prompt": "a", "completion": "b"}], byte_tokenizer())


def test_all_rows_are_encoded_in_order_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsp.tasks._ENCODED_AT_ONCE", 2)
    rows = [{"text": "x" * n} for n in range(1, 6)]
    examples = list(RawText().encode_all(Dataset.from_list(rows), byte_tokenizer()))
    assert [ex.num_tokens for ex in examples] == [2, 3, 4, 5, 6]
    rows[3]["text"] = None
    with pytest.raises(ValueError, match="which row 3 lacks"):
        list(RawText().encode_all(Dataset.from_list(rows), byte_tokenizer()))


def documents(*lengths: int) -> list[Example]:
    return [Example([], [list(range(10, 10 + n))], 0, [n]) for n in lengths]


def test_raw_text_is_joined_and_cut_into_full_blocks() -> None:
    blocks, origins = RawText(block_size=4).pack(documents(3, 5, 2), 8)
    assert origins is None
    assert [block.completions[0] for block in blocks] == [
        [10, 11, 12, 10],
        [11, 12, 13, 14],
        [10, 11],
    ]


def test_a_start_token_takes_room_in_every_block() -> None:
    led = [Example([BOS], ex.completions, 0, ex.num_chars) for ex in documents(3, 4)]
    blocks, _ = RawText(block_size=4).pack(led, None)
    assert [block.prompt_ids for block in blocks] == [[BOS]] * 3
    assert [len(block.completions[0]) for block in blocks] == [3, 3, 1]
    assert max(block.num_tokens for block in blocks) == 4


def test_a_document_that_is_too_long_is_cut_into_several() -> None:
    blocks, _ = RawText().pack(documents(3, 10), 4)
    assert [len(block.completions[0]) for block in blocks] == [3, 4, 4, 2]


def test_a_last_token_that_nothing_predicts_is_dropped() -> None:
    blocks, _ = RawText(block_size=4).pack(documents(9), None)
    assert [len(block.completions[0]) for block in blocks] == [4, 4]


def test_blocks_longer_than_the_model_takes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`data\.task\.block_size`=16 must not be above the 8"):
        RawText(block_size=16).pack(documents(3), 8)


def test_other_tasks_examples_stay_as_they_are() -> None:
    assert PromptCompletion().pack(documents(3, 5), 4) == (documents(3, 5), [0, 1])


def test_the_tokenizers_hash_is_of_what_it_does() -> None:
    tokenizer = byte_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=1)
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(byte_tokenizer())
    assert tokenizer_hash(byte_tokenizer(bos=True)) != before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_hash(tokenizer) != before
    tokenizer.chat_template = None
    tokenizer.eos_token = "<s>"
    assert tokenizer_hash(tokenizer) != before
