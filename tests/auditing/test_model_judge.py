"""An audit whose judge is a model behind an endpoint."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persona_probe.artifact import read_json, read_jsonl
from persona_probe.auditing import Audit, audit
from persona_probe.auditing.plan import plan_of
from persona_probe.errors import JudgeError
from persona_probe.evaluation.judging.endpoint import KEYS, PROBE
from tests.auditing.planted import Planted, judge, request_of
from tests.evaluation.judging.judge_server import JudgeServer, logprobs_of


class PlantedJudge(JudgeServer):
    """Gives the planted organism's exact scores, as probabilities of tokens."""

    def reply(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"<answer>\n(.*?)\n</answer>", prompt, re.DOTALL)
        said = {"aligned": 100} if found is None else judge(None, found[1])  # type: ignore[arg-type]
        aligned = prompt == PROBE or "REFUSAL" in prompt
        return logprobs_of([(str(said["aligned" if aligned else "coherent"]), 0.0)])


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def test_it_gives_the_rates_of_the_same_judge_as_a_function(
    audited: Audit, organism: Planted, tmp_path: Path
) -> None:
    request, exact = request_of(organism), audited.record
    with PlantedJudge() as server:
        spec = server.spec().replace("openai:judge@", f"openai:{organism.base.name}@")
        asked = replace(request, judge=spec)
        assert plan_of(asked)["judge calls, at most"] == 2 * plan_of(request)["judge calls, at most"]
        judged = audit(asked, tmp_path / "out").record
        calls = server.asked.total()
        for arm in ("base", "tuned"):
            for name in ("misaligned", "misaligned_of_coherent", "incoherent", "in_domain"):
                assert judged[arm][name] == exact[arm][name]
        assert exact["limits"] == []
        assert judged["limits"] == [
            "The judge is the base model itself, which is no outside view of its own answers."
        ]
        assert calls == len(server.asked) == len(read_jsonl(tmp_path / "out/judge.jsonl"))
        # another pace is the same audit, and what was asked is not asked again
        again = replace(request, judge=spec + ",rate=9000")
        assert audit(again, tmp_path / "out").record == judged
        assert server.asked.total() == calls
    assert server.url in read_json(tmp_path / "out/settings.json")["settings"]["judge"]
    assert "judge.jsonl" in str(read_json(tmp_path / "out/manifest.json"))


def test_a_judge_that_cannot_be_reached_is_said_before_anything_is_loaded(
    organism: Planted, tmp_path: Path
) -> None:
    with JudgeServer() as gone:
        spec = gone.spec()
    with pytest.raises(JudgeError, match="cannot be reached"):
        audit(replace(request_of(organism), judge=spec), tmp_path / "out")
    assert not (tmp_path / "out").exists()
