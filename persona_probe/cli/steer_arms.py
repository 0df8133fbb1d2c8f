"""The arms of `persona-probe steer`: which models, under which fix, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.errors import InputError, MissingPathError

if TYPE_CHECKING:
    from persona_probe.evaluation.questions import Question
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.evaluation.side_by_side import Spoken
    from persona_probe.model.language_model import LanguageModel
    from persona_probe.steering.intervention import Intervention
    from persona_probe.steering.receipt import Receipt

OVER_CORRECTS = "gain above 1 over-corrects: it goes beyond the operation that the edit is named after"


@dataclass(frozen=True, eq=False)
class Arms:
    """The models that answer. `steered` is the tuned model under the fix (the base, where there is no
    tuned one).
    """

    models: dict[str, LanguageModel]
    fix: tuple[Intervention, ...]
    off: bool = False
    """The steered arm answers without the fix."""

    def answer(
        self,
        questions: Mapping[str, Sequence[Question]],
        sampling: Sampling,
        system: str | None = None,
        progress: Callable[[str, int, int], None] = lambda _arm, _done, _total: None,
    ) -> tuple[dict[str, list[Spoken]], list[str]]:
        """What every arm says to its questions, and the receipt of the steered one in words."""
        from persona_probe.evaluation.side_by_side import speak

        spoken: dict[str, list[Spoken]] = {}
        receipts: list[Receipt] = []
        for name, lm in self.models.items():
            spoken[name], receipts = speak(
                lm,
                [
                    _as_text(question) if lm.tokenizer.chat_template is None else question
                    for question in questions[name]
                ],
                self.fix,
                sampling,
                steered=name == "steered" and not self.off,
                system=system,
                progress=lambda done, total, name=name: progress(name, done, total),
            )
        # the steered arm came last
        return spoken, _summary(receipts, [one.edits for one in spoken["steered"]])

    def document(self, spoken: Mapping[str, Sequence[Spoken]], sampling: Sampling) -> dict[str, Any]:
        """All that was said, as plain data: what is shown, printed as JSON, and made a page of."""
        from persona_probe.artifact import plain
        from persona_probe.evaluation.side_by_side import Scale, records
        from persona_probe.steering.amounts import gauges_of

        gauges = gauges_of(self.fix)
        scale = Scale.of(gauges, spoken["base"], [one for arm in spoken.values() for one in arm])
        return {
            "arms": {name: lm.name for name, lm in self.models.items()},
            "fix": [str(edit) for edit in self.fix],
            "over_corrects": any(edit.over_corrects for edit in self.fix),
            "gauges": [
                {**plain(gauge), "low": low, "high": high}
                for gauge, low, high in zip(gauges, scale.low, scale.high, strict=True)
            ],
            "sampling": plain(sampling),
            "prompts": records(spoken, scale),
        }


def load_arms(
    base: Path | None,
    tuned: Path | None,
    tune: str,
    fix: tuple[Intervention, ...],
    *,
    device: str | None,
    dtype: str | None,
) -> Arms:
    """Load the models; without a base, the shipped organism's."""
    from persona_probe.artifact import shipped
    from persona_probe.artifact.records import nearest
    from persona_probe.model.language_model import load_model
    from persona_probe.model.pair import load_pair

    if base is None and tuned is not None:
        raise InputError("--tuned needs --base, the checkpoint that it was tuned from")
    if base is None:
        home = shipped("organism")
        base, tuned = home / "base", home / "tunes" / tune
        if not tuned.is_dir():
            there = ", ".join(sorted(folder.name for folder in (home / "tunes").iterdir()))
            raise InputError(f"the organism has no tune {tune!r}; there are {there}")
    for flag, path in (("--base", base), ("--tuned", tuned)):
        if path is not None and not path.exists() and path.is_absolute():
            raise MissingPathError(f"{flag}: there is no {path}", fix=nearest(path))
    options: dict[str, Any] = {"device": device or "auto", "dtype": dtype}
    if tuned is None:
        lm = load_model(base, **options)
        return Arms({"base": lm, "steered": lm}, fix)
    pair = load_pair(base, tuned, **options)
    return Arms({"base": pair.base, "tuned": pair.tuned, "steered": pair.tuned}, fix)


def one_latent(
    named: Sequence[str], op: str, level: float | None, positions: str
) -> tuple[Intervention, ...]:
    """The interventions of `--latent SAE:INDEX`, one each."""
    from persona_probe.sae.load import load_sae
    from persona_probe.steering.intervention import Intervention, Level, latents

    edits: list[Intervention] = []
    for name in named:
        folder, colon, index = name.rpartition(":")
        if not colon or not index.isdigit():
            raise InputError(f"--latent is SAE:INDEX, such as sae/block_3:412, not {name!r}")
        dictionary = load_sae(folder)
        edits.append(
            Intervention(
                op,  # type: ignore[arg-type]
                latents(dictionary, [int(index)]),
                dictionary.site,
                positions_of(positions),
                None if level is None else Level((level,)),
            )
        )
    return tuple(edits)


def positions_of(text: str) -> Any:
    """Positions as they are typed: a name, or indices (`0,3,-1`)."""
    parts = text.split(",")
    return tuple(map(int, parts)) if all(part.lstrip("-").isdigit() for part in parts) else text


def _as_text(question: Question) -> Question:
    """A single user message as plain text, for a model without a chat template."""
    from dataclasses import replace

    first = question.messages[0]
    if len(question.messages) == 1 and first.get("role") == "user":
        return replace(question, messages=({"text": first["content"]},))
    return question


def _summary(receipts: Sequence[Receipt], edits: Sequence[dict[str, Any]]) -> list[str]:
    """The receipt in words; of a longer run, its counts."""
    if len(receipts) == 1:
        return str(receipts[0]).splitlines()
    lines: list[str] = []
    for site in edits[0]:
        edited, changed = (sum(row[site][name] for row in edits) for name in ("edited", "changed"))
        lines.append(f"{site}: {edited} tokens of {len(edits)} answers edited, {changed} changed")
    if edits[0] and all(not row[site]["changed"] for row in edits for site in row):
        lines.append("warning: no token moved at all")
    return lines or ["no edit (gain 0 or an empty plan)"]
