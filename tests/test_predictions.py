"""What a run keeps of its predictions on val and test: by row, at the best step, without a pass of their own."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_run_language
import torch
from test_run import config, exact, rows  # noqa: F401
from test_run_language import data  # noqa: F401

from harness.config.schema import RunConfig
from harness.content.files import base_model
from harness.content.identity import identify
from harness.data.labelled import load_data
from harness.models.tokenizers import load_tokenizer
from harness.results.schema import Status
from harness.run import run
from harness.tasks.labelled import SequenceObjective
from harness.tasks.predictions import write_predictions

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def predictions(runs_dir: Path, run_id: str, split: str) -> pd.DataFrame:
    return pd.read_parquet(runs_dir / run_id / "predictions" / f"{split}.parquet")


def splits_of(wanted: RunConfig) -> Any:
    return load_data(wanted.dataset, load_tokenizer(base_model(wanted)))


def test_a_classifier_keeps_what_was_scored_at_its_best_step(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    # So high a rate that the last step is not the best.
    wanted = config(rows, tmp_path, trainer={"learning_rate": 3e-2, "max_steps": 12, "eval_every": 1})
    result = run(wanted)
    metrics, splits = result.metrics, splits_of(wanted)
    assert metrics["best_step"] < metrics["num_steps"]
    lines = rows.read_text().splitlines()
    for name in ("val", "test"):
        assert metrics[f"{name}_nll"] != metrics[f"{name}_nll_last"]
        table, split = predictions(tmp_path, result.run_id, name), getattr(splits, name)
        assert table["row"].tolist() == list(range(len(split)))
        assert table["label"].tolist() == [splits.label_names[label] for label in split.labels]
        columns = [f"probability_{label}" for label in splits.label_names]
        assert list(table.columns) == ["row", "source", "source_row", "label", "predicted", *columns]
        assert set(table[columns].dtypes) == {np.dtype("float32")}
        # Held out of the file of training rows, and so not its first lines.
        assert set(table["source"]) == {"train.csv line"}
        assert [lines[number - 1].rpartition(",")[2] for number in table["source_row"]] == table["label"].tolist()
        assert table["source_row"].is_unique and table["source_row"].tolist() != list(range(2, 2 + len(table)))

        probabilities = table[columns].to_numpy()
        assert probabilities.sum(1) == pytest.approx(np.ones(len(table)), abs=1e-6)
        assert table["predicted"].tolist() == [splits.label_names[at] for at in probabilities.argmax(1)]
        own = [row[f"probability_{row.label}"] for _, row in table.iterrows()]
        assert -np.log(own).mean() == pytest.approx(metrics[f"{name}_nll"], rel=1e-5)
        assert (table["label"] == table["predicted"]).mean() == metrics[f"{name}_accuracy"]


def test_lengths_do_not_decide_the_order(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    """Scoring goes from long to short; each row has its own prediction, as when it is scored alone."""
    wanted = config(rows, tmp_path)
    split = splits_of(wanted).test
    assert split.scoring_order.tolist() != list(range(len(split)))

    class Length(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, attention_mask: torch.Tensor, **_: Any) -> Any:
            lengths = attention_mask.sum(-1, keepdim=True).float()
            return type("Output", (), {"logits": torch.cat([lengths, 0 * lengths, -lengths], -1)})

    objective = SequenceObjective(wanted.dataset, val=split, eval_batch_size=5, keeps_logits=True)
    logits = objective.evaluate(Length()).logits
    assert logits is not None
    assert logits[:, 0].tolist() == split.lengths.tolist()
    assert SequenceObjective(wanted.dataset, val=split, eval_batch_size=5).evaluate(Length()).logits is None


def test_rows_of_a_file_of_their_own_and_of_a_regression(tmp_path: Path) -> None:
    texts = [f"{'long ' * (n % 5)}text {n},{n / 10}" for n in range(40)]
    for name, some in (("train.csv", texts), ("test.csv", texts[5:15])):
        (tmp_path / name).write_text("\n".join(["text,label", "", *some, ""]))
    files = {"train_file": str(tmp_path / "train.csv"), "test_file": str(tmp_path / "test.csv")}
    scored = {"task": "regression", "metrics": ["pearson"], "best_metric": "mse"}
    result = run(config(tmp_path, tmp_path / "runs", dataset={**files, **scored}))
    assert result.status is Status.FINISHED, result.error
    table = predictions(tmp_path / "runs", result.run_id, "test")
    assert list(table.columns) == ["row", "source", "source_row", "label", "predicted"]
    assert set(table["source"]) == {"test.csv line"}
    assert table["source_row"].tolist() == list(range(3, 13))  # behind the header and a blank line
    assert table["label"].tolist() == pytest.approx([n / 10 for n in range(5, 15)])
    assert ((table["label"] - table["predicted"]) ** 2).mean() == pytest.approx(result.metrics["test_mse"], rel=1e-5)


def test_what_is_not_finite_is_no_class(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    split = splits_of(config(rows, tmp_path)).test
    logits = torch.zeros(len(split), 3)
    logits[:, 1] = 1.0
    logits[2] = math.nan
    write_predictions(tmp_path / "test.parquet", split, logits, ["a", "b", "c"])
    table = pd.read_parquet(tmp_path / "test.parquet")
    assert table.loc[2, ["predicted", "probability_a", "probability_b", "probability_c"]].isna().all()
    assert set(table["predicted"].drop(2)) == {"b"}
    assert table["probability_b"][0] == pytest.approx(math.e / (2 + math.e))


def test_it_can_be_left_out_and_is_no_part_of_the_identity(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluated: Counter[str] = Counter()
    evaluate_split = SequenceObjective.evaluate_split

    def counted(self: SequenceObjective, *positional: Any) -> Any:
        evaluated[stage] += 1
        return evaluate_split(self, *positional)

    monkeypatch.setattr(SequenceObjective, "evaluate_split", counted)
    stage = "kept"
    usual = run(config(rows, tmp_path))
    folder = tmp_path / usual.run_id / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == ["test.parquet", "val.parquet"]
    stage = "left out"
    without = config(rows, tmp_path, save_predictions=False, rerun="all")
    assert identify(without).run_id == usual.run_id
    assert exact(run(without).metrics) == exact(usual.metrics)
    assert not folder.exists()  # those of the earlier run do not stay beside the new result
    assert evaluated["kept"] == evaluated["left out"] > 0


def test_a_language_model_has_none(data: Path, tmp_path: Path) -> None:  # noqa: F811
    result = run(test_run_language.config(data, tmp_path))
    assert result.status is Status.FINISHED
    assert not (tmp_path / result.run_id / "predictions").exists()


def test_rows_that_are_dropped_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    texts = [f"{'very long ' * 20 if n % 4 == 0 else ''}text {n},{('good', 'bad')[n % 2]}" for n in range(60)]
    path = tmp_path / "train.csv"
    path.write_text("\n".join(["text,label", *texts, ""]))
    wanted = config(path, tmp_path, dataset={"max_length": 30, "too_long": "drop"})
    splits = splits_of(wanted)
    numbers = np.concatenate([split.source_rows for split in (splits.train, splits.val, splits.test)])
    assert sorted(numbers.tolist()) == [n + 2 for n in range(60) if n % 4]
    for split in (splits.train, splits.val, splits.test):
        names = [splits.label_names[label] for label in split.labels]
        assert names == [("good", "bad")[(number - 2) % 2] for number in split.source_rows]


def test_the_code_of_the_page_runs_on_what_runs_leave(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = rows.read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([*lines[:81], ""]))
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *lines[81:], ""]))
    files = {"train_file": str(tmp_path / "train.csv"), "test_file": str(tmp_path / "test.csv")}
    trainer = {"learning_rate": 1e-2, "max_steps": 12}
    first = run(config(rows, tmp_path / "runs", dataset=files, trainer=trainer))
    second = run(config(rows, tmp_path / "runs", "head_only", dataset=files))
    page = (ROOT / "docs/how-to/predictions.md").read_text(encoding="utf-8")
    code = dict(re.findall(r'^```python title="(\w+)\.py"\n(.*?)^```$', page, flags=re.DOTALL | re.MULTILINE))
    assert list(code) == ["paired_test", "errors"]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for name, text in code.items():
        names: dict[str, Any] = {}
        exec(text.replace("FIRST", first.run_id).replace("SECOND", second.run_id), names)
        printed = capsys.readouterr().out
        if name == "paired_test":
            difference = first.metrics["test_accuracy"] - second.metrics["test_accuracy"]
            assert names["only_one"] - names["only_two"] == pytest.approx(difference * 40)
            assert names["only_one"] + names["only_two"] > 0
            assert 0 <= float(printed.split()[-1]) <= 1
        else:
            assert len(names["wrong"]) == round(40 * (1 - first.metrics["test_accuracy"])) > 0
            in_file = pd.read_csv("test.csv").rename(lambda number: number + 2)
            shown = names["wrong"].join(in_file["text"], on="source_row")
            assert (shown["label"] == in_file["label"].loc[shown["source_row"]].to_numpy()).all()
            assert shown.nlargest(1, "sure")["text"].item() in printed
