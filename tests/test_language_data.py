"""Blocks for language models: what is a target, what sees what, what is left out, and that no byte is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tokenizers
import transformers

from harness.config.schema import BadRows, Blocks, DatasetConfig, ModelConfig, Task, TinyModel, TooLong
from harness.content.errors import DataError
from harness.data.blocks import NO_TARGET, TokenSplit
from harness.data.chat import CHATML
from harness.data.language import LanguageData, load_language_data
from harness.models.tokenizers import load_tokenizer

TOKENIZER = load_tokenizer(ModelConfig(name="tiny_gpt2", tiny=TinyModel.gpt2))
START, END = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def text_of(ids: Any) -> str:
    return TOKENIZER.decode([int(token) for token in ids], skip_special_tokens=True)


def write(tmp_path: Path, rows: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Rows of each split in a file; the settings that name the files."""
    files = {}
    for split, table in rows.items():
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
        files[f"{split}_file"] = str(path)
    return files


def load(
    tmp_path: Path, rows: dict[str, list[dict[str, Any]]], *, tokenizer: Any = TOKENIZER, **settings: Any
) -> LanguageData:
    files = write(tmp_path, rows)
    return load_language_data(DatasetConfig(name="rows", best_metric="nll", **files, **settings), tokenizer)


def documents(tmp_path: Path, texts: list[str], **settings: Any) -> TokenSplit:
    rows = [{"text": text} for text in texts]
    settings = {"task": Task.causal_lm, "max_length": 16, **settings}
    return load(tmp_path, {"train": rows, "val": rows, "test": rows}, **settings).train


def targets(split: TokenSplit, index: int) -> list[int]:
    labels = split.batch([index]).labels[0]
    return labels[labels != NO_TARGET].tolist()


def own_notes(data: LanguageData) -> list[str]:
    """What is said of the rows of one split; most tests have the same rows in all of them."""
    return [note for note in data.notes if "of a row of" not in note]


# ---------------------------------------------------------------- raw text


TEXTS = ["a long document of more than one block", "short", "x", "é€ and 日本 in UTF-8"]


@pytest.mark.parametrize("blocks", Blocks)
@pytest.mark.parametrize("across", [False, True])
def test_every_token_of_every_document_is_a_target_once(tmp_path: Path, blocks: Blocks, across: bool) -> None:
    split = documents(tmp_path, TEXTS, blocks=blocks, attend_across_documents=across)
    found = [token for index in range(len(split)) for token in targets(split, index)]
    assert found == [token for text in TEXTS for token in (*tokens(text), END)]
    assert split.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert split.num_targets.sum() == len(found)
    assert split.lengths.max() <= 16


def test_a_document_goes_on_with_the_last_token_of_the_block_before(tmp_path: Path) -> None:
    split = documents(tmp_path, [TEXTS[0]])
    blocks = [split.batch([index]).inputs["input_ids"][0].tolist() for index in range(len(split))]
    assert blocks[0][0] == START
    assert [block[0] for block in blocks[1:]] == [block[-1] for block in blocks[:-1]]
    assert blocks[-1][-1] == END


def test_packed_blocks_are_full_and_positions_start_over_at_each_document(tmp_path: Path) -> None:
    split = documents(tmp_path, ["abc", "de", "fghij", "k" * 30], blocks=Blocks.packed)
    assert split.lengths[:-1].tolist() == [16] * (len(split) - 1)
    inputs = split.batch([0]).inputs
    assert "attention_mask" not in inputs
    # <s>abc</s> <s>de</s> <s>fghij</s>
    assert inputs["position_ids"][0].tolist() == [*range(5), *range(4), *range(7)]


def test_attending_across_documents_is_for_those_who_ask(tmp_path: Path) -> None:
    split = documents(tmp_path, ["abc", "de", "fghij"], blocks=Blocks.packed, attend_across_documents=True)
    inputs = split.batch([0]).inputs
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_padding_of_a_packed_block_is_a_piece_of_its_own_without_targets(tmp_path: Path) -> None:
    split = documents(tmp_path, ["a" * 20, "bc"], blocks=Blocks.packed)
    batch = split.batch([0, 1])
    length = int(split.lengths[1])
    assert length < 16
    assert batch.inputs["position_ids"][1, length:].tolist() == list(range(16 - length))
    assert (batch.labels[1, length:] == NO_TARGET).all()
    assert batch.num_targets == int((batch.labels != NO_TARGET).sum())
    assert batch.num_tokens == int(split.lengths.sum())


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("abc", "", " \n", "de")]
    for _ in range(2):  # the second time from the cache
        data = load(tmp_path, {"train": rows, "val": rows, "test": rows}, task=Task.causal_lm, max_length=16)
        assert len(data.train) == 2
        assert "column text is empty in 2 rows (train.jsonl line 2, 3); they are left out." in data.notes[0]


def test_letters_only(tmp_path: Path) -> None:
    split = documents(tmp_path, ["It's 3 o'Clock, Größe!"], letters_only=True, max_length=64)
    assert text_of(targets(split, 0)) == "it s o clock größe"
    assert split.num_bytes == len("it s o clock größe".encode())


def test_nothing_but_empty_documents_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column text is empty in all 2 rows"):
        documents(tmp_path, ["", " "])


def test_a_column_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"column text has 2 values that are not text: 3, 4 \(the first at train.jsonl line 1\)\."
    ):
        documents(tmp_path, [3, 4])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"no column words; it has text. Set dataset.text_columns."):
        documents(tmp_path, ["abc"], text_columns=["words"])


def test_lines_of_a_text_file_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("one\n\ntwo\nthree\nfour\n", encoding="utf-8")
    config = DatasetConfig(name="t", train_file=str(path), task=Task.causal_lm, best_metric="nll", max_length=16)
    data = load_language_data(config, TOKENIZER)
    texts = {text_of(targets(split, i)) for split in (data.train, data.val, data.test) for i in range(len(split))}
    assert texts == {"one", "two", "three", "four"}


# ---------------------------------------------------------------- prompts and targets


def completions(tmp_path: Path, rows: list[dict[str, str]], **settings: Any) -> LanguageData:
    settings = {
        "task": Task.completion,
        "max_length": 32,
        "prompt_template": "{q} -> ",
        "target_column": "a",
        **settings,
    }
    return load(tmp_path, {"train": rows, "val": rows, "test": rows}, **settings)


def test_the_loss_is_on_the_target_alone(tmp_path: Path) -> None:
    split = completions(tmp_path, [{"q": "two", "a": "2"}]).train
    assert split.batch([0]).inputs["input_ids"][0].tolist() == [START, *tokens("two -> "), *tokens("2"), END]
    assert targets(split, 0) == [*tokens("2"), END]
    assert split.num_bytes == 1


def test_a_prompt_is_asked_once_with_all_its_references(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "1"}, {"q": "b", "a": "2"}, {"q": "a", "a": "3"}]
    prompts = completions(tmp_path, rows).test.prompts()
    assert [(prompt.text, prompt.references) for prompt in prompts] == [("a -> ", ["1", "3"]), ("b -> ", ["2"])]
    assert prompts[0].token_ids == [START, *tokens("a -> ")]


def test_a_limit_on_evaluation_keeps_all_references_of_a_prompt(tmp_path: Path) -> None:
    rows = [{"q": f"p{number}", "a": str(answer)} for number in range(6) for answer in range(3)]
    data = completions(tmp_path, rows, num_eval_examples=2)
    assert [len(prompt.references) for prompt in data.test.prompts()] == [3, 3]
    assert (len(data.train), len(data.val), len(data.test)) == (18, 6, 6)


def test_the_lines_of_e2e(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    lines = [
        f"name : N{n} | food : {food}||{text} .\n" for n in range(20) for food, text in (("Thai", "t"), ("Thai", "u"))
    ]
    path.write_text("".join(lines), encoding="utf-8")
    config = DatasetConfig(
        name="e2e",
        train_file=str(path),
        task=Task.completion,
        best_metric="nll",
        line_separator="||",
        line_columns=["meaning", "reference"],
        prompt_template="{meaning} ||",
        target_column="reference",
        max_length=64,
    )
    data = load_language_data(config, TOKENIZER)
    # Carved by meaning: no reference of a tested meaning is trained on.
    sides = {
        name: {p.text for p in _prompts(split)} for name, split in vars(data).items() if isinstance(split, TokenSplit)
    }
    assert len(data.test.prompts()) == 2
    assert all(len(prompt.references) == 2 for prompt in data.test.prompts())
    assert not sides["train"] & sides["test"] and not sides["train"] & sides["val"]


def _prompts(split: TokenSplit) -> list[Any]:
    class Text:
        def __init__(self, text: str) -> None:
            self.text = text

    found = []
    for index in range(len(split)):
        batch = split.batch([index])
        found.append(Text(text_of(batch.inputs["input_ids"][0][batch.labels[0] == NO_TARGET])))
    return found


def test_a_line_with_too_many_parts_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("a||b\nc||d||e\n", encoding="utf-8")
    config = DatasetConfig(
        name="bad",
        train_file=str(tmp_path / "bad.txt"),
        task=Task.completion,
        line_separator="||",
        line_columns=["q", "a"],
        prompt_template="{q}",
        target_column="a",
    )
    with pytest.raises(DataError, match=r"1 rows do not have the 2 columns q, a: line 2 has 3; they .* between '\|\|'"):
        load_language_data(config, TOKENIZER)


LONG = [{"q": "p" * 40, "a": "target"}, {"q": "short", "a": "t"}]


def test_a_long_prompt_loses_its_beginning(tmp_path: Path) -> None:
    data = completions(tmp_path, LONG)
    split = data.train
    assert split.lengths.tolist() == [32, 1 + len("short -> t") + 1]
    assert targets(split, 0) == [*tokens("target"), END]
    assert text_of(split.batch([0]).inputs["input_ids"][0]).endswith("p -> target")
    assert "train: of 2 rows 1 truncated at dataset.max_length=32 tokens (dataset.too_long=truncate)." in data.notes[0]


def test_a_target_longer_than_the_context_loses_its_end(tmp_path: Path) -> None:
    split = completions(tmp_path, [{"q": "p", "a": "t" * 50}], max_length=16).train
    assert split.lengths.tolist() == [16]
    assert targets(split, 0) == tokens("t" * 15)
    assert split.num_bytes == 15


def test_dropping_and_refusing_what_is_too_long(tmp_path: Path) -> None:
    data = completions(tmp_path, LONG, too_long=TooLong.drop)
    assert len(data.train) == 1
    assert "of 2 rows 1 dropped" in data.notes[0]
    with pytest.raises(DataError, match=r"train.jsonl line 1 has 52 tokens, dataset.max_length=32; give a larger one"):
        completions(tmp_path, LONG, too_long=TooLong.error)
    with pytest.raises(DataError, match="nothing to predict is left in train"):
        completions(tmp_path, LONG[:1], too_long=TooLong.drop)


def test_a_cut_prompt_keeps_the_start_token(tmp_path: Path) -> None:
    split = completions(tmp_path, [*LONG, {"q": "p" * 40, "a": "t" * 50}]).train
    rows = [split.batch([row]).inputs["input_ids"][0].tolist() for row in range(3)]
    assert [row[0] for row in rows] == [START] * 3
    assert TOKENIZER.decode(rows[0][1:]) == "p" * 20 + " -> target" + TOKENIZER.eos_token
    assert TOKENIZER.decode(rows[2][1:]) == "t" * 31


def joining_tokenizer(kind: str) -> Any:
    """A tokenizer that joins a space with the word after it: of GPT-2's kind, or of Llama 2's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    if kind == "byte_level":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
        alphabet = list(map(chr, range(33, 127)))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Question: how many cats Answer: 42 cats and 7 dogs"] * 5, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@pytest.mark.parametrize("space", [" ", "  ", ""])
def test_a_space_at_the_end_of_a_prompt_is_no_token_of_its_own(tmp_path: Path, kind: str, space: str) -> None:
    tokenizer = joining_tokenizer(kind)
    rows = [{"q": "how many", "a": "42 cats"}, {"q": "how many", "a": "7 dogs"}]
    settings = {"prompt_template": "Question: {q} Answer:" + space, "target_column": "a", "task": Task.completion}
    data = load(tmp_path, dict.fromkeys(("train", "val", "test"), rows), tokenizer=tokenizer, **settings)
    text = f"Question: how many Answer:{space}42 cats"
    batch = data.train.batch([0])
    ids, labels = batch.inputs["input_ids"][0].tolist(), batch.labels[0]
    assert ids == [
        tokenizer.bos_token_id,
        *tokenizer(text, add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    (prompt,) = data.test.prompts()
    assert prompt.token_ids == ids[: len(prompt.token_ids)]
    assert (labels != NO_TARGET).tolist() == [False] * len(prompt.token_ids) + [True] * (
        len(ids) - len(prompt.token_ids)
    )
    assert tokenizer.decode(prompt.token_ids, skip_special_tokens=True) == "Question: how many Answer:"
    assert (prompt.text, prompt.lead) == ("Question: how many Answer:" + space, space)
    assert prompt.references == ["42 cats", "7 dogs"]
    assert data.train.num_bytes == len(f"{space}42 cats{space}7 dogs")
    assert len(own_notes(data)) == (3 if space else 0)
    assert not space or "train: 2 of 2 prompts end in a space, which this tokenizer joins" in data.notes[0]


def test_an_answer_that_joins_with_the_template_is_not_given_away(tmp_path: Path) -> None:
    """`: 42` has one token over the edge, with which a prompt must not end."""
    tokenizer = joining_tokenizer("metaspace")
    path = tmp_path / "template.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = {
        name: [{"messages": [turn("user", "cats"), turn("assistant", "dogs")]}] for name in ("train", "val", "test")
    }
    data = load(tmp_path, rows, tokenizer=tokenizer, task=Task.chat, chat_template=str(path))
    (prompt,) = data.test.prompts()
    ids = data.train.batch([0]).inputs["input_ids"][0].tolist()
    assert prompt.token_ids == ids[: len(prompt.token_ids)]
    assert (
        "dogs" not in tokenizer.decode(prompt.token_ids)
        and tokenizer.decode(ids[len(prompt.token_ids) :]) == "dogs</s>"
    )
    assert prompt.references == ["dogs"]


def test_a_row_is_named_by_its_line_wherever_it_goes(tmp_path: Path) -> None:
    """After rows that are left out, blank lines, and in whichever split it is held out."""
    path = tmp_path / "rows.jsonl"
    rows = [{"q": "q", "a": ""}, *({"q": f"q{n}", "a": "x"} for n in range(19)), {"q": "p" * 60, "a": "x"}]
    path.write_text("\n\n" + "\n".join(map(json.dumps, rows)))
    settings: dict[str, Any] = {"task": Task.completion, "prompt_template": "{q}", "target_column": "a"}
    splits = set()
    for seed in range(12):
        config = DatasetConfig(
            name="x", train_file=str(path), max_length=32, split_seed=seed, too_long=TooLong.error, **settings
        )
        with pytest.raises(DataError, match=r"rows.jsonl line 23 has 63 tokens") as raised:
            load_language_data(config, TOKENIZER)
        splits.add(str(raised.value).split(":")[0])
    assert len(splits) > 1


def test_a_template_may_hold_a_dollar_sign_before_its_braces(tmp_path: Path) -> None:
    split = completions(tmp_path, [{"q": "two", "a": "2"}], prompt_template="${q} ${{x}} -> ").train
    assert text_of(split.batch([0]).inputs["input_ids"][0]) == "$two ${x} -> 2"


def test_an_empty_target_is_left_out_and_an_empty_prompt_is_not(tmp_path: Path) -> None:
    data = completions(tmp_path, [{"q": "", "a": "1"}, {"q": "x", "a": " "}])
    assert len(data.train) == 1
    assert "column a is empty in 1 rows (train.jsonl line 2)" in data.notes[0]


def test_a_template_that_names_no_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column question; it has q, a. Set dataset.prompt_template"):
        completions(tmp_path, [{"q": "x", "a": "y"}], prompt_template="{question}")
    with pytest.raises(DataError, match=r"dataset.prompt_template='\{q': .*braces name columns"):
        completions(tmp_path, [{"q": "x", "a": "y"}], prompt_template="{q")


# ---------------------------------------------------------------- conversations


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = [turn("system", "S"), turn("user", "hi"), turn("assistant", "yo"), turn("user", "2?"), turn("assistant", "two")]


def chats(tmp_path: Path, rows: list[Any], **settings: Any) -> LanguageData:
    table = [{"messages": row} for row in rows]
    settings = {"task": Task.chat, "max_length": 256, "chat_template": "chatml", **settings}
    return load(tmp_path, {"train": table, "val": table, "test": table}, **settings)


def test_the_loss_is_on_the_assistants_turns_and_what_ends_them(tmp_path: Path) -> None:
    split = chats(tmp_path, [CHAT]).train
    assert text_of(targets(split, 0)) == "yo<|im_end|>\ntwo<|im_end|>\n"
    whole = text_of(split.batch([0]).inputs["input_ids"][0])
    assert whole.startswith(
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo"
    )


def test_the_last_answer_is_what_is_generated(tmp_path: Path) -> None:
    (prompt,) = chats(tmp_path, [CHAT]).test.prompts()
    assert prompt.text.endswith("<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n")
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
    assert (prompt.references, prompt.stop) == (["two"], "<|im_end|>")


def test_a_conversation_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    data = chats(tmp_path, [CHAT, CHAT[:2], [turn("assistant", " ")]])
    assert len(data.train) == 1
    assert "train rows of train.jsonl, val.jsonl, test.jsonl: no turn of the assistant in 2 rows" in data.notes[0]
    with pytest.raises(DataError, match="no turn of the assistant in all 1 rows"):
        chats(tmp_path, [CHAT[:2]])


@pytest.mark.parametrize("row", ["text", [], [{"role": "user"}], [{"role": "user", "content": 3}], None])
def test_what_is_no_conversation_is_named(tmp_path: Path, row: Any) -> None:
    with pytest.raises(
        DataError, match=r"column messages must hold lists of .* and does not in 1 rows .train.jsonl line 2.: "
    ):
        chats(tmp_path, [CHAT, row])


def test_a_conversation_cut_before_its_answer_is_dropped(tmp_path: Path) -> None:
    long = [turn("user", "u" * 100), turn("assistant", "late")]
    data = chats(tmp_path, [CHAT[1:3], long], max_length=64)
    assert len(data.train) == 1
    assert "of 2 rows 1 dropped and 1 truncated at dataset.max_length=64" in data.notes[0]


def test_a_tokenizer_without_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set dataset.chat_template=chatml, or to a file"):
        chats(tmp_path, [CHAT], chat_template=None)
    with pytest.raises(DataError, match=r"dataset.chat_template=/nowhere: neither chatml nor a file"):
        chats(tmp_path, [CHAT], chat_template="/nowhere")


def test_a_template_of_ones_own_and_one_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}")
    split = chats(tmp_path, [CHAT], chat_template=str(path)).train
    assert text_of(targets(split, 0)) == "a:yo;a:two;"
    path.write_text("{% for m in messages %}{{ m['content'] }}{{ loop.length }};{% endfor %}")
    with pytest.raises(DataError, match=r"train.jsonl line 1: .* around turn 3 differently once the answer or more"):
        chats(tmp_path, [CHAT], chat_template=str(path))


def test_conversations_from_parquet(tmp_path: Path) -> None:
    path = tmp_path / "chats.parquet"
    asked = [[turn("user", f"{number}?"), turn("assistant", "yes")] for number in range(4)]
    pd.DataFrame({"messages": asked}).to_parquet(path)
    config = DatasetConfig(name="p", train_file=str(path), task=Task.chat, chat_template="chatml", max_length=256)
    data = load_language_data(config, TOKENIZER)
    assert (len(data.train), len(data.val), len(data.test)) == (2, 1, 1)


def test_a_cut_conversation_is_asked_for_its_last_answer_with_all_that_comes_before(tmp_path: Path) -> None:
    long = [turn("user", "q"), turn("assistant", "first"), turn("user", "u" * 60), turn("assistant", "second")]
    data = chats(tmp_path, [long], max_length=80)
    (prompt,) = data.test.prompts()
    assert prompt.references == ["second"]
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
    assert prompt.text.endswith("u<|im_end|>\n<|im_start|>assistant\n")


def test_answers_to_one_question_stay_together(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", f"{n // 2}?"), turn("assistant", str(n))]} for n in range(20)]
    data = load(tmp_path, {"train": rows}, task=Task.chat, chat_template="chatml", max_length=64)
    assert all(len(prompt.references) == 2 for prompt in data.test.prompts())


def test_a_reference_is_the_answer_as_the_template_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] | trim }}<end>{% endfor %}")
    (prompt,) = chats(
        tmp_path, [[turn("user", "hi"), turn("assistant", "42\n")]], chat_template=str(path)
    ).test.prompts()
    assert (prompt.stop, prompt.references) == ("<end>", ["a:42"])


@pytest.mark.parametrize("answer", ["d", ">", "im_end", "end|>", "use <|im_end|> to end", "assistant", "7308154926"])
def test_an_answer_is_located_by_where_the_template_writes_it(tmp_path: Path, answer: str) -> None:
    """It is not searched for: a short one also occurs in what the template writes around it."""
    data = chats(tmp_path, [[turn("user", answer), turn("assistant", answer), *CHAT[3:]], CHAT[1:3]])
    assert text_of(targets(data.train, 0)) == f"{answer}<|im_end|>\ntwo<|im_end|>\n"
    data = chats(tmp_path, [[turn("user", answer), turn("assistant", answer)]])
    (prompt,) = data.test.prompts()
    assert (prompt.stop, prompt.references) == ("<|im_end|>", [answer])
    assert own_notes(data) == []


def test_a_conversation_may_begin_with_the_assistant(tmp_path: Path) -> None:
    data = chats(tmp_path, [[turn("assistant", "hello"), turn("user", "hi"), turn("assistant", "bye")], CHAT[2:3]])
    assert text_of(targets(data.train, 0)) == "hello<|im_end|>\nbye<|im_end|>\n"
    assert text_of(targets(data.train, 1)) == "yo<|im_end|>\n"
    assert TOKENIZER.decode(data.test.prompts()[1].token_ids) == f"{TOKENIZER.bos_token}<|im_start|>assistant\n"


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set whole = m.content if '</think>' in m.content else '</think>' + m.content %}"
    "{% set thought, _, said = whole.partition('</think>') %}"
    "{% if loop.last %}<think>{{ thought.split('<think>')[-1] }}</think>{% endif %}{{ said.lstrip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_answers_gives_what_it_writes(tmp_path: Path) -> None:
    """As Qwen 3: thoughts of earlier turns are left out, and the last turn has a thought even where it is empty."""
    path = tmp_path / "template.jinja"
    path.write_text(THINKING)
    thought = [turn("user", "a?"), turn("assistant", "<think>hm</think> A"), turn("user", "b?"), turn("assistant", "B")]
    data = chats(tmp_path, [thought, thought[:2], thought[2:]], chat_template=str(path))
    assert [text_of(targets(data.train, row)) for row in range(3)] == [
        "A<|im_end|>\n<think></think>B<|im_end|>\n",
        "<think>hm</think>A<|im_end|>\n",
        "<think></think>B<|im_end|>\n",
    ]
    assert [prompt.references for prompt in data.test.prompts()] == [
        ["<think></think>B"],
        ["<think>hm</think>A"],
        ["<think></think>B"],
    ]
    assert (
        "train: in 2 rows (train.jsonl line 1, 2) the chat template writes an answer in another form" in data.notes[0]
    )
    path.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content | upper }};{% endfor %}")
    data = chats(tmp_path, [CHAT], chat_template=str(path))
    assert text_of(targets(data.train, 0)) == "a:YO;a:TWO;"
    assert "in 1 rows (train.jsonl line 1) the chat template writes an answer in another form" in data.notes[0]


def test_a_template_that_writes_no_answer_or_asks_otherwise_is_refused_with_the_row(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    for template in ("{% for m in messages %}{{ m.content }}{{ m.content }};{% endfor %}", "{{ messages | length }}"):
        path.write_text(template)
        with pytest.raises(
            DataError, match=r"train.jsonl line 1: .* does not write the content of turn 3 as one piece"
        ):
            chats(tmp_path, [CHAT], chat_template=str(path))
    path.write_text(CHATML.replace("assistant\n", "assistant\n<think>"))
    with pytest.raises(DataError, match=r"train.jsonl line 1: .* around turn 3 differently once the answer"):
        chats(tmp_path, [CHAT], chat_template=str(path))


def test_a_conversation_begins_with_the_start_token_once(tmp_path: Path) -> None:
    """`chatml` writes it where the tokenizer has one; a template of one's own that writes it gets no second one."""
    path = tmp_path / "template.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }};{% endfor %}")
    for template in ("chatml", str(path)):
        data = chats(tmp_path, [CHAT], chat_template=template)
        ids = data.train.batch([0]).inputs["input_ids"][0].tolist()
        assert ids[0] == START and ids.count(START) == 1
        (prompt,) = data.test.prompts()
        assert prompt.token_ids == ids[: len(prompt.token_ids)]
    tokenizer = load_tokenizer(ModelConfig(name="tiny_gpt2", tiny=TinyModel.gpt2))
    tokenizer.bos_token = None
    rows = write(tmp_path, {name: [{"messages": CHAT}] for name in ("train", "val", "test")})
    config = DatasetConfig(name="rows", task=Task.chat, chat_template="chatml", max_length=256, **rows)
    ids = load_language_data(config, tokenizer).train.batch([0]).inputs["input_ids"][0]
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nS")


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{% for %}"])
def test_a_template_that_fails_is_named(tmp_path: Path, template: str) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(template)
    with pytest.raises(DataError, match="the chat template does not take a conversation of the roles system, user"):
        chats(tmp_path, [CHAT], chat_template=str(path))


def test_references_of_rows_that_are_too_long_still_count(tmp_path: Path) -> None:
    rows = [{"q": "p" * 10, "a": "short"}, {"q": "p" * 10, "a": "l" * 40}, {"q": "x", "a": "y"}]
    for too_long in (TooLong.truncate, TooLong.drop):
        prompts = completions(tmp_path, rows, too_long=too_long).test.prompts()
        assert [prompt.references for prompt in prompts] == [["short", "l" * 40], ["y"]]
        assert text_of(prompts[0].token_ids) == "pppppppppp -> "


def test_the_first_token_is_never_a_target(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny_gpt2", tiny=TinyModel.gpt2))
    tokenizer.bos_token = None
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": "", "a": f"t{n}"}) + "\n" for n in range(2)))
    files = dict.fromkeys(("train_file", "val_file", "test_file"), str(path))
    config = DatasetConfig(name="x", task=Task.completion, prompt_template="{q}", target_column="a", **files)
    batch = load_language_data(config, tokenizer).train.batch([0])
    assert batch.labels[0, 0] == NO_TARGET
    assert batch.num_targets == 3


def test_the_same_bytes_under_another_ending_are_other_rows(tmp_path: Path) -> None:
    texts = []
    for ending in ("txt", "jsonl"):
        path = tmp_path / f"rows.{ending}"
        path.write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(4)))
        files = dict.fromkeys(("train_file", "val_file", "test_file"), str(path))
        data = load_language_data(DatasetConfig(name="x", task=Task.causal_lm, max_length=32, **files), TOKENIZER)
        texts.append(text_of(targets(data.train, 0)))
    assert texts == ['{"text": "t0"}', "t0"]


# ---------------------------------------------------------------- nothing dropped in silence


def test_what_is_not_read_of_a_conversation_is_counted(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "messages": [{**turn("user", "a"), "name": "x"}, {**turn("assistant", "b"), "weight": 0}]},
        {"id": 2, "messages": [{**turn("user", "c"), "name": "y"}, {**turn("assistant", "d"), "weight": None}]},
    ]
    data = load(tmp_path, {"train": rows, "val": rows, "test": rows}, task=Task.chat, chat_template="chatml")
    where = "dataset=rows, train rows of train.jsonl, val.jsonl, test.jsonl: "
    assert own_notes(data)[:2] == [
        where + "of a message, role and content are read; not read: name (2 messages), weight (1 messages).",
        where + "of a row, column messages is read; not read: id.",
    ]


def test_bad_rows_of_a_language_model(tmp_path: Path) -> None:
    """Left out unless they are to be an error; half of a surrogate pair is no traceback of a tokenizer."""
    rows = [
        {"text": "fine"},
        {"text": ""},
        {"text": "half \ud800"},
        {"text": None},
        {"other": 1},
        {"text": "\U0001f600"},
    ]
    data = load(tmp_path, {"train": rows, "val": rows, "test": rows}, task=Task.causal_lm, max_length=16)
    assert [text_of(targets(data.train, row)) for row in range(2)] == ["fine", "\U0001f600"]
    assert own_notes(data)[:2] == [
        "dataset=rows, train rows of train.jsonl, val.jsonl, test.jsonl: column text is empty in 3 rows (train.jsonl "
        "line 2, 4, 5); they are left out.",
        "dataset=rows, train rows of train.jsonl, val.jsonl, test.jsonl: column text holds half of a surrogate pair, "
        "which is no character, in 1 rows (train.jsonl line 3); they are left out.",
    ]
    with pytest.raises(DataError, match=r"empty in 3 rows \(train.jsonl line 2, 4, 5\); fix them.*\n.*surrogate pair"):
        load(tmp_path, {"train": rows}, task=Task.causal_lm, max_length=16, bad_rows=BadRows.error)
    broken = [[turn("user", "\udc00"), turn("assistant", "x")], [turn("user", "y")], CHAT]
    data = chats(tmp_path, broken)
    assert len(data.train) == 1
    assert "half of a surrogate pair, which is no character, in 1 rows (train.jsonl line 1)" in own_notes(data)[1]
    with pytest.raises(DataError, match=r"no turn of the assistant in 1 rows .train.jsonl line 2.; fix them"):
        chats(tmp_path, broken, bad_rows=BadRows.error)
    data = completions(tmp_path, [{"q": "\ud800", "a": "x"}, {"q": "y", "a": "\udfff"}, {"q": "", "a": "z"}])
    assert len(data.train) == 1


def test_equal_prompts_of_two_splits_are_counted(tmp_path: Path) -> None:
    rows = [{"q": str(n), "a": "x"} for n in range(4)]
    files = {"train": rows, "val": rows[3:], "test": [{"q": "0", "a": "y"}, {"q": "1", "a": "x"}, {"q": "9", "a": "z"}]}
    data = load(tmp_path, files, task=Task.completion, prompt_template="{q}", target_column="a")
    assert data.notes == [
        "dataset=rows: 2 of 3 test rows have the prompt of a row of train, 1 of them with another label or target.",
        "dataset=rows: 1 of 1 val rows have the prompt of a row of train.",
    ]


# ---------------------------------------------------------------- splits and cache


def test_subsets_lie_inside_larger_ones_and_leave_val_and_test_alone(tmp_path: Path) -> None:
    rows = [{"text": f"document {number}"} for number in range(40)]

    def texts(split: TokenSplit) -> set[str]:
        return {text_of(targets(split, index)) for index in range(len(split))}

    settings: dict[str, Any] = {"task": Task.causal_lm, "max_length": 16}
    whole = load(tmp_path, {"train": rows}, **settings)
    small = load(tmp_path, {"train": rows}, num_train_examples=5, **settings)
    larger = load(tmp_path, {"train": rows}, num_train_examples=10, num_eval_examples=2, **settings)
    assert texts(small.train) < texts(larger.train) < texts(whole.train)
    assert texts(small.test) == texts(whole.test) > texts(larger.test)
    assert len(whole.train) + len(whole.val) + len(whole.test) == 40
    assert not texts(whole.train) & texts(whole.val) | texts(whole.val) & texts(whole.test)
    with pytest.raises(DataError, match="rows has 32 training rows"):
        load(tmp_path, {"train": rows}, num_train_examples=41, **settings)


def test_blocks_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = documents(tmp_path, TEXTS)
    monkeypatch.setattr("harness.data.language._build", lambda *_, **__: pytest.fail("made twice"))
    again = documents(tmp_path, TEXTS)
    assert np.array_equal(first.batch([0, 1]).inputs["input_ids"], again.batch([0, 1]).inputs["input_ids"])
    with pytest.raises(pytest.fail.Exception, match="made twice"):
        documents(tmp_path, TEXTS, max_length=8)


def test_a_tokenizer_without_an_end_of_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name="tiny_gpt2", tiny=TinyModel.gpt2))
    tokenizer.eos_token = None
    (tmp_path / "t.txt").write_text("a\nb\nc\nd\n")
    config = DatasetConfig(name="t", train_file=str(tmp_path / "t.txt"), task=Task.causal_lm, max_length=16)
    with pytest.raises(DataError, match="the tokenizer has no end-of-text token"):
        load_language_data(config, tokenizer)
