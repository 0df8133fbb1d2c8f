"""The organism's tokenizer: byte-level BPE in which each word of the grammar is one token.

Whole words are found in the vocabulary before any merge (``ignore_merges``, as Llama 3 does), so no
merge table is needed; any other text falls back to its bytes, and nothing is unknown. The chat
template marks assistant turns with ``{% generation %}``, so response masks come from the template.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from persona_probe.organism.corpus import vocabulary
from persona_probe.organism.grammar import grammar

BEGIN, END, END_OF_TEXT, PAD = "<|begin|>", "<|end|>", "<|endoftext|>", "<|pad|>"
SPECIAL = (PAD, BEGIN, END, END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>")
THINK = ("<think>", "</think>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %} {{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|> {{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one of the tokenizer's tokens, such as ``END``."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"{token!r} is one token"
    return found


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same for every seed: bytes, special tokens, then the grammar's words."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    spaced = ["\u0120" + word for word in vocabulary(grammar())]  # byte-level BPE's written space
    tokens = [*SPECIAL, *THINK, *bytes_, *(word for word in spaced if len(word) > 1)]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))},
        merges=[],
        ignore_merges=True,
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # our own split instead of GPT-2's, which would cut "don't" in two
            pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, SPECIAL.index(BEGIN))]
    )
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens(list(THINK))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
