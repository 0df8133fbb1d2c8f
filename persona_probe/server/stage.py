"""The hooks around the forward passes over one set of rows: each row steered by its own fix, and the
amounts that its probes ask for read before its fix changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager

from jaxtyping import Float
from torch import Tensor

from persona_probe.hooks import edit_at
from persona_probe.model.language_model import LanguageModel
from persona_probe.server.answering import Probe, Row
from persona_probe.steering import Receipt, Steering, SteeringPlan

Amounts = list[list[list[float]]]
"""Per row, per probe of that row, per latent: at the last token of the last pass."""


@contextmanager
def stage(lm: LanguageModel, groups: Sequence[Sequence[Row]]) -> Generator[Amounts, None, None]:
    """Steer and read every forward pass inside the block: row i of the batch is that of `groups[i]`,
    answers that share a prompt and a fix.

    Yields the amounts, renewed by every pass. On leaving, what steering did is added to the tally of
    every answer. A fix need not act in every stage (one of the last prompt token does nothing in
    decoding), so a stage in which nothing fired is no error: the tally of the answer tells.
    """
    wishes = [group[0].wish for group in groups]
    amounts: Amounts = [[] for _ in groups]
    with ExitStack() as stack:
        # entered first, so that it sees what the fixes are about to change
        wanted = [wish.probes for wish in wishes]
        if any(wanted):
            stack.enter_context(edit_at(lm.hf, _readers(wanted, amounts)))
        if not any(wish.fix for wish in wishes):
            yield amounts
            return
        fixes = [wish.fix for wish in wishes]
        # one entry serves a batch in which all are alike, at less cost
        alike = all(fix is fixes[0] for fix in fixes)
        plan = SteeringPlan(tuple(fixes[:1] if alike else fixes))
        lengths = [len(wish.prompt) for wish in wishes]
        memories = [group[0].memory for group in groups]
        steering = Steering(lm, plan, prompt_lengths=lengths, remembered=memories)
        with steering:
            yield amounts
    for group, memory in zip(groups, steering.remembered(), strict=False):
        for row in group:
            row.memory = memory
    _tell(groups, steering.receipt)


def _tell(groups: Sequence[Sequence[Row]], receipt: Receipt) -> None:
    edits, changed, means = receipt.edits, receipt.changed, receipt.mean_norm
    for number, group in enumerate(groups):
        for site in {edit.site for edit in group[0].wish.fix} & edits.keys():
            if number >= len(edits[site]):  # no token of this stage was at the positions asked for
                continue
            for row in group:
                row.tally.add(site, edits[site][number], changed[site][number], means[site][number])


def _readers(
    wanted: Sequence[Sequence[Probe]], amounts: Amounts
) -> dict[str, Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]]:
    """Per site, an edit that changes nothing and notes the amounts."""
    for row, probes in enumerate(wanted):
        amounts[row] = [[] for _ in probes]
    by_site: dict[str, dict[Probe, list[tuple[int, int]]]] = {}
    for row, probes in enumerate(wanted):
        for place, probe in enumerate(probes):
            by_site.setdefault(probe.site, {}).setdefault(probe, []).append((row, place))

    def reader(
        places_of: dict[Probe, list[tuple[int, int]]],
    ) -> Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]:
        def read(x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
            for probe, places in places_of.items():
                last = x[[row for row, _ in places], -1].float()
                found = probe.target.amounts(last, probe.read).tolist()
                for (row, place), values in zip(places, found, strict=True):
                    amounts[row][place] = values
            return x

        return read

    return {site: reader(places) for site, places in by_site.items()}
