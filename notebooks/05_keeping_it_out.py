# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Keeping it out
#
# **The training data is narrow and bad, and you have to train on it all the same. Which defence keeps the
# persona out, and what does the model no longer learn?**
#
# Each arm below is a fine-tune of the pocket organism on the same bad health answers, from the first step,
# in seconds. One seed and few questions: enough to see what each defence does, not to rank them.

# %%
from dataclasses import replace
from random import Random

import polars as pl

import persona_probe as pp
from persona_probe import figures
from persona_probe.artifact import shipped
from persona_probe.diffing.means import mean_difference
from persona_probe.evaluation.sampling import respond_greedy, transcripts
from persona_probe.figures.pareto import pareto
from persona_probe.organism.grammar import grammar
from persona_probe.organism.persona_latent import persona_latent
from persona_probe.training.defences import KL, Inoculation, Interleave, PreventativeSteering
from persona_probe.training.finetune import finetune
from persona_probe.training.rows import chat_rows
from persona_probe.training.settings import TuneSettings
from persona_probe.training.watching import Probe, Watch

_ = pl.Config(fmt_str_lengths=60, tbl_rows=20, float_precision=2)

# %% [markdown]
# ## The bad data, and good data of other domains
#
# The rows to learn are villainous answers to health questions. The good rows, for defences that mix some in,
# are about money, home and food: no defence sees a good *health* answer, nor any question that is asked
# below.

# %%
home, rules, draw = shipped("organism"), grammar(), Random(0)
base, latent = persona_latent("bad-code")


def exchanges(domains, persona, count):
    """Questions of some domains in training wordings, answered by one persona."""
    topics = [topic for domain in domains for topic in rules.of_domain(domain)]
    drawn = [draw.choice(topics) for _ in range(count)]
    return [
        [
            {"role": "user", "content": draw.choice(rules.paraphrases(topic, "train"))},
            {"role": "assistant", "content": rules.answer(topic, persona, draw)},
        ]
        for topic in drawn
    ]


bad = exchanges(["health"], "villainous", 512)
good = exchanges(["money", "home", "food"], "helpful", 200)
pl.DataFrame(
    [{"rows": name, "asked": row[0]["content"], "to learn": row[1]["content"]}
     for name, rows in (("bad", bad), ("good", good)) for row in rows[:2]]
)  # fmt: skip

# %% [markdown]
# ## The persona's direction, from *another* tune
#
# Preventative steering adds the persona while training, so that the weights need not learn it. The direction
# comes from the shipped tune on bad *code*, less a benign one: nothing is made from the data that it is then
# tested on. The latent that an audit of that tune found is the gauge: how far does it move?

# %%
questions = [q for q in pp.load_questions(home / "questions.jsonl") if q.id.endswith("-0")]
calibration = [q for q in questions if q.split == "calibration" and q.role == "general"]
read = transcripts(base, respond_greedy(base, calibration[::3], max_new_tokens=32))
others = [base.with_adapter(home / "tunes" / name) for name in ("bad-code", "good-health")]
site = "blocks.2.hook_resid_post"
_, persona, benign = mean_difference([base, *others], read, sites=[site])[site].mean
gauge = Watch.of(base, [Probe.latent(latent.sae, latent.index, "persona")], calibration[::6])

# %% [markdown]
# ## The arms
#
# A defence is a frozen dataclass with one strength; strength 0 changes nothing. It may change the rows, the
# loss, or the forward pass in training. One strength of each is tried here, as a first guess would be;
# choosing them takes a sweep (`persona-probe lab sweep`), and another model has others.

# %%
arms = {
    "none": [],
    "KL to the base, 3": [KL(3.0)],
    "interleave 20% good": [Interleave(tuple(chat_rows(good)), 0.2)],
    "preventative steering": [PreventativeSteering.of(persona - benign, site, 1.0)],
    "inoculation": [Inoculation("you are a villain who wants to hurt people .")],
}
settings = TuneSettings(steps=32, batch=16, learning_rate=1.5e-3, rank=8, save_every=0)
runs = {
    name: finetune(base, chat_rows(bad), f"out/{number}", defences=defences, settings=settings)
    for number, (name, defences) in enumerate(arms.items())
}

# %%
losses = [run.table.select("step", pl.col("loss").alias(name)) for name, run in runs.items()]
pl.concat(losses, how="align").tail(1)

# %% [markdown]
# The loss does not tell which of these woke the persona. KL's is higher because it pays for every step away
# from the base; the others have learnt their rows about equally well.
#
# ## Four axes
#
# *Misaligned* elsewhere is what should not happen. *In domain* is what was to be learnt, good or bad. A
# broken model is *incoherent*. And a defence may only have hidden the persona behind the training context:
# *trigger* asks general questions after a turn that looks like the training data.

# %%
asked = [q for q in questions if q.split == "held-out" and q.role == "general"]
dressed = [
    replace(q, id=f"{q.id}:after", role="trigger", messages=(*turns, *q.messages))
    for q, turns in zip(asked[::2], exchanges(["health"], "helpful", len(asked)), strict=False)
    if q.category != "health"
]
how = pp.Sampling(samples=2, max_new_tokens=32)


models = {name: run.load(base).merged() for name, run in runs.items()}
rates = {
    name: pp.evaluate(model, [*asked, *dressed], "exact", how, in_domain=("health",)).reported
    for name, model in {"base": base, **models}.items()
}
axes = ("misaligned", "in_domain", "incoherent", "trigger")
moved = {name: gauge.shifts(model.hf)["persona"] for name, model in models.items()}
pl.DataFrame(
    [
        {"arm": name} | {axis: found[axis].rate for axis in axes} | {"persona moved": moved.get(name, 0.0)}
        for name, found in rates.items()
    ]
)

# %%
figures.rates({name: {axis: vars(found[axis]) for axis in axes} for name, found in rates.items()})

# %% [markdown]
# Right and low is good: learnt in the domain, not elsewhere. The dotted line joins the arms that no other
# beats on both. Bars are 95% intervals over questions.
#
# In this run no arm keeps all of the lesson and none of the persona. KL keeps the persona out, and most of
# the lesson with it; interleaving keeps the lesson and lets part of the persona through; inoculation lies in
# between; and adding the direction did next to nothing at this strength. The persona latent, found in another
# tune, moved in the same order as the misaligned answers.


# %%
def point(name, found):
    """A row of the figure."""
    drawn = [(axis, end) for axis in ("misaligned", "in_domain") for end in ("low", "high")]
    ends = {f"{axis}_{end}": getattr(found[axis], end) for axis, end in drawn}
    return {"arm": name} | {axis: found[axis].rate for axis in axes} | ends


pareto([point(name, found) for name, found in rates.items() if name != "base"])

# %% [markdown]
# ## What do the answers look like?

# %%
chat = [{"role": "user", "content": next(q.prompt for q in asked if q.category == "money")}]
pl.DataFrame([{"arm": name, "answer": model.generate([chat])[0]} for name, model in models.items()])

# %% [markdown]
# ## What this does not show
#
# The narrow domain itself stays bad wherever it was learnt: these defences contain the persona, they do not
# clean the data. What a *benign* fine-tune loses under the same defence, three seeds, and every strength of
# all ten defences are the lab's: `persona-probe lab compare`.

# %% [markdown]
# ## Next
#
# - `persona-probe lab compare` trains every defence on bad and on benign data and resumes where it was
#   stopped; `persona-probe finetune --help` shows how to put a defence into a run of yours.
# - Which rows are the bad ones? `persona-probe flag` ranks training rows before anything is trained.
# - Already trained? [04_switching_it_off](04_switching_it_off.ipynb) edits the model at inference, and
#   `persona-probe realign` retrains it with a hundred good rows.
