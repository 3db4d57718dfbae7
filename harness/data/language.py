"""Texts for language models: from a `DatasetConfig` to blocks of tokens with their targets.

A block is a row of at most `max_length` tokens. Where `is_target` holds, the token is to be predicted from those before
it; everything else is context. What becomes an example:

    causal_lm    <start> w w w w <end>          every w and <end>; a long document continues in the next block
    completion   <start> p p p t t t <end>      t and <end>
    chat         the chat template              the assistant's turns and what ends them

A prompt and its target have the tokens of the joined text wherever the prompt then has the tokens that it has alone:
generation must begin as training did. Where a tokenizer joins a space with the word after it, spaces at the end of a
prompt are therefore tokenised with the target.

`cut` gives each document its own blocks; `packed` fills blocks with pieces of several documents, which do not see
each other: positions start over at each piece, and attention stays inside. A block that continues a document begins
with the last token of the block before, as context, so that every token of a document is a target exactly once.
"""

from __future__ import annotations

import io
import json
import logging
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from harness.config.schema import BadRows, Blocks, DatasetConfig, Task
from harness.content.assets import cache_dir
from harness.content.errors import DataError
from harness.data.blocks import Prompt, TokenBlocks, TokenSplit, fit_to_length, piece_positions, start_token, tokenise
from harness.data.chat import conversation_faults, encode_conversations, find_chat_template, last_answer
from harness.data.labelled import Tokenizer, tokenizer_text
from harness.data.prompts import encode_completions, prompt_text, template_columns
from harness.data.row_checks import Faults, equal_rows_notes, text_faults, without_faults
from harness.data.sources import Source, column_problems, digest, open_source
from harness.data.splits import choose_rows, hold_out_groups
from harness.processes.preparation import once
from harness.results.files import write_atomically

logger = logging.getLogger(__name__)

# Part of the cache key: raise it when the blocks made from the same files change.
_FORMAT = 4


@dataclass(frozen=True)
class LanguageData:
    """A dataset ready for a language model. `notes` says what was left out or truncated, one sentence each.

    `test` is None where it was not to be read.
    """

    train: TokenSplit
    val: TokenSplit
    test: TokenSplit | None
    fingerprint: str
    notes: list[str]

    # A language model has no task head.
    num_labels: ClassVar[int | None] = None
    label_names: ClassVar[list[str]] = []
    positive_class: ClassVar[int | None] = None


def load_language_data(config: DatasetConfig, tokenizer: Tokenizer, *, with_test: bool = True) -> LanguageData:
    """Reads, checks, splits and tokenises (once) a dataset for a language model.

    Empty texts and conversations without an assistant's turn are left out unless `bad_rows` is `error`, and what is
    longer than `max_length` is treated as `too_long` says; both are counted in `notes`. Without test, a test split of
    the data is not opened.

    Raises:
        DataError: files or columns that do not exist, values that are not text, or nothing left to learn from.
    """
    source = open_source(config, with_test=with_test)
    settings = _settings(config, tokenizer) + ("" if with_test else " without test")
    key = digest(source.fingerprint, tokenizer_text(tokenizer), settings)[:16]
    path = cache_dir() / "blocks" / f"{config.name}-{key}.npz"
    if not path.is_file():
        once(lambda: _build(source, config, tokenizer, path, with_test=with_test))
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
        fingerprint = digest(fingerprint, find_chat_template(config, tokenizer))
    test = split("test") if with_test else None
    return LanguageData(split("train"), split("val"), test, fingerprint, described["notes"])


def _settings(config: DatasetConfig, tokenizer: Any) -> str:
    template = find_chat_template(config, tokenizer) if config.task is Task.chat else None
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    chosen = [config.task, config.text_columns, config.max_length, config.blocks, config.attend_across_documents]
    chosen += [config.prompt_template, config.target_column, config.messages_column, config.too_long]
    chosen += [config.val_fraction, config.test_fraction, config.split_seed, config.subset_seed]
    chosen += [config.letters_only, config.num_train_examples, config.num_eval_examples, config.bad_rows]
    return json.dumps([_FORMAT, chosen, ends, template])


def _build(source: Source, config: DatasetConfig, tokenizer: Any, path: Path, *, with_test: bool) -> None:
    started = time.perf_counter()
    rows = source.read()
    notes = list(rows.notes)
    tables = {name: _usable_rows(table, name, config, source, notes) for name, table in rows.tables.items()}
    splits = _split(tables, config, with_test=with_test)
    arrays: dict[str, np.ndarray] = {}
    prompts: list[dict[str, Any]] = []
    for name, table in splits.items():
        blocks = _encode(table, name, config, tokenizer, notes)
        if not blocks.token_ids:
            raise DataError(f"dataset={config.name}: nothing to predict is left in {name}. {' '.join(notes)}")
        lengths = np.array([len(ids) for ids in blocks.token_ids], dtype=np.int64)
        positions = [
            piece_positions(len(ids), starts) for ids, starts in zip(blocks.token_ids, blocks.piece_starts, strict=True)
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


def _columns(config: DatasetConfig) -> list[str]:
    match config.task:
        case Task.causal_lm:
            return list(config.text_columns)
        case Task.completion:
            return list(dict.fromkeys([*template_columns(config), config.target_column]))
        case _:
            return [config.messages_column]


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
    check = conversation_faults if config.task is Task.chat else _column_faults
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


def _split(tables: dict[str, pd.DataFrame], config: DatasetConfig, *, with_test: bool) -> dict[str, pd.DataFrame]:
    """The rows of train, val and test. Raises `DataError`."""
    groups = {name: _groups(table, config) for name, table in tables.items()}

    def hold_out(rows: np.ndarray, fraction: float, name: str) -> np.ndarray:
        return hold_out_groups(groups["train"][rows], fraction, name, config)

    chosen = choose_rows(groups, config, hold_out=hold_out, keep_order=True, with_test=with_test)
    return {name: tables[table].iloc[rows] for name, (table, rows) in chosen.items()}


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
            prompts = [prompt_text(row, config) for row in table.to_dict("records")]
            return prompts, table[config.target_column].tolist()
        case _:
            turns = [
                [[message["role"], message["content"]] for message in messages]
                for messages in table[config.messages_column]
            ]
            last = [last_answer(messages) for messages in table[config.messages_column]]
            prompts = [json.dumps(row[:end]) for row, end in zip(turns, last, strict=True)]
            return prompts, [row[end][1] for row, end in zip(turns, last, strict=True)]


def _encode(table: pd.DataFrame, split: str, config: DatasetConfig, tokenizer: Any, notes: list[str]) -> TokenBlocks:
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
            examples = encode_completions(table, split, config, tokenizer, notes)
        case _:
            examples = encode_conversations(table, split, config, tokenizer, notes)
    return fit_to_length(examples, table.index, split, config, tokenizer, notes)


def _letters_only(text: str) -> str:
    """Lower case, and one space for everything between letters."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def _encode_documents(texts: list[str], config: DatasetConfig, tokenizer: Any) -> TokenBlocks:
    blocks = TokenBlocks()
    start, end, size = start_token(tokenizer), tokenizer.eos_token_id, config.max_length
    for text, ids in zip(texts, tokenise(texts, tokenizer), strict=True):
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
