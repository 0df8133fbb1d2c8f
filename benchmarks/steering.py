"""Steering: what it costs against no steering and against the peers.

A random Llama of 8 blocks and d_model 512 with a random dictionary of 16,384 latents tells the time:
no latent's meaning matters to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.figure import Figure, medians
from persona_probe.artifact import shipped
from persona_probe.model.checkpoint import Checkpoint
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.sae.load import Dictionary, from_sae_lens
from persona_probe.steering import Condition, Intervention, Level, SteeringPlan, latents, steer

SITE = "blocks.3.hook_resid_post"
PROMPT = 16


def run(quick: bool) -> Iterator[Figure]:
    """What costs nothing first."""
    with torch.no_grad():
        case = Case.of(quick)
        yield from nothing_is_nothing(case)
        yield from against_peers(case, quick)
        yield from many_rows(case, quick)


@dataclass(frozen=True, eq=False)
class Case:
    """The model that tells the time, and its dictionary as sae-lens has it and as we do."""

    lm: LanguageModel
    sae: JumpReLUSAE
    dictionary: Dictionary
    new_tokens: int

    @classmethod
    def of(cls, quick: bool) -> Case:
        torch.manual_seed(0)
        width, d_sae = (128, 1024) if quick else (512, 16_384)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            eos_token_id=None,
            bos_token_id=None,
            pad_token_id=0,
        )
        lm = LanguageModel(Checkpoint("memory:llama"), LlamaForCausalLM(config).eval(), _tokenizer())
        sae = JumpReLUSAE(
            JumpReLUSAEConfig(
                d_in=width, d_sae=d_sae, metadata=SAEMetadata(hook_name=SITE, model_name="random")
            )
        )
        sae.W_dec.data = torch.nn.functional.normalize(torch.randn(d_sae, width), dim=-1)
        sae.W_enc.data = sae.W_dec.data.T.contiguous()
        sae.threshold.data.fill_(0.5)
        return cls(lm, sae, from_sae_lens(sae), 8 if quick else 64)

    def clamp(self, latent: int, level: float = 3.0) -> Intervention:
        """One latent put at a level on every token."""
        return Intervention("clamp", latents(self.dictionary, [latent]), SITE, level=Level((level,)))

    def prompts(self, rows: int) -> torch.Tensor:
        return torch.randint(2, 4000, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))

    def generate(self, ids: torch.Tensor, fix: Any = ()) -> torch.Tensor:
        """Greedy, by Hugging Face's own generate; steered where there is a fix."""
        with steer(self.lm, fix) if fix else nullcontext():
            return self.lm.hf.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )


def against_peers(case: Case, quick: bool) -> Iterator[Figure]:
    """8 rows, one clamped latent."""
    ids, fix = case.prompts(8), case.clamp(7)
    bridge, spliced = _bridge(case), _bridge(case, SAETransformerBridge)
    spliced.add_sae(case.sae, use_error_term=True)
    inner = spliced.get_sae_hook_name(case.sae)

    def clamp(acts: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001
        acts[..., 7] = 3.0
        return acts

    def by(model: Any, hooks: Sequence[tuple[str, Callable[..., Any]]]) -> torch.Tensor:
        with model.hooks(fwd_hooks=list(hooks)):
            return model.generate(
                ids,
                max_new_tokens=case.new_tokens,
                do_sample=False,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )

    plain, one, shape = "unsteered generate", "one clamped latent", f"8 rows x {case.new_tokens} new tokens"
    lens, spliced_in = "TransformerLens generate, one hook", "sae-lens SAETransformerBridge, error term on"
    ours = lambda: case.generate(ids, fix)  # noqa: E731
    # a few per cent are asked for: these two take more turns than the peers, which are far off
    near = medians({plain: lambda: case.generate(ids), one: ours}, repeats=1 if quick else 7)
    cost = near[one] / near[plain]
    yield Figure(f"{one}, {shape}", near[one], "s", plain, cost, "<= 1.05x", cost <= 1.05)
    contenders: dict[str, Callable[[], object]] = {
        plain: lambda: case.generate(ids),
        one: ours,
        lens: lambda: by(bridge, fix.fwd_hooks()),
        spliced_in: lambda: by(spliced, [(inner, clamp)]),
    }
    taken = medians(contenders, repeats=1 if quick else 3)
    gain = taken[spliced_in] / taken[one]
    yield Figure(f"{one}, {shape}", taken[one], "s", spliced_in, gain, ">= 1.5x faster", gain >= 1.5)
    yield Figure(f"{lens}, {shape}", taken[lens], "s", plain, taken[lens] / taken[plain])
    same = torch.equal(case.generate(ids, fix), by(spliced, [(inner, clamp)]))
    yield Figure("and the same tokens", float(same), "of 1", spliced_in, bar="the same clamp", holds=same)


def many_rows(case: Case, quick: bool) -> Iterator[Figure]:
    """64 rows, each with an intervention of its own."""
    rows = 64
    ids = case.prompts(rows)
    plan = SteeringPlan(tuple((case.clamp(row, 2 + row / 8),) for row in range(rows)))
    plain, unsteered = "the unsteered batch", lambda: case.generate(ids)
    taken = medians({plain: unsteered, "ours": lambda: case.generate(ids, plan)}, 1 if quick else 3)
    ratio = taken["ours"] / taken[plain]
    yield Figure("64 rows, 64 interventions", taken["ours"], "s", plain, ratio, "<= 1.10x", ratio <= 1.10)


def nothing_is_nothing(case: Case) -> Iterator[Figure]:
    """Logits under fixes that must not change a bit."""
    ids = case.prompts(8)
    plain = case.lm.forward(ids)
    never = Intervention("ablate", latents(case.dictionary, [7]), SITE, condition=Condition("above", 1e9))
    asked = Condition("above", 1e9, latents(case.dictionary, [9]), decided="prompt")
    gated = Intervention("ablate", latents(case.dictionary, [7]), SITE, "response", condition=asked)
    fixes: dict[str, Any] = {
        "gain 0": case.clamp(7).with_gain(0.0),
        "an empty plan": SteeringPlan(((),) * 8),
        "a condition that never holds": never,
        "a condition on the prompt that does not hold": gated,
    }
    for name, fix in fixes.items():
        with steer(case.lm, fix):
            changed = int((case.lm.forward(ids) != plain).sum())
        yield Figure(f"logits changed by {name}", changed, "logits", "unsteered", bar="0", holds=not changed)


def _bridge(case: Case, kind: Any = None) -> Any:
    if kind is None:
        return case.lm.bridge()
    tree: Any = copy.deepcopy(case.lm.hf)
    tree.config.architectures = [type(tree).__name__]
    tokenizer = copy.deepcopy(case.lm.tokenizer)
    return kind.boot_transformers(case.lm.checkpoint.path, hf_model=tree, tokenizer=tokenizer)


def _tokenizer() -> PreTrainedTokenizerBase:
    return load_model(shipped("organism") / "base").tokenizer
