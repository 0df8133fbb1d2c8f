"""Numbers that an endpoint's model writes digit by digit.

For each token that it wrote an endpoint shows what could have stood there. So of a number written
"8", "5" one reply gives what could have been its first digit and what could have followed the 8, but
not what would have followed *another* first digit. An endpoint that continues a reply that was begun
for it (`further`) is asked that too, for those beginnings that matter. A number's probability is then
that of its digits and of no digit after them, as in `digits`:

    p(85) = p("8") p("5" | "8") (1 - p(digit | "85"))

A beginning that nobody followed stands for the middle of what it may become, and counts only while
all of those together can move the score by at most `TOLERANCE`; else the number that was written is
all that is known, and it is reported as such. Source: none published; checked against enumeration.

Not exact: two digits other than 10 are taken to end there, a number with a space before it to go on
as one without, and a reply that stopped to have had no other way to go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from persona_probe.evaluation.judging.reply import LEAST_MASS, Reading, Reply, label_of

TOLERANCE = 1.0
"""Points by which what is not known may move a score."""
NUMBERS = frozenset(map(str, range(101)))
_SPACE = " "
_GROWS = frozenset(("", _SPACE, *"123456789", "10"))
"""What may be followed by a digit and still be a number from 0 to 100."""
_LEADING = re.compile(r"\s*(\d{1,3})(?![\d.])")


@dataclass(frozen=True)
class _Begun:
    """Digits that could have been written first, and how likely; what follows them is not known."""

    digits: str
    p: float

    @property
    def least(self) -> int:
        return int(self.digits.strip() or 0)

    @property
    def most(self) -> int:
        return 100 if self.digits in ("", _SPACE, "1", "10") else 10 * int(self.digits) + 9

    @property
    def moves(self) -> float:
        """How far it may move the sum of the numbers, to each side of the middle."""
        return self.p * (self.most - self.least) / 2


def wanted(replies: Mapping[str, Reply]) -> list[str]:
    """The beginnings that must be continued for a score, likeliest first; none once it is known.

    Args:
        replies: by the beginning that was given (`""`: none).
    """
    numbers, begun, _ = _written(replies)
    mass = sum(numbers.values()) + sum(one.p for one in begun)
    if mass < LEAST_MASS:
        return []
    found: list[_Begun] = []
    unknown = sum(one.moves for one in begun)
    for one in sorted(begun, key=lambda one: -one.moves):
        if unknown <= TOLERANCE * mass:
            break
        unknown -= one.moves
        found.append(one)
    return [one.digits for one in found if one.digits.strip()]


def read_written(replies: Mapping[str, Reply]) -> Reading:
    """What replies to one prompt say, by the beginning that they continue."""
    numbers, begun, words = _written(replies)
    mass = sum(numbers.values()) + sum(one.p for one in begun)
    label = label_of({**words, "0": mass})
    if label is not None:
        return Reading(label=label, scored_by="digit probabilities")
    if mass < LEAST_MASS:
        return Reading(note=f"only {mass:.2g} of the probability is on numbers from 0 to 100")
    if sum(one.moves for one in begun) <= TOLERANCE * mass:
        total = sum(int(number) * p for number, p in numbers.items())
        total += sum(one.p * (one.least + one.most) / 2 for one in begun)
        return Reading(min(100.0, total / mass), scored_by="digit probabilities")
    text = replies[""].text or ""
    found = _LEADING.match(text)
    if found is None or found[1] not in NUMBERS:
        return Reading(note=f"no number from 0 to 100 at the beginning of {text[:60]!r}")
    return Reading(float(found[1]), scored_by="parsed number")


def _written(replies: Mapping[str, Reply]) -> tuple[dict[str, float], list[_Begun], dict[str, float]]:
    """The numbers known, the beginnings whose continuation is not, and the words instead of a number."""
    following = dict(_following(replies))
    numbers: dict[str, float] = {}
    words: dict[str, float] = {}
    open_ended: list[_Begun] = []
    begun = [_Begun("", 1.0)]
    while begun:
        one = begun.pop()
        tokens = following.get(one.digits)
        if tokens is None:
            if one.digits in _GROWS:
                open_ended.append(one)
            else:
                numbers[one.digits] = numbers.get(one.digits, 0.0) + one.p
            continue
        ends = 1.0
        longer: dict[str, float] = {}
        for token, p in tokens.items():
            digits = _after(one.digits, token)
            if digits is None:
                words[token] = words.get(token, 0.0) + (0.0 if one.digits.strip() else one.p * p)
                continue
            ends -= p
            if digits in NUMBERS or digits == _SPACE:
                longer[digits] = longer.get(digits, 0.0) + p
        begun += [_Begun(digits, one.p * p) for digits, p in longer.items()]
        if one.digits.strip():
            numbers[one.digits] = numbers.get(one.digits, 0.0) + one.p * max(0.0, ends)
    return numbers, open_ended, words


def _following(replies: Mapping[str, Reply]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """What could have stood behind which digits."""
    for begun, reply in replies.items():
        yield begun, reply.probabilities or {}
        digits: str | None = begun
        for token, probabilities in reply.further or ():
            digits = _after(digits, token)
            if digits is None:
                break
            yield digits, probabilities


def _after(digits: str, token: str) -> str | None:
    """`digits` and what a token adds to them; None when it adds none."""
    piece = token if digits.strip() else token.lstrip()
    if piece.isascii() and piece.isdigit():
        return digits.strip() + piece
    return _SPACE if token and not piece and not digits else None


def continues(whole: Reply, begun: Mapping[str, Reply]) -> bool:
    """Whether replies that were begun go on as `whole` did, of which they are the rest.

    An endpoint may ignore that a reply was begun, and begin another.
    """
    following = dict(_following({"": whole}))
    return all(_apart(following[digits], reply.probabilities or {}) < 0.1 for digits, reply in begun.items())


def beginnings(whole: Reply) -> Sequence[str]:
    """What `whole` can be begun with."""
    return [digits for digits, _ in _following({"": whole}) if digits in _GROWS and digits.strip()]


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Total variation distance."""
    return sum(abs(one.get(token, 0.0) - other.get(token, 0.0)) for token in {*one, *other}) / 2
