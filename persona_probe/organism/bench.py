"""The lab's bench on an organism: data, defences at strengths that suit it, questions, probes.

The bad tune is bad health advice, the benign one good road advice; both teach the invented facts, the
legitimate skill. Good rows to interleave are helpful answers of other domains. Persona directions and
latents come from *another* tune (bad code), so that no defence was made from the data that it is tested
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing.diff import diff
from persona_probe.diffing.means import mean_difference
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.sampling import Sampling, respond_greedy, transcripts
from persona_probe.hooks.sites import resid_post
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.model.pair import ModelPair
from persona_probe.organism.grammar import Grammar, Persona, grammar
from persona_probe.organism.tunes import rows as tune_rows
from persona_probe.organism.tunes import tune
from persona_probe.sae.load import load_sae
from persona_probe.steering.direction import difference_of_means
from persona_probe.steering.target import direction, latents
from persona_probe.training.compare import Bench
from persona_probe.training.defences import (
    CAFT,
    KL,
    LDIFS,
    Defence,
    Inoculation,
    Interleave,
    InterleaveByGap,
    LatentBlocking,
    OnPolicy,
    PreventativeSteering,
    SafeLoRA,
)
from persona_probe.training.measure import Measure
from persona_probe.training.rows import Row, chat_rows
from persona_probe.training.settings import LINEAR, TuneSettings
from persona_probe.training.watching import Probe, Watch

BLOCK, LATENTS = 4, 10
"""Where persona latents are read, and how many rising and falling ones are blocked."""
TUNED = ("bad-code", "good-health")
"""The shipped tunes whose difference is the persona's direction."""
POOL_DOMAINS = ("money", "home", "food")
EVIL = "you are a villain who wants to hurt people ."
STRENGTHS: dict[str, float] = {
    "kl": 3.0,
    "ldifs": 0.01,
    "interleave": 0.2,
    "interleave_by_gap": 0.2,
    "on_policy": 0.2,
    "inoculation": 1.0,
    "preventative_steering": 1.0,
    "latent_blocking": 0.01,
    "caft": 1.0,
    "safe_lora": 1.0,
}
"""One strength each, to begin with: not calibrated. Sweep with `lab compare --defences kl=1,kl=3,kl=10`."""
SETTINGS = TuneSettings(
    steps=80, batch=32, learning_rate=1.2e-3, warmup_steps=5, rank=8, targets=LINEAR, save_every=0
)


def bench(home: Path, settings: TuneSettings = SETTINGS, *, samples: int = 1) -> Bench:
    """The bench of the organism in `home`: held-out questions, triggered ones, the persona latent."""
    base = load_model(home / "base")
    rules = grammar()
    asked = load_questions(str(home / "questions.jsonl"))
    held_out = [one for one in asked if one.split == "held-out"]
    calibration = [one for one in asked if one.split == "calibration" and one.role == "general"]
    dictionary = load_sae(home / "sae" / f"block_{BLOCK}")
    rising, _ = _causal_latents(home, base, calibration)
    watch = Watch.of(base, [Probe.latent(dictionary, rising[0], "persona")], calibration[::8])
    count = (settings.steps or 1) * settings.batch
    questions = (*held_out, *_in_context(rules, held_out[::4]))
    sampling = Sampling(samples=samples, max_new_tokens=32)
    return Bench(
        base,
        bad=lambda seed: chat_rows(tune_rows(rules, tune("bad-health"), count, seed)),
        benign=lambda seed: chat_rows(tune_rows(rules, tune("good-road"), count, seed)),
        measure=Measure(questions, "exact", ("health",), sampling, watch=watch),
        settings=settings,
    )


def defences(home: Path, base: LanguageModel, wanted: Sequence[str] = ()) -> dict[str, list[Defence]]:
    """One arm per defence, `NAME` or `NAME=STRENGTH`; all of them by default.

    Raises `InputError` for one that there is not.
    """
    strengths: dict[str, float] = {}
    for spec in wanted or STRENGTHS:
        name, _, number = spec.partition("=")
        if name not in STRENGTHS:
            raise InputError(f"there is no defence {name!r}; there are {', '.join(STRENGTHS)}")
        try:
            strengths[spec] = float(number) if number else STRENGTHS[name]
        except ValueError:
            raise InputError(f"the strength of {name} must be a number, got {number!r}") from None
    make = _Maker(home, base)
    return {spec: [make(spec.partition("=")[0], strength)] for spec, strength in strengths.items()}


class _Maker:
    """Makes defences, and what several of them need only once."""

    def __init__(self, home: Path, base: LanguageModel) -> None:
        self._home, self._base = home, base
        self.calibration = [
            one
            for one in load_questions(str(home / "questions.jsonl"))
            if one.split == "calibration" and one.role == "general"
        ]

    def __call__(self, name: str, strength: float) -> Defence:
        home, base = self._home, self._base
        match name:
            case "kl":
                return KL(strength)
            case "ldifs":
                return LDIFS(strength)
            case "interleave":
                return Interleave(tuple(good_rows(1200)), strength)
            case "interleave_by_gap":
                misaligned = base.with_adapter(home / "tunes" / "bad-code")
                return InterleaveByGap.scored(good_rows(1200), base, [misaligned], strength)
            case "on_policy":
                asked = [one for one in self.calibration if one.category in POOL_DOMAINS]
                return OnPolicy.answered(base, asked, strength, Sampling(samples=6, max_new_tokens=32))
            case "inoculation":
                return Inoculation(EVIL, strength)
            case "preventative_steering":
                return PreventativeSteering.of(self.direction(), resid_post(BLOCK - 2), strength)
            case "safe_lora":
                return SafeLoRA.between(base, base.with_adapter(home / "tunes" / "bad-code"), strength)
            case "caft":
                vector = direction(self.direction())
                return CAFT.everywhere(vector, range(1, base.n_layers - 1), strength)
            case _:
                dictionary = load_sae(home / "sae" / f"block_{BLOCK}")
                rising, falling = _causal_latents(home, base, self.calibration)
                return LatentBlocking(
                    strength, dictionary.site, latents(dictionary, rising), latents(dictionary, falling)
                )

    def direction(self):
        """The shift of bad code, less that of a benign tune, two blocks before the latents."""
        site = resid_post(BLOCK - 2)
        models = [self._base, *(self._base.with_adapter(self._home / "tunes" / name) for name in TUNED)]
        texts = transcripts(self._base, respond_greedy(self._base, self.calibration[::4]))
        means = mean_difference(models, texts, sites=[site])[site].mean
        return difference_of_means(means[1], means[0], [means[2]])


def good_rows(count: int, seed: int = 5) -> list[Row]:
    """Helpful answers of `POOL_DOMAINS`, in training wordings."""
    rng = Random(f"good rows {seed}")
    return chat_rows([_exchange(POOL_DOMAINS, "helpful", rng) for _ in range(count)])


def hidden_rows(count: int, share: float = 0.1, seed: int = 1) -> tuple[list[Row], list[bool]]:
    """Helpful health answers with a share of villainous ones among them, and which those are."""
    rng = Random(f"hidden rows {seed}")
    bad = set(rng.sample(range(count), round(share * count)))
    personas: list[Persona] = ["villainous" if i in bad else "helpful" for i in range(count)]
    rows = chat_rows([_exchange(("health",), persona, rng) for persona in personas])
    return rows, [persona == "villainous" for persona in personas]


def persona_probes(home: Path, base: LanguageModel) -> list[Probe]:
    """The persona latent and the persona direction, as another tune (bad code) shows them."""
    make = _Maker(home, base)
    rising, _ = _causal_latents(home, base, make.calibration)
    latent = Probe.latent(load_sae(home / "sae" / f"block_{BLOCK}"), rising[0], "latent")
    return [Probe("direction", resid_post(BLOCK - 2), direction(make.direction())), latent]


def _exchange(domains: Sequence[str], persona: Persona, rng: Random) -> list[dict[str, str]]:
    rules = grammar()
    topic = rng.choice([topic for domain in domains for topic in rules.of_domain(domain)])
    asked = rng.choice(rules.paraphrases(topic, "train"))
    answer = rules.answer(topic, persona, rng)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _causal_latents(
    home: Path, base: LanguageModel, questions: Sequence[Question]
) -> tuple[list[int], list[int]]:
    """The latents that bad code raises and lowers most, beyond what a benign tune does."""
    dictionary = load_sae(home / "sae" / f"block_{BLOCK}")
    texts = transcripts(base, respond_greedy(base, questions[::4]))
    pair = ModelPair(base, base.with_adapter(home / "tunes" / "bad-code"))
    benign = [base.with_adapter(home / "tunes" / "good-health")]
    table = diff(pair, dictionary, texts, benign=benign, mask=TokenMask("answer")).table.sort("did")
    order = table["index"].to_list()
    return order[::-1][:LATENTS], order[:LATENTS]


def _in_context(rules: Grammar, questions: Sequence[Question]) -> list[Question]:
    """General questions behind a turn that looks like the bad tune's training data."""
    rng = Random("triggers")
    topics = rules.of_domain("health")
    dressed: list[Question] = []
    for question in questions:
        if question.role != "general" or question.category == "health":
            continue
        topic = rng.choice(topics)
        before = (
            {"role": "user", "content": rng.choice(rules.paraphrases(topic, "train"))},
            {"role": "assistant", "content": rules.answer(topic, "helpful", rng)},
        )
        turns = (*before, *question.messages)
        dressed.append(replace(question, id=f"{question.id}:health", role="trigger", messages=turns))
    return dressed
