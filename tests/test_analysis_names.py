"""What rows are called: a placement by what was asked for, two files or folders of one name told apart, look-alikes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_analysis_load import ENVIRONMENT, save_run
from test_analysis_tables import measured

from analysis import select
from analysis.load import load_runs
from analysis.methods import method_label, uses_rank
from analysis.tables import paper_tables


def save(
    runs_dir: Path, run_id: str, *, model: Any = (), dataset: Any = (), content: Any = None, **options: Any
) -> None:
    """A finished run with these settings of its model and dataset, and the content that it recorded."""
    environment = ENVIRONMENT | options.pop("environment", {}) | ({} if content is None else {"content": content})
    path = save_run(runs_dir, run_id, environment=environment, metrics=measured(), **options)
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["config"]["model"] |= dict(model)
    raw["config"]["dataset"] |= dict(dataset)
    path.write_text(json.dumps(raw))


def cells_of(runs_dir: Path) -> pd.DataFrame:
    return select.cells(load_runs(runs_dir).frame)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"projections": ["q", "v"]}, "qv"),
        ({"projections": ["v", "q"]}, "qv"),
        ({"projections": ["q"]}, "q"),
        ({"projections": ["q", "up"]}, "q_up"),
        ({"projections": ["all", "lm_head"]}, "all_lm_head"),
        ({"projections": ["qkv"]}, "qkv"),
        ({"projections": ["q", "k", "v"]}, "q_k_v"),
        ({"projections": ["attention"], "blocks": "last_half"}, "attention (last_half)"),
        ({"projections": ["q"], "blocks": [5, 2]}, "q (blocks 2, 5)"),
        ({"projections": ["q"], "blocks": [1, 0]}, "q (first_2)"),
    ],
)
def test_a_placement_is_called_by_what_was_asked_for(tmp_path: Path, settings: dict[str, Any], label: str) -> None:
    changes = {f"target_layers__{name}": value for name, value in settings.items()}
    save_run(tmp_path, "a", target_layers="qv", **changes)
    assert cells_of(tmp_path)["target_layers"].tolist() == [label]


def test_a_name_that_lies_is_printed_as_what_it_is(tmp_path: Path) -> None:
    """The issue's example: `target_layers=qv target_layers.projections=[q]` beside the real one."""
    save_run(tmp_path, "real", metrics=measured(num_adapter_params=1024))
    save_run(tmp_path, "other", target_layers__projections=["q"], metrics=measured(num_adapter_params=512))
    frame = load_runs(tmp_path).frame
    tradeoff = paper_tables(frame, select.cells(frame))[0]
    assert {(row[2], row[3]) for row in tradeoff.text.rows} == {("qv", "1,024"), ("q", "512")}
    (note,) = (note for note in tradeoff.notes if note.startswith("Named by what ran"))
    assert note.endswith("for another: `q` is `target_layers=qv`.")


def test_expressions_have_a_mark_and_no_name_of_projections(tmp_path: Path) -> None:
    for number, (name, modules) in enumerate((("qv", [".*key"]), ("mine", [".*key"]), ("mine", [".*query"]))):
        settings = {"target_layers__projections": [], "target_layers__modules": modules}
        save_run(tmp_path, f"a{number}", rank=number + 1, target_layers=name, **settings)
    labels = cells_of(tmp_path)["target_layers"].tolist()
    assert sorted(label.partition(" [")[0] for label in labels) == ["mine", "mine", "modules"]
    assert len(set(labels)) == 3
    assert all(re.fullmatch(r"\w+ \[[0-9a-f]{6}\]", label) for label in labels)


# ---------------------------------------------------------------- models and datasets


def test_two_files_called_local_are_two_datasets_and_never_averaged(tmp_path: Path) -> None:
    """Seeds of one cell on two contents, as ids made of paths allowed."""
    local = {"name": "local", "train_file": "data/train.csv"}
    for seed, fingerprint in enumerate(["f0", "f0", "f1"]):
        save(
            tmp_path, f"a-s{seed}", cell_id="a", seed=seed, dataset=local, environment={"data_fingerprint": fingerprint}
        )
    cells = cells_of(tmp_path)
    assert cells["num_finished"].tolist() == [2, 1]
    assert all(re.fullmatch(r"local \[train.csv [0-9a-f]{6}\]", name) for name in cells["dataset"])
    assert cells["dataset"].nunique() == cells["cell_id"].nunique() == cells["condition_id"].nunique() == 2
    frame = load_runs(tmp_path).frame
    tradeoff = paper_tables(frame, select.cells(frame))[0]
    assert len(tradeoff.text.rows) == 2
    (note,) = (note for note in tradeoff.notes if note.startswith("Named by what ran"))
    assert note.count("is `dataset=local train_file=data/train.csv`") == 2


def test_the_same_content_in_two_folders_is_one_dataset(tmp_path: Path) -> None:
    for rank, path in ((1, "here"), (2, "there")):
        local = {"name": "local", "train_file": "train.csv", "path": path}
        save(tmp_path, f"a{rank}", rank=rank, dataset=local, content={"dataset.train": "c0.csv"})
    cells = cells_of(tmp_path)
    assert cells["dataset"].tolist() == ["local", "local"]
    assert cells["differs"].tolist() == [None, None]


def test_content_decides_and_not_a_fingerprint_of_an_earlier_version(tmp_path: Path) -> None:
    asset = {"name": "r8", "asset": "r8", "train_file": "train.csv"}
    save(tmp_path, "old", rank=1, dataset=asset, environment={"data_fingerprint": "f0"})
    save(tmp_path, "new", rank=2, dataset=asset, environment={"data_fingerprint": "f1"}, content={"dataset.train": "c"})
    assert cells_of(tmp_path)["dataset"].tolist() == ["r8", "r8"]


def test_a_run_that_failed_before_it_read_its_data_goes_with_the_others(tmp_path: Path) -> None:
    local = {"name": "local", "train_file": "train.csv"}
    save(tmp_path, "a", rank=1, dataset=local, environment={"data_fingerprint": "f0"})
    save(tmp_path, "b", rank=2, dataset=local, status="failed", error="no")
    assert cells_of(tmp_path)["dataset"].tolist() == ["local", "local"]


def test_a_folder_under_the_name_of_a_model_says_so(tmp_path: Path) -> None:
    preset = {"name": "minilm", "asset": "minilm"}
    save(tmp_path, "a", rank=1, model=preset)
    save(tmp_path, "b", rank=2, model=preset | {"path": "/home/x/my-model/"})
    models = cells_of(tmp_path)["model"].tolist()
    assert models[0] == "minilm" and re.fullmatch(r"minilm \[my-model [0-9a-f]{6}\]", models[1])


def test_it_says_so_too_where_that_model_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, "a", model={"name": "minilm", "asset": "minilm", "path": "/home/x/my-model"})
    assert cells_of(tmp_path)["model"].tolist() == ["minilm [my-model]"]


def test_two_revisions_of_a_model_are_two(tmp_path: Path) -> None:
    for rank, revision in ((1, "a" * 40), (2, "b" * 40)):
        save(tmp_path, f"a{rank}", rank=rank, model={"name": "gpt2", "hub_id": "gpt2", "revision": revision})
    assert [name.partition(" [")[2][:7] for name in cells_of(tmp_path)["model"]] == ["a" * 7, "b" * 7]


# ---------------------------------------------------------------- names that look alike


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("sst2", "sst2 "), ["sst2", "sst2\\x20"]),
        (("sst2", "sst2\u200b"), ["sst2", "sst2\\u200b"]),
        (("sst2\u200b", "sst2\u200c"), ["sst2\\u200b", "sst2\\u200c"]),
        (("caf\u00e9", "cafe\u0301"), ["caf\\xe9", "cafe\\u0301"]),
        (("a b", "a  b"), ["a b", "a\\x20\\x20b"]),
        (("sst2", "cola"), ["sst2", "cola"]),
    ],
)
def test_names_that_look_alike_are_spelled_out(tmp_path: Path, names: tuple[str, str], shown: list[str]) -> None:
    for number, name in enumerate(names):
        save_run(tmp_path, f"run{number}", dataset__name=name, metrics=measured())
    assert sorted(cells_of(tmp_path)["dataset"]) == sorted(shown)


def test_one_placement_under_two_ids_is_two_rows(tmp_path: Path) -> None:
    """Names were part of ids; blocks that are spelled in two ways were too."""
    save_run(tmp_path, "a", metrics=measured())
    save_run(tmp_path, "b", target_layers__name="mine", metrics=measured())
    save_run(tmp_path, "c", blocks=[0, 1], metrics=measured())
    save_run(tmp_path, "d", blocks="first_2", metrics=measured())
    best = select.best_cells(cells_of(tmp_path))
    assert sorted(best["cell_id"]) == ["a", "b", "c", "d"]


def test_ranks_for_some_targets_are_a_part_of_the_placement_and_no_other_recipe(tmp_path: Path) -> None:
    for run_id, pattern in {"plain": None, "mlp": {"mlp": 4}, "both": {"v@last_half": 16, "mlp": 4}}.items():
        save_run(tmp_path, run_id, cell_id=run_id, target_layers="all", rank__pattern=pattern)
    cells = cells_of(tmp_path)
    assert sorted(cells["target_layers"]) == ["all", "all (mlp r4)", "all (mlp r4, v@last_half r16)"]
    assert cells["recipe_id"].nunique() == 1 and not any(cells["differs"])


def test_a_variant_is_named_with_its_method_and_no_other_recipe(tmp_path: Path) -> None:
    for run_id, variant in {
        "a": {"name": "plain", "dora": False, "init": "kaiming", "learning_rate_ratio": 1.0},
        "b": {"name": "dora", "dora": True, "init": "kaiming", "learning_rate_ratio": 1.0},
        "c": None,  # from before there were variants
    }.items():
        path = save_run(tmp_path, run_id, cell_id=run_id, rank=2 if variant is None else 4)
        raw = json.loads(path.read_text(encoding="utf-8"))
        if variant is not None:
            raw["config"]["variant"] = variant
        path.write_text(json.dumps(raw))
    cells = cells_of(tmp_path)
    assert sorted(cells["method"]) == ["lora", "lora", "lora dora"]
    assert cells["recipe_id"].nunique() == 1 and not any(cells["differs"])
    labels = sorted(method_label(cell) for cell in cells.to_dict("records"))
    assert labels == ["LoRA", "LoRA", "LoRA (dora)"] and all(uses_rank(cell) for cell in cells.to_dict("records"))
