"""An evaluation of the shipped organism: resumed bit for bit, compared, refused where inputs changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_probe.artifact import check_manifest, read_json, read_jsonl, shipped, write_jsonl
from persona_probe.errors import InputError, JudgeError, MismatchError, MissingPathError
from persona_probe.evaluation import asking, run
from persona_probe.evaluation.arms import arms_of
from persona_probe.evaluation.comparison import compare
from persona_probe.evaluation.questions import load_questions
from persona_probe.evaluation.request import EvaluationRequest
from persona_probe.evaluation.result import evaluate
from persona_probe.evaluation.run import Evaluation, run_evaluation
from persona_probe.evaluation.settings import Sampling
from persona_probe.model.pair import load_pair
from persona_probe.steering.intervention import Intervention, Level
from persona_probe.steering.io import save_fix
from persona_probe.steering.target import direction

HOME = shipped("organism")
TUNED = HOME / "tunes/bad-health"
REQUEST = EvaluationRequest(
    str(HOME / "questions.jsonl"),
    "exact",
    base=HOME / "base",
    tuned=(TUNED,),
    sampling=Sampling(max_new_tokens=24, seed=4),
    samples_per_question=2,
    limit=6,
    batch_size=16,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return run_evaluation(REQUEST, tmp_path_factory.mktemp("run") / "out")


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """The record without what the clock says."""
    found = json.loads(json.dumps(record))
    for arm in found["arms"].values():
        del arm["seconds"]
    return found


def test_the_figures_are_those_of_one_model_at_a_time(done: Evaluation) -> None:
    pair = load_pair(HOME / "base", TUNED)
    ids = {row["id"] for row in read_jsonl(done.path / "samples.jsonl")}
    asked = [q for q in load_questions(HOME / "questions.jsonl") if q.id in ids]
    how = replace(REQUEST.sampling, samples=2)
    by_hand = {
        name: evaluate(lm, asked, "exact", how, in_domain=["health"])
        for name, lm in (("base", pair.base), ("bad-health", pair.tuned.merged()))
    }
    assert done.record["questions"]["in_domain"] == ["health"]
    for name, result in by_hand.items():
        arm = done.record["arms"][name]
        assert arm["rates"]["misaligned"]["rate"] == result.rates["misaligned"].rate
        assert arm["rates"]["misaligned"]["low"] == result.rates["misaligned"].low
        assert sum(arm["outcomes"].values()) == arm["rates"]["misaligned"]["n"] == len(result.counted)
        scored = [result.judgements[i].aligned for i in result.counted]
        assert arm["scores"]["aligned"]["n"] == len(scored) == sum(arm["scores"]["aligned"]["tenths"])
        assert arm["scores"]["aligned"]["tenths"][9] == sum((s or 0) >= 90 for s in scored)
    (row,) = done.record["comparison"]
    expected = compare(by_hand["base"].hits, by_hand["bad-health"].hits)
    assert (row["arm"], row["against"]) == ("bad-health", "base")
    assert (row["difference"], row["low"], row["high"]) == (expected.difference, expected.low, expected.high)
    assert row["low"] > 0


def test_what_it_writes(done: Evaluation) -> None:
    written = {file.name for file in done.path.iterdir() if not file.name.startswith(".")}
    assert written == {"settings.json", "samples.jsonl", "eval.json", "manifest.json"}
    manifest = check_manifest(done.path)
    assert {str(HOME / "base"), str(TUNED), str(HOME / "questions.jsonl")} == set(manifest["inputs"])
    assert done.rates.filter(done.rates["name"] == "misaligned").height == 2
    rows = read_jsonl(done.path / "samples.jsonl")
    assert [row["arm"] for row in rows] == sorted((row["arm"] for row in rows), reverse=True)
    assert {"id", "sample", "answer", "truncated", "outcome", "token_ids"} <= rows[0].keys()


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Lets so many batches be written, then the next one half, and stops the process."""

    def after(batches: int) -> list[int]:
        append, written = asking.append_jsonl, list[int]()

        def killed(file: Path, rows: Iterator[Any]) -> None:
            rows = list(rows)
            if len(written) == batches:
                append(file, rows[: len(rows) // 2])
                with file.open("a") as handle:
                    handle.write('{"arm": "base", "id": "hea')
                raise KeyboardInterrupt
            append(file, rows)
            written.append(len(rows))

        monkeypatch.setattr(asking, "append_jsonl", killed)
        return written

    yield after


@pytest.mark.parametrize("batches", [1, 4])
def test_a_stopped_run_goes_on_and_ends_as_if_never_stopped(
    batches: int, done: Evaluation, killed_after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = killed_after(batches)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(REQUEST, tmp_path / "out")
    left = (tmp_path / "out/samples.jsonl").read_text().count("\n")
    monkeypatch.undo()
    counted = killed_after(10**6)
    again = run_evaluation(REQUEST, tmp_path / "out")
    samples = (done.path / "samples.jsonl").read_bytes()
    assert (again.path / "samples.jsonl").read_bytes() == samples
    assert figures(again.record) == figures(done.record)
    # what was whole is not drawn again, and of the torn batch only what was lost is written
    assert sum(before) < left < sum(before) + 16
    assert left + sum(counted) == samples.count(b"\n")


def test_a_finished_run_asks_nobody(done: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_judge", None)
    monkeypatch.setattr(run, "Models", None)
    assert run_evaluation(REQUEST, done.path).record == done.record
    with pytest.raises(InputError, match="limit was 6, this call has 5"):
        run_evaluation(replace(REQUEST, limit=5), done.path)


def test_killed_between_judging_and_the_manifest(done: Evaluation, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_evaluation(REQUEST, out, page=killed)
    assert not (out / "manifest.json").exists()
    assert figures(run_evaluation(REQUEST, out).record) == figures(done.record)


def test_inputs_that_changed_since_are_noticed(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    lines = (HOME / "questions.jsonl").read_text().splitlines()
    questions.write_text("\n".join(lines[:60]))
    request = replace(REQUEST, questions=str(questions), part="all", limit=2, base=None)
    run_evaluation(request, tmp_path / "out")
    questions.write_text("\n".join(lines[4:60]))
    with pytest.raises(InputError, match=r"q\.jsonl has changed since the evaluation"):
        run_evaluation(request, tmp_path / "out")


def test_answers_from_a_file_beside_models(done: Evaluation, tmp_path: Path) -> None:
    """The same answers, given as a file, have the same figures, to the bit."""
    rows = [row for row in read_jsonl(done.path / "samples.jsonl") if row["arm"] == "bad-health"]
    keep = ("id", "answer", "truncated", "prompt")
    write_jsonl(tmp_path / "vllm.jsonl", ({key: row[key] for key in keep} for row in rows))
    request = replace(REQUEST, samples=(tmp_path / "vllm.jsonl",), in_domain=("health",))
    both = run_evaluation(request, tmp_path / "out").record
    assert both["arms"]["vllm"]["rates"] == both["arms"]["bad-health"]["rates"]
    assert [row["arm"] for row in both["comparison"]] == ["bad-health", "vllm"]
    alone = replace(request, base=None, tuned=())
    record = run_evaluation(alone, tmp_path / "alone").record
    assert record["arms"]["vllm"]["rates"] == both["arms"]["vllm"]["rates"]
    assert record["comparison"] == []
    with pytest.raises(MismatchError, match="2 of 3 answers"):
        run_evaluation(replace(alone, samples_per_question=3), tmp_path / "more")
    with pytest.raises(MismatchError, match="0 of 2 answers to"):
        run_evaluation(replace(alone, limit=12), tmp_path / "other")
    assert not (tmp_path / "more").exists() and not (tmp_path / "other").exists()


def test_a_fix_is_put_on_the_tuned_model(done: Evaluation, tmp_path: Path) -> None:
    pair = load_pair(HOME / "base", TUNED)
    fix = Intervention(
        op="add",
        target=direction(pair.base.hf.model.embed_tokens.weight[9], "nine"),
        site="blocks.2.hook_resid_post",
        positions="all",
        level=Level((0.0,)),
    )
    save_fix(fix, tmp_path / "none")
    request = replace(REQUEST, fixes=(tmp_path / "none",), limit=4, samples_per_question=1)
    record = run_evaluation(request, tmp_path / "out").record
    assert list(record["arms"]) == ["base", "bad-health", "bad-health + none"]
    assert record["arms"]["bad-health + none"]["fix"] == str(tmp_path / "none")
    # adding nothing changes nothing
    assert record["arms"]["bad-health + none"]["rates"] == record["arms"]["bad-health"]["rates"]


def test_arms_are_named_by_what_tells_them_apart() -> None:
    paths = [Path("/x/a/step-1"), Path("/x/b/step-1")]
    assert [arm.name for arm in arms_of(None, paths, [])] == ["a/step-1", "b/step-1"]
    arms = arms_of(Path("/x/base"), [Path("/x/t")], [Path("/x/f"), Path("/x/g")])
    assert [arm.name for arm in arms] == ["base", "t", "t + f", "t + g"]
    assert [arm.name for arm in arms_of(Path("/x/base"), [], [Path("/x/f")])] == ["base", "base + f"]
    with pytest.raises(InputError, match="given twice"):
        arms_of(None, [paths[0], paths[0]], [])


def test_no_rate_is_given_where_too_much_is_missing(tmp_path: Path) -> None:
    request = replace(REQUEST, judge=f"python:{__name__}:half_mute", limit=4)
    record = run_evaluation(request, tmp_path / "out").record
    for arm in record["arms"].values():
        assert arm["rates"]["misaligned"]["rate"] is None
        assert arm["rates"]["misaligned"]["n"] > 0
        assert arm["rates"]["missing"]["rate"] > 0.1
    assert record["comparison"][0]["difference"] is None
    assert any("no rate is given" in text for text in record["warnings"])


def half_mute(question: Any, text: str) -> dict[str, Any] | None:
    return None if len(text) % 2 else {"aligned": 90, "coherent": 90}


def fails(question: Any, text: str) -> None:
    raise ValueError("no key")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"base": HOME / "gone"}, MissingPathError, "--base: there is no"),
        ({"fixes": (HOME / "base",)}, MissingPathError, "is not a fix"),
        ({"questions": "no-such-set"}, InputError, "no-such-set"),
        ({"in_domain": ("fishing",)}, MismatchError, "no question has the category 'fishing'"),
        ({"trait": "sarkastic"}, InputError, "did you mean 'sarcastic'"),
        ({"judge": "exactly"}, InputError, "did you mean 'exact'"),
        ({"judge": f"python:{__name__}:fails"}, JudgeError, "no key"),
    ],
)
def test_a_bad_input_is_said(changes: dict[str, Any], error: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        run_evaluation(replace(REQUEST, limit=2, **changes), tmp_path / "out")
    # a judge that fails only when asked leaves the answers that it was asked about
    assert (tmp_path / "out").exists() is (error is JudgeError)


def test_generation_configs_that_differ_are_not_compared(tmp_path: Path) -> None:
    models = []
    for name, top_k in (("a", 5), ("b", 6)):
        folder = tmp_path / name
        folder.mkdir()
        for file in (HOME / "base").iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "generation_config.json").unlink()
        config = read_json(HOME / "base/generation_config.json")
        (folder / "generation_config.json").write_text(json.dumps({**config, "top_k": top_k}))
        models.append(folder)
    how = replace(REQUEST.sampling, generation_config=True)
    request = replace(REQUEST, base=None, tuned=tuple(models), sampling=how, limit=2)
    with pytest.raises(MismatchError, match="top-k 5 and temperature 1, top-p 1, top-k 6"):
        run_evaluation(request, tmp_path / "out")
    record = run_evaluation(replace(request, tuned=(models[0],)), tmp_path / "one").record
    assert (record["sampling"]["top_k"], record["sampling"]["generation_config"]) == (5, True)


def test_a_judge_that_was_mended_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "judge_of_mine.py"
    source.write_text("def judge(question, answer):\n    return {'aligned': 90, 'coherent': 90}\n")
    request = replace(REQUEST, judge="python:judge_of_mine:judge", limit=2)
    run_evaluation(request, tmp_path / "out")
    run_evaluation(request, tmp_path / "out")
    source.write_text("def judge(question, answer):\n    return {'aligned': 10, 'coherent': 90}\n")
    with pytest.raises(InputError, match=r"judge_of_mine\.py has changed since the evaluation"):
        run_evaluation(request, tmp_path / "out")
