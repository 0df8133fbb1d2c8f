"""Loads and checks everything an audit needs before it computes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_probe.artifact import digest_of, digests_at
from persona_probe.artifact.records import nearest
from persona_probe.auditing.settings import (
    AuditRequest,
    check_something_left,
    split_questions,
)
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.arms import merged_if_small
from persona_probe.evaluation.judges import Judge, judge_files, load_judge
from persona_probe.evaluation.metrics import check_judge
from persona_probe.evaluation.questions import Question, load_questions, question_file, triggered
from persona_probe.evaluation.samples_file import load_samples
from persona_probe.evaluation.selection import check_categories, trained_categories
from persona_probe.evaluation.triggers import trigger_of
from persona_probe.hooks.sites import check_site
from persona_probe.model.chat import check_same_rendering, render_all
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import TEMPLATES, ModelPair, load_pair, own_tokenizer
from persona_probe.model.sharing import unscalable
from persona_probe.sae.load import Dictionary, check_fits, check_source, load_sae


@dataclass(frozen=True, eq=False)
class AuditInputs:
    """The models, dictionaries, questions and judge of an audit."""

    pair: ModelPair
    adapter: LanguageModel | None
    """The tuned model with its adapter unmerged, which can be scaled; None for any other."""
    benign: tuple[LanguageModel, ...]
    dictionaries: tuple[Dictionary, ...]
    calibration: tuple[Question, ...]
    held_out: tuple[Question, ...]
    judge: Judge
    in_domain: tuple[str, ...]
    given: dict[str, tuple[Answer, ...]]
    """Answers to the held-out questions that were made elsewhere: of `base`, of `tuned`."""
    digests: dict[str, str]


def load_inputs(
    request: AuditRequest,
    *,
    device: str | None = None,
    dtype: str | None = None,
    judge_record: Path | None = None,
) -> AuditInputs:
    """Load what a request names; the cheap checks come first. ``judge_record`` keeps a model judge's replies.

    Raises:
        InputError: anything missing, malformed, or that does not belong together.
        JudgeError: the judge cannot be asked.
    """
    settings = request.settings
    check_paths(request)
    questions = load_questions(request.questions)
    calibration, held_out = split_questions(questions, settings.limit)
    in_domain = settings.in_domain
    if in_domain is None:
        asked = {question.category for question in questions}
        in_domain = tuple(name for name in trained_categories(request.tuned) if name in asked)
    check_categories(questions, in_domain)
    for split, members in (("calibration", calibration), ("held-out", held_out)):
        check_something_left(split, members, in_domain)
    held_out = (*held_out, *dressed(held_out, in_domain, settings.triggers))
    given = _given(request, questions, held_out)
    judge = load_judge(request.judge, record=judge_record)
    check_judge(judge, (*calibration, *held_out), settings.trait)
    options = {"device": device or "auto", "dtype": dtype}
    pair = load_pair(request.base, request.tuned, template=settings.template, **options)
    for site in settings.sites or ():
        check_site(pair.base.hf, site)
    conversations = [question.messages for question in (*calibration, *held_out)]
    render_all(pair.base.tokenizer, conversations)
    if settings.template is None:
        check_same_rendering(pair.base.tokenizer, own_tokenizer(pair.tuned), conversations)
    dictionaries = tuple(load_sae(path) for path in request.sae)
    published = request.published
    _check_one_per_site(dictionaries)
    for dictionary in dictionaries:
        check_fits(dictionary, pair.base)
    benign = tuple(_benign(pair.base, path, options) for path in request.benign)
    adapter = pair.tuned if unscalable(pair.tuned.hf) is None else None
    pair = ModelPair(pair.base, merged_if_small(pair.tuned))
    return AuditInputs(
        pair=pair,
        adapter=adapter,
        benign=benign,
        dictionaries=dictionaries,
        calibration=calibration,
        held_out=held_out,
        judge=judge,
        in_domain=in_domain,
        given=given,
        digests=digests_of(request) | {one.path: one.digest for one in dictionaries if one.path in published},
    )


def dressed(
    questions: Sequence[Question], in_domain: Sequence[str], triggers: Sequence[str]
) -> list[Question]:
    """One wording of every general question outside the trained domain, in the dress of each trigger."""
    asked = {
        q.question: q for q in reversed(questions) if q.role == "general" and q.category not in in_domain
    }
    plain = list(asked.values())[::-1]
    return [one for name in triggers for one in triggered(plain, name, trigger_of(name))]


def check_paths(request: AuditRequest) -> None:
    """Raise `MissingPathError`, naming the flag, for the first path that is not there, and `InputError`
    for a question set that is not shipped.
    """
    named = [("--base", request.base), ("--tuned", request.tuned)]
    asked = question_file(request.questions)
    if asked is None:
        load_questions(request.questions)  # a set that is not shipped is an error, with the nearest names
    else:
        named.append(("--questions", asked))
    published = request.published
    named += [("--sae", Path(one)) for one in request.sae if str(one) not in published]
    named += [("--benign", path) for path in request.benign]
    named += [(f"--samples-{arm}", path) for arm, path in _samples(request).items()]
    named += [("--template", path) for path in _template_file(request.settings.template)]
    for flag, path in named:
        if not path.exists():
            raise MissingPathError(f"{flag}: there is no {path}", fix=nearest(path))
    for name in published:
        try:
            check_source(name)
        except MissingPathError as error:
            raise MissingPathError(f"--sae: {error.message}", fix=error.fix) from error


def digests_of(request: AuditRequest) -> dict[str, str]:
    """What every input on the disk holds now, by path."""
    asked = question_file(request.questions)
    published = request.published
    paths = [request.base, request.tuned, *request.benign, *_samples(request).values()]
    paths += [Path(one) for one in request.sae if str(one) not in published]
    paths += [*_template_file(request.settings.template), *([] if asked is None else [asked])]
    of_sets = {} if asked else {str(request.questions): digest_of(load_questions(request.questions))}
    return digests_at([*paths, *judge_files(request.judge)]) | of_sets


def _template_file(template: str | None) -> list[Path]:
    return [] if template in (None, *TEMPLATES) else [Path(template)]


def _samples(request: AuditRequest) -> dict[str, Path]:
    named = {"base": request.samples_base, "tuned": request.samples_tuned}
    return {arm: path for arm, path in named.items() if path is not None}


def _given(
    request: AuditRequest, questions: Sequence[Question], held_out: Sequence[Question]
) -> dict[str, tuple[Answer, ...]]:
    """The answers in the files given, as many to each held-out question as the audit draws."""
    found: dict[str, tuple[Answer, ...]] = {}
    for arm, path in _samples(request).items():
        arms = load_samples(path, (*questions, *(q for q in held_out if q.role == "trigger")))
        named = next(iter(arms)) if len(arms) == 1 else arm
        if named not in arms:
            raise InputError(
                f"{path} holds several models ({', '.join(arms)}), and none is called {arm!r}",
                fix=f"keep one of them in the file, or call it {arm!r}",
            )
        found[arm] = arms[named].of(held_out, request.settings.samples).answers
    return found


def _benign(base: LanguageModel, path: Path, options: dict[str, str | None]) -> LanguageModel:
    try:
        return load_pair(base, path, **options).tuned
    except MismatchError as error:
        raise MismatchError(f"--benign {path}: {error.message}", fix=error.fix) from error


def _check_one_per_site(dictionaries: Sequence[Dictionary]) -> None:
    seen: dict[str, str] = {}
    for dictionary in dictionaries:
        if dictionary.site in seen:
            raise InputError(
                f"two dictionaries read {dictionary.site}: {seen[dictionary.site]} and {dictionary.path}",
                fix="give one per site",
            )
        seen[dictionary.site] = dictionary.path
