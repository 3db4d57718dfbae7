"""Texts for language models: from a `DatasetConfig` to blocks of tokens with their targets.

A block is a row of at most `max_length` tokens. Where `is_target` holds, the token is to be predicted from those before
it; everything else is context. What becomes an example:

    causal_lm    <start> w w w w <end>          every w and <end>; a long document goes on in the next block
    completion   <start> p p p t t t <end>      t and <end>
    chat         the chat template              the assistant's turns and what ends them

A prompt and its target have the tokens of the joined text wherever the prompt then has the tokens that it has alone:
generation must begin as training did. Where a tokenizer joins a space with the word after it, spaces at the end of a
prompt are therefore tokenised with the target.

`cut` gives each document blocks of its own; `packed` fills blocks with pieces of several documents, which do not see
each other: positions start over at each piece, and attention stays inside. A block that goes on with a document begins
with the last token of the block before, as context, so that every token of a document is a target exactly once.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from harness.assets import cache_dir
from harness.config import BadRows, Blocks, DatasetConfig, Task, TooLong
from harness.content import chat_template_file
from harness.data import Batch, Tokenizer, tokenizer_text
from harness.preparation import once
from harness.readers import counted_rows, place
from harness.results import write_atomically
from harness.row_checks import Faults, equal_rows_notes, is_broken, text_faults, without_faults
from harness.sources import DataError, Source, column_problems, digest, open_source

logger = logging.getLogger(__name__)

# Part of the cache key: raise it when the blocks made from the same files change.
_FORMAT = 4

NO_TARGET = -100
"""Label of a token that is not to be predicted."""

# What `dataset.chat_template=chatml` stands for.
CHATML = (
    "{{ bos_token | default('', true) }}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Prompt:
    """What a text is generated from, and what people wrote in its place.

    `token_ids` are the tokens before the target, as in training but never cut; `references` all targets that the split
    has for them, also those of rows that are too long;
    `stop` is what a chat template writes after an answer; `lead` are the spaces that ended the prompt and are
    tokenised with the target, so that a generated text begins with them and no reference does.
    """

    text: str
    token_ids: list[int]
    references: list[str]
    stop: str = ""
    lead: str = ""


@dataclass
class _Blocks:
    """Blocks under construction. `piece_starts` are the positions at which a piece of another document begins."""

    token_ids: list[list[int]] = field(default_factory=list)
    is_target: list[list[bool]] = field(default_factory=list)
    piece_starts: list[list[int]] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    prompts: dict[str, Prompt] = field(default_factory=dict)

    def add(self, token_ids: list[int], is_target: list[bool], num_bytes: int) -> None:
        self.token_ids.append(token_ids)
        self.is_target.append(is_target)
        self.piece_starts.append([0])
        self.num_bytes.append(num_bytes)


class TokenSplit:
    """The blocks of one split, in a fixed order, and of the test split the prompts to generate from."""

    def __init__(self, arrays: dict[str, np.ndarray], prompts: list[Prompt], *, pad_token_id: int, isolate: bool):
        self._arrays = arrays
        self._prompts = prompts
        self._pad_token_id = pad_token_id
        self._isolate = isolate
        self._starts = np.concatenate([[0], np.cumsum(arrays["lengths"])])
        self.lengths = arrays["lengths"]
        self.num_targets = np.add.reduceat(arrays["is_target"].astype(np.int64), self._starts[:-1])
        self.num_bytes = int(arrays["num_bytes"].sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The blocks at `indices` as one batch, padded on the right to the longest of them.

        Labels are the token ids themselves where they are targets, else `NO_TARGET`; nothing is shifted. Packed blocks
        have `position_ids` that start over at each piece, which is how transformers knows that they are packed, and no
        attention mask: padding is a piece of its own.
        """
        lengths = self.lengths[np.asarray(indices)]
        shape = (len(lengths), int(lengths.max()))
        # Packed, padding is a piece like any other; transformers would warn of pad tokens without a mask.
        fill = self._arrays["token_ids"][0] if self._isolate else self._pad_token_id
        token_ids = np.full(shape, fill, dtype=np.int64)
        labels = np.full(shape, NO_TARGET, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            where = slice(self._starts[index], self._starts[index] + length)
            token_ids[row, :length] = self._arrays["token_ids"][where]
            is_target = self._arrays["is_target"][where]
            labels[row, :length][is_target] = token_ids[row, :length][is_target]
            positions[row, :length] = self._arrays["positions"][where]
            positions[row, length:] = np.arange(shape[1] - length)
        inputs = {"input_ids": torch.from_numpy(token_ids)}
        if self._isolate:
            inputs["position_ids"] = torch.from_numpy(positions)
        else:
            inputs["attention_mask"] = torch.from_numpy((np.arange(shape[1]) < lengths[:, None]).astype(np.int64))
        return Batch(
            inputs,
            torch.from_numpy(labels),
            num_tokens=int(lengths.sum()),
            num_targets=int(self.num_targets[np.asarray(indices)].sum()),
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every block once, longest first: padding is least, and a batch that is too large fails at once."""
        order = np.argsort(-self.lengths, kind="stable")
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])

    def prompts(self) -> list[Prompt]:
        """Each prompt once and uncut, in the order of the rows, with all its references; of the test split alone."""
        return self._prompts


@dataclass(frozen=True)
class LanguageData:
    """A dataset ready for a language model. `notes` says what was left out or cut, one sentence each."""

    train: TokenSplit
    val: TokenSplit
    test: TokenSplit
    fingerprint: str
    notes: list[str]


def load_language_data(config: DatasetConfig, tokenizer: Tokenizer) -> LanguageData:
    """Reads, checks, splits and tokenises (once) a dataset for a language model.

    Empty texts and conversations without an assistant's turn are left out unless `bad_rows` is `error`, and what is
    longer than `max_length` is treated as `too_long` says; both are counted in `notes`.

    Raises:
        DataError: files or columns that do not exist, values that are not text, or nothing left to learn from.
    """
    source = open_source(config)
    key = digest(source.fingerprint, tokenizer_text(tokenizer), _settings(config, tokenizer))[:16]
    path = cache_dir() / "blocks" / f"{config.name}-{key}.npz"
    if not path.is_file():
        once(lambda: _build(source, config, tokenizer, path))
    with np.load(path) as file:
        arrays = dict(file)
    described = json.loads(arrays.pop("described").tobytes())
    isolate = config.task is Task.causal_lm and config.blocks is Blocks.packed and not config.attend_across_documents

    def split(name: str) -> TokenSplit:
        own = {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(f"{name}/")}
        prompts = [Prompt(**prompt) for prompt in described["prompts"]] if name == "test" else []
        return TokenSplit(own, prompts, pad_token_id=tokenizer.pad_token_id, isolate=isolate)

    fingerprint = source.fingerprint
    if config.task is Task.chat:
        fingerprint = digest(fingerprint, _chat_template(config, tokenizer))
    return LanguageData(split("train"), split("val"), split("test"), fingerprint, described["notes"])


def _settings(config: DatasetConfig, tokenizer: Any) -> str:
    template = _chat_template(config, tokenizer) if config.task is Task.chat else None
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    chosen = [config.task, config.text_columns, config.max_length, config.blocks, config.attend_across_documents]
    chosen += [config.prompt_template, config.target_column, config.messages_column, config.too_long]
    chosen += [config.val_fraction, config.test_fraction, config.split_seed, config.subset_seed]
    chosen += [config.letters_only, config.num_train_examples, config.num_eval_examples, config.bad_rows]
    return json.dumps([_FORMAT, chosen, ends, template])


# ---------------------------------------------------------------- rows


def _build(source: Source, config: DatasetConfig, tokenizer: Any, path: Path) -> None:
    started = time.perf_counter()
    rows = source.read()
    notes = list(rows.notes)
    tables = {name: _usable_rows(table, name, config, source, notes) for name, table in rows.tables.items()}
    splits = _split(tables, config)
    arrays: dict[str, np.ndarray] = {}
    prompts: list[dict[str, Any]] = []
    for name, table in splits.items():
        blocks = _encode(table, name, config, tokenizer, notes)
        if not blocks.token_ids:
            raise DataError(f"dataset={config.name}: nothing to predict is left in {name}. {' '.join(notes)}")
        lengths = np.array([len(ids) for ids in blocks.token_ids], dtype=np.int64)
        positions = [
            _positions(len(ids), starts) for ids, starts in zip(blocks.token_ids, blocks.piece_starts, strict=True)
        ]
        arrays |= {
            f"{name}/token_ids": np.concatenate([np.array(ids, dtype=np.int32) for ids in blocks.token_ids]),
            f"{name}/is_target": np.concatenate([np.array(mask, dtype=bool) for mask in blocks.is_target]),
            f"{name}/positions": np.concatenate(positions),
            f"{name}/lengths": lengths,
            f"{name}/num_bytes": np.array(blocks.num_bytes, dtype=np.int64),
        }
        if name == "test":
            prompts = [asdict(prompt) for prompt in blocks.prompts.values()]
    keys = {name: _texts_and_targets(table, config) for name, table in splits.items()}
    notes += equal_rows_notes(config.name, keys, what="text" if config.task is Task.causal_lm else "prompt")
    described = json.dumps({"notes": notes, "prompts": prompts}).encode()
    arrays["described"] = np.frombuffer(described, dtype=np.uint8)
    _save(arrays, path)
    num_tokens = sum(len(values) for key, values in arrays.items() if key.endswith("/token_ids"))
    logger.info("tokenised %s: %d tokens in %.1f s", config.name, num_tokens, time.perf_counter() - started)


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise DataError(
            f"the cache folder {path.parent} cannot be written ({error.strerror or error}); set LORA_HARNESS_CACHE to "
            "another one."
        ) from error


def _positions(length: int, piece_starts: list[int]) -> np.ndarray:
    ends = [*piece_starts[1:], length]
    return np.concatenate(
        [np.arange(end - start, dtype=np.int32) for start, end in zip(piece_starts, ends, strict=True)]
    )


def _columns(config: DatasetConfig) -> list[str]:
    match config.task:
        case Task.causal_lm:
            return list(config.text_columns)
        case Task.completion:
            return list(dict.fromkeys([*_template_columns(config), config.target_column]))
        case _:
            return [config.messages_column]


def _template_columns(config: DatasetConfig) -> list[str]:
    assert config.prompt_template is not None
    try:
        return [name for _, name, _, _ in string.Formatter().parse(config.prompt_template) if name is not None]
    except ValueError as error:
        raise DataError(f"dataset.prompt_template={config.prompt_template!r}: {error}; braces name columns.") from error


def _usable_rows(
    table: pd.DataFrame, split: str, config: DatasetConfig, source: Source, notes: list[str]
) -> pd.DataFrame:
    """The rows from which something can be learned; what is left out is counted in `notes`. Raises `DataError`."""
    where = f"dataset={config.name}, {split} rows of {source.description}"
    columns = _columns(config)
    if table.empty:
        raise DataError(f"{where}: no rows.")
    setting = {
        Task.causal_lm: "dataset.text_columns",
        Task.completion: "dataset.prompt_template and dataset.target_column",
        Task.chat: "dataset.messages_column",
    }[config.task]
    absent = column_problems(table, columns, where=where, setting=setting)
    if absent:
        raise DataError("\n".join(absent))
    check = _conversation_faults if config.task is Task.chat else _column_faults
    faults, problems = check(table, where, config, notes)
    drop = config.bad_rows is not BadRows.error
    table, found = without_faults(table, faults, where=where, drop=drop, notes=notes)
    if problems or found:
        raise DataError("\n".join([*problems, *found]))
    return table


def _column_faults(
    table: pd.DataFrame, where: str, config: DatasetConfig, notes: list[str]
) -> tuple[Faults, list[str]]:
    faults: Faults = {}
    problems: list[str] = []
    columns = _columns(config)
    for column in columns:
        # Of a prompt with its target, the target must say something; of raw text, the text.
        found, wrong = text_faults(table, column, where=where, may_be_empty=column != columns[-1])
        faults |= found
        problems += wrong
    return faults, problems


def _conversation_faults(
    table: pd.DataFrame, where: str, config: DatasetConfig, notes: list[str]
) -> tuple[Faults, list[str]]:
    column = config.messages_column
    wrong = [index for index, messages in enumerate(table[column]) if not _is_conversation(messages)]
    if wrong:
        return {}, [
            f'{where}: column {column} must hold lists of {{"role": ..., "content": ...}}, and does not in '
            f"{counted_rows(table.index[wrong])}: {table[column].iloc[wrong[0]]!r:.80}."
        ]
    unread = Counter(
        key
        for messages in table[column]
        for message in messages
        for key, value in message.items()
        if key not in ("role", "content") and value is not None
    )
    if unread:
        shown = ", ".join(f"{key} ({count} messages)" for key, count in sorted(unread.items()))
        notes.append(f"{where}: of a message, role and content are read; not read: {shown}.")
    other_columns = [str(name) for name in table.columns if name != column]
    if other_columns:
        notes.append(f"{where}: of a row, column {column} is read; not read: {', '.join(other_columns)}.")
    return {
        "no turn of the assistant": [
            not any(_is_answer(message) for message in messages) for messages in table[column]
        ],
        "half of a surrogate pair, which is no character,": [
            any(is_broken(message["role"]) or is_broken(message["content"]) for message in messages)
            for messages in table[column]
        ],
    }, []


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list | tuple | np.ndarray)
        and len(messages) > 0
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )


def _is_answer(message: dict[str, str]) -> bool:
    return message["role"] == "assistant" and message["content"].strip() != ""


# ---------------------------------------------------------------- splits


def _split(tables: dict[str, pd.DataFrame], config: DatasetConfig) -> dict[str, pd.DataFrame]:
    """Carves what is missing out of train (test first, then val), then takes the subsets."""
    splits = dict(tables)
    for name, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if name not in splits:
            splits["train"], splits[name] = _carve(splits["train"], fraction, name, config)
    available = len(splits["train"])
    if config.num_train_examples is not None and config.num_train_examples > available:
        raise DataError(
            f"dataset.num_train_examples={config.num_train_examples}: {config.name} has {available} training rows "
            "(validation and test rows taken off); give at most that, or null for all."
        )
    if config.num_train_examples is not None:
        order = np.random.default_rng(config.subset_seed).permutation(available)
        splits["train"] = splits["train"].iloc[np.sort(order[: config.num_train_examples])]
    if config.num_eval_examples is not None:
        for name in ("val", "test"):
            groups = _groups(splits[name], config)
            order = np.random.default_rng(config.subset_seed).permutation(int(groups.max()) + 1)
            splits[name] = splits[name][np.isin(groups, order[: config.num_eval_examples])]
    return splits


def _groups(table: pd.DataFrame, config: DatasetConfig) -> np.ndarray:
    """A number for each row, the same for rows of one prompt: its references belong together."""
    if config.task is Task.causal_lm:
        return np.arange(len(table))
    return pd.factorize(pd.Series(_texts_and_targets(table, config)[0]))[0]


def _texts_and_targets(table: pd.DataFrame, config: DatasetConfig) -> tuple[list[str], list[str]]:
    """Of each row the text that makes it the same as another one, and what is predicted after it."""
    match config.task:
        case Task.causal_lm:
            texts = table[config.text_columns[0]].tolist()
            return texts, [""] * len(texts)
        case Task.completion:
            prompts = [_prompt_text(row, config) for row in table.to_dict("records")]
            return prompts, table[config.target_column].tolist()
        case _:
            turns = [
                [[message["role"], message["content"]] for message in messages]
                for messages in table[config.messages_column]
            ]
            last = [_last_answer(messages) for messages in table[config.messages_column]]
            prompts = [json.dumps(row[:end]) for row, end in zip(turns, last, strict=True)]
            return prompts, [row[end][1] for row, end in zip(turns, last, strict=True)]


def _last_answer(messages: Sequence[dict[str, str]]) -> int:
    return max(index for index, message in enumerate(messages) if _is_answer(message))


def _carve(train: pd.DataFrame, fraction: float, name: str, config: DatasetConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of one prompt stay together: its other references in training would give the answer away."""
    groups = _groups(train, config)
    num_groups = int(groups.max()) + 1
    num_carved = max(1, round(num_groups * fraction))
    if num_carved >= num_groups:
        raise DataError(
            f"dataset={config.name}: {num_groups} rows are too few to carve a {name} split off; give more rows, or "
            f"dataset.{name}_file."
        )
    # A seed of its own for each split: carved one after the other, they would otherwise take the same places.
    generator = np.random.default_rng([config.split_seed, len(name)])
    is_carved = np.isin(groups, generator.permutation(num_groups)[:num_carved])
    return train[~is_carved], train[is_carved]


def _prompt_text(row: dict[Any, Any], config: DatasetConfig) -> str:
    assert config.prompt_template is not None
    try:
        return config.prompt_template.format_map(row)
    except (ValueError, KeyError, AttributeError, IndexError) as error:
        raise DataError(
            f"dataset.prompt_template={config.prompt_template!r}: {error}; braces hold names of columns alone."
        ) from error


# ---------------------------------------------------------------- tokens


def _encode(table: pd.DataFrame, split: str, config: DatasetConfig, tokenizer: Any, notes: list[str]) -> _Blocks:
    if tokenizer.eos_token_id is None and config.task is not Task.chat:
        raise DataError(
            f"dataset.task={config.task}: the tokenizer has no end-of-text token (eos_token), with which a text must "
            "end; name one in its tokenizer_config.json."
        )
    match config.task:
        case Task.causal_lm:
            texts = table[config.text_columns[0]]
            if config.letters_only:
                texts = texts.map(_letters_only)
            return _encode_documents(texts.tolist(), config, tokenizer)
        case Task.completion:
            examples = _completions(table, split, config, tokenizer, notes)
        case _:
            examples = _conversations(table, split, config, tokenizer, notes)
    return _fitted(examples, table.index, split, config, tokenizer, notes)


def _token_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # Not verbose: transformers would warn that a document is longer than the model reads.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _letters_only(text: str) -> str:
    """Lower case, and one space for everything between letters."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def _start_token(tokenizer: Any) -> int:
    """What stands before the first token of a document: without it that token could not be predicted."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _encode_documents(texts: list[str], config: DatasetConfig, tokenizer: Any) -> _Blocks:
    blocks = _Blocks()
    start, end, size = _start_token(tokenizer), tokenizer.eos_token_id, config.max_length
    for text, ids in zip(texts, _token_ids(texts, tokenizer), strict=True):
        document = [start, *ids, end]
        num_bytes = len(text.encode())
        at = 0  # the last token that is context already
        while at < len(document) - 1:
            open_block = config.blocks is Blocks.packed and blocks.token_ids and size - len(blocks.token_ids[-1]) >= 2
            room = size - len(blocks.token_ids[-1]) if open_block else size
            piece = document[at : at + room]
            mask = [False] + [True] * (len(piece) - 1)
            if open_block:
                if not config.attend_across_documents:
                    blocks.piece_starts[-1].append(len(blocks.token_ids[-1]))
                blocks.token_ids[-1] += piece
                blocks.is_target[-1] += mask
                blocks.num_bytes[-1] += num_bytes
            else:
                blocks.add(piece, mask, num_bytes)
            num_bytes = 0  # the whole document's bytes count where it begins
            at += len(piece) - 1
    return blocks


@dataclass(frozen=True)
class _Example:
    """A prompt with its target, or a conversation. The first `num_start` tokens stay however much is cut."""

    prompt: Prompt
    target: str
    token_ids: list[int]
    is_target: list[bool]
    num_start: int = 0


def _completions(
    table: pd.DataFrame, split: str, config: DatasetConfig, tokenizer: Any, notes: list[str]
) -> Iterator[_Example]:
    prompts = [_prompt_text(row, config) for row in table.to_dict("records")]
    targets = table[config.target_column].tolist()
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    kept = [prompt.rstrip(" ") for prompt in prompts] if _joins_spaces(tokenizer) else prompts
    leads = [prompt[len(text) :] for prompt, text in zip(prompts, kept, strict=True)]
    num_moved = sum(lead != "" for lead in leads)
    if num_moved:
        notes.append(
            f"dataset={config.name}, {split}: {num_moved} of {len(prompts)} prompts end in a space, which this "
            "tokenizer joins with the word after it; it is tokenised with the target."
        )
    ends = [lead + target for lead, target in zip(leads, targets, strict=True)]
    joined = _token_ids([text + end for text, end in zip(kept, ends, strict=True)], tokenizer)
    encoded = zip(_token_ids(kept, tokenizer), _token_ids(ends, tokenizer), joined, strict=True)
    for row, (prompt_ids, target_ids, joined_ids) in enumerate(encoded):
        if joined_ids[: len(prompt_ids)] == prompt_ids:
            target_ids = joined_ids[len(prompt_ids) :]
        # The first token has nothing before it from which it could be predicted.
        context = [*start, *prompt_ids] or [_start_token(tokenizer)]
        ids = [*context, *target_ids, tokenizer.eos_token_id]
        is_target = [False] * len(context) + [True] * (len(ids) - len(context))
        prompt = Prompt(prompts[row], context, [], lead=leads[row])
        yield _Example(prompt, targets[row], ids, is_target, num_start=len(start))


def _joins_spaces(tokenizer: Any) -> bool:
    """Whether a space and the word after it can be one token; GPT-2 and SentencePiece have a sign for that space."""
    return any(len(token) > 1 and token[0] in "Ġ▁ " for token in tokenizer.get_vocab())


def _chat_template(config: DatasetConfig, tokenizer: Any) -> str:
    given = config.chat_template
    if given is None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(
                "dataset.chat_template: the tokenizer has no chat template of its own; set "
                "dataset.chat_template=chatml, or to a file that holds a Jinja template."
            )
        return str(tokenizer.chat_template)
    if given == "chatml":
        return CHATML
    try:
        path = chat_template_file(config)
        assert path is not None
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"dataset.chat_template={given}: neither chatml nor a file that can be read ({error.strerror})."
        ) from error


@dataclass(frozen=True)
class _Answer:
    """Where a turn of the assistant stands in a rendered conversation.

    `start`: after the template's generation prompt. `stop`: where the answer ends and what the template writes after it
    begins. `end`: where that ends. `is_rewritten`: the template writes something else than the row's content, spaces at
    its ends aside.
    """

    start: int
    stop: int
    end: int
    is_rewritten: bool


_Render = Callable[[list[dict[str, str]], bool], str]


def _conversations(
    table: pd.DataFrame, split: str, config: DatasetConfig, tokenizer: Any, notes: list[str]
) -> Iterator[_Example]:
    template = _chat_template(config, tokenizer)
    if not getattr(tokenizer, "is_fast", True):
        raise DataError(
            f"dataset={config.name}: task=chat needs a fast tokenizer, which says where each token stands in the text; "
            f"{type(tokenizer).__name__} does not. Give the model a tokenizer.json."
        )

    def render(messages: list[dict[str, str]], ask: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=ask
                )
            )
        except Exception as error:  # a template can raise whatever it likes
            raise DataError(
                f"the chat template does not take a conversation of the roles "
                f"{', '.join(message['role'] for message in messages) or 'none'} ({type(error).__name__}: {error}); "
                "fix the rows, or set dataset.chat_template=chatml."
            ) from error

    rewritten: list[int] = []
    for row, value in enumerate(table[config.messages_column]):
        messages = [{"role": message["role"], "content": message["content"]} for message in value]
        try:
            text = render(messages, False)
            answers = _answers(messages, text, render)
        except DataError as error:
            raise DataError(f"dataset={config.name}, {split}: {place(table.index, row)}: {error}") from error
        if any(answer.is_rewritten for answer in answers):
            rewritten.append(row)
        ids, starts = _tokens_with_starts(text, [answer.start for answer in answers], tokenizer)
        # A token belongs to where it begins.
        is_target = [any(answer.start <= first < answer.end for answer in answers) for first in starts]
        last = answers[-1]
        num_context = sum(first < last.start for first in starts)
        prompt = Prompt(text[: last.start], ids[:num_context], [], stop=text[last.stop : last.end].strip())
        # The first token has nothing before it from which it could be predicted.
        yield _Example(prompt, text[last.start : last.stop], ids, [False, *is_target[1:]])
    if rewritten:
        notes.append(
            f"dataset={config.name}, {split}: in {counted_rows(table.index[rewritten])} the chat template writes an "
            "answer in another form than the row holds; what it writes is the target."
        )


def _answers(messages: list[dict[str, str]], text: str, render: _Render) -> list[_Answer]:
    """The assistant's turns in `text`, the rendered conversation. Raises `DataError` where they cannot be located.

    Nothing is searched for in what people wrote: the conversation is rendered again with a number of our own in place
    of one answer, and what the template then writes after that number is what it writes after the answer.
    """
    answers: list[_Answer] = []
    marker = _absent_number(text)
    for index, message in enumerate(messages):
        if not _is_answer(message):
            continue
        marked = [*messages[:index], {"role": message["role"], "content": marker}]
        head, found, after = render([*marked, *messages[index + 1 :]], False).partition(marker)
        # A template cannot be asked to begin an empty conversation.
        before = render(messages[:index], True) if index else head
        stop = len(text) - len(after)
        if not found or marker in after:
            raise DataError(
                f"the chat template does not write the content of turn {index + 1} as one piece, so that what is to be "
                "learned cannot be located; set dataset.chat_template=chatml."
            )
        first = max(len(before), answers[-1].end if answers else 0)
        if not text.startswith(before) or not text.endswith(after) or stop < first:
            raise DataError(
                f"the chat template writes what stands around turn {index + 1} differently once the answer or more "
                "turns follow, so that the assistant's part cannot be located; set dataset.chat_template=chatml, or "
                "keep one assistant turn in each row."
            )
        ending = after
        if index + 1 < len(messages):
            # What follows begins with what ends the answer, and goes on with the next turn.
            ending = _common_start(after, render(marked, False).rpartition(marker)[2])
        shown = text[len(head) if text.startswith(head) else len(before) : stop]
        content = message["content"]
        is_rewritten = shown not in (content, content.strip(), content.lstrip(), content.rstrip())
        answers.append(_Answer(len(before), stop, stop + len(ending), is_rewritten))
    return answers


def _common_start(one: str, other: str) -> str:
    length = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))
    return one[:length]


def _absent_number(text: str) -> str:
    """A number that the text does not hold; digits, because a template may change the case of letters."""
    number = 7308154926
    while str(number) in text:
        number += 1
    return str(number)


def _tokens_with_starts(text: str, cuts: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of a text and where each begins; a token that would reach over a cut is made two.

    Otherwise a prompt would end with the beginning of its answer, which generation does not know.
    """
    ids, offsets = _tokens_with_offsets(text, tokenizer)
    crossed = [cut for cut in cuts if any(first < cut < last for first, last in offsets)]
    if crossed:
        bounds = [0, *crossed, len(text)]
        ids, offsets = [], []
        for begin, end in itertools.pairwise(bounds):
            more, places = _tokens_with_offsets(text[begin:end], tokenizer)
            ids += more
            offsets += [(begin + first, begin + last) for first, last in places]
    return ids, [first for first, _ in offsets]


def _tokens_with_offsets(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def _fitted(
    examples: Iterator[_Example], rows: pd.Index, split: str, config: DatasetConfig, tokenizer: Any, notes: list[str]
) -> _Blocks:
    """The examples within `max_length`; a prompt loses its beginning, a target and a conversation their end."""
    blocks, counts, size = _Blocks(), Counter[str](), config.max_length
    for row, example in enumerate(examples):
        ids, mask = example.token_ids, example.is_target
        blocks.prompts.setdefault(example.prompt.text, example.prompt).references.append(example.target)
        if len(ids) > size:
            if config.too_long is TooLong.error:
                raise DataError(
                    f"dataset={config.name}, {split}: {place(rows, row)} has {len(ids)} tokens, "
                    f"dataset.max_length={size}; give a larger one, or dataset.too_long=truncate or drop."
                )
            if config.too_long is TooLong.drop:
                counts["dropped"] += 1
                continue
            ids, mask = _truncated(example, size, config.task)
            if any(mask):
                counts["truncated"] += 1
        if not any(mask):
            counts["dropped"] += 1
            continue
        blocks.add(ids, mask, _target_bytes(example, ids, mask, config, tokenizer))
    if counts:
        what = " and ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        notes.append(
            f"dataset={config.name}, {split}: of {counts.total() + len(blocks.token_ids) - counts['truncated']} rows "
            f"{what} at dataset.max_length={size} tokens (dataset.too_long={config.too_long})."
        )
    return blocks


def _truncated(example: _Example, size: int, task: Task) -> tuple[list[int], list[bool]]:
    ids, mask = example.token_ids, example.is_target
    if task is Task.chat:
        return ids[:size], mask[:size]
    start, num_context = example.num_start, mask.index(True)
    # The target first, then of the context as much as there is room for: at least one token, with the start token.
    room = max(1, size - (len(ids) - num_context))
    first = num_context - min(num_context - start, room - start)
    return [*ids[:start], *ids[first:]][:size], [*mask[:start], *mask[first:]][:size]


def _target_bytes(example: _Example, ids: list[int], mask: list[bool], config: DatasetConfig, tokenizer: Any) -> int:
    if config.task is Task.completion and len(ids) == len(example.token_ids):
        return len((example.prompt.lead + example.target).encode())
    targets = [token for token, wanted in zip(ids, mask, strict=True) if wanted]
    return len(tokenizer.decode(targets, skip_special_tokens=True).encode())
