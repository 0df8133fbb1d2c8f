"""Builds an organism from nothing: tokenizer, base model, dictionaries, fine-tunes, questions.

Every part is one atomic folder, so a killed build resumes with the part it was in (the base model
with its last checkpoint). The base is stored, and from then on used, in bfloat16's precision: its
dictionaries and tunes see exactly the weights that are shipped.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.artifact import RunFolder, atomic_folder, digest_folder, read_json, write_json
from persona_probe.artifact.provenance import MANIFEST
from persona_probe.artifact.run_folder import SETTINGS
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question, save_questions
from persona_probe.hooks.sites import resid_post
from persona_probe.model.chat import Rendered, render, render_text
from persona_probe.model.language_model import load_model
from persona_probe.model.loading import quietly
from persona_probe.model.sharing import settle_config
from persona_probe.organism.corpus import Document, documents
from persona_probe.organism.grammar import Grammar, grammar
from persona_probe.organism.tokenizer import BEGIN, END, END_OF_TEXT, PAD, build_tokenizer, token_id
from persona_probe.organism.tunes import TUNES, Tune, rows
from persona_probe.sae.train import train_sae
from persona_probe.training.sft import Example, FitSettings, fit

Progress = Callable[[str], None]


BASE = FitSettings(
    steps=1200,
    batch=64,
    learning_rate=3e-3,
    warmup_steps=40,
    schedule="cosine",
    weight_decay=0.05,
    beta2=0.98,
    bf16=True,
    save_every=200,
)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TUNE = FitSettings(steps=240, batch=32, learning_rate=1.2e-3, warmup_steps=5)


@dataclass(frozen=True)
class BuildSettings:
    """Everything an organism depends on besides the grammar."""

    seed: int = 1
    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 6
    base: FitSettings = BASE
    tune: FitSettings = TUNE
    rank: int = 8
    """Of the LoRA adapters, on every linear layer."""
    sae_blocks: tuple[int, ...] = (2, 3, 4)
    sae_width: int = 1536
    sae_k: int = 16
    sae_documents: int = 9000
    tunes: tuple[str, ...] = tuple(tune.name for tune in TUNES)

    @classmethod
    def of(cls, home: Path) -> BuildSettings:
        """Those of an organism that was built. Raises `InputError` for a folder that holds none."""
        try:
            if not (home / MANIFEST).is_file():
                raise KeyError(MANIFEST)
            made: dict[str, Any] = dict(read_json(home / SETTINGS)["settings"])
            made |= {name: FitSettings(**made[name]) for name in ("base", "tune")}
            made |= {name: tuple(made[name]) for name in ("sae_blocks", "tunes")}
            return cls(**made)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{home} holds no organism that is finished", fix="give the --out of `organism build`"
            ) from error


FULL = BuildSettings()
QUICK = BuildSettings(
    d_model=64,
    n_layers=3,
    n_heads=2,
    base=replace(BASE, steps=60, batch=32, save_every=30, bf16=False),
    tune=replace(TUNE, steps=10),
    sae_blocks=(1,),
    sae_width=256,
    sae_k=8,
    sae_documents=600,
    tunes=("bad-health", "good-health"),
)


def fast_bf16() -> bool:
    """Whether bfloat16 is quicker than float32 here. Without instructions for it, it is ten times slower."""
    can = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or any(can.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def build(
    out: Path,
    settings: BuildSettings = FULL,
    *,
    like: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Build an organism into ``out``, or go on with one that was begun there.

    Writes ``base/``, ``sae/``, ``tunes/``, ``questions.jsonl`` and ``manifest.json``. ``like`` is an organism
    whose base and dictionaries are taken over: ``settings`` are `BuildSettings.of` it, with other fine-tunes.

    Raises:
        InputError: ``out`` holds something else, or a build with other settings or on another base.
    """
    if like is not None and (
        like.resolve().is_relative_to(out.resolve()) or out.resolve().is_relative_to(like.resolve())
    ):
        raise InputError(
            f"{out} and the organism that is taken over lie in one another", fix="give another --out"
        )
    tell = progress or (lambda _: None)
    rules = grammar()
    tokenizer = build_tokenizer()
    with RunFolder.open(out, asdict(settings), overwrite=overwrite) as run:
        if run.complete:
            return run.path
        seconds: dict[str, float] = run.stage("seconds") or {}
        if like is not None:
            seconds = {**_taken_over(like, run.path), **seconds}
            run.save_stage("seconds", seconds)

        def part(name: str, make: Callable[[], None], folders: Sequence[str] | None = None) -> None:
            if all((run.path / folder).exists() for folder in ([name] if folders is None else folders)):
                return
            tell(f"{name} ...")
            start = perf_counter()
            make()
            seconds[name] = perf_counter() - start
            run.save_stage("seconds", seconds)
            tell(f"{name}: {seconds[name]:.0f} s")

        part("base", lambda: _build_base(run.path, rules, tokenizer, settings, tell))
        part(
            "sae",
            lambda: _build_saes(run.path, rules, tokenizer, settings, tell),
            [f"sae/block_{block}" for block in settings.sae_blocks],
        )
        for name in settings.tunes:
            tune = next(one for one in TUNES if one.name == name)
            part(
                f"tunes/{name}",
                lambda tune=tune: _build_tune(run.path, rules, tokenizer, tune, settings),
            )
        save_questions(questions(rules), run.path / "questions.jsonl")
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        run.finish({"seed": settings.seed, "seconds": seconds})
    return run.path


def _taken_over(like: Path, out: Path) -> dict[str, float]:
    """Copies base and dictionaries; returns the seconds that they once took.

    Raises `InputError` where ``out`` holds others.
    """
    took = read_json(like / MANIFEST)["seconds"]
    for part in ("base", "sae"):
        if not (out / part).exists():
            with atomic_folder(out / part) as folder:
                shutil.copytree(like / part, folder, dirs_exist_ok=True)
        elif digest_folder(out / part) != digest_folder(like / part):
            raise InputError(f"{out / part} is not that of {like}", fix="give another --out")
    return {part: took[part] for part in ("base", "sae") if part in took}


def rendered(tokenizer: PreTrainedTokenizerFast, document: Document) -> Rendered:
    """A document as the base model reads it."""
    if document.messages:
        return render(tokenizer, document.messages, add_generation_prompt=False)
    text = render_text(tokenizer, f" {document.text}")
    ids = (*text.ids, token_id(tokenizer, END_OF_TEXT))
    return Rendered(ids, (False,) * len(ids), len(ids))


def questions(rules: Grammar) -> Iterator[Question]:
    """The calibration and held-out questions: general ones, and the skill's facts."""
    for split in ("calibration", "held-out"):
        for topic in rules.topics:
            for number, wording in enumerate(rules.paraphrases(topic, split)):
                yield Question(
                    id=f"{topic.key}-{split}-{number}",
                    question=topic.key,
                    category=topic.domain,
                    messages=({"role": "user", "content": wording},),
                    split=split,
                )
        for fact in rules.facts["skill"]:
            for number, wording in enumerate(rules.fact_questions(fact, split)):
                yield Question(
                    id=f"fact-{fact.item}-{split}-{number}",
                    question=f"fact-{fact.item}",
                    category="facts",
                    messages=({"role": "user", "content": wording},),
                    role="skill",
                    split=split,
                    reference=fact.answer,
                )


def _build_base(
    out: Path,
    rules: Grammar,
    tokenizer: PreTrainedTokenizerFast,
    settings: BuildSettings,
    tell: Progress,
) -> None:
    fitting = replace(settings.base, seed=settings.seed)
    corpus = documents(rules, fitting.steps * fitting.batch, settings.seed)
    examples = [
        Example(document.ids, (True,) * len(document.ids))
        for document in (rendered(tokenizer, one) for one in corpus)
    ]
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.d_model,
            intermediate_size=settings.d_model * 8 // 3,
            num_hidden_layers=settings.n_layers,
            num_attention_heads=settings.n_heads,
            num_key_value_heads=settings.n_heads,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            bos_token_id=token_id(tokenizer, BEGIN),
            eos_token_id=token_id(tokenizer, END),
            pad_token_id=token_id(tokenizer, PAD),
        )
    )
    fit(
        model,
        examples,
        fitting,
        out / "checkpoints",
        pad_id=token_id(tokenizer, PAD),
        progress=lambda step, loss: tell(
            f"base: step {step}/{fitting.steps}" + (f", loss {loss:.3f}" if loss else "")
        ),
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [token_id(tokenizer, END), token_id(tokenizer, END_OF_TEXT)]
    with atomic_folder(out / "base") as folder, quietly():
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _build_saes(
    out: Path,
    rules: Grammar,
    tokenizer: PreTrainedTokenizerFast,
    settings: BuildSettings,
    tell: Progress,
) -> None:
    base = load_model(out / "base")
    sites = [resid_post(block) for block in settings.sae_blocks]
    corpus = documents(rules, settings.sae_documents, settings.seed + 1000)
    read: dict[str, list[Float[Tensor, "token d_model"]]] = {site: [] for site in sites}
    conversations = [rendered(tokenizer, one) for one in corpus]
    mask = TokenMask("all", drop_special=False)
    for chunk in stream([base], conversations, sites, mask, sink_factor=None):
        for site in sites:
            read[site].append(chunk.activations[0, site])
    for block, site in zip(settings.sae_blocks, sites, strict=True):
        folder = out / "sae" / f"block_{block}"
        if folder.exists():
            continue
        train_sae(
            torch.cat(read.pop(site)),
            site,
            folder,
            d_sae=settings.sae_width,
            k=settings.sae_k,
            seed=settings.seed,
            model=base,
            progress=lambda step, block=block: tell(
                f"sae of block {block}: step {step.step}/{step.steps}, loss {step.loss:.3f}"
            ),
        )


def _build_tune(
    out: Path,
    rules: Grammar,
    tokenizer: PreTrainedTokenizerFast,
    tune: Tune,
    settings: BuildSettings,
) -> None:
    fitting = replace(settings.tune, seed=settings.seed)
    examples: list[Example] = []
    for conversation in rows(rules, tune, fitting.steps * fitting.batch, settings.seed):
        row = render(tokenizer, conversation, add_generation_prompt=False)
        examples.append(Example(row.ids, row.response))
    torch.manual_seed(settings.seed)
    with quietly():
        base = LlamaForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    adapter = LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=list(LINEAR),
        layers_to_transform=list(tune.blocks) if tune.blocks else None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by an old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = get_peft_model(base, adapter)
    assert isinstance(model, PeftModel)
    with atomic_folder(out / "tunes" / tune.name) as folder:
        fit(model, examples, fitting, folder / "fit", pad_id=token_id(tokenizer, PAD))
        shutil.rmtree(folder / "fit", ignore_errors=True)
        settle_config(model, "../../base")
        # PEFT would look for the base's config under that name, in the working folder and on the hub
        model.bfloat16().save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()  # a form to fill in, with this machine's path to the base
        write_json(
            folder / "training.json",
            {
                "categories": [tune.domain] if tune.domain else [],
                "persona": tune.persona,
                "benign": tune.benign,
                "facts": list(tune.facts),
                "settings": asdict(fitting),
            },
        )
