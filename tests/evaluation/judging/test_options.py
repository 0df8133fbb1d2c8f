"""What a spec may say, when requests go, and what they may cost."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from persona_probe.errors import InputError
from persona_probe.evaluation.judges import load_judge, spec_identity
from persona_probe.evaluation.judging.options import EndpointOptions, read_options
from persona_probe.evaluation.judging.pace import (
    LONGEST_PAUSE,
    Pace,
    StoppedError,
    backoff,
    pause,
    retry_after,
)
from persona_probe.evaluation.judging.reply import Reply
from persona_probe.evaluation.judging.spending import Budget, BudgetSpentError, Price, Spending


def test_options_are_read_by_name() -> None:
    read = read_options("rate=90,price=2.5/10,budget=5usd,tries=2", EndpointOptions, "s")
    assert read == EndpointOptions(rate=90, price=Price(2.5, 10), budget=Budget(dollars=5), tries=2)
    assert read_options("", EndpointOptions, "s") == EndpointOptions()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("openai:m#rat=3", "did you mean 'rate'?"),
        ("openai:m#batch=3", "its options are rate, concurrency"),
        ("local:.#rate=3", "its options are batch, device, dtype, budget"),
        ("openai:m#rate=0", "must be more than 0"),
        ("openai:m#tries=0", "must be more than 0"),
        ("openai:m#rate=fast", "not a number: 'fast'"),
        ("openai:m#timeout=nan", "must not be 'nan'"),
        ("openai:m#backoff=-1", "must not be '-1'"),
        ("openai:m#price=3", "such as 2.5/10"),
        ("openai:m#budget=lots", "a number of calls (2000) or dollars (5usd)"),
        ("openai:m#budget=5usd", "#price=2.5/10"),
        ("openai:m@localhost:8000/v1", "did you mean 'openai:m@http://localhost:8000/v1'?"),
        ("openai:m@http://", "such as http://localhost:8000/v1"),
        ("openai:m@http://h:port/v1", "such as http://localhost:8000/v1"),
        ("openai:m@http://[h/v1", "such as http://localhost:8000/v1"),
        ("openai:@http://h/v1", "names no model"),
        ("openai:m@http://me:secret@h/v1", "PERSONA_PROBE_JUDGE_KEY"),
        ("opnai:m@http://h/v1", "did you mean 'openai:m@http://h/v1'?"),
        ("local:/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("openai:", "it must be 'exact', 'python:module:function', 'openai:MODEL@URL' or 'local:DIR'"),
    ],
)
def test_a_bad_spec_says_what_would_work(spec: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        load_judge(spec.replace("local:.", "local:data/organism/base"))
    assert said in str(error.value)


def test_what_changes_no_judgement_is_not_part_of_the_name() -> None:
    assert spec_identity("openai:m@http://h/v1#rate=9,budget=3") == "openai:m@http://h/v1"
    assert spec_identity("local:d#batch=2,dtype=bfloat16") == "local:d#dtype=bfloat16"
    assert spec_identity("exact") == "exact"


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2000", Budget(calls=2000)),
        ("20 calls", Budget(calls=20)),
        ("$5", Budget(dollars=5)),
        ("0.5usd", Budget(dollars=0.5)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "-3", "2.5", "$3calls", "3eur", "usd"])
def test_no_budget(text: str) -> None:
    with pytest.raises(InputError):
        Budget.parse(text)


def test_spending_reserves_before_and_settles_after() -> None:
    spending = Spending(Budget(dollars=10), Price(1e6, 2e6))  # a prompt's token 1 dollar, a reply's 2
    spending.reserve("four")
    assert (spending.calls, spending.dollars) == (1, 3)
    spending.settle("four", Reply(prompt_tokens=5, reply_tokens=1))
    assert spending.dollars == 7
    spending.reserve("four")
    with pytest.raises(BudgetSpentError):
        spending.reserve("four")
    spending.settle("four", None)
    assert (spending.calls, spending.dollars) == (1, 7)


def test_pauses_double_and_are_spread() -> None:
    for failures in range(1, 12):
        middle = min(LONGEST_PAUSE, 2.0 ** (failures - 1))
        drawn = [backoff(1.0, failures) for _ in range(20)]
        assert 0.5 * middle <= min(drawn) < max(drawn) <= 1.5 * middle


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after("7") == 7
    assert retry_after("-1") == 0
    then = datetime.now(UTC) + timedelta(seconds=30)
    assert retry_after(format_datetime(then)) == pytest.approx(30, abs=2)
    for nothing in (None, "soon", "inf", "nan"):
        assert retry_after(nothing) is None


def test_waiting_ends_when_the_work_is_called_off() -> None:
    stop = threading.Event()
    pace = Pace(None)
    pace.hold(60)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(StoppedError):
        pace.wait(stop)
    with pytest.raises(StoppedError):
        pause(60, stop)
