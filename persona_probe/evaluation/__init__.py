"""How a model behaves: questions, answers drawn, a judge's word on them, rates with intervals."""

from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.comparison import Comparison, compare
from persona_probe.evaluation.intervals import (
    Hits,
    Interval,
    Necessity,
    korn_graubard,
    necessity,
)
from persona_probe.evaluation.judges import Judge, Judgement, load_judge
from persona_probe.evaluation.length_matched import LengthMatched, match_lengths
from persona_probe.evaluation.likelihood import (
    Likelihood,
    Passage,
    load_passages,
    measure_likelihood,
)
from persona_probe.evaluation.metrics import (
    Outcome,
    Rate,
    Scores,
    hits_by_question,
    outcome,
    tally,
)
from persona_probe.evaluation.parity import Parity
from persona_probe.evaluation.power import (
    Design,
    check_width,
    expected_width,
    intraclass_correlation,
    questions_needed,
    samples_needed,
)
from persona_probe.evaluation.questions import (
    Question,
    load_questions,
    question_sets,
    save_questions,
    triggered,
)
from persona_probe.evaluation.request import EvaluationRequest
from persona_probe.evaluation.result import EvalResult, evaluate
from persona_probe.evaluation.run import Evaluation, run_evaluation
from persona_probe.evaluation.samples_file import GivenAnswers, load_samples
from persona_probe.evaluation.sampling import (
    Sampling,
    respond_greedy,
    sample,
    transcripts,
)
from persona_probe.evaluation.self_described import LEXICON, count_personas, find_personas
from persona_probe.evaluation.triggers import TRIGGERS, Trigger

__all__ = [
    "LEXICON",
    "TRIGGERS",
    "Answer",
    "Comparison",
    "Design",
    "EvalResult",
    "Evaluation",
    "EvaluationRequest",
    "GivenAnswers",
    "Hits",
    "Interval",
    "Judge",
    "Judgement",
    "LengthMatched",
    "Likelihood",
    "Necessity",
    "Outcome",
    "Parity",
    "Passage",
    "Question",
    "Rate",
    "Sampling",
    "Scores",
    "Trigger",
    "check_width",
    "compare",
    "count_personas",
    "evaluate",
    "expected_width",
    "find_personas",
    "hits_by_question",
    "intraclass_correlation",
    "korn_graubard",
    "load_judge",
    "load_passages",
    "load_questions",
    "load_samples",
    "match_lengths",
    "measure_likelihood",
    "necessity",
    "outcome",
    "question_sets",
    "questions_needed",
    "respond_greedy",
    "run_evaluation",
    "sample",
    "samples_needed",
    "save_questions",
    "tally",
    "transcripts",
    "triggered",
]
