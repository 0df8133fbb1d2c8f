"""Capture and diffing against the usual recipe, and against the least work there is.

The workload: a Llama-architecture model of random weights (d_model 512, 8 layers, MLP 1,376), the site
behind block 4, a JumpReLU dictionary of 16,384 latents of which about 64 fire on a token, ragged chats
of 12 to 400 tokens (log-normal, median 70). Every contender reads the same chats and comes to the same
mean activations, which is checked.

The floor is the matrix products of the forward pass up to the site and of the encoder, on real tokens
only: no padding, no norms, no softmax, nothing counted.

The recipe writes every latent of every token to memory, so its time moves more than ours with what else
a host is doing.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.figure import Figure, medians
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import batch_tokens_for, buckets, joined, stream
from persona_probe.artifact import shipped
from persona_probe.diffing.diff import diff
from persona_probe.diffing.levels import latent_means
from persona_probe.diffing.passes import Placement, Reading, pass_of
from persona_probe.diffing.shards import ENCODED_TOGETHER
from persona_probe.execution import Results, Share
from persona_probe.model import LanguageModel, ModelPair, load_model
from persona_probe.model.chat import Rendered
from persona_probe.model.loading import quietly
from persona_probe.sae.encode import BLOCK_LATENTS, BLOCK_TOKENS, encode
from persona_probe.sae.load import Dictionary, from_sae_lens

BLOCK, D_MODEL, LAYERS, D_MLP, D_SAE, L0, VOCABULARY = 4, 512, 8, 1376, 16_384, 64, 4096
SITE = f"blocks.{BLOCK}.hook_resid_post"
EVERYTHING = TokenMask("all", drop_special=False)


@dataclass(frozen=True, eq=False)
class Workload:
    """What every contender is given."""

    lm: LanguageModel
    tuned: LanguageModel
    bridge: Any
    """TransformerLens's, on the same tensors."""
    sae: JumpReLUSAE
    dictionary: Dictionary
    chats: list[Rendered]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.chats))


def run(quick: bool) -> Iterator[Figure]:
    """The figures; `quick` reads a fifth or less."""
    yield from speed(quick)
    yield from memory(quick)
    yield from processes(quick)
    yield from exactness()


def workload(n_chats: int) -> Workload:
    """Model, a fine-tune of it, dictionary and chats, from fixed seeds."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        lm = _saved(Path(folder) / "base", seed=0)
        tuned = _saved(Path(folder) / "tuned", seed=0, noise=1e-3)
        bridge = lm.bridge()
    chats = list(Chats(n_chats, VOCABULARY))
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=SAEMetadata(hook_name=SITE)))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        decoder = torch.randn(D_SAE, D_MODEL, generator=generator)
        sae.W_dec.copy_(decoder / decoder.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.threshold.fill_(threshold(lm, chats, SITE, sae.W_enc, L0))
    return Workload(lm, tuned, bridge, sae, from_sae_lens(sae), chats)


@torch.no_grad()
def threshold(lm: LanguageModel, chats: Sequence[Rendered], site: str, encoder: Tensor, l0: int) -> float:
    """Where about `l0` latents fire on a token."""
    sample = next(stream([lm], chats[:20], [site], EVERYTHING)).activations[0, site][:256]
    return float((sample @ encoder).topk(l0, dim=1).values[:, -1].mean())


def speed(quick: bool) -> list[Figure]:
    """Wall time of the contenders, who take turns."""
    work = workload(8 if quick else 64)
    own_work = {"persona_probe": lambda: ours(work)}
    near = own_work | {"a pair": lambda: pair(work), "the matrix products": lambda: floor(work)}
    far = own_work | {
        "the usual recipe": lambda: recipe(work, stop=True),
        "the recipe without stop_at_layer": lambda: recipe(work, stop=False),
        "nnsight": lambda: with_nnsight(work),
    }
    expected = recipe(work, stop=True)
    for name in ("persona_probe", "the recipe without stop_at_layer", "nnsight"):
        # rounding moves single tokens across a latent's threshold, so not entry by entry
        apart = float((far[name]() - expected).norm() / expected.norm())
        if apart > 1e-3:
            raise RuntimeError(f"{name} comes to other means than the usual recipe: {apart:.2g} apart")
    peers = medians(far, repeats=1 if quick else 5)
    close = medians(near, repeats=1 if quick else 9)  # bars that a slow second would break

    def against(name: str, bar: float | None) -> Figure:
        own = peers["persona_probe"]
        ratio = peers[name] / own
        return Figure(
            f"latent means of {work.tokens:,} tokens", own, "s", f"{name}: {peers[name]:.2f} s", ratio,
            None if bar is None else f">= {bar:g}x faster", None if bar is None else ratio >= bar,
        )  # fmt: skip

    own = close["persona_probe"]
    least = own / close["the matrix products"]
    double = close["a pair"] / own
    return [
        against("the usual recipe", 3.0),
        against("the recipe without stop_at_layer", None),
        against("nnsight", None),
        Figure(
            "latent means", own, "s", f"the matrix products: {close['the matrix products']:.2f} s", least,
            "<= 1.4x", least <= 1.4,
        ),
        Figure(
            "diff of a pair", close["a pair"], "s", f"one model: {own:.2f} s", double,
            "<= 2.05x", double <= 2.05,
        ),
        Figure("speed", work.tokens / own, "tokens/s", f"{torch.get_num_threads()} threads"),
    ]  # fmt: skip


def ours(work: Workload) -> Tensor:
    """Mean activation per latent: over tokens, then over chats."""
    table = latent_means(work.lm, work.dictionary, work.chats, mask=EVERYTHING).sort("index")
    return table["mean"].to_torch().float()


def pair(work: Workload) -> None:
    diff(ModelPair(work.lm, work.tuned), work.dictionary, work.chats, mask=EVERYTHING)


@torch.no_grad()
def recipe(work: Workload, *, stop: bool) -> Tensor:
    """What notebooks do: 16 chats at a time as they come, the cache of one hook, the whole encoding."""
    total = torch.zeros(D_SAE)
    options = {"stop_at_layer": BLOCK + 1} if stop else {}
    for ids, real in batches(work.chats, 16):
        _, cache = work.bridge.run_with_cache(ids, names_filter=[SITE], attention_mask=real.long(), **options)
        total += chat_means(work.sae.encode(cache[SITE]), real)
    return total / len(work.chats)


@torch.no_grad()
def with_nnsight(work: Workload) -> Tensor:
    """The recipe with nnsight's tracing."""
    import nnsight

    traced = nnsight.NNsight(work.lm.hf)
    total = torch.zeros(D_SAE)
    for ids, real in batches(work.chats, 16):
        with traced.trace(ids, attention_mask=real.long()):
            hidden = traced.model.layers[BLOCK].output.save()
        total += chat_means(work.sae.encode(hidden if isinstance(hidden, Tensor) else hidden[0]), real)
    return total / len(work.chats)


def batches(chats: Sequence[Rendered], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids, padded on the right, and which of them are real."""
    for start in range(0, len(chats), size):
        rows = chats[start : start + size]
        width = max(map(len, rows))
        ids = torch.tensor([[*row.ids, *[0] * (width - len(row))] for row in rows])
        yield ids, torch.arange(width) < torch.tensor([[len(row)] for row in rows])


def chat_means(latents: Tensor, real: Tensor) -> Tensor:
    """Sum over chats of the mean over a chat's tokens."""
    return ((latents * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)).sum(dim=0)


@torch.no_grad()
def floor(work: Workload) -> None:
    """Every matrix product of the truncated forward pass and of the encoder, on as many tokens."""
    layer: Any = work.lm.hf.model.layers[0]
    heads = work.lm.hf.config.num_attention_heads
    lengths = [len(chat) for chat in work.chats]
    for group in buckets(lengths, batch_tokens_for(torch.device("cpu"))):
        x = torch.randn(sum(lengths[i] for i in group), D_MODEL)
        for _ in range(BLOCK + 1):
            q, k, v = layer.self_attn.q_proj(x), layer.self_attn.k_proj(x), layer.self_attn.v_proj(x)
            for part in zip(*(each.split([lengths[i] for i in group]) for each in (q, k, v)), strict=True):
                one, two, three = (each.view(len(each), heads, -1).transpose(0, 1) for each in part)
                torch.matmul(torch.matmul(one, two.transpose(1, 2)), three)
            layer.self_attn.o_proj(q)
            wide = layer.mlp.gate_proj(x)
            layer.mlp.up_proj(x)
            layer.mlp.down_proj(wide)
        for some in range(0, D_SAE, BLOCK_LATENTS):
            encoder = work.dictionary.W_enc[:, some : some + BLOCK_LATENTS].contiguous()
            for start in range(0, len(x), BLOCK_TOKENS):
                torch.mm(x[start : start + BLOCK_TOKENS], encoder)


def memory(quick: bool) -> list[Figure]:
    """Peak memory of a diff of tiny models, over a hundred times as many tokens; each in a process of
    its own.
    """
    few, many = 10_000, (100_000 if quick else 1_000_000)
    low, high = (_peak(tokens) for tokens in (few, many))
    ratio = high / low
    return [
        Figure(
            f"peak memory of a diff of {many:,} tokens", high / 2**20, "MiB",
            f"{few:,} tokens: {low / 2**20:.0f} MiB", ratio, "within 10%", ratio <= 1.1,
        )
    ]  # fmt: skip


def processes(quick: bool) -> list[Figure]:
    """The work of one process, and of each of two that share the shards."""
    tokens = 50_000 if quick else 200_000
    with tempfile.TemporaryDirectory() as folder:
        alone = _child("_share", 0, 1, tokens, f"{folder}/one").wait_for()
        both = [_child("_share", i, 2, tokens, f"{folder}/two") for i in range(2)]
        shared = [each.wait_for() for each in both]
        same = {f.name: f.read_bytes() for f in Path(folder, "one").iterdir()} == {
            f.name: f.read_bytes() for f in Path(folder, "two").iterdir()
        }
    most = max(each["cpu_seconds"] for each in shared)
    wall = max(each["seconds"] for each in shared)
    return [
        Figure(
            f"work of each of two processes, {tokens:,} tokens", most, "s of CPU",
            f"one process: {alone['cpu_seconds']:.1f} s; the same files: {'yes' if same else 'NO'}",
            most / alone["cpu_seconds"], "halves (<= 0.6x)", same and most <= 0.6 * alone["cpu_seconds"],
        ),
        Figure(
            "wall time of two processes", wall, "s", f"one process: {alone['seconds']:.1f} s",
            wall / alone["seconds"],
        ),
    ]  # fmt: skip


def exactness() -> list[Figure]:
    """Every statistic of a diff against fp64 loops over the same activations and encodings, as a share
    of the mean activation.
    """
    models, dictionary, chats = tiny(80, d_sae=256)
    clusters = [str(i // 2) for i in range(len(chats))]
    table = diff(ModelPair(*models), dictionary, chats, clusters, mask=EVERYTHING).table.sort("index")
    means = np.zeros((2, len(chats), 256))
    fires = np.zeros_like(means)
    for chunk in joined(stream(models, chats, [dictionary.site], EVERYTHING), ENCODED_TOGETHER):
        for i in range(2):
            codes = encode(dictionary, chunk.activations[i, dictionary.site]).dense().double().numpy()
            for document in chunk.document.unique().tolist():
                own = codes[chunk.document.numpy() == document]
                for latent in range(256):
                    means[i, document, latent] = math.fsum(own[:, latent]) / len(own)
                    fires[i, document, latent] = (own[:, latent] > 0).sum() / len(own)
    shift = means[1] - means[0]
    expected = {
        "mean_base": means[0].mean(0), "mean_tuned": means[1].mean(0), "delta": shift.mean(0),
        "fires_base": fires[0].mean(0), "fires_tuned": fires[1].mean(0),
    }  # fmt: skip
    k = len(chats) // 2
    left = (shift - shift.mean(0)).reshape(k, 2, -1).sum(1)
    error = np.sqrt(k / (k - 1) * (left**2).sum(0)) / len(chats)
    from scipy import stats

    half = stats.t.ppf(0.975, k - 1) * error
    expected |= {"low": expected["delta"] - half, "high": expected["delta"] + half}
    typical = float(means.mean())
    worst = max(float(np.abs(table[name].to_numpy() - value).max()) for name, value in expected.items())
    return [
        Figure(
            "largest error of any statistic", worst / typical, "of the mean activation",
            "loops in fp64", None, "<= 1e-6", worst <= 1e-6 * typical,
        )
    ]  # fmt: skip


class Chats(Sequence[Rendered]):
    """Random chats of 12 to 400 tokens, each made when it is read."""

    def __init__(self, n: int, vocabulary: int) -> None:
        drawn = np.exp(np.random.default_rng(0).normal(math.log(70), 0.7, n))
        self._lengths = drawn.round().clip(12, 400).astype(int)
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> Rendered: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rendered]: ...
    def __getitem__(self, index: int | slice) -> Rendered | list[Rendered]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if index >= len(self):
            raise IndexError(index)
        length = int(self._lengths[index])
        ids = np.random.default_rng(index).integers(10, self._vocabulary, length).tolist()
        prompt = length // 2
        return Rendered(tuple(ids), (False,) * prompt + (True,) * (length - prompt), prompt)


def tiny(n_chats: int, d_sae: int = 1024) -> tuple[list[LanguageModel], Dictionary, Chats]:
    """A tiny pair and its dictionary, for what does not depend on size."""
    with tempfile.TemporaryDirectory() as folder:
        small = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        models = [_saved(Path(folder) / str(i), 0, 1e-2 * i, **small) for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(d_sae, 64, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    site, encoder = "blocks.1.hook_resid_post", decoder.T.contiguous()
    chats = Chats(n_chats, VOCABULARY)
    least = threshold(models[0], chats, site, encoder, 16)
    dictionary = Dictionary(
        site=site, W_enc=encoder, b_enc=torch.zeros(d_sae), W_dec=decoder, b_dec=torch.zeros(64),
        threshold=torch.full((d_sae,), least), activation="jumprelu", k=None, apply_b_dec_to_input=False,
        normalisation="none", path="random", digest="sha256:tiny",
    )  # fmt: skip
    return models, dictionary, chats


def _saved(folder: Path, seed: int, noise: float = 0.0, **shape: int) -> LanguageModel:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": D_MODEL, "intermediate_size": D_MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "max_position_embeddings": 512,
    } | shape  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    with quietly():
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(shipped("organism", "base")).save_pretrained(folder)
    return load_model(folder, device="cpu")


def _peak(tokens: int) -> int:
    return int(_child("_memory", tokens).wait_for()["peak"])


def _memory(tokens: int) -> dict[str, float]:
    models, dictionary, chats = tiny(tokens // 88)
    diff(ModelPair(*models), dictionary, chats, mask=EVERYTHING)
    # not getrusage, which begins with what the process that started this one held
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak": int(status["VmHWM"].split()[0]) * 1024}


def _share(index: int, of: int, tokens: int, folder: str) -> dict[str, float]:
    torch.set_num_threads(1)
    models, dictionary, chats = tiny(tokens // 88)
    one = pass_of(models[0], models, [dictionary], EVERYTHING, None, Placement(torch.device("cpu")))
    reading = Reading([one], chats, None, Results(folder))
    start, cpu = time.perf_counter(), time.process_time()
    reading.run(Share(index, of))
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


class _child:
    """A function of this module in a process of its own."""

    def __init__(self, name: str, *args: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.capture", name, *map(str, args)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip

    def wait_for(self) -> dict[str, float]:
        said, _ = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError("a benchmark's process failed")
        return json.loads(said.splitlines()[-1])


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    called = {"_memory": _memory, "_share": _share}[name]
    print(json.dumps(called(*(int(a) if a.isdigit() else a for a in arguments))))
