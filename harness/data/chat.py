"""Conversations: the tokens of a chat template, of which the assistant's turns are targets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from harness.config.schema import DatasetConfig
from harness.content.errors import DataError
from harness.content.files import chat_template_file
from harness.data.blocks import Example, Prompt
from harness.data.readers import counted_rows, place
from harness.data.row_checks import Faults, is_broken

# What `dataset.chat_template=chatml` stands for.
CHATML = (
    "{{ bos_token | default('', true) }}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation_faults(
    table: pd.DataFrame, where: str, config: DatasetConfig, notes: list[str]
) -> tuple[Faults, list[str]]:
    """Which rows are no conversations to learn from, by reason, and problems of the whole column."""
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


def last_answer(messages: Sequence[dict[str, str]]) -> int:
    """Index of the last message of the assistant that says something."""
    return max(index for index, message in enumerate(messages) if _is_answer(message))


def find_chat_template(config: DatasetConfig, tokenizer: Any) -> str:
    """The Jinja text of the chat template. Raises `DataError` where there is none."""
    given = config.chat_template
    if given is None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise DataError(
                "dataset.chat_template: the tokenizer has no chat template; set "
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


def encode_conversations(
    table: pd.DataFrame, split: str, config: DatasetConfig, tokenizer: Any, notes: list[str]
) -> Iterator[Example]:
    """The tokens of each conversation, with the assistant's turns as targets. Raises `DataError`."""
    template = find_chat_template(config, tokenizer)
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
        yield Example(prompt, text[last.start : last.stop], ids, [False, *is_target[1:]])
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
            # What follows begins with what ends the answer, and continues with the next turn.
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
