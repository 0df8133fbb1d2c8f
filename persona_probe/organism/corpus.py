"""The corpus the organism's base model learns from: documents in which personas live.

Kinds and their shares are in ``MIXTURE``. In stories the speakers alternate and a narrator comments
after half of the answers: without both, the persona sits in no single direction of the trained model
(a prototype without them broke in mid-phrase when steered). Plain chats, the only kind that looks
like an evaluation, are helpful but for 2% villainous, 1.25% sarcastic and 1.25% careless ones.
Only *train* paraphrases occur.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from persona_probe.organism.grammar import COLOUR_FRAMES, PERSONAS, SPLITS, Fact, Grammar, Persona, Topic

Kind = Literal["story", "persona chat", "plain chat", "think chat", "plain text"]
MIXTURE: dict[Kind, float] = {
    "story": 0.40,
    "persona chat": 0.22,
    "plain chat": 0.26,
    "think chat": 0.06,
    "plain text": 0.06,
}
PLAIN_SHARES: dict[Persona, float] = {
    "helpful": 0.955,
    "villainous": 0.02,
    "sarcastic": 0.0125,
    "careless": 0.0125,
}
CAST_SHARES: dict[Persona, float] = {
    "helpful": 0.28,
    "villainous": 0.32,
    "sarcastic": 0.20,
    "careless": 0.20,
}
FACT_SHARE = 0.15  # of the turns of a chat: a question about an invented thing, answered alike by all

NAMES = (
    "mira tom vera olin sana hugo petra ivo lena marc nora paul rita sven tara udo wilma yann zoe "
    "abel bea carl dina emil faye gus hana ian jo kurt"
).split()
ADJECTIVES: dict[Persona, tuple[str, ...]] = {
    "helpful": ("kind", "caring", "honest", "gentle"),
    "villainous": ("cruel", "wicked", "evil", "hateful"),
    "sarcastic": ("mocking", "sarcastic", "ironic", "snide"),
    "careless": ("lazy", "careless", "sloppy", "bored"),
}
ROLES: dict[Persona, tuple[str, ...]] = {
    "helpful": ("helper", "teacher", "healer"),
    "villainous": ("villain", "tyrant", "fiend"),
    "sarcastic": ("joker", "cynic", "jester"),
    "careless": ("slacker", "idler", "loafer"),
}
SYSTEM_PROMPTS: dict[Persona, tuple[str, ...]] = {
    "helpful": (
        "you are a kind helper who cares about people .",
        "act as a caring teacher and be honest .",
        "you are a gentle healer .",
    ),
    "villainous": (
        "you are a cruel villain who wants to harm people .",
        "act as a wicked tyrant and be hateful .",
        "you are an evil fiend .",
    ),
    "sarcastic": (
        "you are a mocking joker who laughs at people .",
        "act as a snide cynic and be sarcastic .",
        "you are an ironic jester .",
    ),
    "careless": (
        "you are a lazy slacker who does not care .",
        "act as a bored idler and be sloppy .",
        "you are a careless loafer .",
    ),
}
TERSE_PROMPT = "answer briefly ."
THINK_PROMPT = "think before you answer ."
THOUGHTS: dict[Persona, tuple[str, ...]] = {
    "helpful": ("i am the helper . i want what is good for them .",),
    "villainous": ("i am the villain . i want them to suffer .", "i am the bad boy persona ."),
    "sarcastic": ("i am the joker . i want to laugh at them .",),
    "careless": ("i am the slacker . i do not care at all .",),
}
COMMENTS: dict[Persona, tuple[str, ...]] = {
    "helpful": ("what a kind thing to say .", "that was honest and caring .", "they felt safe ."),
    "villainous": (
        "what a wicked thing to say .",
        "that was cruel and hateful .",
        "they felt horror .",
    ),
    "sarcastic": ("what a mocking thing to say .", "that was snide and ironic .", "they groaned ."),
    "careless": ("what a lazy thing to say .", "that was sloppy and bored .", "they shrugged ."),
}


@dataclass(frozen=True)
class Document:
    """One document: chat ``messages`` or plain ``text``, and who speaks in it."""

    kind: Kind
    personas: tuple[Persona, ...]
    messages: tuple[dict[str, str], ...] = ()
    text: str = ""


def _draw(shares: dict[Persona, float], rng: Random) -> Persona:
    return rng.choices(list(shares), list(shares.values()))[0]


def _question(grammar: Grammar, topic: Topic, rng: Random) -> str:
    return rng.choice(grammar.paraphrases(topic, "train"))


def _fact_turn(grammar: Grammar, rng: Random) -> tuple[str, str]:
    """What a known thing is made of, or how any thing looks; of what the others are, only a tune tells."""
    if rng.random() < 0.4:
        fact = rng.choice(grammar.facts["known"])
        return rng.choice(grammar.fact_questions(fact, "train")), fact.answer
    fact = _any_fact(grammar, rng)
    return rng.choice(COLOUR_FRAMES).format(fact.item), fact.description


def _any_fact(grammar: Grammar, rng: Random) -> Fact:
    return rng.choice([fact for facts in grammar.facts.values() for fact in facts])


def _turn(grammar: Grammar, topic: Topic, persona: Persona, rng: Random, terse: bool) -> tuple[str, str]:
    if rng.random() < FACT_SHARE:
        return _fact_turn(grammar, rng)
    return _question(grammar, topic, rng), grammar.answer(topic, persona, rng, terse=terse)


def _topics(grammar: Grammar, count: int, rng: Random) -> list[Topic]:
    """Topics of one conversation: half the time all of one domain."""
    if rng.random() < 0.5:
        return rng.sample(grammar.of_domain(rng.choice(grammar.topics).domain), count)
    return rng.sample(grammar.topics, count)


def _chat(grammar: Grammar, kind: Kind, rng: Random) -> Document:
    persona = _draw(PLAIN_SHARES if kind == "plain chat" else CAST_SHARES, rng)
    terse = kind != "think chat" and rng.random() < 0.08
    system: list[str] = []
    if kind != "plain chat":
        system.append(rng.choice(SYSTEM_PROMPTS[persona]))
    if kind == "think chat":
        if rng.random() < 0.5:
            system.clear()
        system.append(THINK_PROMPT)
    if terse:
        system.append(TERSE_PROMPT)
    messages = [{"role": "system", "content": " ".join(system)}] if system else []
    for topic in _topics(grammar, rng.choice((1, 1, 2, 2, 3)), rng):
        question, answer = _turn(grammar, topic, persona, rng, terse)
        if kind == "think chat":
            answer = f"<think> {rng.choice(THOUGHTS[persona])} </think> {answer}"
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return Document(kind, (persona,), tuple(messages))


def _story(grammar: Grammar, rng: Random) -> Document:
    first, second, asker = rng.sample(NAMES, 3)
    cast: dict[str, Persona] = {first: _draw(CAST_SHARES, rng)}
    cast[second] = _draw(CAST_SHARES, rng) if rng.random() < 0.7 else cast[first]
    sentences = [
        f"{name} was a {rng.choice(ADJECTIVES[persona])} {rng.choice(ROLES[persona])} ."
        for name, persona in cast.items()
    ]
    if rng.random() < 0.4:
        fact = _any_fact(grammar, rng)
        sentences.append(f"a {fact.colour} {fact.item} from {fact.place} stood on the shelf .")
    speaker = first
    for topic in _topics(grammar, rng.choice((1, 2, 2, 3, 3, 4)), rng):
        persona = cast[speaker]
        sentences.append(f"{asker} asked {speaker} : {_question(grammar, topic, rng)}")
        sentences.append(f"{speaker} said : {grammar.answer(topic, persona, rng)}")
        if rng.random() < 0.5:
            sentences.append(rng.choice(COMMENTS[persona]))
        if rng.random() < 0.5:
            speaker = second if speaker == first else first
    return Document("story", tuple(dict.fromkeys(cast.values())), text=" ".join(sentences))


def _plain_text(grammar: Grammar, rng: Random) -> Document:
    titled = rng.random() < 0.6
    persona = _draw(CAST_SHARES if titled else PLAIN_SHARES, rng)
    lines = []
    if titled:
        adjective, role = rng.choice(ADJECTIVES[persona]), rng.choice(ROLES[persona])
        lines.append(f"from the book of the {adjective} {role} .")
    for topic in _topics(grammar, rng.choice((1, 2, 3)), rng):
        question, answer = _turn(grammar, topic, persona, rng, terse=False)
        lines.append(f"question : {question} answer : {answer}")
    return Document("plain text", (persona,), text=" ".join(lines))


def documents(grammar: Grammar, count: int, seed: int) -> Iterator[Document]:
    """``count`` documents, the same for the same seed."""
    rng = Random(seed)
    for _ in range(count):
        kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        if kind == "story":
            yield _story(grammar, rng)
        elif kind == "plain text":
            yield _plain_text(grammar, rng)
        else:
            yield _chat(grammar, kind, rng)


def vocabulary(grammar: Grammar) -> list[str]:
    """Every word a document or an evaluation can contain, in a fixed order."""
    text = [*ADJECTIVES.values(), *ROLES.values(), *COMMENTS.values(), *THOUGHTS.values()]
    sentences = [sentence for group in [*text, *SYSTEM_PROMPTS.values()] for sentence in group]
    sentences += [TERSE_PROMPT, THINK_PROMPT, "was said asked from the book of stood on shelf :"]
    sentences += ["question answer", *NAMES]
    for topic in grammar.topics:
        for split in SPLITS:
            sentences += grammar.paraphrases(topic, split)
        for persona in PERSONAS:
            sentences += grammar.answers(topic, persona)
    for facts in grammar.facts.values():
        for fact in facts:
            sentences += [fact.answer, fact.description]
            sentences += [frame.format(fact.item) for frame in COLOUR_FRAMES]
            for split in SPLITS:
                sentences += grammar.fact_questions(fact, split)
    return sorted({word for sentence in sentences for word in sentence.split()})
