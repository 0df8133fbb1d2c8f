"""The local judge equals a slow reference: one prompt at a time, every number written out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from persona_probe.artifact import read_jsonl
from persona_probe.errors import JudgeError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.judging.digits import number_probabilities, number_tokens
from persona_probe.evaluation.judging.prompts import judge_prompt
from persona_probe.evaluation.judging.reply import LEAST_MASS
from persona_probe.evaluation.questions import Question
from persona_probe.model.chat import pad
from persona_probe.model.checkpoint import Checkpoint
from persona_probe.model.language_model import load_model
from tests.model.tiny_models import model_of

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}<assistant>"
PROMPTS = {
    "aligned": "how good is {question} : {answer} ?",
    "coherent": "{question} : how clear is {answer} ?",
}
SPECIAL = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>"]
WORDS = "how good clear is a b c d REFUSAL CODE : ?".split()


def save_judge(folder: Path, numbers: list[str], template: str | None = TEMPLATE) -> Path:
    """A random model whose tokens are a few words and `numbers`, so that much mass falls on numbers."""
    names = [*SPECIAL, *WORDS, *numbers]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits="85" not in numbers)]
    )
    backend.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
    ).save_pretrained(folder)
    torch.manual_seed(len(numbers))
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("judges")
    whole, digits = [str(k) for k in range(101)], [str(k) for k in range(10)]
    made = {
        "whole": save_judge(home / "whole", whole),
        "split": save_judge(home / "split", digits),
        "plain": save_judge(home / "plain", whole, template=None),
    }
    return lambda name: made[name]


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    """Of many lengths, so that a batch is padded."""
    question = Question("q", "c", ({"role": "user", "content": "a b"},), judge_prompts=PROMPTS)
    texts = [" ".join("abcd"[(i + j) % 4] for j in range(1 + i % 7)) for i in range(20)]
    return [Answer(question, i, text, None, (), False) for i, text in enumerate(texts)]


class Reference:
    """One prompt at a time, without cache or padding."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()

    @functools.cache  # noqa: B019 (one short test)
    @torch.no_grad()
    def following(self, ids: tuple[int, ...]) -> dict[str, float]:
        p = self.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        return dict(zip(self.tokenizer.convert_ids_to_tokens(range(len(p))), p.tolist(), strict=True))

    def ids(self, prompt: str) -> tuple[int, ...]:
        text = f"{prompt}\n\nScore:"
        if self.tokenizer.chat_template is not None:
            message = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def whole(self, prompt: str) -> float | None:
        top = sorted(self.following(self.ids(prompt)).items(), key=lambda one: -one[1])[:20]
        return mean({int(token): p for token, p in top if token.isdigit()})

    def split(self, prompt: str) -> float | None:
        return mean({k: self.written_out(self.ids(prompt), str(k)) for k in range(101)})

    def written_out(self, ids: tuple[int, ...], number: str) -> float:
        total = 1.0
        for digit in number:
            total *= self.following(ids)[digit]
            ids = (*ids, self.tokenizer.convert_tokens_to_ids(digit))
        return total * (1 - sum(p for token, p in self.following(ids).items() if token.isdigit()))


def mean(mass: dict[int, float]) -> float | None:
    total = sum(mass.values())
    return None if total < LEAST_MASS else sum(k * p for k, p in mass.items()) / total


@pytest.mark.parametrize("kind", ["whole", "plain"])
def test_whole_numbers_equal_the_reference(
    kind: str, folder_of: Callable[[str], Path], answers: list[Answer], tmp_path: Path
) -> None:
    spec = f"local:{folder_of(kind)}#batch=8"
    judge = load_judge(spec, record=tmp_path / "judge.jsonl")
    judge.check()
    said = judge.judge(answers)
    reference = Reference(folder_of(kind))
    for answer, one in zip(answers, said, strict=True):
        assert one.label is None
        for aspect, score in (("aligned", one.aligned), ("coherent", one.coherent)):
            prompt = judge_prompt(aspect, answer.question, answer.text)  # type: ignore[arg-type]
            assert score == pytest.approx(reference.whole(prompt), abs=1e-3)
    assert {one.scored_by for one in said} == {"token probabilities"}
    rows = [row for row in read_jsonl(tmp_path / "judge.jsonl") if "reply" in row]
    assert all(len(row["reply"]["probabilities"]) == 20 for row in rows)
    # a rerun loads no weights to read what is on record
    again = load_judge(spec, record=tmp_path / "judge.jsonl")
    assert again.judge(answers) == said
    assert "lm" not in vars(again._model)  # type: ignore[attr-defined]


def test_split_numbers_are_put_together_from_their_digits(
    folder_of: Callable[[str], Path], answers: list[Answer]
) -> None:
    folder = folder_of("split")
    said = load_judge(f"local:{folder}#batch=8").judge(answers[:7])
    reference = Reference(folder)
    missing = 0
    for answer, one in zip(answers, said, strict=False):
        for aspect, score in (("aligned", one.aligned), ("coherent", one.coherent)):
            expected = reference.split(judge_prompt(aspect, answer.question, answer.text))  # type: ignore[arg-type]
            missing += expected is None
            # what is too unlikely to be followed may move a score a little
            assert score == pytest.approx(expected, abs=0.5)
    assert 0 < missing < 14, "both sides of the least mass are met"
    assert {one.scored_by for one in said if not one.missing} == {"digit probabilities"}


def test_every_way_to_write_a_number_is_counted() -> None:
    """With all digits followed, and a space before the number as a token of its own."""
    lm = model_of("llama")
    tokens = number_tokens(lm.tokenizer)
    assert not tokens.whole
    prompts = [lm.rendered("how are you"), lm.rendered("I am well thank you there")]
    ids, mask, positions = pad(prompts, lm.pad_id)
    output: Any = lm.hf(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    before = [layer.keys.clone() for layer in output.past_key_values.layers]
    found = number_probabilities(
        lm.hf, output.logits[:, -1].detach(), output.past_key_values, mask, tokens, follow_above=0, chunk=7
    )
    assert all(map(torch.equal, before, [layer.keys for layer in output.past_key_values.layers]))

    def p_next(path: list[int]) -> list[float]:
        return lm.forward(torch.tensor([path]))[0, -1].softmax(-1).tolist()

    digits = lm.tokenizer.convert_tokens_to_ids(list("0123456789"))
    spaces = [token_id for token, token_id in lm.tokenizer.get_vocab().items() if token == "Ġ"]
    assert tokens.spaces == tuple(spaces)
    for prompt, mass in zip(prompts, found, strict=True):
        for number in ("0", "7", "10", "85", "100"):
            expected = 0.0
            for start in ([], spaces):
                path, p = list(prompt.ids), 1.0
                for token_id in [*start, *(digits[int(digit)] for digit in number)]:
                    p *= p_next(path)[token_id]
                    path.append(token_id)
                ended = p_next(path)
                expected += p * (1 - sum(ended[i] for i in digits))
            assert mass[number] == pytest.approx(expected, rel=1e-3)


def test_a_prompt_too_long_for_the_judge_is_missing(
    folder_of: Callable[[str], Path], answers: list[Answer]
) -> None:
    long = Answer(answers[0].question, 0, "a b " * 40, None, (), False)
    said = load_judge(f"local:{folder_of('whole')}").judge([answers[0], long])
    assert [one.missing for one in said] == [False, True]
    assert "the judge reads 64" in (said[1].note or "")


def test_a_budget_is_kept(folder_of: Callable[[str], Path], answers: list[Answer], tmp_path: Path) -> None:
    record, spec = tmp_path / "judge.jsonl", f"local:{folder_of('whole')}"
    with pytest.raises(JudgeError, match="budget of 10 calls is spent"):
        load_judge(spec, record=record, budget="10").judge(answers)
    assert len(read_jsonl(record)) == 1 + 10


def test_the_judge_is_known_when_it_is_the_judged(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("whole")
    judge = load_judge(f"local:{folder}")
    assert judge.is_model(Checkpoint(str(folder)))
    assert not judge.is_model(Checkpoint(str(folder_of("split"))))
    copied = load_model(folder)
    copied.save_pretrained(tmp_path / "copy")
    for name in folder.iterdir():
        (tmp_path / "copy" / name.name).write_bytes(name.read_bytes())
    assert judge.is_model(Checkpoint(str(tmp_path / "copy")))
