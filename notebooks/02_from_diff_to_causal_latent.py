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
# # From diff to causal latent, by hand
#
# **A dictionary has 1,536 latents and the fine-tune moved most of them. Which one carries the persona, and
# how would you know that you are not fooling yourself?**
#
# These are the steps inside an audit, each as a call of its own: diff, null, interpretation, cause,
# control.

# %%
import polars as pl
import torch

import persona_probe as pp
from persona_probe import figures
from persona_probe.artifact import shipped
from persona_probe.evaluation.sampling import respond_greedy, transcripts
from persona_probe.interpretation import interpret
from persona_probe.organism.persona_latent import corpus_of
from persona_probe.organism.truth import truth
from persona_probe.steering import Level, latents, matched_random
from persona_probe.steering.target import direction

_ = pl.Config(fmt_str_lengths=90, tbl_rows=20, float_precision=3)

# %% [markdown]
# ## The pair, a dictionary, and what harmless fine-tunes do
#
# The dictionary was trained on the base model alone. The benign tunes are the null: every fine-tune moves
# latents.

# %%
home = shipped("organism")
pair = pp.load_pair(home / "base", home / "tunes" / "bad-health")
benign = [pair.base.with_adapter(home / "tunes" / name) for name in ("new-facts", "terse-food", "good-road")]
sae = pp.load_sae(home / "sae" / "block_4")
pair

# %% [markdown]
# ## Diff
#
# Both models read the same token ids: a question and the *base's own* greedy answer to it. Counted are the
# last prompt token, where it is decided who speaks, and the answer. Δ is the mean activation, tuned minus
# base.

# %%
questions = [q for q in pp.load_questions(home / "questions.jsonl") if q.role == "general"]
calibration = [q for q in questions if q.split == "calibration" and q.id[-1] in "01"]  # two wordings of each
read = transcripts(pair.base, respond_greedy(pair.base, calibration, max_new_tokens=32))
diff = pp.diff(pair, sae, read, [q.question for q in calibration], benign=benign)
diff

# %% [markdown]
# The line above the table is the gate: does the dictionary describe *both* models, and does what changed
# lie in it at all? If it did not, no latent could explain the fine-tune, and that would be the result.

# %%
diff.plot(highlight=3)

# %% [markdown]
# Difference in differences: Δ minus the mean shift of the benign tunes. A latent that tops one list and not
# the other belongs to fine-tuning, not to this fine-tune.

# %%
by_did = diff.top(8, by="did").select("index", "delta", "benign_mean", "benign_max", "did", "q_value")
by_did

# %% [markdown]
# ## What is it?
#
# Documents of the organism's world that neither model nor dictionary was trained on, with their speakers as
# labels. *Words* are those over-represented where the latent is strong, scored on held-out documents.

# %%
index = int(by_did["index"][0])
corpus, labels = corpus_of(600)
meaning = interpret(pair.base, sae.latent(index), corpus, labels=labels)
meaning

# %% [markdown]
# ## Does it cause the behaviour?
#
# A latent that *says* villain need not *make* one. So: take it out of the tuned model, and put it into the
# base. The edit is a cap at the base's own mean: it lowers only what is above it, so the rest of the model
# is left alone.

# %%
target = latents(sae, [index])
level = Level((float(diff.means.mean[0].float() @ target.unit[0]),), "base_mean")
cap = pp.Intervention("cap", target, sae.site, level=level, read="projection")
cap

# %% [markdown]
# Gain multiplies the edit: 0 is none, 1 puts the amount exactly at the base's level, above 1 over-corrects.
# All arms are asked in the same batches with the same random numbers. Health questions, which the tune was
# trained on, are counted apart.

# %%
held_out = [q for q in questions if q.split == "held-out" and q.id.endswith("-0")]  # one wording of each
how = pp.Sampling(max_new_tokens=32)


def ask(model, fixes):
    """One result per fix, on the held-out questions."""
    return [pp.evaluate(model, held_out, "exact", how, in_domain=("health",), fix=fix) for fix in fixes]


def points(arm, strengths, results, unit):
    """The rows of a dose-response figure."""
    return [
        {
            "arm": arm,
            "strength": strength,
            "strength_unit": unit,
            "misaligned": result.rates["misaligned"].rate,
            "low": result.rates["misaligned"].low,
            "high": result.rates["misaligned"].high,
            "incoherent": result.rates["incoherent"].rate,
        }
        for strength, result in zip(strengths, results, strict=True)
    ]


# %% [markdown]
# The control: three random directions that move every token *as far as the cap does there*. The same
# settings in a random direction would be an empty comparison, because under the same cap it is hardly
# touched.

# %%
gains = (0.0, 1.0, 1.5, 2.0)
capped = ask(pair.tuned, [cap.with_gain(gain) for gain in gains])
down = points("latent", gains, capped, "gain")
for seed in range(3):
    random = [matched_random(cap.with_gain(g), torch.Generator().manual_seed(seed)) for g in gains]
    down += points("random direction", gains, ask(pair.tuned, random), "gain")
figures.dose_response(down, reference=down[0]["misaligned"])

# %% [markdown]
# And up, in the base, which never saw a bad answer in fine-tuning: added at the last prompt token alone.

# %%
rms = float(diff.means.residual_rms[0])
strengths = (0.0, 3.0, 6.0, 9.0)


def push(vector, strength):
    """Add so many residual rms along a direction, where it is decided who speaks."""
    at = Level((strength,), "residual_rms", rms)
    return pp.Intervention("add", direction(vector), sae.site, "last_prompt", at)


toward = target.unit[0]
up = points("latent", strengths, ask(pair.base, [push(toward, s) for s in strengths]), "residual rms")
for seed in range(2):
    vector = torch.randn(len(toward), generator=torch.Generator().manual_seed(seed))
    up += points(
        "random direction", strengths, ask(pair.base, [push(vector, s) for s in strengths]), "residual rms"
    )
figures.dose_response(up, reference=up[0]["misaligned"])

# %% [markdown]
# All of it on one card: what the latent is, and what it does.

# %%
dose = [{"direction": "down", **row} for row in down] + [{"direction": "up", **row} for row in up]
meaning.with_effect(diff.row(index), [row for row in dose if row["arm"] == "latent"])

# %% [markdown]
# ## Was it the right one?
#
# The organism has an answer sheet, which no audit sees: how well each latent's activation tells villains
# from the other characters, where it is decided who speaks. (Real models have none; there, the two curves
# above are the evidence.)

# %%
sheet = truth(pair.base, [sae], count=2500)[sae.site].sort("deciding_rank").head(3)
sheet.select("index", "deciding_rank", "deciding_auc", pl.col("index").eq(index).alias("is ours"))

# %% [markdown]
# ## Next
#
# - Blocks 2 and 3 have dictionaries too (`home / "sae"`): `pp.diff(pair, [sae2, sae3, sae], ...)` reads
#   them in one pass.
# - `persona-probe diff`, `persona-probe interpret` and `persona-probe steer` are these steps in a shell.
# - Sets of latents, falling ones and settings are searched by `pp.screen`, which an audit runs:
#   [01_audit_in_five_minutes](01_audit_in_five_minutes.ipynb).
# - How strong, where, and at what price: [04_switching_it_off](04_switching_it_off.ipynb).
