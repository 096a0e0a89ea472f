r"""Rows of well-known data sets of the hub, brought into the forms that fedsp's tasks expect.

A layout is a function of one row, named by its import path where a source asks for one. There are
two forms, whose texts are those of the evaluation harness lm-eval 0.4 where it has the task:

- choices: `question`, `choices` (texts), `answer` (index) and, where there is one, `context`;
- completion: `prompt`, `completion` (with the space it begins with) and, where several answers are
  right, `answers`.
"""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Layout = Callable[[Row], dict[str, Any]]

_LETTERS = "ABCD"
_BLANK = "  _  ."


def arc(row: Row) -> dict[str, Any]:
    """ARC, `allenai/ai2_arc`: labels are letters or digits, and there may be three or five."""
    choices = row["choices"]
    answer = choices["label"].index(row["answerKey"])
    return {"question": row["question"], "choices": choices["text"], "answer": answer}


def openbookqa(row: Row) -> dict[str, Any]:
    """OpenBookQA, `allenai/openbookqa`: a stem to be completed."""
    choices = row["choices"]
    answer = choices["label"].index(row["answerKey"].lstrip())
    return {"question": row["question_stem"], "choices": choices["text"], "answer": answer}


def hellaswag(row: Row) -> dict[str, Any]:
    """HellaSwag, `Rowan/hellaswag`: activity and context, cleaned of WikiHow's marks."""
    question = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "question": _without_marks(question),
        "choices": [_without_marks(ending) for ending in row["endings"]],
        "answer": int(row["label"]),
    }


def piqa(row: Row) -> dict[str, Any]:
    """PIQA, `baber/piqa`: a goal and two ways to reach it."""
    return {
        "question": row["goal"],
        "choices": [row["sol1"], row["sol2"]],
        "answer": row["label"],
    }


def sciq(row: Row) -> dict[str, Any]:
    """SciQ, `allenai/sciq`: the supporting passage, which may be empty, is the context."""
    distractors = [row[f"distractor{number}"] for number in (1, 2, 3)]
    return {
        "context": row["support"].lstrip(),
        "question": row["question"],
        "choices": [*distractors, row["correct_answer"]],
        "answer": 3,
    }


def sciq_closed_book(row: Row) -> dict[str, Any]:
    """SciQ, `allenai/sciq`, as a question whose answer is to be written from memory."""
    return {
        "prompt": f"Question: {row['question']}\nAnswer:",
        "completion": f" {row['correct_answer']}",
    }


def race(row: Row) -> dict[str, Any]:
    """RACE, `ehovy/race`: one question of an article."""
    return {
        "context": row["article"],
        "question": row["question"],
        "choices": row["options"],
        "answer": _LETTERS.index(row["answer"]),
    }


def race_document(row: Row) -> dict[str, Any]:
    """RACE as lm-eval scores it, `EleutherAI/race`: an article's last question behind the others.

    The earlier questions come with their answers and the last one bare, so the question of the
    result is the whole prompt.
    """
    *solved, last = ast.literal_eval(row["problems"])
    text = f"Article: {row['article']}\n\n"
    for problem in solved:
        question, answer = problem["question"], problem["options"][_answer(problem)]
        if question.endswith(_BLANK):
            text += f"{question[: -len(_BLANK) + 1]}{answer}\n"
        else:
            text += f"Question: {question}\nAnswer: {answer}\n"
    return {
        "question": text + last["question"],
        "choices": last["options"],
        "answer": _answer(last),
    }


def web_questions(row: Row) -> dict[str, Any]:
    """WebQuestions, `stanfordnlp/web_questions`: the first answer is learned, all are right."""
    return {
        "prompt": f"Question: {row['question']}\nAnswer:",
        "completion": f" {row['answers'][0]}",
        "answers": list(row["answers"]),
    }


def wikitext(row: Row) -> dict[str, Any]:
    """WikiText, `EleutherAI/wikitext_document_level`: an article with its spacing mended."""
    return {"prompt": "", "completion": _detokenized(row["page"])}


def dolly(row: Row) -> dict[str, Any]:
    """Dolly, `databricks/databricks-dolly-15k`: an instruction, perhaps with a passage."""
    prompt = "\n\n".join(part for part in (row["instruction"], row["context"]) if part)
    return {"prompt": prompt, "completion": row["response"], "category": row["category"]}


def _answer(problem: Row) -> int:
    return _LETTERS.index(problem["answer"])


def _without_marks(text: str) -> str:
    """Strip WikiHow's `[title]`, `[header]`, `[step]`, …, of which a title ends a sentence."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# what WikiText's tokens were separated by, in lm-eval's order: each rule sees the last one's text
_SPACED = (
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def _detokenized(text: str) -> str:
    text = text.replace("s '", "s'")
    for spaced, mark in _SPACED:
        text = text.replace(spaced, mark)
    for pattern, replacement in _BRACKETS:
        text = re.sub(pattern, replacement, text)
    for spaced, mark in _REST:
        text = text.replace(spaced, mark)
    return text
