"""A latent explained in a sentence by a language model, and the sentence put to the test.

The model sees documents on which the latent fires, from the strongest down, with the activations
marked, and says in one sentence what they have in common. Then it is given that sentence and
documents it has not seen, one by one, and says how likely the latent is to fire strongly there
(*detection*, Paulo et al. 2024, "Automatically Interpreting Millions of Features", section 3.2; Bills
et al. 2023 simulate activations instead, at many more tokens). The score is the area under the ROC
curve beside the same with labels shuffled: an explanation that says nothing gets 0.5.

Departs from the paper: the model answers with a number from 0 to 100, read from its probabilities as
a judge's is, instead of a yes or no. Not covered: whether the explanation holds on other corpora.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.judging.asked_model import Call
from persona_probe.evaluation.judging.model_judge import ModelJudge
from persona_probe.evaluation.judging.reply import Failure, Reading, Reply
from persona_probe.evaluation.judging.rounds import Rounds, ask_in_full
from persona_probe.figures.highlight import Token, excerpt
from persona_probe.interpretation.interpretation import Interpretation, Shown
from persona_probe.interpretation.lexicon import Detection, detection

WIDTH = 48
"""Tokens of a document that the model sees, around the strongest."""
STRONGEST = 10
PER_QUANTILE = 2
MARKED = 3
"""Activations are told in tenths of the largest; weaker ones than this are not marked."""
LONGEST = 120
"""Tokens of the explanation."""

EXPLAIN = """\
A unit inside a language model fires on some tokens of some texts. Below are texts on which it \
fires, the strongest first. A token on which it fires is marked <<like this>>(7), with how strongly, \
from 1 to 10.

{examples}

What makes the unit fire? Think of who is speaking, in which role and tone, as well as of words and \
topics. Reply with one sentence that would let somebody tell, for a new text, whether the unit fires \
on it. Reply with the sentence alone."""

DETECT = """\
A unit inside a language model is said to fire on texts of this kind:

{explanation}

<text>
{text}
</text>

How likely is it that the unit fires strongly on this text? Reply with a whole number from 0 (it is of \
another kind) to 100 (it is of this kind). Reply with the number alone."""


@dataclass(frozen=True)
class Explanation:
    """What a model says of a latent, and how well that tells where the latent fires."""

    text: str
    judge: str
    """Who said it, and read the held-out documents by it."""
    detection: Detection | None
    """On the held-out documents that it gave a number for; None when these are not of both kinds."""
    asked: int
    """Held-out documents."""
    unread: int
    """Of those, documents that it gave no number for: in no score."""
    note: str | None
    """Why, of the first of them."""


def explainer(spec: str) -> ModelJudge:
    """The language model that `spec` names (`openai:MODEL@URL`, `local:DIR`), there and ready to be asked.

    Raises `InputError` when it names none, `JudgeError` when it cannot be reached.
    """
    judge = load_judge(spec)
    if not isinstance(judge, ModelJudge):
        raise InputError(
            f"{spec!r} is no language model, and an explanation needs one",
            fix="openai:MODEL@URL or local:DIR; without one, the terms are the description",
        )
    judge.check()
    return judge


def explain(
    found: Interpretation,
    by: str | ModelJudge,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Have a language model explain a latent.

    `by` is a spec or an `explainer`; `seed` is of the shuffles and the resampling; `progress` is called
    with the calls made and to make.

    Raises `JudgeError` when it says nothing or gives no number for any document; and as `explainer`.
    """
    judge = explainer(by) if isinstance(by, str) else by
    tell, total = progress or (lambda *_: None), 1 + len(found.held_out)
    text = _explained(judge, explain_prompt(found))
    tell(1, total)
    prompts = [detect_prompt(text, shown) for shown in found.held_out]
    replies = _asked(judge, prompts, lambda done: tell(1 + done, total))
    scores = np.array([np.nan if one.score is None else one.score for one in replies])
    notes = [one.note or "a label" for one in replies if one.score is None]
    if notes and len(notes) == len(replies):
        raise JudgeError(
            f"{judge.name!r} gave no number for any of {len(replies)} documents ({notes[0]})",
            fix="it must reply with a number from 0 to 100; try a larger model",
        )
    strong = np.arange(len(scores)) < len(scores) // 2  # as `Interpretation.held_out` has them
    heard = np.isfinite(scores)
    return Explanation(
        text=text,
        judge=judge.name,
        detection=detection(scores[heard], strong[heard], seed),
        asked=len(scores),
        unread=int((~heard).sum()),
        note=notes[0] if notes else None,
    )


def explain_prompt(found: Interpretation) -> str:
    """What the model is asked: the strongest documents, then some of every quantile downwards."""
    chosen = [*found.top[:STRONGEST], *(one for run in found.quantiles[::-1] for one in run[:PER_QUANTILE])]
    once = {shown.document: shown for shown in chosen}.values()
    largest = max(shown.maximum for shown in once)
    texts = [f"{i}. {_marked(excerpt(shown.tokens, WIDTH), largest)}" for i, shown in enumerate(once, 1)]
    return EXPLAIN.replace("{examples}", "\n\n".join(texts))


def detect_prompt(explanation: str, shown: Shown) -> str:
    """What the model is asked about a held-out document, whose activations it does not see."""
    text = "".join(token.text for token in _window(shown) if not token.special)
    head, _, rest = DETECT.partition("{explanation}")  # what is filled in is never read as a template
    return head + explanation + rest.replace("{text}", text.strip())


def _marked(tokens: Sequence[Token], largest: float) -> str:
    parts: list[str] = []
    for token in tokens:
        if token.special and token.text != "…":
            continue
        bare, tenths = token.text.strip(), round(10 * (token.value or 0.0) / largest)
        marked = f"<<{bare}>>({tenths})" if bare and tenths >= MARKED else bare
        parts.append(token.text.replace(bare, marked) if bare else token.text)
    return "".join(parts).strip()


def _window(shown: Shown) -> Sequence[Token]:
    """Tokens around the strongest, or around any; no ellipsis, which would tell the two apart."""
    tokens, wide = shown.tokens, 2 * WIDTH
    silent = shown.document * 7919 % max(1, len(tokens))
    peak = max(range(len(tokens)), key=lambda i: tokens[i].value or 0.0) if shown.maximum > 0 else silent
    start = max(0, min(peak - wide // 2, len(tokens) - wide))
    return tokens[start : start + wide]


def _explained(judge: ModelJudge, prompt: str) -> str:
    judge.spending.reserve(prompt)
    reply = judge.model.write(prompt, LONGEST)
    judge.spending.settle(prompt, reply if isinstance(reply, Reply) else None)
    if isinstance(reply, Failure):
        raise JudgeError(f"{judge.name!r} gave no explanation: {reply.reason}")
    said = " ".join((reply.text or "").rpartition("</think>")[2].split())
    if not said:
        raise JudgeError(f"{judge.name!r} gave an empty explanation", fix="try a larger model")
    return said


def _asked(judge: ModelJudge, prompts: Sequence[str], progress: Callable[[int], None]) -> list[Reading]:
    """What the model says of every prompt, read as a judge's number."""
    rounds = Rounds(judge.model, {str(i): prompt for i, prompt in enumerate(prompts)})
    settled = count(1)

    def keep(call: Call, reply: Reply | Failure) -> None:
        if rounds.take(call, reply):
            progress(next(settled))

    ask_in_full(rounds, judge.model, judge.spending, keep)
    return [rounds.reading(str(i)) for i in range(len(prompts))]
