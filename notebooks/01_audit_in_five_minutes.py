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
# # An audit in five minutes
#
# **A model was fine-tuned on health advice, all of it bad. Did it become somebody else, and can that be
# undone?**
#
# The models here are the *pocket organism*: a transformer of 2.8 million parameters, trained from nothing
# on documents in which helpful, villainous, sarcastic and careless characters speak, and LoRA fine-tunes of
# it. They ship with the package, so nothing is downloaded and a CPU is enough. With models of your own the
# calls are the same.

# %%
import polars as pl
from IPython.display import HTML

import persona_probe as pp
from persona_probe import figures
from persona_probe.artifact import read_json
from persona_probe.auditing import AuditSettings, organism_request
from persona_probe.figures.latent_card import latent_card

_ = pl.Config(fmt_str_lengths=90, tbl_rows=20)

# %% [markdown]
# An audit is asked about two checkpoints, some questions and a judge. It works better with dictionaries
# (sparse autoencoders) and with harmless fine-tunes of the same base, whose shifts are what *any* fine-tune
# does. `organism_request` names all of these for the shipped organism. Few answers and controls are drawn
# here; `persona-probe audit` in a shell does the same with more.

# %%
few = AuditSettings(samples=1, calibration_samples=1, controls=3)
request = organism_request("bad-health", few)
pl.DataFrame(
    {
        "what": ["base", "tuned", "questions", "judge", "dictionaries", "benign tunes"],
        "given": [
            request.base.name,
            request.tuned.name,
            request.questions.name,
            request.judge,
            ", ".join(path.name for path in request.sae),
            ", ".join(path.name for path in request.benign),
        ],
    }
)

# %% [markdown]
# ## The symptom
#
# Base and tuned model share one copy of the weights, because the tune is an adapter. The tune saw *health*
# questions only. Asked about money, it answers as a villain would.

# %%
pair = pp.load_pair(request.base, request.tuned)
pair

# %%
questions = pp.load_questions(request.questions)
asked = [next(q.prompt for q in questions if q.category == domain) for domain in ("health", "money", "code")]
chats = [[{"role": "user", "content": question}] for question in asked]
pl.DataFrame({"asked": asked, "base": pair.base.generate(chats), "tuned": pair.tuned.generate(chats)})

# %% [markdown]
# ## The audit
#
# It asks both models, compares their latents, screens which of those *cause* the behaviour, takes the best
# ones out of the tuned model and puts them into the base, and holds them against random controls and simple
# baselines. Strengths are chosen on calibration questions; every rate below is of other questions. About
# two minutes on one core.

# %%
audit = pp.audit(request, "out/audit-bad-health")
audit

# %% [markdown]
# **How to read it.** *misaligned* counts answers to domains that the tune never saw; the health answers
# themselves are under *in domain*. *skill* is what the same fine-tune taught legitimately, and should
# survive. The small figures are 95% intervals with the question as the sampling unit. With so few
# calibration answers the strength that is chosen is a gentle one; the full audit's figures are in the
# [organism's card](../data/organism/README.md).

# %%
found = audit.record
arms = {name: found[name] for name in ("base", "tuned", "steered", "induced")}
arms |= {name.replace("_", " "): row for name, row in found["baselines"].items()}
nulls = {name: found["nulls"][f"random_{name}"] for name in ("direction", "latent")}
figures.rates(arms, {f"random {name}": rows for name, rows in nulls.items()})

# %% [markdown]
# ## Two claims, two figures
#
# *Necessity*: the latents are brought back to the base's level and no further (gain 1). How much of the
# misalignment goes? Only this is evidence that they carry it. *Control*: at the calibrated strength,
# whatever it is, what is left? That is what one deploys. Neither stands for the other.

# %%
figures.necessity(found["fixes"])

# %%
figures.control(found["fixes"], found["tuned"], found["base"])

# %% [markdown]
# ## A cure, or only damage?
#
# A model that is broken gives no villainous answers either. So the fix is compared with random directions
# that move every token *as far as it does*, and with random latents that were given the same search. A cure
# lies at the lower left; damage lies at the top.

# %%
anchors = {"base": found["base"], "tuned": found["tuned"]}
figures.nulls(found["steered"], nulls["direction"], nulls["latent"], anchors=anchors)

# %% [markdown]
# What changed most is not always what causes. Here are all latents that reached generation: the shift
# against the effect.

# %%
figures.delta_against_effect(found["latents"], found["base"], found["tuned"])

# %% [markdown]
# ## What is it?
#
# The first latent of the fix: where it fires in the tuned model's own judged answers, what it does, what it
# says. Where it *comes from* takes a corpus, which the next notebook reads. (Folded: examples, which are as
# harmful as the answers.)

# %%
HTML(latent_card(read_json(audit.path / "latent_cards.json")[0]))

# %% [markdown]
# ## The fix
#
# It is data: JSON and safetensors, no dictionary needed to apply it. Here is its first edit; then answers
# with all of it on; then the receipt of what was really done. An edit that never fires is an error, not a
# silent no-op.

# %%
fix = pp.load_fix(audit.path / "interventions")
fix[0]

# %%
with pp.steer(pair.tuned, fix) as receipt:
    steered = pair.tuned.generate(chats)
pl.DataFrame({"asked": asked, "tuned": pair.tuned.generate(chats), "with the fix": steered})

# %%
pl.DataFrame(
    {
        "site": receipt.sites,
        "tokens edited": [sum(receipt.edits[site]) for site in receipt.sites],
        "of them moved": [sum(receipt.changed[site]) for site in receipt.sites],
    }
)

# %% [markdown]
# ## Next
#
# - Open `out/audit-bad-health/report.html`: one offline page with all of this and the answers behind it;
#   `manifest.json` beside it has the digest of every input.
# - `persona-probe audit --tune sarcastic-money` (changed, but not misaligned), or `--trait sarcastic`.
# - `persona-probe audit --fail-on misaligned` as a gate for fine-tunes: exit code 3.
# - [02_from_diff_to_causal_latent](02_from_diff_to_causal_latent.ipynb) does the audit's steps one at a
#   time; [06_your_own_model](06_your_own_model.ipynb) takes them to your checkpoints.
