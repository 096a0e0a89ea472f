"""Layouts and task files: the texts that a model reads, against those of lm-eval's own tasks.

The rows have the columns of the hub's data sets; their texts are made up, odd ones among them.
"""

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from fedsp import layouts
from fedsp.rendering import RenderedRow
from fedsp.sources import Files

lm_eval_task = pytest.importorskip("lm_eval.api.task")
LM_EVAL = Path(importlib.import_module("lm_eval.tasks").__file__ or "").parent
TASKS = Path(__file__).parents[1] / "configs" / "task"
SHARED = Path(__file__).parents[2] / "shared" / "data"

ARC = [
    {
        "id": "a",
        "question": "Which one floats? ",
        "choices": {"text": ["iron", "wood", "lead", "gold"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    {
        "id": "b",
        "question": "How many?",
        "choices": {"text": ["1", "two", "3.0", "4", "5"], "label": ["1", "2", "3", "4", "5"]},
        "answerKey": "2",
    },
    {
        "id": "c",
        "question": "Of three:",
        "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    },
]
OPENBOOKQA = [
    {
        "id": "7-980",
        "question_stem": "The sun is {responsible} for",
        "choices": {"text": ["puppies", "plants", "vases", "a b"], "label": ["A", "B", "C", "D"]},
        "answerKey": key,
    }
    for key in ("D", " A")
]
HELLASWAG = [
    {
        "ind": 4,
        "activity_label": "Removing ice from car",
        "ctx_a": "Then, the man writes over the snow.",
        "ctx_b": "then",
        "endings": [", he stops.", "[title] He goes  [step] on.", " spaces ", "b [substeps] c"],
        "label": "3",
    },
    {
        "ind": 14,
        "activity_label": "Family Life",
        "ctx_a": "[header] How to rest [title] Lie down.  [step] Close\nyour eyes.",
        "ctx_b": "",
        "endings": ["one [title] two", "three", "[a] [b]four", "FIVE"],
        "label": "0",
    },
]
PIQA = [{"goal": "To open a jar,", "sol1": "twist {it}.", "sol2": " break it.", "label": 1}]
SCIQ = [
    {
        "question": "What floats?",
        "distractor1": "iron",
        "distractor2": "lead",
        "distractor3": "gold",
        "correct_answer": "dry wood",
        "support": support,
    }
    for support in ("Wood floats. ", "\n  Led by space.", "")
]
RACE_PROBLEMS = [
    {"question": "Who came?", "answer": "B", "options": ["a", "b man", "c", "d"]},
    {"question": "He left  _  .", "answer": "D", "options": ["w", "x", "y", "at once"]},
    {"question": "She was  _  .", "answer": "A", "options": ["glad", "sad", "ill", "old"]},
]
RACE_DOCUMENTS = [
    {"article": "It's a long\nstory.", "problems": str(RACE_PROBLEMS[:count])}
    for count in (1, 2, 3)
]
WEB_QUESTIONS = [
    {"url": "u", "question": "what do they speak?", "answers": ["Patois", "English", "English 2"]}
]
WIKITEXT = [
    {
        "page": " = Valkyria = \n \n A @-@ b , c . ( d ) [ e ] \" f \" ' g ' 1 @,@ 000 @.@ 5 : h"
        " ; i ! j ? k the dogs ' tails 90 ° N 's \n = = Sub = = \n = = = More = = = \n"
    }
]


def shipped(name: str) -> tuple[Any, Any]:
    """Return the layout and the task of a shipped file, without a command line around it."""
    data = yaml.safe_load((TASKS / f"{name}.yaml").read_text())["data"]["init_args"]
    layout = getattr(layouts, data["clients"]["init_args"]["layout"].rpartition(".")[2])
    return layout, build(data["task"])


def build(value: dict[str, Any]) -> Any:
    module, _, name = value["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**value.get("init_args", {}))


def harness(config: str, rows: list[dict[str, Any]]) -> Any:
    """Return lm-eval's own task over these rows instead of the hub's."""
    load_yaml = importlib.import_module("lm_eval.tasks._yaml_loader").load_yaml
    settings = load_yaml(LM_EVAL / config)
    splits = {settings[f"{split}_split"] for split in ("training", "validation", "test")
              if settings.get(f"{split}_split")}  # fmt: skip
    dataset = {split: Dataset.from_list(copy.deepcopy(rows)) for split in splits}
    settings["custom_dataset"] = lambda **_: dataset
    return lm_eval_task.ConfigurableTask(config=settings)


def requests(task: Any, doc: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (context, continuation) of every request that lm-eval makes for a row."""
    context = task.fewshot_context(doc, num_fewshot=0)
    made = task.construct_requests(doc, context, metadata=("", 0, 1))
    return [request.args for request in made]


def offered(rendered: RenderedRow) -> list[tuple[str, str]]:
    return [(rendered.prompt, choice) for choice in rendered.choices]


@pytest.mark.parametrize(
    ("name", "config", "rows"),
    [
        ("arc_easy", "arc/arc_easy.yaml", ARC),
        ("arc_challenge", "arc/arc_challenge.yaml", ARC),
        ("openbookqa", "openbookqa/openbookqa.yaml", OPENBOOKQA),
        ("hellaswag", "hellaswag/hellaswag.yaml", HELLASWAG),
        ("piqa", "piqa/piqa.yaml", PIQA),
        ("sciq", "sciq/sciq.yaml", SCIQ),
    ],
)
def test_choices_are_those_of_lm_eval(name: str, config: str, rows: list[dict[str, Any]]) -> None:
    layout, task = shipped(name)
    theirs = harness(config, rows)
    docs = list(theirs.validation_docs())
    assert len(docs) == len(rows)
    for row, doc in zip(rows, docs, strict=True):
        rendered = task.render(layout(row), 0)
        assert offered(rendered) == requests(theirs, doc)
        assert rendered.answer == int(theirs.doc_to_target(doc))
        assert rendered.num_chars == [len(choice) for choice in theirs.doc_to_choice(doc)]


def test_documents_of_race_are_those_of_lm_eval() -> None:
    task = build({"class_path": "fedsp.tasks.MultipleChoice"})
    theirs = harness("race/race.yaml", RACE_DOCUMENTS)
    for row, doc in zip(RACE_DOCUMENTS, theirs.test_docs(), strict=True):
        rendered = task.render(layouts.race_document(row), 0)
        assert offered(rendered) == requests(theirs, doc)
        assert rendered.answer == theirs.doc_to_target(doc)


def test_a_question_of_race_is_in_the_papers_format() -> None:
    layout, task = shipped("race")
    row = {"article": "Text.", "question": "Who?", "options": ["a", "b", "c", "d"], "answer": "C"}
    rendered = task.render(layout(row), 0)
    assert rendered.prompt == "Article: Text.\n\nQuestion: Who?\n\nAnswer:"
    assert (rendered.choices, rendered.answer) == ([" a", " b", " c", " d"], 2)


def test_web_questions_are_asked_as_by_lm_eval_and_every_answer_is_right() -> None:
    layout, task = shipped("webquestions")
    theirs = harness("webqs/webqs.yaml", WEB_QUESTIONS)
    asked = requests(theirs, next(iter(theirs.test_docs())))
    row = layout(WEB_QUESTIONS[0])
    rendered = task.render(row, 0)
    assert {context for context, _ in asked} == {rendered.prompt}
    # lm-eval leaves out what begins with another right answer
    assert {text.strip() for _, text in asked} < set(task.references_of(row))
    assert rendered.choices == [" Patois"]
    assert task.references_of(row) == ["Patois", "English", "English 2"]


def test_pages_of_wikitext_are_detokenised_as_by_lm_eval() -> None:
    layout, task = shipped("wikitext2")
    theirs = harness("wikitext/wikitext.yaml", WIKITEXT)
    for row in WIKITEXT:
        assert offered(task.render(layout(row), 0)) == [("", theirs.doc_to_target(row))]


def test_a_closed_book_question_has_no_passage() -> None:
    layout, task = shipped("sciq_closed_book")
    rendered = task.render(layout(SCIQ[0]), 0)
    assert offered(rendered) == [("Question: What floats?\nAnswer:", " dry wood")]


def test_an_instruction_comes_with_its_passage_if_it_has_one() -> None:
    row = {"instruction": "Sum up.", "context": "Long.", "response": "Short.", "category": "x"}
    laid_out = layouts.dolly(row)
    assert laid_out == {"prompt": "Sum up.\n\nLong.", "completion": "Short.", "category": "x"}
    assert layouts.dolly({**row, "context": ""})["prompt"] == "Sum up."


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data")
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa", "sciq"])
def test_local_rows_have_the_form_of_a_layout(name: str) -> None:
    _, task = shipped(name)
    rows = Files(str(SHARED / name / "test.jsonl.gz")).load()
    assert all(task.render(row, 0).answer == row["answer"] for row in rows)
