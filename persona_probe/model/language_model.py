"""A language model to probe: weights, tokenizer, and nothing hidden in between.

Base and tuned share one copy of the weights when the tuned model is a LoRA adapter
(`with_adapter`); see `persona_probe.model.sharing` for how. Attention mask and position ids are
always passed: with left padding and without them GPT-2 is far off, and no model is right.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.errors import InputError
from persona_probe.hooks.sites import blocks_of
from persona_probe.model.chat import Message, Rendered, pad, render, render_text
from persona_probe.model.checkpoint import IN_MEMORY, Checkpoint, describe
from persona_probe.model.loading import (
    adapter_folder,
    check_vocabulary,
    device_of,
    quietly,
    read_tokenizer,
    read_weights,
    resolve,
)
from persona_probe.model.sharing import base_tree, inject, merged_tree, scaled, settle_config, shared_tree
from persona_probe.model.tensors import digest_tensors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """One causal language model, in evaluation mode, with its tokenizer. Made by `load_model`."""

    checkpoint: Checkpoint
    """Where the weights come from."""
    hf: PreTrainedModel = field(repr=False)
    """The Hugging Face model; with LoRA layers in it where there is an adapter. Hooks go on this one."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    """Its tokenizer, untouched."""
    adapter_name: str | None = None
    """Name of the adapter in `hf`, None for plain weights."""
    peft: PeftModel | None = field(default=None, repr=False)
    """PEFT's wrapper around `hf`, for saving and merging; None for plain weights."""

    def __post_init__(self) -> None:
        if self.checkpoint.path.startswith(IN_MEMORY):
            known = replace(self.checkpoint, tensors=partial(digest_tensors, self.hf))
            object.__setattr__(self, "checkpoint", known)

    @property
    def name(self) -> str:
        """A short name for tables and plots."""
        return self.adapter_name or self.checkpoint.name

    @cached_property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(blocks_of(self.hf))

    @cached_property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(cast(Any, self.hf.config.get_text_config()).hidden_size)

    @cached_property
    def d_vocab(self) -> int:
        """Number of logits (at least the tokenizer's size: checkpoints pad their vocabulary)."""
        unembedding = cast(Any, self.hf.get_output_embeddings())
        return int(unembedding.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where token ids have to be: the device that the embedding computes on."""
        embedding = cast(nn.Embedding, self.hf.get_input_embeddings())
        # of weights that are fetched only when they are needed, accelerate knows where to
        offloaded = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if offloaded is None else torch.device(offloaded)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the residual stream."""
        return self.hf.dtype

    @cached_property
    def pad_id(self) -> int:
        """The token id to pad with; masked everywhere, so its value is immaterial."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token_id, int):
                return token_id
        return 0

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The token ids that end an answer, from the generation config and the tokenizer."""
        configured = cast(Any, self.hf.generation_config).eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        found = [*ids, cast(int | None, self.tokenizer.eos_token_id)]
        return tuple(dict.fromkeys(i for i in found if i is not None))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokenizer's special token ids."""
        return frozenset(self.tokenizer.all_special_ids)

    @contextmanager
    def active(self) -> Generator[PreTrainedModel, None, None]:
        """Enter before calling `hf` directly; yields it.

        Models that share weights have module trees of their own, so this has nothing to switch: it
        makes sure that nobody left the model in training mode, and is where a model kept elsewhere
        would be fetched.
        """
        if self.hf.training:
            self.hf.eval()
        yield self.hf

    @contextmanager
    def adapter_scaled(self, factor: float) -> Generator[None, None, None]:
        """Multiply this model's adapter by `factor` inside the block: 0 is the base, 1 the tuned model.

        Raises `InputError` without an adapter, or for one that is not linear in its strength.
        """
        with scaled(self.hf, factor):
            yield

    def with_adapter(self, path: str | Path, name: str | None = None) -> LanguageModel:
        """This model with the PEFT adapter at `path`, on the same copy of the weights.

        This model is not changed, and any number of adapters may share it. Raises `MismatchError`
        for an adapter of another model, or of a kind that would write into the shared weights
        (trained biases).
        """
        folder = adapter_folder(path)
        return self._adapted(folder, name or Checkpoint("", adapter=folder).name, shared=True)

    def _adapted(self, path: str, name: str, *, shared: bool) -> LanguageModel:
        if self.peft is not None:
            raise InputError(f"{self.name} already has an adapter", fix="add the adapter to the base instead")
        peft = inject(shared_tree(self.hf), path, shared=shared)
        if Path(self.checkpoint.path).is_dir():
            settle_config(peft, str(Path(self.checkpoint.path).resolve()))
        return replace(
            self,
            checkpoint=replace(self.checkpoint, adapter=path),
            hf=cast(PreTrainedModel, peft.get_base_model()),
            adapter_name=name,
            peft=peft,
        )

    def without_adapter(self) -> LanguageModel:
        """The base, on the same copy of the weights.

        Raises `InputError` for an adapter that cannot be taken out (whole modules, biases, PiSSA).
        """
        if self.peft is None:
            return self
        checkpoint = replace(self.checkpoint, adapter=None)
        return replace(self, checkpoint=checkpoint, hf=base_tree(self.peft), adapter_name=None, peft=None)

    def merged(self) -> LanguageModel:
        """The same model with its adapter added into the weights: faster, equal up to rounding.

        Only the weights that the adapter targets are copied. A model without adapter is returned as
        it is.
        """
        if self.peft is None:
            return self
        return replace(self, hf=merged_tree(self.peft), peft=None)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Logits, of all positions or of the ``last`` ones, without gradient; without a mask every token
        counts. Right and left padding agree.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with self.active() as hf:
            keep = {"logits_to_keep": last} if last is not None and keeps_logits(hf) else {}
            logits = hf(
                input_ids=input_ids.to(self.device),
                attention_mask=attention_mask.to(self.device),
                position_ids=position_ids(attention_mask).to(self.device),
                use_cache=False,
                **keep,
            ).logits
        return logits if last is None else logits[:, -last:]

    def rendered(self, prompt: str | Sequence[Message] | Rendered) -> Rendered:
        """A prompt as token ids: a string is plain text, a list of messages is a chat."""
        if isinstance(prompt, Rendered):
            return prompt
        if isinstance(prompt, str):
            return render_text(self.tokenizer, prompt)
        return render(self.tokenizer, prompt)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[Message] | Sequence[str | Sequence[Message] | Rendered],
        *,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> list[str]:
        """Continue each prompt and return the new texts: `hf.generate` with the padding done right.

        A string is plain text, a list of messages a chat; one of them, or a list of them. Greedy unless
        `do_sample=True`; `options` go to `hf.generate`.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
        batch = cast(Sequence[str | Sequence[Message] | Rendered], [prompts] if single else prompts)
        padded = pad([self.rendered(prompt) for prompt in batch], self.pad_id).to(self.device)
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": self.pad_id, **options}
        with self.active() as hf:
            output = cast(Any, hf).generate(
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                max_new_tokens=max_new_tokens,
                **settings,
            )
        new = cast(Tensor, output)[:, padded.input_ids.shape[1] :]
        return self.tokenizer.batch_decode(new, skip_special_tokens=True)

    def bridge(self) -> TransformerBridge:
        """A TransformerLens `TransformerBridge` on the same tensors, never folded or centred.

        It wraps a module tree of its own, so this model's `state_dict`, `save_pretrained` and
        adapter stay as they are. With an adapter, the weights that it targets are merged copies.
        Its tokenizer is a copy, which TransformerLens rebuilds to prepend BOS: pass token ids, not
        text.
        """
        from transformer_lens.model_bridge import TransformerBridge

        tree = merged_tree(self.peft) if self.peft is not None else shared_tree(self.hf)
        tree.config.architectures = [type(tree).__name__]
        return TransformerBridge.boot_transformers(
            self.checkpoint.path, hf_model=tree, tokenizer=copy.deepcopy(self.tokenizer)
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as Hugging Face does; a model with an adapter writes the adapter."""
        target: Any = self.hf if self.peft is None else self.peft
        with quietly():
            target.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))


def position_ids(attention_mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Positions that count real tokens from 0, whichever side the padding is on."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def load_model(
    source: str | Path | PreTrainedModel | PeftModel | LanguageModel,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> LanguageModel:
    """Load a model from a checkpoint folder, a PEFT adapter folder, a hub id, or one already in memory.

    An adapter folder brings its base with it (`base_model_name_or_path`, looked for beside the adapter
    first); `adapter=` puts one on a base that you name. Nothing is fetched for a local path. A model in
    memory is not touched: its tree is copied and its weights are shared, so training it on shows here.

    Args:
        tokenizer: used instead of the checkpoint's own; needed for a model in memory.
        device: "auto" is the first GPU, else the CPU.
        dtype: fp32 on the CPU and the checkpoint's own type on a GPU, unless given.
        device_map: handed to accelerate, for a model larger than one device.

    Raises:
        MissingPathError: there is no such folder.
        InputError: it is no whole checkpoint, has no tokenizer, or is in memory and not as is asked for.
        MismatchError: adapter or tokenizer belong to another model.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = read_tokenizer(describe(tokenizer))
    if isinstance(source, LanguageModel):
        _check_as_it_is(source.hf, revision, device, dtype, device_map)
        if tokenizer is not None:
            check_vocabulary(tokenizer, source.d_vocab, source.name)
            source = replace(source, tokenizer=tokenizer)
        return source if adapter is None else source.with_adapter(adapter)
    if isinstance(source, PreTrainedModel | PeftModel):
        _check_as_it_is(source, revision, device, dtype, device_map)
        return _from_memory(source, tokenizer, adapter)
    checkpoint = resolve(source, revision)
    if adapter is not None:
        if checkpoint.adapter is not None:
            raise InputError(
                f"{source} is itself an adapter",
                fix="pass its base, with adapter= the one you want",
            )
        checkpoint = replace(checkpoint, adapter=adapter_folder(adapter))
    tokenizer = tokenizer or read_tokenizer(checkpoint)
    hf = read_weights(checkpoint, device=device, dtype=dtype, device_map=device_map)
    loaded = LanguageModel(replace(checkpoint, adapter=None), hf, tokenizer)
    check_vocabulary(tokenizer, loaded.d_vocab, checkpoint.name)
    if checkpoint.adapter is None:
        return loaded
    return loaded._adapted(checkpoint.adapter, checkpoint.name, shared=False)  # pyright: ignore[reportPrivateUsage]


def _check_as_it_is(
    model: nn.Module,
    revision: str | None,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    device_map: object,
) -> None:
    """A model in memory is taken as it is: raise `InputError` where something else is asked for."""
    there = next(model.parameters())
    said: dict[str, object] = {"revision": revision, "device_map": device_map}
    if device != "auto" and device_of(device).type != there.device.type:
        said["device"] = device
    if dtype is not None and str(dtype).removeprefix("torch.") != str(there.dtype).removeprefix("torch."):
        said["dtype"] = dtype
    for name, value in said.items():
        if value is not None:
            raise InputError(
                f"a model in memory is taken as it is ({there.dtype} on {there.device}), "
                f"not with {name}={value}",
                fix="move or convert it before, or give the folder that it came from",
            )


def _from_memory(
    source: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter: str | Path | None,
) -> LanguageModel:
    if tokenizer is None:
        raise InputError(
            "a model in memory comes without its tokenizer",
            fix="pass it: load_model(model, tokenizer=tokenizer)",
        )
    tree = shared_tree(source)
    peft = tree if isinstance(tree, PeftModel) else None
    hf = cast(PreTrainedModel, tree.get_base_model() if isinstance(tree, PeftModel) else tree)
    loaded = LanguageModel(
        Checkpoint(f"{IN_MEMORY}{type(hf).__name__}"),
        hf,
        tokenizer,
        adapter_name=str(peft.active_adapter) if peft is not None else None,
        peft=peft,
    )
    check_vocabulary(tokenizer, loaded.d_vocab, loaded.checkpoint.path)
    return loaded if adapter is None else loaded.with_adapter(adapter)


def keeps_logits(hf_model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of its last tokens alone."""
    return "logits_to_keep" in inspect.signature(hf_model.forward).parameters
