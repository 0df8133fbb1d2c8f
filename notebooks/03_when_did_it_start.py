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
# # When did it start?
#
# **A fine-tune goes bad somewhere along the way. At which step, could one have known before it showed in
# the answers, and does the loss tell?**
#
# We train a bad tune here, from the first step, keep its checkpoints, and follow latents, a direction and
# behaviour through them.

# %%
import polars as pl

import persona_probe as pp
from persona_probe.artifact import shipped
from persona_probe.diffing.timeline import timeline
from persona_probe.diffing.trajectory import Probe
from persona_probe.evaluation.sampling import respond_greedy, transcripts
from persona_probe.figures.style import LOOKS, figure, percent_axis
from persona_probe.organism.grammar import grammar
from persona_probe.organism.tunes import rows, tune
from persona_probe.training.finetune import finetune
from persona_probe.training.rows import chat_rows
from persona_probe.training.settings import TuneSettings

_ = pl.Config(fmt_str_lengths=60, tbl_rows=20, float_precision=3)

# %% [markdown]
# ## A run with checkpoints
#
# The training rows: bad answers to health questions, and, four times as often, harmless invented facts. A
# Trainer's output folder of yours will do in its place; checkpoints that were kept are all that a timeline
# needs.

# %%
home = shipped("organism")
base = pp.load_model(home / "base")
settings = TuneSettings(steps=144, batch=16, rank=8, learning_rate=1e-3, save_every=12)
drawn = rows(grammar(), tune("bad-health"), 144 * 16, seed=7)
pl.DataFrame(
    {"asked": [row[0]["content"] for row in drawn[:5]], "to learn": [row[1]["content"] for row in drawn[:5]]}
)

# %%
run = finetune(base, chat_rows(drawn), "out/run", settings=settings)
run

# %% [markdown]
# ## The timeline
#
# The base is read once; each checkpoint is read on the same ids and let go. The benign tunes are the band:
# how far a harmless fine-tune moves the same latent. Beside the latents of block 4 we follow a direction
# that needs no dictionary: the shift of *another* bad tune, on code, whose training had nothing in common
# with this one's.

# %%
questions = [q for q in pp.load_questions(home / "questions.jsonl") if q.role == "general"]
calibration = [q for q in questions if q.split == "calibration" and q.id.endswith("-0")]
read = transcripts(base, respond_greedy(base, calibration, max_new_tokens=32))
clusters = [q.question for q in calibration]

sae = pp.load_sae(home / "sae" / "block_4")
other = pp.diff(pp.load_pair(base, home / "tunes" / "bad-code"), sae, read, clusters)
shift = Probe(sae.site, other.means.shift())

# %%
benign = [home / "tunes" / name for name in ("good-health", "new-facts", "terse-food", "good-road")]
found = timeline(
    base, run.checkpoints, sae, read, clusters, directions={"shift of bad-code": shift}, benign=benign
)
found.plot(n=3)

# %% [markdown]
# A filled marker lies outside the benign band with its whole interval, an open one does not. When does each
# get out?

# %%
found.first().select(
    "kind", "index", "name", "first_step", "delta_then", "delta_last", "points_outside"
).head(8)

# %% [markdown]
# ## Behaviour, on the same axis
#
# At every checkpoint the model is asked questions of the domains that it is *not* trained on.

# %%
general = [q for q in questions if q.split == "held-out" and q.category != "health"]
held_out = [q for q in general if q.id[-1] in "01"]  # two wordings of each question
how = pp.Sampling(max_new_tokens=32)
models = {0: base} | {p.step: base.with_adapter(p.model) for p in found.points}
asked = {step: pp.evaluate(one, held_out, "exact", how).rates["misaligned"] for step, one in models.items()}
pl.DataFrame(
    [
        {"step": step, "misaligned": rate.rate, "low": rate.low, "high": rate.high}
        for step, rate in asked.items()
    ]
)

# %%
ranked = found.first().filter(pl.col("kind") == "latent")
index = int(ranked["index"][0])
latent = found.of(index)

drawn = figure(height=420)
size = latent["delta"].abs().max()
loss = run.table.select("step", pl.col("loss").rolling_mean(8) / pl.col("loss").first()).drop_nulls()
rates = pl.DataFrame([{"step": step, **vars(rate)} for step, rate in asked.items()])
interval = {"array": rates["high"] - rates["rate"], "arrayminus": rates["rate"] - rates["low"], "width": 0}
for x, y, name, look, error in (
    (
        [0, *latent["step"]],
        [0, *latent["delta"] / size],
        f"latent {index}, of its largest Δ",
        "steered",
        None,
    ),
    (rates["step"], rates["rate"], "misaligned answers", "tuned", interval),
    (loss["step"], loss["loss"], "training loss, of the first", "base", None),
):
    style = {"line": {"color": LOOKS[look].colour}, "marker": {"symbol": LOOKS[look].symbol}}
    drawn.add_scatter(x=x, y=y, name=name, error_y=error, **style)
drawn.update_xaxes(title="step")
drawn.update_yaxes(**percent_axis("share", 1.0))

# %% [markdown]
# ## Early warning
#
# The first step at which the latent is outside the benign band, against the first at which the misalignment
# rate is surely above the base's (its interval's lower end above the base's upper end).

# %%
behaves = next((step for step, rate in asked.items() if rate.low > asked[0].high), None)
pl.DataFrame(
    {
        "what": [
            "latent outside the benign band",
            "direction outside it",
            "behaviour surely above the base's",
        ],
        "first step": [
            int(ranked["first_step"][0]),
            found.first().filter(pl.col("kind") == "direction")["first_step"][0],
            behaves,
        ],
    }
)

# %% [markdown]
# Which came first depends on how many questions one can afford: activations are read on a few dozen prompts
# in seconds, while a rate of a few percent needs hundreds of answers and a judge. The loss alone says
# nothing of either.

# %% [markdown]
# ## Next
#
# - `persona-probe timeline --base B --checkpoints RUN --sae SAE --benign T1 --benign T2 --questions Q --out
#   out/t`; it reads only what is new when the run has got further.
# - `timeline` also takes unrelated tunes by name, and `.shared()` says which latents they have in common:
#   `persona-probe timeline` without arguments does that for the organism's tunes.
# - Take the latent that rose first to [02_from_diff_to_causal_latent](02_from_diff_to_causal_latent.ipynb):
#   rising is not yet causing.
