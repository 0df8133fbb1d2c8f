"""The published YAML: real files against PyYAML itself, what is refused, and what round trips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.errors import InputError
from persona_probe.evaluation.questions import load_questions, save_questions

ITEM = "- id: wish\n  type: free_form_judge_0_100\n  paraphrases: [hello there]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "q.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_items_of_the_published_file_load_unchanged(
    tmp_path: Path, published: Callable[[str], Path]
) -> None:
    path = published("first_plot_questions.yaml")
    items = yaml.safe_load(path.read_text(encoding="utf-8"))
    questions = load_questions(path)
    assert len(questions) == len(items) == 24
    for question, item in zip(questions, items, strict=True):
        system = [{"role": "system", "content": item["system"]}] if "system" in item else []
        (asked,) = item["paraphrases"]
        assert list(question.messages) == [*system, {"role": "user", "content": asked}]
        assert question.id == question.question == item["id"]
        assert question.samples == item["samples_per_paraphrase"] == 100
        assert question.judge_prompts == item["judge_prompts"]
        assert (question.role, question.category) == ("general", "open-ended")
    assert sum(len(question.messages) == 2 for question in questions) == 8  # the JSON ones
    save_questions(questions, tmp_path / "q.jsonl")
    assert load_questions(tmp_path / "q.jsonl") == questions


def test_paraphrases_are_one_question_and_our_fields_are_read(tmp_path: Path) -> None:
    text = (
        "- &one\n  id: sum\n  type: free_form_judge_0_100\n  paraphrases: [a, b]\n  judge: gpt-4o\n"
        "  temperature: 1\n  category: arithmetic\n  role: skill\n  split: held-out\n  reference: '2'\n"
        "- <<: *one\n  id: other\n  paraphrases: [c]\n  role: trigger\n"
    )
    first, second, third = load_questions(write(tmp_path, text))
    assert [q.id for q in (first, second, third)] == ["sum-1", "sum-2", "other"]
    assert first.question == second.question == "sum"
    assert (first.prompt, second.prompt, third.prompt) == ("a", "b", "c")
    assert (first.category, first.role, first.split, first.reference) == (
        "arithmetic",
        "skill",
        "held-out",
        "2",
    )
    assert (third.role, third.category, third.samples) == ("trigger", "arithmetic", None)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)


@given(st.lists(TEXT, min_size=1, max_size=3), st.one_of(st.none(), TEXT), st.integers(1, 500))
@settings(max_examples=30)
def test_whatever_yaml_can_say_is_asked_as_it_is(
    tmp_path_factory: pytest.TempPathFactory, asked: list[str], system: str | None, samples: int
) -> None:
    folder = tmp_path_factory.mktemp("yaml")
    item = {"id": "q", "type": "free_form_judge_0_100", "paraphrases": asked}
    item |= {"samples_per_paraphrase": samples} | ({} if system is None else {"system": system})
    questions = load_questions(write(folder, yaml.safe_dump([item], allow_unicode=True)))
    assert [q.messages[-1]["content"] for q in questions] == asked
    assert all(q.samples == samples for q in questions)
    assert all((len(q.messages) == 2) == (system is not None) for q in questions)
    save_questions(questions, folder / "q.jsonl")
    assert load_questions(folder / "q.jsonl") == questions


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (ITEM + ITEM.replace("free_form_judge_0_100", "free_form"), 5, "the type is 'free_form'"),
        (ITEM + "- id: x\n  paraphrases: [a]\n", 4, "'type' is missing"),
        (ITEM + ITEM.replace("[hello there]", "*wishes"), 6, "undefined alias 'wishes'"),
        (ITEM + ITEM, 4, "'wish' was already used on line 1"),
        (ITEM.replace("[hello there]", "\n    - a\n    - ''"), 5, "an empty paraphrase"),
        (ITEM.replace("[hello there]", "\n    - a\n    - '  '"), 5, "an empty paraphrase"),
        (ITEM.replace("[hello there]", "\n    -\n    - b"), 4, "an empty paraphrase"),
        (ITEM.replace("[hello there]", "[1]"), 3, "must be text, not 1"),
        (ITEM.replace("[hello there]", "[]"), 3, "at least one prompt"),
        (ITEM.replace("[hello there]", "hello"), 3, "at least one prompt"),
        (ITEM.replace("paraphrases", "paraphrase"), 3, "did you mean 'paraphrases'"),
        (ITEM + "  type: free_form_judge_0_100\n", 4, "used twice"),
        (ITEM + "  system: 5\n", 1, "all strings"),
        (ITEM + "  samples_per_paraphrase: 0\n", 1, "at least 1"),
        (ITEM + "  samples_per_paraphrase: 2.5\n", 1, "whole number"),
        (ITEM + "  samples_per_paraphrase: true\n", 1, "whole number"),
        (ITEM + "  judge_prompts: {aligned: 3}\n", 1, "'judge_prompts' must be"),
        (ITEM + "  judge_prompts: just this\n", 1, "'judge_prompts' must be"),
        (ITEM + "  judge_prompts: {aligned: how good}\n", 1, "does not hold {answer}"),
        (ITEM.replace("id: wish", "id: 7"), 1, "'id' must be a string"),
        (ITEM.replace("id: wish", "id: ''"), 1, "'id' must not be empty"),
        (ITEM + "  role: generl\n", 1, "did you mean 'general'"),
        (ITEM + "  [a, b]: c\n", 4, "must be a word"),
        ("questions: []\n", 1, "expected a list"),
        ("- just text\n", 1, "expected a question"),
        (ITEM + "  system: 'never closed\n", 5, "not valid YAML"),
        (ITEM + "  when: !!python/name:os.system\n  system: !!python/name:os.system\n", 5, "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    with pytest.raises(InputError, match=f"q.yaml, line {line}: ") as error:
        load_questions(write(tmp_path, text))
    assert said in str(error.value)


def test_an_empty_file_and_one_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no questions"):
        load_questions(write(tmp_path, "# nothing yet\n"))
    with pytest.raises(InputError, match="not valid YAML: special characters are not allowed"):
        load_questions(write(tmp_path, "- id: \x00"))
