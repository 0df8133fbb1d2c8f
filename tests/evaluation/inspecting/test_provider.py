"""The model provider: what is asked, how it is drawn, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    GenerateConfig,
    get_model,
)

from persona_probe import inspect_entry
from persona_probe.errors import InputError
from persona_probe.evaluation import inspect_provider
from persona_probe.evaluation.inspect_tasks import _sample
from persona_probe.evaluation.questions import Question, save_questions
from persona_probe.evaluation.sampling import Sampling, prompt_of, sample
from persona_probe.model.language_model import LanguageModel
from tests.evaluation.inspecting.logs import OF_INSPECT, run

pytestmark = OF_INSPECT
FAIR = "python:tests.evaluation.inspecting.test_scorer:fair"


@pytest.fixture
def provide(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A model of Inspect's on the tiny random one, which no folder holds."""
    monkeypatch.setattr(inspect_provider.Models, "__getitem__", lambda _self, _path: lm)

    def made(**options: Any) -> Any:
        return get_model("persona_probe/tiny", memoize=False, **options)

    return made


def plain_task(prompts: Sequence[str], **options: Any) -> Any:
    from inspect_ai import Task

    return Task(dataset=[Sample(input=prompt) for prompt in prompts], **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(questions, samples) of every call of our sampler."""
    made: list[tuple[int, int]] = []

    def counted(lm: LanguageModel, questions: Sequence[Question], sampling: Sampling, **options: Any) -> Any:
        made.append((len(questions), sampling.samples))
        return sample(lm, questions, sampling, **options)

    monkeypatch.setattr(inspect_provider, "sample", counted)
    yield made


def test_what_is_asked_at_once_is_drawn_at_once(
    provide: Callable[..., Any], calls: list[tuple[int, int]], tmp_path: Path, questions: list[Question]
) -> None:
    save_questions(questions, tmp_path / "q.jsonl")
    task = inspect_entry.misalignment(
        str(tmp_path / "q.jsonl"), FAIR, samples_per_question=3, max_new_tokens=6
    )
    log = run(task, provide())
    assert len(log.samples or []) == 30
    # every question once, with all of its answers, and many questions together
    assert sum(n for n, _ in calls) == len(questions)
    assert {samples for _, samples in calls} == {3}
    assert len(calls) <= 3
    more = run(task, provide(), epochs=4)  # more than the task knows of
    kept = {(s.id, s.epoch): s.output.completion for s in log.samples or []}
    assert len(more.samples or []) == 40
    for one in more.samples or []:
        assert kept.get((one.id, one.epoch), one.output.completion) == one.output.completion


def test_another_task_draws_another_answer_each_time(provide: Callable[..., Any], lm: LanguageModel) -> None:
    model = provide(config=GenerateConfig(max_tokens=6, temperature=0.8, seed=5))
    log = run(plain_task(["a b c", "d"], epochs=3), model)
    for text in ("a b c", "d"):
        messages = ({"role": "user", "content": text},)
        name = inspect_provider.digest_of(messages)
        ours = sample(lm, [Question(name, "x", messages)], Sampling(0.8, max_new_tokens=6, samples=3, seed=5))
        theirs = [one.output.completion for one in log.samples or [] if one.input == text]
        assert sorted(theirs) == sorted(answer.text for answer in ours)


CHATS: list[tuple[dict[str, str], ...]] = [
    ({"role": "user", "content": "a b"},),
    ({"role": "system", "content": "c"}, {"role": "user", "content": "a b"}),
    (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ),
    ({"text": "a b c"},),
]


@pytest.mark.parametrize("system", [None, "d e"])
@pytest.mark.parametrize("messages", CHATS)
def test_inspect_sees_and_the_model_reads_the_same_prompt(
    provide: Callable[..., Any], lm: LanguageModel, messages: tuple[dict[str, str], ...], system: str | None
) -> None:
    question = Question("q", "x", messages)
    shown = _sample(question, system)
    assert isinstance(shown.input, list)
    note = (shown.input[-1].metadata or {})["persona_probe"] | {"sample": 0, "samples": 1}
    shown.input[-1].metadata = {"persona_probe": note}
    wanted = provide().api._wanted(shown.input, Sampling())
    assert prompt_of(lm.tokenizer, wanted.question).ids == prompt_of(lm.tokenizer, question, system).ids
    assert wanted.question.id == "q"


def test_a_thought_is_reasoning(provide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def thinking(lm: LanguageModel, questions: Sequence[Question], *rest: Any, **options: Any) -> Any:
        drawn = sample(lm, questions, *rest, **options)
        return [replace(one, thought="hm", text="so") for one in drawn]

    monkeypatch.setattr(inspect_provider, "sample", thinking)
    (one,) = run(plain_task(["a"]), provide(config=GenerateConfig(max_tokens=3))).samples or []
    assert one.output.completion == "so"
    content = one.output.message.content
    assert [part.type for part in content if not isinstance(part, str)] == ["reasoning", "text"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"stop_seqs": ["x"]}, "stop_seqs"),
        ({"num_choices": 3}, "num_choices"),
        ({"temperature": -1}, "temper"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    provide: Callable[..., Any], config: dict[str, Any], said: str
) -> None:
    model = provide()
    with pytest.raises(InputError, match=said):
        model.api._sampling(GenerateConfig(**config))
    allowed = GenerateConfig(temperature=0.5, top_p=0.9, top_k=7, max_tokens=9, seed=3, num_choices=1)
    assert model.api._sampling(allowed) == Sampling(0.5, 0.9, 9, seed=3, top_k=7)


def test_an_error_of_ours_is_the_evals(provide: Callable[..., Any]) -> None:
    log = run(plain_task(["a"]), provide(config=GenerateConfig(stop_seqs=["x"])))
    assert log.status == "error"
    assert log.error is not None
    assert "do not do stop_seqs" in log.error.message
