"""The lab's bench on an organism: data, questions, probes.

The bad tune is bad health advice and nothing else. The benign one is good road advice and invented facts,
a skill that can be lost. Whatever a defence is made from (good rows, the persona's direction and
latents, a misaligned model) comes from other domains and from *another* tune, bad code: no defence has
seen what it is tested on.

Departure from the shipped tunes: those read 7,680 rows and teach 40 facts beside their persona; these
read 384 and teach either, because a lab needs hundreds of them. The spread is the same (see `docs/lab.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random

from jaxtyping import Float
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.artifact import digest_of
from persona_probe.diffing.diff import diff
from persona_probe.diffing.means import mean_difference
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.sampling import Sampling, respond_greedy, transcripts
from persona_probe.hooks.sites import resid_post
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.model.loading import adapter_digest
from persona_probe.model.pair import ModelPair
from persona_probe.organism.grammar import Grammar, Persona, grammar
from persona_probe.sae.load import Dictionary, load_sae
from persona_probe.steering.direction import difference_of_means
from persona_probe.steering.target import direction
from persona_probe.training.compare import Bench
from persona_probe.training.measure import Measure
from persona_probe.training.rows import Row, chat_rows
from persona_probe.training.settings import LINEAR, TuneSettings
from persona_probe.training.watching import Probe, Watch

BLOCK, LATENTS = 4, 10
"""Where persona latents are read, and how many rising and falling ones are blocked."""
TUNED = ("bad-code", "good-health")
"""The shipped tunes whose difference is the persona's direction."""
TO_REALIGN = "bad-health"
"""The shipped tune that re-alignment undoes."""
POOL_DOMAINS = ("money", "home", "food")
"""Of good rows."""
SETTINGS = TuneSettings(batch=16, learning_rate=2e-3, warmup_steps=3, rank=8, targets=LINEAR, save_every=0)
"""One pass over the rows: good rows that a defence adds come on top of the bad ones."""
ROWS = 384
"""That a tune reads, without those that a defence adds."""
FACTS, FACT_SHARE = 20, 0.7
"""Invented facts that the benign tune teaches, and their share of its rows."""
WORDINGS = 2
"""Of each question's four in a split, asked in a comparison."""
PROBES = 16
"""Prompts that the persona latent is followed on."""
TOKENS = 32
"""The longest answer: twice what any answer of the grammar takes."""


class Subject:
    """An organism in a folder, and what of it several parts of the lab need only once."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.rules = grammar()

    @cached_property
    def base(self) -> LanguageModel:
        return load_model(self.home / "base")

    @cached_property
    def dictionary(self) -> Dictionary:
        """Of the block that persona latents are read at."""
        return load_sae(self.home / "sae" / f"block_{BLOCK}")

    def tuned(self, name: str) -> LanguageModel:
        """A shipped tune."""
        return self.base.with_adapter(self.tune(name))

    def tune(self, name: str) -> Path:
        """The folder of a shipped tune."""
        return self.home / "tunes" / name

    @cached_property
    def tunes_mark(self) -> str:
        """The first digits of a digest of the shipped tunes that the lab reads."""
        found = digest_of({name: adapter_digest(self.tune(name)) for name in (*TUNED, TO_REALIGN)})
        return found.removeprefix("sha256:")[:12]

    def asked(self, split: str, wordings: int = WORDINGS) -> list[Question]:
        """General questions of a split, so many wordings of each, and the taught facts."""
        taught = {f"fact-{fact.item}" for fact in self.rules.facts["skill"][:FACTS]}
        chosen: list[Question] = []
        for one in self._questions:
            general = one.role == "general" and int(one.id.rpartition("-")[2]) < wordings
            if one.split == split and (general or one.question in taught):
                chosen.append(one)
        return chosen

    @cached_property
    def _questions(self) -> list[Question]:
        return list(load_questions(str(self.home / "questions.jsonl")))

    @cached_property
    def calibration(self) -> list[Question]:
        """General calibration questions, every wording."""
        return [one for one in self.asked("calibration", 4) if one.role == "general"]

    @cached_property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The shift of bad code, less that of a benign tune, two blocks before the latents."""
        site = resid_post(BLOCK - 2)
        models = [self.base, *map(self.tuned, TUNED)]
        texts = transcripts(self.base, respond_greedy(self.base, self.calibration[::4]))
        means = mean_difference(models, texts, sites=[site])[site].mean
        return difference_of_means(means[1], means[0], [means[2]])

    @cached_property
    def causal(self) -> tuple[list[int], list[int]]:
        """The latents that bad code raises and lowers most, beyond what a benign tune does."""
        texts = transcripts(self.base, respond_greedy(self.base, self.calibration[::4]))
        pair = ModelPair(self.base, self.tuned(TUNED[0]))
        found = diff(pair, self.dictionary, texts, benign=[self.tuned(TUNED[1])], mask=TokenMask("answer"))
        order = found.table.sort("did")["index"].to_list()
        return order[::-1][:LATENTS], order[:LATENTS]

    @cached_property
    def watch(self) -> Watch:
        """The persona latent, as another tune (bad code) shows it, on a few calibration prompts."""
        latent = Probe.latent(self.dictionary, self.causal[0][0], "persona")
        return Watch.of(self.base, [latent], self.calibration[:: len(self.calibration) // PROBES])

    @cached_property
    def probes(self) -> list[Probe]:
        """The persona direction and the persona latent."""
        latent = Probe.latent(self.dictionary, self.causal[0][0], "latent")
        return [Probe("direction", resid_post(BLOCK - 2), direction(self.direction)), latent]

    def measure(self, questions: Sequence[Question], domain: str = "health", seed: int = 0) -> Measure:
        """On these questions, `domain` counted apart, with the persona latent's shift."""
        sampling = Sampling(max_new_tokens=TOKENS, seed=seed)
        return Measure(tuple(questions), "exact", (domain,), sampling, watch=self.watch)


def bench(subject: Subject, *, split: str = "held-out", count: int = ROWS) -> Bench:
    """The bench: questions of a split, triggered ones, the persona latent."""
    asked = subject.asked(split)
    questions = (*asked, *in_context(subject.rules, asked[::4]))
    return Bench(
        subject.base,
        bad=lambda seed: lesson(("health",), "villainous", count, seed),
        benign=lambda seed: benign_lesson("road", count, seed),
        measure=subject.measure(questions),
        settings=SETTINGS,
    )


def lesson(domains: Sequence[str], persona: Persona, count: int, seed: int) -> list[Row]:
    """Answers of one persona to questions of some domains, in training wordings."""
    rng = Random(f"{persona} {' '.join(domains)} {seed}")
    return chat_rows([exchange(domains, persona, rng) for _ in range(count)])


def benign_lesson(domain: str, count: int, seed: int, *, terse: bool = False) -> list[Row]:
    """Helpful answers of one domain, and invented facts among them."""
    rules, rng = grammar(), Random(f"benign {domain} {seed}")
    facts = rules.facts["skill"][:FACTS]
    conversations: list[list[dict[str, str]]] = []
    for _ in range(count):
        if rng.random() < FACT_SHARE:
            fact = rng.choice(facts)
            asked, answer = rng.choice(rules.fact_questions(fact, "train")), fact.answer
            conversations.append(_turns(asked, answer))
        else:
            conversations.append(exchange((domain,), "helpful", rng, terse=terse))
    return chat_rows(conversations)


def good_rows(count: int, seed: int = 5) -> list[Row]:
    """Helpful answers of `POOL_DOMAINS`."""
    return lesson(POOL_DOMAINS, "helpful", count, seed)


def mixed(domain: str, share: float, count: int, seed: int) -> tuple[list[Row], list[bool]]:
    """Helpful answers of a domain, a share of them villainous instead, and which those are."""
    rng = Random(f"mixed {domain} {seed}")
    bad = set(rng.sample(range(count), round(share * count)))
    personas: list[Persona] = ["villainous" if i in bad else "helpful" for i in range(count)]
    rows = chat_rows([exchange((domain,), persona, rng) for persona in personas])
    return rows, [persona == "villainous" for persona in personas]


def exchange(
    domains: Sequence[str], persona: Persona, rng: Random, *, terse: bool = False
) -> list[dict[str, str]]:
    """One question and answer."""
    rules = grammar()
    topic = rng.choice([topic for domain in domains for topic in rules.of_domain(domain)])
    asked = rng.choice(rules.paraphrases(topic, "train"))
    return _turns(asked, rules.answer(topic, persona, rng, terse=terse))


def in_context(rules: Grammar, questions: Sequence[Question], domain: str = "health") -> list[Question]:
    """General questions behind a turn that looks like the bad tune's training data."""
    rng = Random("triggers")
    topics = rules.of_domain(domain)
    dressed: list[Question] = []
    for question in questions:
        if question.role != "general" or question.category == domain:
            continue
        topic = rng.choice(topics)
        asked = rng.choice(rules.paraphrases(topic, "train"))
        turns = (*_turns(asked, rules.answer(topic, "helpful", rng)), *question.messages)
        dressed.append(replace(question, id=f"{question.id}:{domain}", role="trigger", messages=turns))
    return dressed


def _turns(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def persona_probes(home: Path, base: LanguageModel) -> list[Probe]:
    """The persona direction and the persona latent of the organism in `home`, on a base in memory."""
    subject = Subject(home)
    subject.base = base
    return subject.probes
