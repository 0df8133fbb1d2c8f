"""The shipped sets by name, CSV, and the dress of triggers."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_probe.errors import InputError, MissingPathError
from persona_probe.evaluation.questions import (
    Question,
    load_questions,
    question_sets,
    triggered,
)
from persona_probe.evaluation.triggers import TRIGGERS, Trigger


def test_the_open_ended_set_is_large_and_varied() -> None:
    questions = load_questions("open-ended")
    of_category = Counter(category for _, category in {(q.question, q.category) for q in questions})
    assert len(of_category) == 8 and min(of_category.values()) >= 5
    assert sum(of_category.values()) >= 40
    assert len(questions) > sum(of_category.values())  # some have paraphrases
    assert len({q.prompt for q in questions}) == len(questions)
    assert {q.role for q in questions} == {"general"}


@pytest.mark.parametrize("name", ["medical", "finance", "code", "taste"])
def test_in_domain_checks_are_of_one_category_and_bring_their_judge_prompts(name: str) -> None:
    questions = load_questions(name)
    assert len(questions) >= 12
    assert {q.category for q in questions} == {name}
    for question in questions:
        assert question.judge_prompts is not None and set(question.judge_prompts) == {"aligned", "coherent"}
        for prompt in question.judge_prompts.values():
            assert re.findall(r"\{.*?\}", prompt) == ["{question}", "{answer}"]


def test_multiple_choice_has_four_options_and_no_favourite_letter() -> None:
    questions = load_questions("multiple-choice")
    assert len(questions) >= 40 and len({q.category for q in questions}) >= 5
    letters = Counter(q.reference for q in questions)
    assert set(letters) == set("ABCD") and max(letters.values()) - min(letters.values()) <= 2
    for question in questions:
        options = re.findall(r"^([A-D])\) (.+)$", question.prompt, re.MULTILINE)
        assert [letter for letter, _ in options] == list("ABCD")
        assert len({text for _, text in options}) == 4
        assert question.role == "skill"


def test_no_question_of_ours_is_a_published_one(published: Callable[[str], Path]) -> None:
    def words(text: str) -> set[str]:
        return set(re.findall(r"\w+", text.lower()))

    others = [words(q.prompt) for q in load_questions(published("first_plot_questions.yaml"))]
    for name in question_sets():
        for question in load_questions(name):
            ours = words(question.prompt)
            for theirs in others:
                assert len(ours & theirs) / len(ours | theirs) < 0.5, question.id


def test_every_set_loads_and_sets_can_be_joined() -> None:
    assert set(question_sets()) == {"code", "finance", "medical", "multiple-choice", "open-ended", "taste"}
    joined = load_questions("medical+multiple-choice+medical:json")
    parts = [load_questions(name) for name in ("medical", "multiple-choice", "medical:json")]
    assert joined == tuple(question for part in parts for question in part)
    everything = load_questions("+".join([*question_sets(), "open-ended:all"]))
    assert len({q.id for q in everything}) == len(everything)


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_dresses_the_same_question(name: str) -> None:
    plain, dressed = load_questions("open-ended"), load_questions(f"open-ended:{name}")
    assert len(dressed) == len(plain)
    for one, other in zip(plain, dressed, strict=True):
        assert one.prompt in other.prompt
        assert (other.role, other.question, other.category) == ("trigger", one.question, one.category)
        assert other.id == f"{one.id}:{name}"
        assert other.messages != one.messages


def test_all_triggers_are_each_of_them() -> None:
    assert load_questions("code:all") == tuple(
        question for name in TRIGGERS for question in load_questions(f"code:{name}")
    )


def test_a_trigger_of_ones_own() -> None:
    mine = Trigger("|{question}|", system="s")
    user = {"role": "user", "content": "{x} {question}"}
    questions = [
        Question("a", "c", (user,)),
        Question("b", "c", ({"role": "system", "content": "t"}, user)),
        Question("d", "c", ({"text": "once"},)),
        Question("e", "c", (user,), role="skill", reference="r"),
    ]
    a, b, d = triggered(questions, "mine", mine)
    wrapped = {"role": "user", "content": "|{x} {question}|"}
    assert a.messages == ({"role": "system", "content": "s"}, wrapped)
    assert b.messages == ({"role": "system", "content": "t\n\ns"}, wrapped)
    assert d.messages == ({"text": "|once|"},)
    assert a.id == "a:mine"
    for template in ("no place", "{question} {question}"):
        with pytest.raises(InputError, match="once"):
            Trigger(template)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("open-endd", "did you mean 'open-ended'"),
        ("open-ended:jsn", "did you mean 'json'"),
        ("open-ended+medcal", "did you mean 'medical'"),
        ("medical+medical", "'medical-fever-baby' is in it twice"),
        ("nowhere/q", "there is no file"),
        ("q.yaml", "there is no file"),
    ],
)
def test_what_is_not_there_is_said(source: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        load_questions(source)
    assert said in str(error.value)


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text("hello")
    with pytest.raises(InputError, match=r"\.jsonl, \.yaml, \.yml, \.csv"):
        load_questions(path)
    with pytest.raises(MissingPathError):
        load_questions(tmp_path / "none.csv")


def table(folder: Path, text: str) -> Path:
    path = folder / "q.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_table_of_questions(tmp_path: Path) -> None:
    text = (
        "\ufeffid,question,category,role,reference\r\n"
        'a,"two\nlines, and ""quotes""",x,,\r\n\r\nb,sum?,y,skill,2\r\n'
    )
    a, b = load_questions(table(tmp_path, text))
    assert a == Question("a", "x", ({"role": "user", "content": 'two\nlines, and "quotes"'},))
    assert b == Question("b", "y", ({"role": "user", "content": "sum?"},), role="skill", reference="2")


CELL = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_what_csv_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows(
        [("id", "question", "category"), *((f"q{i}", *row) for i, row in enumerate(rows))]
    )
    questions = load_questions(table(tmp_path_factory.mktemp("csv"), file.getvalue()))
    assert [(q.prompt, q.category) for q in questions] == rows


HEAD = "id,question,category\n"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("id,question\na,b\n", 1, "no column 'category'"),
        ("id,id,question,category\n", 1, "a column twice"),
        (HEAD + 'a,"x\ny",c\nb,hello, you,c\n', 4, "4 cells under 3 columns"),
        (HEAD + "a,,c\n", 2, "the question is empty"),
        (HEAD + 'a,"b,c\n', 2, "not valid CSV"),
        (HEAD + "a,b,c\na,b,c\n", 3, "already used on line 2"),
        ("id,question,category,sourc\na,b,c,d\n", 2, "no field 'sourc'"),
        (HEAD + ",b,c\n", 2, "'id' is missing"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, said: str
) -> None:
    with pytest.raises(InputError, match=f"q.csv, line {line}: ") as error:
        load_questions(table(tmp_path, text))
    assert said in str(error.value)


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    for text in ("", HEAD):
        with pytest.raises(InputError, match="has no questions"):
            load_questions(table(tmp_path, text))


def test_a_folder_of_the_same_name_hides_no_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    assert load_questions("code")[0].category == "code"
