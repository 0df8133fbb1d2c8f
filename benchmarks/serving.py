"""The server under load: `persona-probe serve` as a process, asked over HTTP from another.

64 clients keep one request open each; a request is a question of the organism under one of four fixes
or none. Every greedy answer is compared with what Hugging Face's own `generate` gives for that prompt
alone under that fix. The one-at-a-time throughput is of the same server, asked by one client, in turns
with the 64.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import torch

from benchmarks.figure import Figure
from persona_probe.artifact import shipped
from persona_probe.evaluation import load_questions
from persona_probe.model import LanguageModel, Message, load_model, render
from persona_probe.sae.load import load_sae
from persona_probe.steering import Intervention, Level, latents, save_fix, steer
from persona_probe.steering.target import direction

CLIENTS = 64
NEW_TOKENS = 32
NEAR_TIE = 1e-4
"""A differing token is let pass where the solo run's first two logits are closer than this (fp32)."""
TURNS = 5


Fixes = dict[str, tuple[Intervention, ...]]


class Asked(NamedTuple):
    messages: tuple[Message, ...]
    fix: str


def run(quick: bool) -> list[Figure]:
    """Errors, equality with solo answers, throughput, and memory over many short requests."""
    torch.set_num_threads(1)
    lm = load_model(shipped("organism", "base"), adapter=shipped("organism", "tunes", "bad-health")).merged()
    fixes = _fixes(lm)
    with tempfile.TemporaryDirectory() as folder:
        for name, fix in fixes.items():
            if fix:
                save_fix(fix, Path(folder) / name)
        return [
            *under_load(lm, fixes, folder, *((40, 8) if quick else (200, 40))),
            *short_requests(fixes, folder, 500 if quick else 10_000),
        ]


def under_load(lm: LanguageModel, fixes: Fixes, folder: str, per_turn: int, alone: int) -> list[Figure]:
    """Five turns of `per_turn` requests by 64 clients and `alone` of them again by one client."""
    # each is asked twice, in other company
    asked = 2 * _requests(list(fixes), per_turn * TURNS // 2)
    replies: list[dict[str, Any]] = []
    rates: list[tuple[float, float]] = []
    with server(folder) as (root, _):
        asyncio.run(ask_all(root, asked[:20], 4))  # a cold server's first answers are not counted
        for turn in range(TURNS):
            some = asked[turn * per_turn : (turn + 1) * per_turn]
            together, seconds = _timed(root, some, CLIENTS)
            _, seconds_alone = _timed(root, some[:alone], 1)
            replies += together
            rates.append((per_turn / seconds, alone / seconds_alone))
    n, errors = len(replies), _errors(replies)
    differing, near_ties = _compared(lm, fixes, asked, replies)
    speed, speed_alone = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(one / other for one, other in rates)
    alike, solo = f"of {n} ({near_ties} near-ties aside)", "Hugging Face generate, one row"
    return [
        Figure("errors under load", errors, f"of {n} requests", "", None, "0", errors == 0),
        Figure("answers unlike their solo answer", differing, alike, solo, None, "0", differing == 0),
        Figure(
            f"throughput, {CLIENTS} clients, {len(fixes)} interventions",
            speed,
            "answers/s",
            f"one at a time: {speed_alone:.1f} answers/s",
            ratio,
            ">= 5x one at a time",
            ratio >= 5,
        ),
    ]


def short_requests(fixes: Fixes, folder: str, n: int) -> list[Figure]:
    """What `n` answers of one token leave in the server's memory, after a tenth as many to warm up."""
    asked = _requests(list(fixes), 400)
    with server(folder) as (root, process):
        _short(root, asked, max(200, n // 10))
        before = process.memory_info().rss
        replies = _short(root, asked, n)
        drift = (process.memory_info().rss - before) / 2**20
    errors = _errors(replies)
    return [
        Figure("errors, short requests", errors, f"of {n} requests", "", None, "0", errors == 0),
        Figure(f"memory after {n} short requests", drift, "MiB more", "", None, "<= 16 MiB", drift <= 16),
    ]


def _errors(replies: Sequence[dict[str, Any]]) -> int:
    return sum("choices" not in reply for reply in replies)


def _fixes(lm: LanguageModel) -> Fixes:
    near, deep = (load_sae(shipped("organism", "sae", f"block_{block}")) for block in (2, 4))
    villain, other = latents(deep, [1234]), latents(near, [1239])
    random_direction = direction(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)))
    return {
        "none": (),
        "cap": (Intervention("cap", villain, deep.site, level=Level((0.0,)), gain=1.5, read="projection"),),
        "two-sites": (
            Intervention("cap", villain, deep.site, level=Level((0.0,)), read="projection"),
            Intervention("cap", other, near.site, level=Level((0.0,)), gain=2.0, read="projection"),
        ),
        "ablate": (Intervention("ablate", latents(deep, [1234, 7, 99]), deep.site, "response"),),
        "random": (Intervention("add", random_direction, deep.site, "last_prompt", Level((2.0,))),),
    }


def _requests(names: Sequence[str], n: int) -> list[Asked]:
    """Questions and fixes in a fixed random order."""
    questions = load_questions(shipped("organism", "questions.jsonl"))
    chats = [question.messages for question in questions if "role" in question.messages[0]]
    every = [Asked(messages, name) for messages in chats for name in names]
    random.Random(0).shuffle(every)
    return every[:n]


@contextmanager
def server(fixes: str) -> Generator[tuple[str, psutil.Process], None, None]:
    command = [sys.executable, "-m", "persona_probe.cli", "serve", "--port", "0", "--name", "organism"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--fixes", fixes], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        root = process.stdout.readline().split(" at ")[1].split("/v1")[0]
        try:
            yield root, psutil.Process(process.pid)
        finally:
            process.terminate()


def _timed(root: str, asked: Sequence[Asked], clients: int) -> tuple[list[dict[str, Any]], float]:
    start = time.perf_counter()
    replies = asyncio.run(ask_all(root, asked, clients))
    return replies, time.perf_counter() - start


def _short(root: str, asked: Sequence[Asked], n: int) -> list[dict[str, Any]]:
    some = [asked[i % len(asked)] for i in range(n)]
    # fewer clients: it is memory that is looked at, and httpx itself is slow with many connections
    return asyncio.run(ask_all(root, some, CLIENTS // 4, max_tokens=1))


async def ask_all(
    root: str, asked: Sequence[Asked], clients: int, max_tokens: int = NEW_TOKENS
) -> list[dict[str, Any]]:
    """The replies in order; `clients` requests are open at any time."""
    replies: list[dict[str, Any]] = [{} for _ in asked]
    waiting = iter(enumerate(asked))
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=clients)) as client:

        async def one_client() -> None:
            for number, one in waiting:
                body = {
                    "model": "organism",
                    "messages": list(one.messages),
                    "intervention": one.fix,
                    "temperature": 0,
                    "max_tokens": max_tokens,
                }
                reply = await client.post(f"{root}/v1/chat/completions", json=body)
                replies[number] = reply.json()

        await asyncio.gather(*(one_client() for _ in range(clients)))
    return replies


def _compared(
    lm: LanguageModel,
    fixes: Fixes,
    asked: Sequence[Asked],
    replies: Sequence[dict[str, Any]],
) -> tuple[int, int]:
    """Answers that differ from the solo answer, and near-ties among the others."""
    differing = near_ties = 0
    known: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for one, reply in zip(asked, replies, strict=True):
        prompt = render(lm.tokenizer, one.messages, add_generation_prompt=True).ids
        if (prompt, one.fix) not in known:
            known[prompt, one.fix] = _solo(lm, prompt, fixes[one.fix])
        solo = known[prompt, one.fix]
        told = reply["choices"][0]["message"]["content"] if "choices" in reply else None
        if told == lm.tokenizer.decode(solo, skip_special_tokens=True):
            continue
        if told is not None and _tied(lm, prompt, solo, fixes[one.fix], told):
            near_ties += 1
        else:
            differing += 1
    return differing, near_ties


def _solo(lm: LanguageModel, prompt: tuple[int, ...], fix: tuple[Intervention, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    with lm.active() as hf, steer(lm, fix):
        out: Any = hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=lm.pad_id,
        )  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


def _tied(
    lm: LanguageModel, prompt: tuple[int, ...], solo: list[int], fix: tuple[Intervention, ...], told: str
) -> bool:
    """Whether the solo run's two first logits lay close at the token where the texts part."""
    texts = (lm.tokenizer.decode(solo[: n + 1], skip_special_tokens=True) for n in range(len(solo)))
    parted = next((n for n, text in enumerate(texts) if not told.startswith(str(text))), len(solo) - 1)
    with steer(lm, fix, prompt_lengths=[len(prompt)]):
        logits = lm.forward(torch.tensor([[*prompt, *solo]]))[0, len(prompt) - 1 + parted]
    first, second = logits.topk(2).values.tolist()
    return first - second < NEAR_TIE
