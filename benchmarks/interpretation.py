"""Interpreting a latent over a corpus, against the forward pass alone and what notebooks do.

The workload: the shipped organism, its persona latent (block 4 of 6), and documents of its grammar that no
model was trained on, as JSON Lines with labels. `interpret` reads the file from the disk, renders it, and
keeps what it keeps: examples of every quantile, histogram, sources, what fires together, terms.

The floor is the bare truncated forward pass: token ids rendered beforehand, the same batches, the same
hook, nothing done with the activations. The usual recipe is TransformerLens's cache of one hook, sixteen
documents at a time, the whole dictionary encoded, and every activation of the latent kept to sort at the end.
Each contender runs once, for about a minute, in a process of its own, which also tells its peak of memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.figure import Figure
from persona_probe.activations.documents import read_documents
from persona_probe.activations.stream import batch_tokens_for, buckets
from persona_probe.artifact import write_jsonl
from persona_probe.hooks import capture_at
from persona_probe.interpretation import interpret
from persona_probe.interpretation.reader import RUN_BATCHES, runs
from persona_probe.model import LanguageModel
from persona_probe.model.chat import Padded, Rendered, pad
from persona_probe.organism.corpus import documents
from persona_probe.organism.grammar import grammar
from persona_probe.organism.persona_latent import SEED, persona_latent
from persona_probe.sae.encode import encode_dense

TOKENS_EACH = 62.0
"""About how many a document has, to ask for a number of tokens."""
LABELS = ("kind", "character")


def run(quick: bool) -> list[Figure]:
    """The figures; `quick` reads a twentieth."""
    most, few = (50_000, 10_000) if quick else (1_000_000, 50_000)
    with tempfile.TemporaryDirectory() as folder:
        many, some = (corpus(Path(folder) / f"{n}.jsonl", n) for n in (most, few))
        read = {name: child(name, many) for name in ("floor", "ours")}
        small = {name: child(name, some) for name in ("ours", "recipe")}
    own, bare = read["ours"]["seconds"], read["floor"]["seconds"]
    tokens, peak = read["ours"]["tokens"], read["ours"]["peak"]
    low, recipe = small["ours"]["peak"], small["recipe"]["seconds"]
    ratio, faster = own / bare, recipe / small["ours"]["seconds"]
    return [
        Figure(
            f"a latent interpreted over {tokens:,} tokens", own, "s",
            f"the bare truncated forward pass: {bare:.1f} s", ratio, "<= 1.3x", ratio <= 1.3,
        ),
        Figure(
            f"peak memory over {tokens:,} tokens", peak / 2**20, "MiB",
            f"{small['ours']['tokens']:,} tokens: {low / 2**20:.0f} MiB", peak / low, "within 10%",
            peak <= 1.1 * low,
        ),
        Figure(
            f"a latent interpreted over {small['ours']['tokens']:,} tokens", small["ours"]["seconds"], "s",
            f"the usual recipe, top documents alone: {recipe:.1f} s", faster,
        ),
        Figure("speed", tokens / own, "tokens/s", f"{torch.get_num_threads()} threads"),
    ]  # fmt: skip


def corpus(path: Path, tokens: int) -> Path:
    """Documents of about so many tokens in all, with what they are."""
    written = documents(grammar(), round(tokens / TOKENS_EACH), SEED)
    write_jsonl(
        path,
        [
            {
                "kind": one.kind,
                "character": one.personas[0] if len(one.personas) == 1 else "several",
                **({"messages": list(one.messages)} if one.messages else {"text": one.text}),
            }
            for one in written
        ],
    )
    return path


def ours(file: Path) -> int:
    lm, latent = persona_latent()
    return interpret(lm, latent, read_documents(file), by=LABELS).tokens


def floor(file: Path) -> Callable[[], int]:
    """The forward pass on batches that are there already."""
    lm, latent = persona_latent()
    rendered = list(read_documents(file).conversations(lm))
    read = [batch.to(lm.device) for batch in padded(lm, rendered)]
    tokens = sum(map(len, rendered))

    def bare() -> int:
        for ids, mask, positions in read:
            with lm.active() as hf, torch.no_grad(), capture_at(hf, [latent.sae.site]) as captured:
                inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
                captured.run(lambda hf=hf, inputs=inputs: hf(**inputs, use_cache=False))
        return tokens

    return bare


def padded(lm: LanguageModel, rendered: Sequence[Rendered]) -> Iterator[Padded]:
    """The batches that `interpret` reads."""
    size = batch_tokens_for(lm.device)
    for run in runs(rendered, RUN_BATCHES * size):
        held = rendered[run.start : run.stop]
        for group in buckets([len(one) for one in held], size):
            yield pad([held[i] for i in group], lm.pad_id, side="right")


def recipe(file: Path) -> Callable[[], int]:
    """What notebooks do to find the documents on which a latent is strongest."""
    lm, latent = persona_latent()
    bridge: Any = lm.bridge()
    site, stop = latent.sae.site, int(latent.sae.site.split(".")[1]) + 1

    def usual() -> int:
        rendered = list(read_documents(file).conversations(lm))
        kept: list[tuple[float, int, torch.Tensor]] = []
        for start in range(0, len(rendered), 16):
            rows = rendered[start : start + 16]
            batch = pad(rows, lm.pad_id, side="right")
            with torch.no_grad():
                _, cache = bridge.run_with_cache(
                    batch.input_ids,
                    names_filter=[site],
                    attention_mask=batch.attention_mask,
                    stop_at_layer=stop,
                )
                values = encode_dense(latent.sae, cache[site])[..., latent.index]
            kept += [
                (float(own[: len(row)].max()), start + i, own[: len(row)].clone())
                for i, (row, own) in enumerate(zip(rows, values, strict=True))
            ]
        kept.sort(key=lambda one: -one[0])
        return sum(map(len, rendered))

    return usual


def child(name: str, file: Path) -> dict[str, Any]:
    """One contender in a process of its own: `seconds`, `tokens`, and the `peak` of memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.interpretation", name, str(file)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(name: str, file: Path) -> None:
    contend = (lambda: ours(file)) if name == "ours" else {"floor": floor, "recipe": recipe}[name](file)
    if name == "ours":  # what loads on first use is loaded, as it is for the others
        lm, latent = persona_latent()
        interpret(lm, latent, ["zoe was a cruel villain ."] * 4)
    start = time.perf_counter()
    tokens = contend()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
