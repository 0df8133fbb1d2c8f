"""What an evaluation is asked to do, and everything about it that can be checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig

from persona_probe.artifact import digest_of, digests_at
from persona_probe.artifact.records import nearest
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.evaluation.arms import SampledArm, arms_of, checkpoint_of
from persona_probe.evaluation.judges import judge_files, spec_identity
from persona_probe.evaluation.longest import context_of, longest_answer
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.samples_file import GivenAnswers, load_samples
from persona_probe.evaluation.sampling import prompt_of
from persona_probe.evaluation.selection import check_categories, spread, trained_categories
from persona_probe.evaluation.settings import Sampling, applied
from persona_probe.model.loading import read_tokenizer

Part = Literal["held-out", "calibration", "all"]


@dataclass(frozen=True)
class EvaluationRequest:
    """Paths, specs and settings of one evaluation. Raises `InputError` for one that cannot be."""

    questions: str
    """A file, or the name of a shipped set."""
    judge: str
    base: Path | None = None
    tuned: tuple[Path, ...] = ()
    fixes: tuple[Path, ...] = ()
    """Folders of interventions: each is put on every tuned model, or on the base if there is none."""
    samples: tuple[Path, ...] = ()
    """Files of answers made elsewhere (see `samples_file`)."""
    sampling: Sampling = field(default_factory=Sampling)
    samples_per_question: int | None = None
    """None: what the questions say themselves, else 1; of a file, all that it holds."""
    system: str | None = None
    """Before the system prompt of every question."""
    part: Part = "held-out"
    """Of questions that have a split; those without one are always asked."""
    limit: int | None = None
    """Only so many questions, spread over the categories."""
    trait: str = "misaligned"
    in_domain: tuple[str, ...] | None = None
    """Categories counted apart; None: those that the tuned models say they were trained on."""
    batch_size: int = 256
    width: float | None = None
    """The widest that the interval of a rate should be. Where too little is asked for that, nothing is
    asked at all ...
    """
    accept_wider: bool = False
    """... but for this: then a warning says so."""

    def __post_init__(self) -> None:
        if not (self.base or self.tuned or self.samples):
            raise InputError("there is nothing to evaluate", fix="give --base, --tuned or --samples")
        if self.fixes and not (self.base or self.tuned):
            raise InputError("--with needs a model to put the fix on", fix="give --base or --tuned too")
        for name in ("samples_per_question", "limit", "batch_size"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {given}")
        if self.width is not None and not 0 < self.width < 1:
            raise InputError(f"--width must lie between 0 and 1, not {self.width}", fix="0.1 is ten points")
        if self.accept_wider and self.width is None:
            raise InputError("--accept-wider says nothing without --width")

    @property
    def settings(self) -> dict[str, Any]:
        """All of it as one table, for `RunFolder.open`."""
        flat = asdict(self)
        sampling = flat.pop("sampling")
        sampling.pop("samples")  # samples_per_question says it
        del flat["width"], flat["accept_wider"]  # they change no figure
        # how fast a judge is asked changes no figure
        return {**flat, **sampling, "judge": spec_identity(self.judge)}

    @cached_property
    def arms(self) -> tuple[SampledArm, ...]:
        """The models to be asked, in order."""
        return arms_of(self.base, self.tuned, self.fixes)

    @cached_property
    def context(self) -> int | None:
        """The fewest positions that one of the models was made for; None where no configuration says."""
        return context_of(self._checkpoints)

    @property
    def _checkpoints(self) -> set[Path]:
        return {Path(checkpoint_of(arm.model, self.base).path) for arm in self.arms}

    def of_usual_length(self) -> EvaluationRequest:
        """The same, with answers as long as they are where nobody says (see `longest_answer`)."""
        return replace(
            self, sampling=replace(self.sampling, max_new_tokens=longest_answer(self._checkpoints))
        )

    def check_paths(self) -> None:
        """Raise `MissingPathError`, naming the flag, for the first path that is not there."""
        named = [("--tuned", path) for path in self.tuned]
        named += [("--with", path) for path in self.fixes]
        named += [("--samples", path) for path in self.samples]
        if self.base is not None:
            named.insert(0, ("--base", self.base))
        for flag, path in named:
            if not path.exists():
                raise MissingPathError(f"{flag}: there is no {path}", fix=nearest(path))

    def asked(self) -> Asked:
        """The questions and the answers that are given. Raises what reading them raises, and
        `InputError` when no question is left.
        """
        every = load_questions(self.questions)
        kept = [q for q in every if self.part == "all" or q.split in (None, self.part)]
        if not kept:
            raise InputError(
                f"none of the {len(every)} questions is of the {self.part} split", fix="--part all asks all"
            )
        chosen = tuple(kept) if self.limit is None else spread(kept, self.limit)
        given: dict[str, GivenAnswers] = {}
        for path in self.samples:
            for name, answers in load_samples(path, every).items():
                if name in given or name in {arm.name for arm in self.arms}:
                    raise InputError(
                        f"two models are called {name!r}, one of them in {path}",
                        fix="name it in the file, with 'arm' in every line",
                    )
                given[name] = answers.of(chosen, self.samples_per_question)
        return Asked(chosen, given, self._in_domain(every), self._resolved())

    def check_prompts(self, questions: tuple[Question, ...]) -> frozenset[Path]:
        """Raise `InputError` for the first prompt that a model's template cannot write, and for answers
        longer than a model reads.

        Returns the models whose template has no system role, and which read a system prompt at the
        head of the first user message.
        """
        folded: set[Path] = set()
        for model in dict.fromkeys(arm.model for arm in self.arms):
            tokenizer = read_tokenizer(checkpoint_of(model, self.base))
            for question in questions:
                try:
                    if prompt_of(tokenizer, question, self.system, self.sampling).system_folded:
                        folded.add(model)
                except InputError as error:
                    raise InputError(f"{model}, {question.id!r}: {error.message}", fix=error.fix) from error
        if self.context is not None and self.sampling.max_new_tokens > self.context:
            raise InputError(
                f"--max-new-tokens {self.sampling.max_new_tokens}: the models read {self.context} tokens, "
                "prompt and answer together",
                fix="give fewer, or leave it out",
            )
        return frozenset(folded)

    def folded(self, model: Path, questions: tuple[Question, ...]) -> int:
        """How many prompts have their system message in the first user message, because the model's
        template has no system role.
        """
        tokenizer = read_tokenizer(checkpoint_of(model, self.base))
        written = (prompt_of(tokenizer, question, self.system, self.sampling) for question in questions)
        return sum(prompt.system_folded for prompt in written)

    def digests(self, questions: tuple[Question, ...]) -> dict[str, str]:
        """What every input holds now, by path."""
        paths = [*(arm.model for arm in self.arms), *self.fixes, *self.samples, *judge_files(self.judge)]
        if self.base is not None:
            paths.append(self.base)
        return {self.questions: digest_of(questions), **digests_at(paths)}

    def _in_domain(self, questions: tuple[Question, ...]) -> tuple[str, ...]:
        if self.in_domain is None:
            known = {question.category for question in questions}
            trained = (name for path in self.tuned for name in trained_categories(path))
            return tuple(name for name in dict.fromkeys(trained) if name in known)
        check_categories(questions, self.in_domain)
        return self.in_domain

    def _resolved(self) -> Sampling:
        """With the generation configs read in, which must say the same for all models."""
        found: dict[str, Sampling] = {}
        for arm in self.arms if self.sampling.generation_config else ():
            folder = Path(checkpoint_of(arm.model, self.base).path)
            there = (folder / "generation_config.json").is_file()
            config = GenerationConfig.from_pretrained(str(folder)) if there else GenerationConfig()
            found[arm.name] = applied(self.sampling, config, arm.name)
        for name, one in found.items():
            first = next(iter(found))
            if one != found[first]:
                raise MismatchError(
                    f"the generation configs of {first} and {name} differ ({_shown(found[first])} and "
                    f"{_shown(one)}): their answers could not be compared",
                    fix="give the settings yourself, without --generation-config",
                )
        return next(iter(found.values()), self.sampling)


@dataclass(frozen=True)
class Asked:
    """What an evaluation's files hold."""

    questions: tuple[Question, ...]
    given: Mapping[str, GivenAnswers]
    """Answers from files, by arm."""
    in_domain: tuple[str, ...]
    sampling: Sampling
    """As it is carried out: without open questions."""

    def counts(self, samples_per_question: int | None) -> dict[int, tuple[Question, ...]]:
        """The questions by the number of answers wanted to each."""
        groups: dict[int, list[Question]] = {}
        for question in self.questions:
            groups.setdefault(samples_per_question or question.samples or 1, []).append(question)
        return {count: tuple(members) for count, members in groups.items()}


def _shown(sampling: Sampling) -> str:
    return f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k or 'all'}"
