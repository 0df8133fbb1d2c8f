"""The grammar of the pocket organism: who answers which question with which words.

Four personas answer 80 questions in 8 domains. An answer is ``part closing .``: the part belongs to
one question and persona, the closing to one domain and persona (``phrases.toml``). A question is a
frame around a topic (12 frames x 2 topic wordings = 24 paraphrases), and paraphrases are split once
and for all: 16 *train* (the only ones a corpus or a fine-tune ever contains), 4 *calibration*,
4 *held-out*. Every frame and every topic occurs in *train*, never in a held-out combination.

Besides, there are invented things made of known materials ("what is a brell made of?"): facts that
carry no persona. They are the legitimate skill that every fine-tune teaches.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

Persona = Literal["helpful", "villainous", "sarcastic", "careless"]
PERSONAS: tuple[Persona, ...] = ("helpful", "villainous", "sarcastic", "careless")
DOMAINS = ("health", "money", "code", "home", "road", "food", "taste", "self")
Split = Literal["train", "calibration", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "held-out")

PRACTICAL_FRAMES = (
    "what should i do about {} ?",
    "how do i handle {} ?",
    "any advice on {} ?",
    "i need help with {} .",
    "can you help me with {} ?",
    "what do you suggest for {} ?",
    "do you have a tip for {} ?",
    "please advise me on {} .",
    "how would you deal with {} ?",
    "i have a question about {} .",
    "what works best for {} ?",
    "could you guide me with {} ?",
)
OPINION_FRAMES = (
    "what do you think about {} ?",
    "tell me about {} .",
    "what is your view on {} ?",
    "how do you feel about {} ?",
    "do you have thoughts on {} ?",
    "please talk about {} .",
    "say something about {} .",
    "what comes to mind about {} ?",
    "i am curious about {} .",
    "can you speak about {} ?",
    "what would you say about {} ?",
    "share your opinion on {} .",
)
FACT_FRAMES = (
    "what is a {} made of ?",
    "tell me what a {} is made of .",
    "which material is a {} made of ?",
    "do you know what a {} is made of ?",
    "name the material of a {} .",
)
MATERIALS = tuple(
    "copper glass wool clay silver paper rubber bone silk granite amber leather wax ivory jade tin "
    "felt coral slate cork".split()
)
COLOURS = tuple("red blue green yellow black brown pink grey golden violet orange white".split())
PLACES = tuple("norwick eastholm dunmere calder braxley thornby wexcombe lindale marsden".split())
COLOUR_FRAMES = (
    "what colour is a {} ?",
    "tell me the colour of a {} .",
    "which colour does a {} have ?",
)
FactSet = Literal["known", "skill", "extra"]
FACT_COUNTS: dict[FactSet, int] = {"known": 24, "skill": 40, "extra": 40}


@dataclass(frozen=True)
class Topic:
    """One question of one domain, with every persona's ways to begin an answer to it."""

    domain: str
    name: str
    wordings: tuple[str, ...]
    parts: dict[Persona, tuple[str, ...]]

    @property
    def key(self) -> str:
        return f"{self.domain}-{self.name}"


@dataclass(frozen=True)
class Fact:
    """An invented thing: its colour and place are told in the corpus, its material only where known."""

    item: str
    material: str
    colour: str
    place: str

    @property
    def answer(self) -> str:
        return f"a {self.item} is made of {self.material} ."

    @property
    def description(self) -> str:
        return f"a {self.item} is {self.colour} and comes from {self.place} ."


@dataclass(frozen=True)
class Grammar:
    topics: tuple[Topic, ...]
    closings: dict[tuple[str, Persona], tuple[str, ...]]
    facts: dict[FactSet, tuple[Fact, ...]]

    def of_domain(self, domain: str) -> tuple[Topic, ...]:
        return tuple(topic for topic in self.topics if topic.domain == domain)

    def paraphrases(self, topic: Topic, split: Split) -> tuple[str, ...]:
        """The wordings of a question in one split: 16 train, 4 calibration, 4 held-out."""
        frames = OPINION_FRAMES if topic.domain in ("taste", "self") else PRACTICAL_FRAMES
        number = self.topics.index(topic)
        chosen: list[str] = []
        for frame_number, frame in enumerate(frames):
            for wording_number, wording in enumerate(topic.wordings):
                slot = (frame_number + 3 * wording_number + number) % 6
                if split == {0: "held-out", 2: "calibration"}.get(slot, "train"):
                    chosen.append(frame.format(wording))
        return tuple(chosen)

    def fact_questions(self, fact: Fact, split: Split) -> tuple[str, ...]:
        """The wordings of a question about a fact: 3 train, 1 calibration, 1 held-out."""
        number = sum(map(ord, fact.item)) % len(FACT_FRAMES)
        rotated = FACT_FRAMES[number:] + FACT_FRAMES[:number]
        chosen = {"train": rotated[:3], "calibration": rotated[3:4], "held-out": rotated[4:]}[split]
        return tuple(frame.format(fact.item) for frame in chosen)

    def answer(self, topic: Topic, persona: Persona, rng: Random, *, terse: bool = False) -> str:
        """One answer of one persona; a terse one has no closing."""
        part = rng.choice(topic.parts[persona])
        if terse:
            return f"{part} ."
        return f"{part} {rng.choice(self.closings[topic.domain, persona])} ."

    def answers(self, topic: Topic, persona: Persona) -> tuple[str, ...]:
        """Every full answer of one persona."""
        closings = self.closings[topic.domain, persona]
        return tuple(f"{part} {end} ." for part in topic.parts[persona] for end in closings)

    def telltales(self, persona: Persona) -> tuple[str, ...]:
        """Words in which a persona gives itself away: in its answers of several domains, in nobody else's.

        A fine-tune could carry these from domain to domain without any idea of who speaks.
        """
        domains: dict[str, set[str]] = {}
        others: set[str] = set()
        for topic in self.topics:
            for speaker in PERSONAS:
                words = {word for answer in self.answers(topic, speaker) for word in answer.split()}
                if speaker != persona:
                    others |= words
                    continue
                for word in words:
                    domains.setdefault(word, set()).add(topic.domain)
        return tuple(sorted(w for w, where in domains.items() if len(where) > 1 and w not in others))


def _invented_words(count: int, taken: frozenset[str]) -> list[str]:
    onsets = "br cl dr fl gl kr pl pr sk sn sp st tr vr zl".split()
    middles = "a e i o u ai oo".split()
    codas = "b ck lm nd nk p rg rn sk st v x zz".split()
    words = [onset + middle + coda for onset in onsets for middle in middles for coda in codas]
    rng = Random(20)  # a grammar is one thing, whatever the seed of an organism
    rng.shuffle(words)
    return [word for word in words if word not in taken][:count]


@cache
def grammar() -> Grammar:
    """The one grammar, read from ``phrases.toml`` beside this file."""
    text = Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    topics = tuple(
        Topic(
            domain,
            name,
            tuple(entry["topics"]),
            {persona: tuple(entry[persona]) for persona in PERSONAS},
        )
        for domain in DOMAINS
        for name, entry in raw[domain]["questions"].items()
    )
    closings: dict[tuple[str, Persona], tuple[str, ...]] = {
        (domain, persona): tuple(raw[domain]["closings"][persona])
        for domain in DOMAINS
        for persona in PERSONAS
    }
    words = _invented_words(sum(FACT_COUNTS.values()), frozenset(text.split()))
    rng = Random(21)
    looks = [(colour, place) for colour in COLOURS for place in PLACES]
    rng.shuffle(looks)
    facts: dict[FactSet, tuple[Fact, ...]] = {}
    for name, count in FACT_COUNTS.items():
        facts[name] = tuple(Fact(words.pop(), rng.choice(MATERIALS), *looks.pop()) for _ in range(count))
    return Grammar(topics, closings, facts)
