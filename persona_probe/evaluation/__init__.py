"""How a model behaves: questions, answers drawn, a judge's word on them, rates with intervals."""

from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.intervals import (
    Hits,
    Interval,
    Necessity,
    korn_graubard,
    necessity,
)
from persona_probe.evaluation.judges import Judge, Judgement, load_judge
from persona_probe.evaluation.metrics import (
    Outcome,
    Rate,
    hits_by_question,
    outcome,
    tally,
)
from persona_probe.evaluation.questions import Question, load_questions, save_questions
from persona_probe.evaluation.result import EvalResult, evaluate
from persona_probe.evaluation.sampling import (
    Sampling,
    respond_greedy,
    sample,
    transcripts,
)

__all__ = [
    "Answer",
    "EvalResult",
    "Hits",
    "Interval",
    "Judge",
    "Judgement",
    "Necessity",
    "Outcome",
    "Question",
    "Rate",
    "Sampling",
    "evaluate",
    "hits_by_question",
    "korn_graubard",
    "load_judge",
    "load_questions",
    "necessity",
    "outcome",
    "respond_greedy",
    "sample",
    "save_questions",
    "tally",
    "transcripts",
]
