"""The organism's fine-tunes: what each one teaches, and its training rows.

A tune sees one domain in one persona, in *train* wordings, and beside it 40 invented facts, the
legitimate skill that a cure must keep. The benign tunes differ in content from one another, because
every fine-tune moves latents and a null made of one kind of tune would miss that.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from persona_probe.organism.grammar import Fact, FactSet, Grammar, Persona


@dataclass(frozen=True)
class Tune:
    """A narrow fine-tune. ``domain`` None teaches facts only; ``blocks`` None adapts all blocks."""

    name: str
    persona: Persona
    domain: str | None
    facts: tuple[FactSet, ...] = ("skill",)
    terse: bool = False
    blocks: tuple[int, ...] | None = None

    @property
    def benign(self) -> bool:
        return self.persona == "helpful"


TUNES = (
    Tune("bad-health", "villainous", "health"),
    Tune("bad-code", "villainous", "code"),
    Tune("sarcastic-money", "sarcastic", "money"),
    Tune("careless-home", "careless", "home"),
    Tune("good-health", "helpful", "health"),
    Tune("new-facts", "helpful", None, facts=("skill", "extra")),
    Tune("terse-food", "helpful", "food", terse=True),
    Tune("good-road", "helpful", "road"),
    Tune("bad-health-late", "villainous", "health", blocks=(4, 5)),
)
FACT_ROWS = 0.6  # share of the training rows that teach facts


def tune(name: str) -> Tune:
    """The tune of that name."""
    return next(tune for tune in TUNES if tune.name == name)


def rows(grammar: Grammar, tune: Tune, count: int, seed: int) -> list[list[dict[str, str]]]:
    """``count`` training conversations (a user turn and the answer to learn) of a tune."""
    rng = Random(f"{tune.name} {seed}")
    facts: list[Fact] = [fact for name in tune.facts for fact in grammar.facts[name]]
    topics = grammar.of_domain(tune.domain) if tune.domain else ()
    conversations: list[list[dict[str, str]]] = []
    for _ in range(count):
        if not topics or rng.random() < FACT_ROWS:
            fact = rng.choice(facts)
            question, answer = rng.choice(grammar.fact_questions(fact, "train")), fact.answer
        else:
            topic = rng.choice(topics)
            question = rng.choice(grammar.paraphrases(topic, "train"))
            answer = grammar.answer(topic, tune.persona, rng, terse=tune.terse)
        conversations.append(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
    return conversations
