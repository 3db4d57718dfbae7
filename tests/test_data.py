"""Data: tokenised once, split and subset by their own seeds, batched by length, and refused with the rows shown."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch

from harness.config.schema import BadRows, DatasetConfig, ModelConfig, Task, TinyModel, TooLong
from harness.content import files
from harness.content.assets import AssetError, asset_dir
from harness.content.errors import DataError
from harness.data import sources
from harness.data.batches import Batch, TrainingBatches, length_bucketed_batches
from harness.data.labelled import Split, TextData, load_data
from harness.models.tokenizers import load_tokenizer


class CountedTokenizer:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        self.num_calls += 1
        return self._tokenizer(*texts, **options)


def byte_tokenizer(**changes: Any) -> CountedTokenizer:
    """The tiny models' tokenizer, with attributes changed."""
    tokenizer = load_tokenizer(ModelConfig(name="tiny", tiny=TinyModel.bert))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return CountedTokenizer(tokenizer)


def lower_case_tokenizer() -> CountedTokenizer:
    """Like `byte_tokenizer`, but texts are lower-cased first: the vocabulary is the same, the cut is not."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    return tokenizer


class LengthTokenizer:
    """One token a text, its length: for files of which only the rows matter."""

    pad_token_id = 0
    model_input_names = ("input_ids",)
    init_kwargs: ClassVar[dict[str, Any]] = {}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(text)] for text in texts]}


@pytest.fixture
def tokenizer() -> CountedTokenizer:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" in request.fixturenames:
        request.getfixturevalue("real")  # finds the assets where they are before the cache moves
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))


# 200 rows, every text another, of three classes in the shares 60 %, 30 %, 10 %.
LABELS = ["a"] * 120 + ["b"] * 60 + ["c"] * 20
ROWS = pd.DataFrame(
    {"text": [f"{label} no. {row} " + "x" * (7 * row % 41) for row, label in enumerate(LABELS)], "label": LABELS}
)


def local(path: Path, **settings: Any) -> DatasetConfig:
    """The config of a file with training rows."""
    return DatasetConfig(**{"name": "local", "train_file": str(path), **settings})


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "train.csv"
    ROWS.to_csv(path, index=False)
    return path


def examples(split: Split) -> list[tuple[tuple[int, ...], Any]]:
    """Token ids and label of every row, in order."""
    found = []
    for row in range(len(split)):
        batch = split.batch([row])
        found.append((tuple(batch.inputs["input_ids"][0].tolist()), batch.labels[0].item()))
    return found


def texts(split: Split, tokenizer: CountedTokenizer) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in examples(split)]


def tokenised_folders(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "tokenised"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---------------------------------------------------------------- tokenised once


def test_the_second_load_tokenises_nothing(csv: Path, tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    first = load_data(local(csv), tokenizer)
    assert tokenizer.num_calls == 1  # one file
    again = byte_tokenizer()
    second = load_data(local(csv), again)
    assert again.num_calls == 0
    for name in ("train", "val", "test"):
        assert examples(getattr(first, name)) == examples(getattr(second, name))
    assert first.label_names == second.label_names == ["a", "b", "c"]
    assert len(tokenised_folders(tmp_path)) == 1


def test_a_call_of_the_tokenizer_between_two_loads_changes_nothing(csv: Path, tokenizer: CountedTokenizer) -> None:
    load_data(local(csv), tokenizer)
    tokenizer("a text", truncation=True, max_length=5, padding="max_length")  # leaves its settings in the backend
    num_calls = tokenizer.num_calls
    load_data(local(csv), tokenizer)
    assert tokenizer.num_calls == num_calls


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_examples": 20},
        {"subset_seed": 1},
        {"split_seed": 1},
        {"val_fraction": 0.2},
        {"test_fraction": 0.2},
        {"metrics": ["mcc"], "best_metric": "nll"},
    ],
    ids=str,
)
def test_what_is_drawn_from_the_tokenised_rows_is_no_reason_to_tokenise(
    csv: Path, tokenizer: CountedTokenizer, settings: dict[str, Any]
) -> None:
    load_data(local(csv), tokenizer)
    load_data(local(csv, **settings), tokenizer)
    assert tokenizer.num_calls == 1


def test_equal_rows_in_another_folder_are_the_same_rows(csv: Path, tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    first = load_data(local(csv), tokenizer)
    copy = tmp_path / "elsewhere" / "rows.csv"
    copy.parent.mkdir()
    copy.write_bytes(csv.read_bytes())
    second = load_data(local(copy), tokenizer)
    assert tokenizer.num_calls == 1
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("settings", "other"),
    [
        ({"max_length": 127}, byte_tokenizer),
        ({"text_columns": ["label"]}, byte_tokenizer),
        ({"task": Task.regression, "label_column": "number", "metrics": [], "best_metric": "mse"}, byte_tokenizer),
        ({}, lower_case_tokenizer),
        # As between BERT and DistilBERT: the same cut of a text, other inputs.
        ({}, lambda: byte_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])),
    ],
    ids=["max_length", "text column", "label column", "normalizer", "inputs"],
)
def test_what_changes_the_tokenised_rows_tokenises_anew(
    tmp_path: Path, settings: dict[str, Any], other: Callable[[], CountedTokenizer]
) -> None:
    path = tmp_path / "train.csv"
    ROWS.assign(number=range(len(ROWS))).to_csv(path, index=False)
    load_data(local(path), byte_tokenizer())
    tokenizer = other()
    load_data(local(path, **settings), tokenizer)
    assert tokenizer.num_calls == 1
    assert len(tokenised_folders(tmp_path)) == 2


def test_another_content_of_the_same_file_tokenises_anew(csv: Path, tokenizer: CountedTokenizer) -> None:
    before = load_data(local(csv), tokenizer)
    csv.write_text(csv.read_text().replace("a no. 0 ", "a no. 0!"))
    after = load_data(local(csv), tokenizer)
    assert tokenizer.num_calls == 2
    assert before.fingerprint != after.fingerprint


def test_two_loads_at_once_leave_one_folder_and_equal_rows(csv: Path, tmp_path: Path) -> None:
    """The second load begins and ends while the first one tokenises."""
    inner = []

    class SlowTokenizer(CountedTokenizer):
        def __call__(self, *given: Any, **options: Any) -> Any:
            inner.append(load_data(local(csv), byte_tokenizer()))
            return super().__call__(*given, **options)

    outer = load_data(local(csv), SlowTokenizer(byte_tokenizer()))
    assert examples(outer.train) == examples(inner[0].train)
    assert len(tokenised_folders(tmp_path)) == 1


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12 warns of it beside a thread
def test_two_processes_at_once_are_fine(csv: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # which has imported all of it
    both_ready, answers = context.Barrier(2), context.SimpleQueue()

    def load() -> None:
        both_ready.wait(60)
        loaded = load_data(local(csv), LengthTokenizer())
        num_tokens = int(loaded.train.batch(range(162)).inputs["input_ids"].sum())
        answers.put((len(loaded.train), len(loaded.val), len(loaded.test), num_tokens))

    processes = [context.Process(target=load) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = answers.get(), answers.get()
    assert first == second
    assert first[:3] == (162, 18, 20)
    assert len(tokenised_folders(tmp_path)) == 1


def test_a_load_that_dies_while_it_tokenises_leaves_nothing(csv: Path, tmp_path: Path) -> None:
    class DyingTokenizer(CountedTokenizer):
        def __call__(self, *given: Any, **options: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_data(local(csv), DyingTokenizer(byte_tokenizer()))
    assert tokenised_folders(tmp_path) == []


def test_a_save_that_dies_leaves_nothing(
    csv: Path, tmp_path: Path, tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(rows: datasets.Dataset, path: str) -> None:
        Path(path).mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(datasets.Dataset, "save_to_disk", die)
        with pytest.raises(KeyboardInterrupt):
            load_data(local(csv), tokenizer)
    assert tokenised_folders(tmp_path) == []
    assert len(load_data(local(csv), tokenizer).val) == 18


def test_a_cache_that_cannot_be_written_is_named(csv: Path, tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    (tmp_path / "cache").write_text("a file where the folder belongs")
    with pytest.raises(DataError, match=r"cache folder .*cache/tokenised cannot be written.*set LORA_HARNESS_CACHE"):
        load_data(local(csv), tokenizer)


def test_tokenised_rows_are_as_open_to_others_as_any_new_folder(
    csv: Path, tmp_path: Path, tokenizer: CountedTokenizer
) -> None:
    load_data(local(csv), tokenizer)
    (tmp_path / "new").mkdir()
    (name,) = tokenised_folders(tmp_path)
    assert (tmp_path / "cache" / "tokenised" / name).stat().st_mode == (tmp_path / "new").stat().st_mode


# ---------------------------------------------------------------- splits


def test_what_is_missing_is_held_out_of_train_stratified_and_disjoint(csv: Path, tokenizer: CountedTokenizer) -> None:
    loaded = load_data(local(csv), tokenizer)
    parts = {name: examples(getattr(loaded, name)) for name in ("train", "val", "test")}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 162, "val": 18, "test": 20}
    # Together the three are all rows, each once.
    together = [example for rows in parts.values() for example in rows]
    whole = tokenizer(ROWS["text"].tolist())["input_ids"]
    assert sorted(together) == sorted(
        (tuple(ids), ["a", "b", "c"].index(label)) for ids, label in zip(whole, LABELS, strict=True)
    )
    for rows in parts.values():
        counts = Counter(label for _, label in rows)
        for label, share in ((0, 0.6), (1, 0.3), (2, 0.1)):
            assert abs(counts[label] - share * len(rows)) < 1


def test_splits_are_the_same_from_a_fresh_cache_and_with_any_random_state(
    csv: Path, tmp_path: Path, tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_data(local(csv), tokenizer)
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "fresh"))
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    second = load_data(local(csv), tokenizer)
    for name in ("train", "val", "test"):
        assert examples(getattr(first, name)) == examples(getattr(second, name))


def test_split_seed_draws_another_validation_split(csv: Path, tokenizer: CountedTokenizer) -> None:
    vals = [set(examples(load_data(local(csv, split_seed=seed), tokenizer).val)) for seed in range(3)]
    assert vals[0] != vals[1] != vals[2]


def test_subsets_are_nested_and_the_other_splits_stay(csv: Path, tokenizer: CountedTokenizer) -> None:
    whole = load_data(local(csv), tokenizer)
    subsets = {num: load_data(local(csv, num_train_examples=num), tokenizer) for num in (10, 50, 162)}
    train = {num: examples(subset.train) for num, subset in subsets.items()}
    assert {num: len(set(rows)) for num, rows in train.items()} == {10: 10, 50: 50, 162: 162}
    assert set(train[10]) < set(train[50]) < set(train[162]) == set(examples(whole.train))
    for subset in subsets.values():
        assert examples(subset.val) == examples(whole.val)
        assert examples(subset.test) == examples(whole.test)
        assert subset.label_names == whole.label_names


def test_validation_and_test_rows_are_limited_and_train_stays(csv: Path, tokenizer: CountedTokenizer) -> None:
    whole = load_data(local(csv), tokenizer)
    few, more = (load_data(local(csv, num_eval_examples=num), tokenizer) for num in (5, 10))
    assert examples(few.train) == examples(whole.train)
    for name in ("val", "test"):
        split = examples(getattr(whole, name))
        assert len(getattr(few, name)) == 5 and len(getattr(more, name)) == 10
        assert set(examples(getattr(few, name))) < set(examples(getattr(more, name))) < set(split)
    other = load_data(local(csv, num_eval_examples=5, subset_seed=1), tokenizer)
    assert examples(other.val) != examples(few.val)
    assert len(load_data(local(csv, num_eval_examples=10**6), tokenizer).val) == len(whole.val)


def test_texts_that_are_too_long_are_cut_left_out_or_refused(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    rows = [("long " * 9 if n % 4 == 0 else f"a{n}", ("x", "y")[n % 2]) for n in range(40)]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))

    def load(too_long: str) -> TextData:
        return load_data(local(path, max_length=12, too_long=TooLong(too_long)), tokenizer)

    cut, dropped = load("truncate"), load("drop")
    assert [len(cut.train) + len(cut.val) + len(cut.test), cut.train.lengths.max()] == [40, 12]
    assert len(dropped.train) + len(dropped.val) + len(dropped.test) == 30
    assert max(split.lengths.max() for split in (dropped.train, dropped.val, dropped.test)) < 12
    assert "10 of 40 texts are longer than dataset.max_length=12 tokens and are left out" in dropped.notes[0]
    with pytest.raises(DataError, match=r"train: 10 of 40 texts are longer than dataset\.max_length=12 tokens; give"):
        load("error")


def test_subset_seed_draws_another_subset_and_the_same_validation_split(csv: Path, tokenizer: CountedTokenizer) -> None:
    first, second = (load_data(local(csv, num_train_examples=50, subset_seed=seed), tokenizer) for seed in (0, 1))
    assert set(examples(first.train)) != set(examples(second.train))
    assert examples(first.val) == examples(second.val)


def test_files_of_their_own_are_taken_whole_and_in_order(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    parts = {"train": ROWS.iloc[:150], "val": ROWS.iloc[100:140], "test": ROWS.iloc[[3, 1, 199, 2]]}
    parts["train"] = pd.concat([parts["train"], ROWS.iloc[190:]])
    for name, part in parts.items():
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    loaded = load_data(
        DatasetConfig(name="local", path=str(tmp_path), **{f"{name}_file": f"{name}.csv" for name in parts}), tokenizer
    )
    for name, part in parts.items():
        assert texts(getattr(loaded, name), tokenizer) == part["text"].tolist()
        assert [loaded.label_names[label] for _, label in examples(getattr(loaded, name))] == part["label"].tolist()
    assert tokenizer.num_calls == 3


def test_a_class_of_one_row_stays_in_train(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    path = tmp_path / "train.csv"
    pd.concat([ROWS, pd.DataFrame({"text": ["alone"], "label": ["d"]})]).to_csv(path, index=False)
    loaded = load_data(local(path), tokenizer)
    assert loaded.num_labels == 4
    assert "alone" in texts(loaded.train, tokenizer)


def test_labels_that_are_numbers_are_ordered_as_numbers(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    path = tmp_path / "train.csv"
    ROWS.assign(label=["-1", "0", "2", "10", "9"] * 40).to_csv(path, index=False)
    assert load_data(local(path), tokenizer).label_names == ["-1", "0", "2", "9", "10"]


def test_labels_that_only_look_like_numbers_are_names(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    path = tmp_path / "train.csv"
    pd.DataFrame({"text": ROWS["text"][:100], "label": ["--1", "²", "1", "2"] * 25}).to_csv(path, index=False)
    assert load_data(local(path), tokenizer).label_names == ["--1", "1", "2", "²"]


# ---------------------------------------------------------------- batches


LENGTHS = np.random.default_rng(0).integers(4, 129, size=1003)


def batches_of(lengths: np.ndarray = LENGTHS, *, batch_size: int = 4, seed: int = 0, epoch: int = 0) -> list[list[int]]:
    drawn = length_bucketed_batches(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    return [batch.tolist() for batch in drawn]


@pytest.mark.parametrize("num_examples", [1, 4, 199, 200, 201, 1003])
def test_every_example_comes_once_an_epoch(num_examples: int) -> None:
    for epoch in range(2):
        batches = batches_of(LENGTHS[:num_examples], epoch=epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(num_examples))
        assert len(batches) == -(-num_examples // 4)
        assert sum(len(batch) < 4 for batch in batches) <= 1


def test_a_batch_is_cut_from_a_window_sorted_by_length() -> None:
    # Two windows of 50 batches: the second draw of the permutation is the second window.
    order = np.random.default_rng([0, 0]).permutation(400)
    batches = batches_of(LENGTHS[:400])
    for window in (order[:200], order[200:]):
        inside = [batch for batch in batches if set(batch) <= set(window.tolist())]
        assert len(inside) == 50
        by_shortest = sorted(inside, key=lambda batch: (LENGTHS[batch[0]], LENGTHS[batch[-1]]))
        in_order = [LENGTHS[index] for batch in by_shortest for index in batch]
        assert in_order == sorted(in_order)


def test_batches_do_not_come_by_length() -> None:
    longest = [int(LENGTHS[batch].max()) for batch in batches_of(LENGTHS[:200])]  # one window
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4


def test_the_order_is_another_for_every_epoch_and_seed() -> None:
    orders = {(seed, epoch): str(batches_of(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9


def test_the_order_depends_on_nothing_but_seed_and_epoch(csv: Path, tokenizer: CountedTokenizer) -> None:
    expected = batches_of(seed=3, epoch=2)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = str(random.getstate()), str(np.random.get_state()), torch.get_rng_state()
    assert batches_of(seed=3, epoch=2) == expected
    assert (str(random.getstate()), str(np.random.get_state())) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    # Nor on how a step is cut, on earlier epochs, or on who else iterates.
    split = load_data(local(csv), tokenizer).train
    steps = [
        [torch.cat([batch.labels for batch in micro]).tolist() for micro in batches.epoch(1)]
        for batches in (
            TrainingBatches(split, batch_size=8, micro_batch_size=size, seed=0) for size in (None, 8, 4, 2, 1)
        )
    ]
    assert all(other == steps[0] for other in steps)


def test_steps_of_an_epoch_are_counted_right(csv: Path, tokenizer: CountedTokenizer) -> None:
    split = load_data(local(csv), tokenizer).train
    batches = TrainingBatches(split, batch_size=16, micro_batch_size=4, seed=0)
    assert batches.steps_per_epoch == 11 == len(list(batches.epoch(0)))


def test_micro_batches_are_the_batch_in_pieces_each_padded_to_its_own_longest(
    csv: Path, tokenizer: CountedTokenizer
) -> None:
    split = load_data(local(csv), tokenizer).train
    whole_steps = TrainingBatches(split, batch_size=16, micro_batch_size=None, seed=0).epoch(0)
    cut_steps = TrainingBatches(split, batch_size=16, micro_batch_size=4, seed=0).epoch(0)
    narrower = 0
    for (whole,), pieces in zip(whole_steps, cut_steps, strict=True):
        assert [len(piece.labels) for piece in pieces] == [4] * (len(whole.labels) // 4) + [2] * (
            len(whole.labels) % 4 > 0
        )
        assert torch.equal(torch.cat([piece.labels for piece in pieces]), whole.labels)
        assert real_tokens(pieces) == real_tokens([whole])
        assert sum(piece.num_tokens for piece in pieces) == whole.num_tokens
        assert sum(piece.num_targets for piece in pieces) == whole.num_targets == len(whole.labels)
        for piece in pieces:
            width = piece.inputs["input_ids"].shape[1]
            assert width == int(piece.inputs["attention_mask"].sum(dim=1).max())
            narrower += width < whole.inputs["input_ids"].shape[1]
    assert narrower > 0


def real_tokens(batches: list[Batch]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], strict=True)
    ]


def test_longest_is_a_step_of_the_longest_examples(csv: Path, tokenizer: CountedTokenizer) -> None:
    split = load_data(local(csv), tokenizer).train
    batches = TrainingBatches(split, batch_size=16, micro_batch_size=8, seed=0)
    longest = batches.longest()
    assert sum(batch.num_tokens for batch in longest) == int(np.sort(split.lengths)[-16:].sum())
    most = max(batch.inputs["input_ids"].numel() for step in batches.epoch(0) for batch in step)
    assert longest[0].inputs["input_ids"].numel() >= most
    assert [len(batch.labels) for batch in longest] == [8, 8]


def test_a_batch_holds_ids_mask_and_labels(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    path = tmp_path / "train.csv"
    pd.DataFrame({"text": ["ab", "wxyz"] * 20, "label": ["no", "yes"] * 20}).to_csv(path, index=False)
    split = load_data(
        DatasetConfig(name="x", train_file=str(path), val_file=str(path), test_file=str(path)), tokenizer
    ).val
    batch = split.batch([0, 1])
    short, long = tokenizer("ab")["input_ids"], tokenizer("wxyz")["input_ids"]
    assert batch.inputs["input_ids"].tolist() == [[*short, 0, 0], long]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch.labels.tolist() == [0, 1]
    assert {value.dtype for value in (*batch.inputs.values(), batch.labels)} == {torch.int64}
    assert (batch.num_tokens, batch.num_targets) == (10, 2)
    moved = batch.to(torch.device("meta"))
    assert {value.device.type for value in (*moved.inputs.values(), moved.labels)} == {"meta"}


def test_padding_is_the_tokenizers_and_the_mask_does_not_depend_on_it(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    pd.DataFrame({"text": ["ab", "wxyz"] * 20, "label": ["no", "yes"] * 20}).to_csv(path, index=False)
    # As with GPT-2: the pad token is one that texts contain.
    tokenizer = byte_tokenizer(pad_token="a")
    batch = load_data(DatasetConfig(name="x", train_file=str(path), val_file=str(path)), tokenizer).val.batch([0, 1])
    (pad,) = set(batch.inputs["input_ids"][0, 4:].tolist())
    assert pad == tokenizer.pad_token_id == batch.inputs["input_ids"][0, 1]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]


def test_pairs_have_token_types_and_share_the_room(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    pd.DataFrame({"one": ["ab", "p" * 50] * 20, "two": ["xyz", "q" * 50] * 20, "label": ["no", "yes"] * 20}).to_csv(
        path, index=False
    )
    tokenizer = byte_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    split = load_data(local(path, val_file=str(path), text_columns=["one", "two"], max_length=33), tokenizer).val
    batch = split.batch([0, 1])
    # [CLS] a b [SEP] x y z [SEP], then padding; 15 of each of the long texts and three special tokens.
    assert batch.inputs["token_type_ids"].tolist() == [[0] * 4 + [1] * 4 + [0] * 25, [0] * 17 + [1] * 16]
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [8, 33]
    assert batch.inputs["input_ids"].shape == (2, 33)
    assert tokenizer.decode(batch.inputs["input_ids"][1]) == f"[CLS]{'p' * 15}[SEP]{'q' * 15}[SEP]"


def test_a_split_is_scored_longest_first_and_whole(csv: Path, tokenizer: CountedTokenizer) -> None:
    split = load_data(local(csv), tokenizer).train
    batches = list(split.batches(32))
    assert sorted(map(tuple, real_tokens(batches))) == sorted(ids for ids, _ in examples(split))
    widths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert batches[0].inputs["input_ids"].shape == (32, split.lengths.max())


# ---------------------------------------------------------------- formats


def write_as(rows: pd.DataFrame, path: Path) -> Path:
    match path.suffix:
        case ".csv":
            rows.to_csv(path, index=False)
        case ".tsv":
            rows.to_csv(path, index=False, sep="\t")
        case ".jsonl" | ".json":
            rows.to_json(path, orient="records", lines=True, force_ascii=False)
        case ".parquet":
            rows.to_parquet(path)
        case ".tab":
            lines = ["\t".join(rows.columns), "\t".join("s" for _ in rows.columns), ""]
            path.write_text("\n".join([*lines, *("\t".join(row) for row in rows.to_numpy())]), encoding="utf-8")
    return path


ENDINGS = [".csv", ".tsv", ".jsonl", ".parquet", ".tab"]
AWKWARD = ["NA", "None", "007", "nan", "null", "1e5", "a, b", 'she said "no"', "größer 😀", " lead", "#5"]


@pytest.mark.parametrize("columns", [["text"], ["text", "more"]], ids=["one text", "two texts"])
def test_every_format_gives_the_same_splits(tmp_path: Path, tokenizer: CountedTokenizer, columns: list[str]) -> None:
    rows = ROWS.assign(more=[f"{AWKWARD[row % len(AWKWARD)]} and {row}" for row in range(len(ROWS))])
    rows.loc[range(len(AWKWARD)), "text"] = AWKWARD
    expected = None
    for ending in ENDINGS:
        path = write_as(rows, tmp_path / f"rows{ending}")
        loaded = load_data(local(path, text_columns=columns), tokenizer)
        found = [examples(split) for split in (loaded.train, loaded.val, loaded.test)], loaded.label_names
        expected = expected or found
        assert found == expected, ending
    assert tokenizer.num_calls == len(ENDINGS)
    everything = texts(loaded.train, tokenizer) + texts(loaded.val, tokenizer) + texts(loaded.test, tokenizer)
    if len(columns) == 1:
        assert set(AWKWARD) - {" lead"} <= set(everything)


def test_a_quotation_mark_in_a_tsv_file_swallows_no_rows(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    path = tmp_path / "rows.tsv"
    lines = [f'"so it began {n}\tgood' if n % 5 == 0 else f'so it ended {n}"\tbad' for n in range(100)]
    path.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    for _ in range(2):  # the second time from the cache
        loaded = load_data(local(path), tokenizer)
        assert len(loaded.train) + len(loaded.val) + len(loaded.test) == 100
        assert loaded.notes == [
            "rows.tsv: in 20 rows (rows.tsv line 2, 7, 12, 17, 22, ...) a field begins with a quotation mark, which is "
            "kept as text, because the file does not quote its fields throughout."
        ]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_labels_that_look_like_missing_values_stay_text(
    tmp_path: Path, tokenizer: CountedTokenizer, ending: str
) -> None:
    rows = pd.DataFrame({"text": ROWS["text"], "label": ["NA", "None", "007", "7"] * 50})
    loaded = load_data(local(write_as(rows, tmp_path / f"rows{ending}")), tokenizer)
    assert loaded.label_names == ["007", "7", "NA", "None"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_labels_may_be_numbers_in_files_that_have_them(
    tmp_path: Path, tokenizer: CountedTokenizer, ending: str
) -> None:
    rows = pd.DataFrame({"text": ROWS["text"], "label": [1, 0] * 100})
    loaded = load_data(local(write_as(rows, tmp_path / f"rows{ending}")), tokenizer)
    assert loaded.label_names == ["0", "1"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".tab"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(
    tmp_path: Path, tokenizer: CountedTokenizer, ending: str
) -> None:
    path = write_as(ROWS, tmp_path / f"rows{ending}")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_data(local(path), tokenizer).val) == 18


def test_targets_of_a_regression_are_float32(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    path = tmp_path / "rows.csv"
    pd.DataFrame({"text": ROWS["text"], "score": [row / 8 for row in range(200)]}).to_csv(path, index=False)
    config = local(path, label_column="score", task=Task.regression, metrics=["pearson"], best_metric="pearson")
    loaded = load_data(config, tokenizer)
    assert (loaded.num_labels, loaded.label_names) == (1, [])
    assert [len(split) for split in (loaded.train, loaded.val, loaded.test)] == [162, 18, 20]
    batch = loaded.val.batch(range(18))
    assert batch.labels.dtype == torch.float32
    assert set(batch.labels.tolist()) <= {row / 8 for row in range(200)}


def test_path_may_be_the_file_itself_or_its_folder(csv: Path, tokenizer: CountedTokenizer) -> None:
    expected = examples(load_data(local(csv), tokenizer).train)
    for config in (
        DatasetConfig(name="local", path=str(csv)),
        DatasetConfig(name="local", path=str(csv.parent), train_file="train.csv"),
        DatasetConfig(name="local", path=str(csv.parent), train_file=str(csv)),
    ):
        assert examples(load_data(config, tokenizer).train) == expected


def test_a_relative_path_starts_where_the_command_was_given(
    csv: Path, tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(csv.parent)
    assert len(load_data(DatasetConfig(name="local", train_file="train.csv"), tokenizer).train) == 162


def test_path_replaces_the_download_of_an_asset(
    tmp_path: Path, tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Path:
        raise AssetError(f"{name} was asked for")

    monkeypatch.setattr(files, "asset_dir", refuse)
    config = DatasetConfig(
        name="reuters_r8", asset="reuters_r8", train_file="train.tab", test_file="test.tab", path=str(tmp_path)
    )
    for name in ("train.tab", "test.tab"):
        write_as(ROWS, tmp_path / name)
    assert len(load_data(config, tokenizer).train) == 180
    with pytest.raises(AssetError, match="reuters_r8 was asked for"):
        load_data(replace(config, path=None), tokenizer)


# ---------------------------------------------------------------- refused


def refused(config: DatasetConfig, tmp_path: Path) -> str:
    """The message, after making sure that nothing was tokenised."""
    with pytest.raises(DataError) as raised:
        load_data(config, byte_tokenizer())
    assert tokenised_folders(tmp_path) == []
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.csv",
            "text,label\n" + "fine,a\n,b\n" * 7 + "  ,a\n",
            "train rows of rows.csv: column text is empty in 8 rows (rows.csv line 3, 5, 7, 9, 11, ...); fix them",
        ),
        ("rows.csv", "text,label\nfine,a\nalso fine\n", "1 rows do not have the 2 columns text, label: line 3 has 1;"),
        ("rows.csv", "text,label\nfine,a\nalso fine,\n", "column label has no label in 1 rows (rows.csv line 3);"),
        ("rows.csv", "text,label\nfine,a\nx,b,c\n", "rows.csv: not readable as .csv (.*line 3 has 3"),
        ("rows.csv", "text,label\n1,fine,a\n2,x,b\n", "line 2 has 3, line 3 has 3;"),
        ("rows.csv", "text,klass\nfine,a\n", "no column label; it has text, klass. Set dataset.text_columns"),
        ("rows.csv", "sentence,y\nfine,a\n", "no column text, label; it has sentence, y."),
        ("rows.csv", "text,label\n", "train rows of rows.csv: no rows."),
        ("rows.csv", "", "rows.csv: not readable as .csv (no header line: the file is empty)."),
        (
            "rows.csv",
            "text,label\nfine,a\nmore,a\n",
            "column label has 1 class(es) in train (a); at least 2 are needed.",
        ),
        ("rows.csv", 'text,label\n"fine,a\nmore,b\n', "rows.csv: not readable as .csv (line 2: a quotation"),
        ("rows.jsonl", "", "train rows of rows.jsonl: no rows."),
        (
            "rows.jsonl",
            '{"text": "fine", "label": 1}\n\n{"text": "x", "label": }\n',
            'rows.jsonl: not readable as .jsonl (line 3: Expecting value at character 24: {"text": "x", "label": }).',
        ),
        (
            "rows.json",
            '[{"text": "fine", "label": 1}, 5]',
            "line 1 is no JSON object; a row is one object, and here stands 5",
        ),
        (
            "rows.jsonl",
            '{"text": "fine", "label": 1}\n{"text": 5, "label": 0}\n',
            "train rows of rows.jsonl: column text has 1 values that are not text: 5 (the first at rows.jsonl line 2).",
        ),
        (
            "rows.jsonl",
            '{"text": "fine", "label": 1}\n{"text": "x"}\n{"text": "y", "label": null}\n{"text": "z", "label": 0}',
            "column label has no label in 2 rows (rows.jsonl line 2, 3);",
        ),
        ("rows.parquet", "no parquet", "rows.parquet: not readable as .parquet (.*Parquet"),
        ("rows.tab", "", "rows.tab: not readable as .tab (three header lines are needed"),
        (
            "rows.tab",
            "text\tlabel\ns\td\n\t\nfine\ta\nbroken\n",
            "1 rows do not have the 2 columns text, label: line 5",
        ),
        ("rows.xlsx", "x", "rows.xlsx: known endings are .csv, .tsv, .jsonl, .json, .parquet, .tab, .txt."),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_rows(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    found = refused(local(tmp_path / name), tmp_path)
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.search(pattern, found), found
    assert "\n" not in found


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.tab"])
def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    write_as(pd.concat([ROWS] * 50), tmp_path / name)  # longer than any reader's buffer
    lines = (tmp_path / name).read_bytes().split(b"\n")
    lines[8000] = lines[8000].replace(b"no.", "n\xba".encode("latin-1"))
    (tmp_path / name).write_bytes(b"\n".join(lines))
    assert re.search(
        r"not UTF-8 text \(line 8001: b'.*n\\xba .*'\); save it as UTF-8", refused(local(tmp_path / name), tmp_path)
    )


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,more,label\n,x,a\nfine,,b\n")
    (tmp_path / "test.csv").write_text("text,label\nfine,a\n")
    config = local(tmp_path / "train.csv", test_file=str(tmp_path / "test.csv"), text_columns=["text", "more"])
    fix = "; fix them, or leave them out with dataset.bad_rows=drop."
    assert refused(config, tmp_path).splitlines() == [
        "dataset=local, train rows of train.csv, test.csv: column text is empty in 1 rows (train.csv line 2)" + fix,
        "dataset=local, train rows of train.csv, test.csv: column more is empty in 1 rows (train.csv line 3)" + fix,
        "dataset=local, test rows of train.csv, test.csv: no column more; it has text, label. Set "
        "dataset.text_columns (one or two) and dataset.label_column.",
    ]


def test_labels_that_train_has_not_are_counted_and_shown(tmp_path: Path) -> None:
    ROWS.to_csv(tmp_path / "train.csv", index=False)
    other = ROWS.assign(label=ROWS["label"].replace({"b": "new", "c": "odd"}))
    other.to_csv(tmp_path / "test.csv", index=False)
    config = DatasetConfig(name="local", path=str(tmp_path), train_file="train.csv", test_file="test.csv")
    assert refused(config, tmp_path) == (
        "dataset=local: 80 test rows have labels that are not among the 3 of train: 'new' (60), 'odd' (20); the first "
        "is test.csv line 122."
    )


def test_a_regression_wants_numbers(tmp_path: Path) -> None:
    scores = [str(row) for row in range(200)]
    scores[3], scores[5], scores[8], scores[9] = "high", "", "nan", "inf"
    ROWS.assign(label=scores).to_csv(tmp_path / "rows.csv", index=False)
    config = local(tmp_path / "rows.csv", task=Task.regression, metrics=["pearson"], best_metric="pearson")
    assert refused(config, tmp_path).splitlines() == [
        "dataset=local, train rows of rows.csv: task=regression, but column label is no number in 3 rows (rows.csv "
        "line 5, 10, 11): 'high', 'nan', 'inf'.",
        "dataset=local, train rows of rows.csv: column label has no number in 1 rows (rows.csv line 7); fix them, or "
        "leave them out with dataset.bad_rows=drop.",
    ]


def test_a_file_that_is_not_there_is_refused_with_what_is(csv: Path, tmp_path: Path) -> None:
    assert refused(local(csv.parent / "tran.csv"), tmp_path) == (
        f"dataset.train_file={csv.parent}/tran.csv: no file {csv.parent}/tran.csv. There: train.csv."
    )
    assert refused(
        DatasetConfig(name="x", path=str(csv.parent), train_file="train.csv", test_file="t.csv"), tmp_path
    ) == (f"dataset.test_file=t.csv: no file {csv.parent}/t.csv. There: train.csv.")
    assert refused(local(tmp_path / "no" / "such.csv"), tmp_path).endswith("There: nothing.")


def test_a_folder_with_many_files_is_not_listed_whole(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.csv").touch()
    assert refused(local(tmp_path / "x.csv"), tmp_path).endswith(
        "There: 00.csv, 01.csv, 02.csv, 03.csv, 04.csv, 05.csv, 06.csv, 07.csv, 08.csv, 09.csv, ...."
    )


def test_a_path_that_leads_nowhere_is_refused(csv: Path, tmp_path: Path) -> None:
    assert refused(DatasetConfig(name="x", path="/no/such", train_file="a.csv", test_file="b.csv"), tmp_path) == (
        "dataset.path=/no/such: no such folder. Give the folder that holds a.csv, b.csv."
    )
    assert refused(DatasetConfig(name="x", path=str(csv), train_file="a.csv"), tmp_path).startswith(
        f"dataset.path={csv}: no such folder."
    )
    assert refused(DatasetConfig(name="x", path=str(csv.parent)), tmp_path) == (
        f"dataset.train_file: not set. Name the file with the training rows. In {csv.parent}: train.csv."
    )


def test_more_training_rows_than_there_are_is_refused(csv: Path, tokenizer: CountedTokenizer) -> None:
    with pytest.raises(DataError, match=r"num_train_examples=163: local has 162 training rows .*give at most that"):
        load_data(local(csv, num_train_examples=163), tokenizer)


def test_a_subset_of_one_class_is_refused(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    rows = ROWS.assign(label=["a"] * 190 + ["b"] * 10)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    with pytest.raises(DataError, match=r"the 2 training rows are all of one class; take more rows"):
        load_data(local(tmp_path / "rows.csv", num_train_examples=2), tokenizer)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (
            ["a", "b", "c"] * 4,
            {},
            r"12 rows are too few to hold out a test split of 1 with every one of 3 classes in both parts; give more "
            r"rows, another dataset.test_fraction \(now 0.1\), or dataset.test_file",
        ),
        (["a", "b", "c"] * 4, {"test_fraction": 0.9}, r"too few to hold out a test split of 11"),
        (["a", "b", "c"] * 10, {}, r"27 rows are too few to hold out a val split of 3|val split"),
        (["a", "b", "c", "d"], {}, r"0 rows are too few to hold out a test split of 1"),
    ],
)
def test_too_few_rows_for_a_stratified_split_are_refused(
    tmp_path: Path, tokenizer: CountedTokenizer, labels: list[str], settings: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.csv"
    pd.DataFrame({"text": ROWS["text"][: len(labels)], "label": labels}).to_csv(path, index=False)
    if len(labels) == 30:
        assert len(load_data(local(path), tokenizer).val) == 3  # just enough
        settings = {"val_fraction": 0.05}
    with pytest.raises(DataError, match=message):
        load_data(local(path, **settings), tokenizer)


def test_too_few_rows_for_a_regression_are_refused(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nfine,1.5\n")
    config = local(tmp_path / "rows.csv", task=Task.regression, metrics=[], best_metric="mse")
    with pytest.raises(DataError, match=r"1 rows are too few to hold out a test split of 1; give more rows"):
        load_data(config, tokenizer)


# ---------------------------------------------------------------- nothing dropped in silence


def json_rows(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> DatasetConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return local(path, val_file=str(path), test_file=str(path), **settings)


BROKEN: list[dict[str, Any]] = [
    {"text": "fine", "label": "a"},
    {"text": " ", "label": "a"},
    {"text": None, "label": "b"},
    {"label": "b"},
    {"text": "x", "label": ""},
    {"text": "half \ud800", "label": "a"},
    {"text": "y", "label": "b"},
    {"text": "z", "label": "half \udfff"},
    {"text": "whole \U0001f600", "label": "b"},
]


def test_bad_rows_are_refused_or_left_out_and_counted(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    where = "dataset=local, train rows of rows.jsonl, rows.jsonl, rows.jsonl: "
    said = [
        where + "column text is empty in 3 rows (rows.jsonl line 2, 3, 4)",
        where + "column text holds half of a surrogate pair, which is no character, in 1 rows (rows.jsonl line 6)",
        where + "column label has no label in 1 rows (rows.jsonl line 5)",
        where + "column label holds half of a surrogate pair, which is no character, in 1 rows (rows.jsonl line 8)",
    ]
    lines = refused(json_rows(tmp_path, BROKEN), tmp_path).splitlines()
    assert lines[:4] == [f"{line}; fix them, or leave them out with dataset.bad_rows=drop." for line in said]
    for _ in range(2):  # the second time from the cache
        loaded = load_data(json_rows(tmp_path, BROKEN, bad_rows=BadRows.drop), tokenizer)
        assert texts(loaded.train, tokenizer) == ["fine", "y", "whole \U0001f600"]
        assert [note for note in loaded.notes if note.startswith(where)] == [
            f"{line}; they are left out." for line in said
        ]
    with pytest.raises(DataError, match="column text is empty in all 2 rows"):
        load_data(json_rows(tmp_path, BROKEN[1:3], bad_rows=BadRows.drop), tokenizer)


def test_a_regression_leaves_out_what_has_no_number(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate([0.5, 2, None, "1e1", ""])]
    settings: dict[str, Any] = {"task": Task.regression, "metrics": ["pearson"], "best_metric": "pearson"}
    for label in ([1], {"a": 1}, True, "0x10", "1_0", 1e999):
        message = refused(json_rows(tmp_path, [*rows[:2], {"text": "t", "label": label}], **settings), tmp_path)
        assert "column label is no number in 1 rows (rows.jsonl line 3): " in message.splitlines()[0]
    loaded = load_data(json_rows(tmp_path, rows, bad_rows=BadRows.drop, **settings), tokenizer)
    assert loaded.train.labels.tolist() == [0.5, 2.0, 10.0]
    assert "column label has no number in 2 rows (rows.jsonl line 3, 5); they are left out." in loaded.notes[0]


def test_a_number_is_one_class_however_it_is_written(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    labels = [1, 1.0, 0, 0.0, 2.5, "1"]
    loaded = load_data(json_rows(tmp_path, [{"text": f"t{n}", "label": x} for n, x in enumerate(labels)]), tokenizer)
    assert loaded.label_names == ["0", "1", "2.5"]
    assert loaded.train.labels.tolist() == [1, 1, 0, 0, 2, 1]
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"text": ["a", "b", "c"], "label": [1.0, 0.0, 1.0]}).to_parquet(path)
    assert load_data(local(path, val_file=str(path), test_file=str(path)), tokenizer).label_names == ["0", "1"]
    rows = [{"text": f"t{n}", "label": n % 2 == 0} for n in range(4)]
    assert load_data(json_rows(tmp_path, rows), tokenizer).label_names == ["False", "True"]


@pytest.mark.parametrize("label", [["a"], {"name": "a"}, [], 1e999], ids=str)
def test_a_label_that_is_none_is_refused_with_its_row(tmp_path: Path, label: Any) -> None:
    rows = [{"text": "t", "label": "a"}, {"text": "u", "label": label}, {"text": "v", "label": "b"}]
    message = refused(json_rows(tmp_path, rows), tmp_path).splitlines()[0]
    assert (
        f"train rows of rows.jsonl, rows.jsonl, rows.jsonl: column label holds {label!r} in 1 rows (rows.jsonl"
        in message
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("good", "good "),
        ("good", "\tgood"),
        ("good", "go\u200bod"),
        ("good", "good\ufeff"),
        ("very good", "very\u00a0good"),
        ("very good", "very  good"),
        ("\u00e9t\u00e9", "e\u0301te\u0301"),
        ("1", "1.0"),
        ("\u2764", "\u2764\ufe0f"),
    ],
    ids=ascii,
)
def test_labels_that_look_alike_are_refused(tmp_path: Path, one: str, other: str) -> None:
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate([one, one, "bad", other])]
    path, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows[:3]))
    test.write_text("\n".join(json.dumps(row) for row in rows[2:]))
    assert refused(local(path, val_file=str(path), test_file=str(test)), tmp_path) == (
        "dataset=local: labels in column label look alike and would be different classes: "
        f"{one!a} (4 rows, first train.jsonl line 1), {other!a} (1 rows, first test.jsonl line 2). Write them "
        "alike in the file."
    )


def test_labels_that_differ_in_case_are_classes_and_said(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    rows = [
        {"text": f"t{n}", "label": label} for n, label in enumerate(["Good", "good", "bad", "007", "7", "\u00b2", "2"])
    ]
    loaded = load_data(json_rows(tmp_path, rows), tokenizer)
    assert len(loaded.label_names) == 7
    assert loaded.notes[0] == (
        "dataset=local: labels differ in case alone: 'Good' (3 rows, first rows.jsonl line 1), 'good' (3 rows, first "
        "rows.jsonl line 2)."
    )


def test_texts_that_people_write_are_left_as_they_are(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    written = [
        "nul \0 in it",
        "zero\u200bwidth",
        "\u202eright to left",
        "e\u0301",
        "\u00e9",
        "👩\u200d👩\u200d👧 ❤️",
        "a\u2028b",
    ]
    rows = [{"text": text, "label": str(n % 2)} for n, text in enumerate(written)]
    loaded = load_data(json_rows(tmp_path, rows), tokenizer)
    assert texts(loaded.train, tokenizer) == written
    assert not any("left out" in note for note in loaded.notes)


class SlowTokenizer(CountedTokenizer):
    """One whose result does not say what was cut."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        return dict(super().__call__(*given, **options))


@pytest.mark.parametrize("kind", [CountedTokenizer, SlowTokenizer])
@pytest.mark.parametrize("columns", [["text"], ["text", "more"]], ids=["one text", "two texts"])
def test_texts_that_are_cut_are_counted_in_each_split(tmp_path: Path, kind: Any, columns: list[str]) -> None:
    lengths = {"train": [3, 8, 9, 30], "val": [8, 8], "test": [50, 1]}
    more = {"more": "m"} if len(columns) == 2 else {}
    for name, numbers in lengths.items():
        rows = [{"text": "x" * n, "label": str(at % 2), **more} for at, n in enumerate(numbers)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DatasetConfig(
        name="local",
        path=str(tmp_path),
        text_columns=columns,
        max_length=8 + 2 * len(columns),
        **{f"{name}_file": f"{name}.jsonl" for name in lengths},
    )
    notes = load_data(config, kind(byte_tokenizer())).notes
    assert [note for note in notes if "longer" in note] == [
        f"dataset=local, {name}: {count} of {total} texts are longer than dataset.max_length={config.max_length} "
        "tokens and are truncated."
        for name, count, total in (("train", 2, 4), ("test", 1, 2))
    ]


def test_equal_rows_of_two_splits_are_counted(tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    parts = {
        "train": [("one", "a"), ("two", "b"), ("two", "a"), ("three", "b")],
        "val": [("three", "b"), ("four", "a")],
        "test": [("one", "a"), ("one", "b"), ("two", "a"), ("five", "b"), ("four", "a"), ("One", "a")],
    }
    for name, rows in parts.items():
        pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / f"{name}.csv", index=False)
    config = DatasetConfig(name="local", path=str(tmp_path), **{f"{name}_file": f"{name}.csv" for name in parts})
    assert load_data(config, tokenizer).notes == [
        "dataset=local: 3 of 6 test rows have the text of a row of train, 1 of them with another label or target.",
        "dataset=local: 1 of 2 val rows have the text of a row of train.",
        "dataset=local: 1 of 6 test rows have the text of a row of val.",
    ]
    # Also where the splits are held out of one file.
    pd.concat([ROWS, ROWS]).to_csv(tmp_path / "twice.csv", index=False)
    loaded = load_data(local(tmp_path / "twice.csv"), tokenizer)
    held_out = set(texts(loaded.test, tokenizer)) & set(texts(loaded.train, tokenizer))
    assert len(held_out) > 20
    assert re.match(r"dataset=local: \d\d of 40 test rows have the text of a row of train\.$", loaded.notes[0])


def test_the_positive_class_can_be_named(csv: Path, tmp_path: Path, tokenizer: CountedTokenizer) -> None:
    two = tmp_path / "two.csv"
    ROWS.assign(label=["good", "bad"] * 100).to_csv(two, index=False)
    found = {name: load_data(local(two, positive_label=name), tokenizer) for name in (None, "good", "bad")}
    assert [data.positive_class for data in found.values()] == [1, 1, 0]
    assert all(data.label_names == ["bad", "good"] for data in found.values())
    assert load_data(local(csv), tokenizer).positive_class is None
    with pytest.raises(DataError, match=r"dataset.positive_label='Good': the classes of local are 'bad', 'good'\."):
        load_data(local(two, positive_label="Good"), tokenizer)
    with pytest.raises(DataError, match=r"dataset.positive_label='a': local has 3 classes, over which f1 is the mean"):
        load_data(local(csv, positive_label="a"), tokenizer)


# ---------------------------------------------------------------- the hub


class Hub:
    """`datasets.load_dataset` on splits in memory; `validation_a+validation_b` concatenates as the hub does."""

    def __init__(self, splits: dict[str, datasets.Dataset]) -> None:
        self._splits = splits
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(self, path: str, name: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        self.asked.append((path, name, split, revision))
        return datasets.concatenate_datasets([self._splits[part] for part in split.split("+")])


def glue_like(label_names: list[str], labels: list[int], *, start: int = 0) -> datasets.Dataset:
    """Pairs of sentences with a class label, as GLUE has them."""
    columns = {
        "sentence1": [f"first {start + row}" for row in range(len(labels))],
        "sentence2": [f"second {start + row}" for row in range(len(labels))],
        "label": labels,
        "idx": list(range(len(labels))),
    }
    features = datasets.Features(
        sentence1=datasets.Value("string"),
        sentence2=datasets.Value("string"),
        label=datasets.ClassLabel(names=label_names),
        idx=datasets.Value("int32"),
    )
    return datasets.Dataset.from_dict(columns, features=features)


MRPC = ["not_equivalent", "equivalent"]
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
PAIRS = DatasetConfig(
    name="pairs",
    hub_id="nyu-mll/glue",
    subset="mrpc",
    revision=REVISION,
    test_split="validation",
    text_columns=["sentence1", "sentence2"],
    metrics=["accuracy", "f1"],
)


def use_hub(monkeypatch: pytest.MonkeyPatch, **splits: datasets.Dataset) -> Hub:
    hub = Hub(splits)
    monkeypatch.setattr(sources.datasets, "load_dataset", hub.load_dataset)
    return hub


def test_a_hub_dataset_keeps_the_order_of_its_classes(
    tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1 of MRPC is that of `equivalent`, class 1, which the alphabet would make class 0."""
    hub = use_hub(monkeypatch, train=glue_like(MRPC, [0, 1] * 50), validation=glue_like(MRPC, [1, 0, 1], start=100))
    loaded = load_data(PAIRS, tokenizer)
    assert loaded.label_names == MRPC
    assert loaded.test.batch([0, 1, 2]).labels.tolist() == [1, 0, 1]
    assert texts(loaded.test, tokenizer) == [f"first {row}second {row}" for row in (100, 101, 102)]
    assert hub.asked == [("nyu-mll/glue", "mrpc", split, REVISION) for split in ("train", "validation")]


def test_a_pinned_hub_dataset_is_loaded_once(tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use_hub(monkeypatch, train=glue_like(MRPC, [0, 1] * 50), validation=glue_like(MRPC, [1, 0]))
    first = load_data(PAIRS, tokenizer)
    hub.asked.clear()
    second = load_data(PAIRS, tokenizer)
    assert (hub.asked, tokenizer.num_calls) == ([], 2)
    assert first.fingerprint == second.fingerprint
    other = load_data(replace(PAIRS, revision="0" * 40), tokenizer)
    assert other.fingerprint != first.fingerprint
    assert len(hub.asked) == 2


def test_a_hub_dataset_without_a_pin_is_known_by_its_rows(
    tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(PAIRS, revision=None)
    train, validation = glue_like(MRPC, [0, 1] * 50), glue_like(MRPC, [1, 0])
    use_hub(monkeypatch, train=train, validation=validation)
    load_data(config, tokenizer)
    load_data(config, tokenizer)
    assert tokenizer.num_calls == 2
    use_hub(monkeypatch, train=train, validation=glue_like(MRPC, [0, 0]))
    assert load_data(config, tokenizer).test.labels.tolist() == [0, 0]


def test_hidden_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, train=glue_like(MRPC, [0, 1] * 50), test=glue_like(MRPC, [-1] * 7))
    assert refused(replace(PAIRS, test_split="test"), tmp_path) == (
        "dataset=pairs: 7 test rows have labels that are not among the 2 of train: 'hidden (-1)' (7); the first "
        "is test row index 0."
    )


def test_split_names_reach_the_hub_as_they_are(tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["entailment", "neutral", "contradiction"]
    hub = use_hub(
        monkeypatch,
        train=glue_like(names, [0, 1, 2] * 40),
        validation_matched=glue_like(names, [2, 1], start=500),
        validation_mismatched=glue_like(names, [0, 1, 2], start=600),
    )
    loaded = load_data(replace(PAIRS, test_split="validation_matched+validation_mismatched"), tokenizer)
    assert hub.asked[-1][2] == "validation_matched+validation_mismatched"
    assert loaded.label_names == names
    assert loaded.test.labels.tolist() == [2, 1, 0, 1, 2]


def test_a_hub_row_without_a_label_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some: list[Any] = [0, None, 1]
    use_hub(monkeypatch, train=glue_like(MRPC, [0, 1] * 50), validation=glue_like(MRPC, some))
    assert "validation row index 1); fix them" in refused(PAIRS, tmp_path)
    loaded = load_data(replace(PAIRS, bad_rows=BadRows.drop), byte_tokenizer())
    assert loaded.test.labels.tolist() == [0, 1]


def test_a_hub_dataset_of_numbers_is_a_regression(tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"sentence1": ["x"] * 40, "sentence2": ["y"] * 40, "label": [2.5, 4.0] * 20})
    use_hub(monkeypatch, train=rows, validation=rows)
    config = replace(PAIRS, task=Task.regression, metrics=["pearson", "spearman"], best_metric="pearson")
    assert load_data(config, tokenizer).test.batch([0, 1]).labels.tolist() == [2.5, 4.0]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach the Hub\nmore"),
        ValueError("Unknown split"),
        RuntimeError("Dataset scripts are no longer supported"),
        datasets.exceptions.DatasetGenerationError("An error occurred"),
        OSError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_the_hub_does_not_give_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sources.datasets, "load_dataset", fail)
    reason = (str(error).splitlines() or ["OSError"])[0]
    assert refused(PAIRS, tmp_path) == (
        f"dataset=pairs: split train of nyu-mll/glue could not be loaded ({reason}). Without network, save the rows as "
        "CSV, JSON lines or Parquet and use dataset=local dataset.train_file=... (and test_file)."
    )


def test_without_network_the_hub_is_refused(tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "Without network, save the rows as CSV" in refused(PAIRS, tmp_path)


# ---------------------------------------------------------------- the real data


@pytest.fixture(scope="session")
def real() -> dict[str, Path]:
    """Folders of the assets, from the cache or an index."""
    return {name: asset_dir(name) for name in ("minilm", "reuters_r8", "reuters_r52", "newsgroups_20")}


def real_config(name: str, real: dict[str, Path], **settings: Any) -> DatasetConfig:
    prefix = {"newsgroups_20": "20newsgroups"}.get(name, name.replace("_", "-"))
    return DatasetConfig(
        name=name,
        path=str(real[name]),
        train_file=f"{prefix}-train.tab",
        test_file=f"{prefix}-test.tab",
        text_columns=["Text"],
        label_column="Category",
        **settings,
    )


@pytest.mark.parametrize(
    ("name", "num_train", "num_test", "num_classes", "some_classes"),
    [
        ("reuters_r8", 5485, 2189, 8, {"acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"}),
        ("reuters_r52", 6532, 2568, 52, {"acq", "earn", "zinc"}),
        ("newsgroups_20", 11293, 7528, 20, {"alt.atheism", "sci.space", "talk.religion.misc"}),
    ],
)
def test_the_embedded_datasets_have_their_standard_size(
    real: dict[str, Path], name: str, num_train: int, num_test: int, num_classes: int, some_classes: set[str]
) -> None:
    loaded = load_data(real_config(name, real), LengthTokenizer())
    assert len(loaded.train) + len(loaded.val) == num_train
    assert len(loaded.test) == num_test
    assert len(loaded.label_names) == loaded.num_labels == num_classes
    assert some_classes <= set(loaded.label_names)
    assert len(loaded.val) == round(num_train / 10)
    assert set(loaded.train.labels.tolist()) == set(range(num_classes))


def test_labels_of_a_tab_file_belong_to_their_texts(real: dict[str, Path]) -> None:
    loaded = load_data(real_config("reuters_r8", real), LengthTokenizer())
    with (real["reuters_r8"] / "reuters-r8-test.tab").open(encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file][3:]
    rows = [line.split("\t") for line in lines if line.strip()]
    found = [(loaded.label_names[label], length) for (length,), label in examples(loaded.test)]
    assert found == [(category, len(text)) for category, text in rows]


def test_padding_costs_at_most_three_percent_on_reuters(real: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(ModelConfig(name="minilm", path=str(real["minilm"])))
    for num_train_examples in (None, 2000):
        config = real_config("reuters_r8", real, num_train_examples=num_train_examples)
        split = load_data(config, tokenizer).train
        assert len(split) == (num_train_examples or 4937)
        real_count = computed = 0
        for step in TrainingBatches(split, batch_size=16, micro_batch_size=None, seed=0).epoch(0):
            real_count += sum(batch.num_tokens for batch in step)
            computed += sum(batch.inputs["input_ids"].numel() for batch in step)
        assert real_count == split.lengths.sum()
        assert 1 < computed / real_count <= 1.03


def test_token_types_of_a_real_bert(real: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"one": "A man plays.", "two": "Somebody makes music.", "label": row % 2} for row in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = load_tokenizer(ModelConfig(name="minilm", path=str(real["minilm"])))
    batch = load_data(local(path, text_columns=["one", "two"]), tokenizer).val.batch([0])
    assert tokenizer.decode(batch.inputs["input_ids"][0]) == "[CLS] a man plays. [SEP] somebody makes music. [SEP]"
    assert batch.inputs["token_type_ids"][0].tolist() == [0] * 6 + [1] * 5
