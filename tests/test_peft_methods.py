"""The methods of the `peft` package: every type that the installed one has runs as any method does, or is refused."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file
from torch import Tensor, nn

from analysis import load_runs, select, tables
from harness import run as run_module
from harness.config.composing import from_dict
from harness.config.schema import RunConfig
from harness.config.validation import ConfigError
from harness.content.files import base_model
from harness.content.identity import identify
from harness.methods import peft_method
from harness.methods.peft_method import PeftMethodError
from harness.models.loading import load_model
from harness.plan import adapt, plan
from harness.prepare import PreparedRun, prepare
from harness.processes.stopping import PreemptedError
from harness.results.methods import METHODS
from harness.results.peft_types import PEFT_TYPES, PeftType
from harness.results.schema import RunResult, Status
from harness.run import run
from harness.training.callbacks import RunCallbacks

Values = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent

# What a type needs to fit matrices of 64 and 128 features, or has no default for.
OF_TYPE: dict[str, Values] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "OFT": {"oft_block_size": 16},
    "ROAD": {"group_size": 32},
    "TRAINABLE_TOKENS": {"token_indices": [36, 68, 87]},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"num_vectors": 16, "vector_length": 16},
    "WAVEFT": {"n_frequency": 50},
    "VERA": {"r": 16},
    "PVERA": {"r": 16},
}
USABLE = [name for name, kind in PEFT_TYPES.items() if not kind.refused]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with labels and lines of text."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [f"{('apple pear', 'iron zinc')[n % 2]} {n},{('fruit', 'metal')[n % 2]}" for n in range(24)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows, ""]))
    (folder / "lines.txt").write_text("\n".join(f"{n} comes before {n + 1}" for n in range(24)))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def values_of(folder: Path, runs_dir: Path, /, *, model: str = "bert", **changes: Any) -> Values:
    is_language = model != "bert"
    values: Values = {
        "model": {"name": f"tiny_{model}", "tiny": model},
        "dataset": {"name": "rows", "train_file": str(folder / "rows.csv"), "max_length": 24},
        "method": {},
        "target_layers": {"name": "all", "projections": ["all"]},
        # Every step has all rows, so that the loss falls as surely as it can.
        "trainer": {"learning_rate": 2e-3, "max_steps": 6, "batch_size": 24, "warmup_fraction": 0},
        "tracking": {"wandb": "disabled", "progress": False, "log_every": 1},
        "runs_dir": str(runs_dir),
        "device": "cpu",
    }
    if is_language:
        values["dataset"] |= {"train_file": str(folder / "lines.txt"), "task": "causal_lm"}
        values["dataset"] |= {"metrics": [], "best_metric": "nll"}
    for name, value in changes.items():
        if value is None:
            values.pop(name, None)
        else:
            values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return values


def of_type(kind: PeftType, folder: Path, runs_dir: Path, *, model: str = "bert", **changes: Any) -> RunConfig:
    """A run of a type on all projections, at rank 4 where it has one."""
    settings = dict(OF_TYPE.get(kind.name, {}))
    rank = None
    if kind.alpha is not None:
        rank = {"rank": 4, "alpha": 8}
    elif kind.rank is not None:
        settings.setdefault(kind.rank, 4)
    method = {"name": kind.method, "peft": settings}
    changed: Values = {"method": method, "rank": rank, **changes}
    if not kind.uses_placement:
        changed["target_layers"] = None
    return from_dict(values_of(folder, runs_dir, model=model, **changed))


@dataclass
class Ran:
    """A run that was made, and the model as it left it."""

    result: RunResult
    prepared: PreparedRun
    dir: Path

    def losses(self) -> list[float]:
        rows = [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]
        return [row["train_nll"] for row in rows if "train_nll" in row]


def ran(config: RunConfig) -> Ran:
    kept: list[PreparedRun] = []

    def keep(*arguments: Any, **named: Any) -> PreparedRun:
        kept.append(prepare(*arguments, **named))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "prepare", keep)
        result = run(config)
    assert result.status is Status.FINISHED, result.error
    return Ran(result, kept[0], Path(config.runs_dir) / result.run_id)


def fresh_base(config: RunConfig) -> nn.Module:
    is_language = config.dataset.task.is_language
    base = load_model(base_model(config), num_labels=None if is_language else 2, pad_token_id=0, seed=config.seed)
    return base.model.eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def read_by_peft(base: nn.Module, adapter_dir: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says of a type (BOFT's extension for CUDA)
        return peft.PeftModel.from_pretrained(base, str(adapter_dir))


# ---------------------------------------------------------------- every type


def test_every_type_of_the_installed_peft_is_described() -> None:
    assert {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == set(PEFT_TYPES)
    assert {kind.method for kind in PEFT_TYPES.values() if not kind.refused} == {
        name for name, method in METHODS.items() if method.peft is not None
    }


@pytest.mark.parametrize("name", [name for name in USABLE if PEFT_TYPES[name].uses_placement])
def test_a_type_takes_quantised_weights_if_peft_has_layers_for_them(name: str) -> None:
    (tuner,) = (kind for each, kind in PEFT_TYPE_TO_TUNER_MAPPING.items() if each.value == name)
    folder = Path(inspect.getfile(tuner)).parent
    has_layers = (folder / "bnb.py").is_file() or "resolve_quantization_backend(" in (folder / "model.py").read_text()
    assert PEFT_TYPES[name].takes_quantized == has_layers


@pytest.mark.parametrize("name", USABLE)
def test_a_type_trains_adapter_and_head_alone_and_is_saved_as_peft_reads_it(
    name: str, folder: Path, tmp_path: Path
) -> None:
    config = of_type(PEFT_TYPES[name], folder, tmp_path)
    planned = plan(config)
    base = fresh_base(config)
    weights = {each: value.clone() for each, value in base.named_parameters()}
    one = ran(config)
    model, metrics = one.prepared.model, one.result.metrics

    assert metrics["num_adapter_params"] == planned.num_adapter_params > 0
    assert metrics["num_head_params"] == 2 * 64 + 2
    assert metrics["num_trainable_params"] == metrics["num_adapter_params"] + metrics["num_head_params"]
    assert [str(target) for target in planned.targets] == one.result.target_modules != []
    assert metrics["peak_memory_bytes"] > 0 and "train_flops" not in metrics
    losses = one.losses()
    assert losses[-1] < losses[0]
    assert type(model) is type(base)

    kept = {each.replace(".base_layer.", "."): value for each, value in model.named_parameters()}
    changed = {each for each, value in weights.items() if not torch.equal(kept[each], value)}
    assert changed == {"classifier.weight", "classifier.bias"}
    # It starts from the seed, whatever was drawn before, and learns.
    torch.manual_seed(99)
    start = fresh_base(config)
    adapt(start, config, ("classifier",))
    again = {each: value for each, value in start.named_parameters() if peft_method.is_adapter(each)}
    adapter = {each: value for each, value in model.named_parameters() if peft_method.is_adapter(each)}
    assert all(value.requires_grad for value in adapter.values()) and again.keys() == adapter.keys()
    assert any(not torch.equal(again[each], value) for each, value in adapter.items())

    adapter_dir = one.dir / "adapter"
    assert metrics["checkpoint_bytes"] == (adapter_dir / "adapter_model.safetensors").stat().st_size
    before = logits(base)
    loaded = read_by_peft(base, adapter_dir)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(loaded), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "model"), [("LORA", "gpt2"), ("IA3", "gpt2"), ("ADALORA", "llama"), ("OFT", "llama")])
def test_a_language_model_has_no_head_and_is_saved_as_peft_reads_it(
    name: str, model: str, folder: Path, tmp_path: Path
) -> None:
    config = of_type(PEFT_TYPES[name], folder, tmp_path, model=model)
    one = ran(config)
    assert one.result.metrics["num_head_params"] == 0
    assert one.losses()[-1] < one.losses()[0]
    base = fresh_base(config)
    before = logits(base)
    loaded = read_by_peft(base, one.dir / "adapter")
    assert torch.allclose(logits(loaded), logits(one.prepared.model), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(loaded), before, atol=1e-4, rtol=0)


def test_the_best_step_comes_back_whole(folder: Path, tmp_path: Path) -> None:
    """VeRA's layers share matrices that do not train, which no state of a step needs to hold."""
    one = ran(config := of_type(PEFT_TYPES["VERA"], folder, tmp_path, trainer={"eval_every": 1}))
    assert one.result.metrics["best_step"] < 6  # among equal accuracies the earliest
    assert one.result.metrics["val_nll"] != one.result.metrics["val_nll_last"]
    loaded = read_by_peft(fresh_base(config), one.dir / "adapter")
    assert torch.allclose(logits(loaded), logits(one.prepared.model), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- the page that lists them


PAGE = (ROOT / "docs/how-to/peft-methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", USABLE)
def test_the_page_says_what_a_type_is_called_and_whether_it_takes_conv1d(
    name: str, folder: Path, tmp_path: Path
) -> None:
    kind = PEFT_TYPES[name]
    try:
        takes_conv1d = bool(plan(of_type(kind, folder, tmp_path, model="gpt2")).targets)
    except PeftMethodError:
        takes_conv1d = False
    rank = "`rank=r8`" if kind.alpha else f"`method.peft.{kind.rank}`" if kind.rank else "none"
    yes = {True: "yes", False: "no"}
    assert f"| `{name}` | `{kind.method}` | {rank} | {yes[takes_conv1d]} | {yes[kind.takes_quantized]} |\n" in PAGE


def test_the_page_has_the_reason_of_every_refusal_and_every_preset() -> None:
    refused = [f"| `{name}` | {kind.refused} |" for name, kind in PEFT_TYPES.items() if kind.refused]
    assert [line for line in PAGE.splitlines() if line in refused] == refused
    listed = re.findall(r"^\| `([A-Z0-9_]+)` \|", PAGE, flags=re.MULTILINE)
    assert sorted(listed) == sorted(PEFT_TYPES)
    for path in (ROOT / "conf/method").glob("*.yaml"):
        if path.stem in METHODS and METHODS[path.stem].peft is not None:
            assert f"`{path.stem}`" in PAGE.partition("## Settings")[0]


# ---------------------------------------------------------------- what a table calls them


@pytest.fixture(scope="module")
def compared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: ours and peft's, one of them at a rank by peft's name, one type with two settings."""
    runs_dir = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for changes in (
            {"method": {"name": "lora"}, "rank": {"rank": 4, "alpha": 8}},
            {"method": {"name": "peft", "peft": {"peft_type": "LOHA", "r": 2}}},
            {"method": {"name": "ia3"}},
            {"method": {"name": "miss", "peft": {"r": 4}}},
            {"method": {"name": "miss", "peft": {"r": 8}}},
            {"method": {"name": "c3a", "peft": {"block_size": 16}}},
            {"method": {"name": "c3a", "peft": {"block_size": 32}}},
        ):
            result = run(from_dict(values_of(folder, runs_dir, **changes)))
            assert result.status is Status.FINISHED, result.error
    return runs_dir


def test_tables_call_them_by_their_method_and_tell_settings_apart(compared: Path) -> None:
    loaded = load_runs(compared)
    assert loaded.problems == []
    cells = select.cells(loaded.frame)
    sizes = "method.peft.block_size"  # what the methods of one name differ in is an axis
    rows = {(cell["method"], cell["rank"], cell[sizes], cell["differs"]) for cell in select.records(cells)}
    assert rows == {
        ("lora", 4, None, None),
        ("loha", 2, None, None),
        ("ia3", None, None, None),
        ("miss", 4, None, None),
        ("miss", 8, None, None),
        ("c3a", None, 32, None),
        ("c3a", None, 16, None),
    }
    best = select.best_cells(cells)
    assert len(best) == len(cells)  # each is a condition of its own
    table = tables.tradeoff(best, loaded.frame)
    assert [row[0] for row in table.text.rows] == ["c3a", "c3a", "ia3", "loha", "lora", "miss", "miss"]
    shown = [row[table.text.titles.index("block size")] for row in table.text.rows]
    assert (set(shown[:2]), set(shown[2:])) == ({"16", "32"}, {"\N{EN DASH}"})


# ---------------------------------------------------------------- what is drawn, what is refused


def test_an_adapter_follows_from_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    def drawn(seed: int, before: int) -> dict[str, Tensor]:
        config = of_type(PEFT_TYPES["LORA"], folder, tmp_path, seed=seed)
        model = fresh_base(from_dict(values_of(folder, tmp_path, method={"name": "ia3"})))
        torch.manual_seed(before)
        adapt(model, config, ("classifier",))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(before)))
        return {name: value for name, value in model.named_parameters() if "lora_A" in name}

    first, again, other = drawn(0, 1), drawn(0, 2), drawn(1, 1)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


RANK = {"rank": 4, "alpha": 8}
REFUSED: list[tuple[Values, str]] = [
    (
        {"method": {"name": "peft"}},
        "method=peft: which type of the peft package? Set method.peft.peft_type to one of LORA, ADALORA, ",
    ),
    (
        {"method": {"name": "peft", "peft": {"peft_type": "LORAX"}}},
        "method.peft.peft_type=LORAX: no such type; there are LORA, ADALORA, ",
    ),
    (
        {"method": {"name": "ia3", "peft": {"peft_type": "LOHA"}}},
        "method.peft.peft_type=LOHA: method=ia3 is IA3; leave it out, or say method=peft.",
    ),
    (
        {"method": {"name": "ia3", "peft": {"task_type": "SEQ_CLS"}}},
        "method.peft.task_type=SEQ_CLS: follows from dataset.task; leave it out.",
    ),
    (
        {"method": {"name": "loha", "adapter_dropout": 0.1}, "rank": RANK},
        "method.adapter_dropout=0.1: is read by method=lora; set one of the rates that LOHA has in peft",
    ),
    (
        {"method": {"name": "loha"}},
        "method=loha needs a rank and has no hidden default: add rank=r8, or method.peft.r=8.",
    ),
    (
        {"method": {"name": "adalora"}},
        "method=adalora needs a rank and has no hidden default: add rank=r8, or method.peft.target_r=8.",
    ),
    (
        {"method": {"name": "loha", "peft": {"r": 4}}, "rank": RANK},
        "method.peft.r=4: the setting rank says it already; give one of the two.",
    ),
    (
        {"method": {"name": "peft_lora", "peft": {"lora_alpha": 4}}, "rank": RANK},
        "method.peft.lora_alpha=4: the setting rank says it already; give one of the two.",
    ),
    ({"method": {"name": "ia3"}, "rank": RANK}, "method=ia3 takes no rank: it has none; leave rank=... out."),
    (
        {"method": {"name": "vera"}, "rank": RANK},
        "method=vera takes no rank: it has a rank of another kind, without alpha; set method.peft.r.",
    ),
    (
        {"method": {"name": "ia3", "peft": {"target_modules": ["query"]}}},
        "method.peft.target_modules=['query']: target_layers=all says already where it acts; give one of the two.",
    ),
    (
        {"method": {"name": "ia3"}, "target_layers": None},
        "method=ia3 needs target layers: add target_layers=qv (q, v, qkvo, mlp, all, ...), or "
        "method.peft.target_modules.",
    ),
    (
        {"method": {"name": "ln_tuning"}},
        "method=ln_tuning takes no target_layers: it adapts no projections; leave target_layers=... out",
    ),
    (
        {"method": {"name": "loha"}, "rank": {**RANK, "pattern": {"v": 2}}},
        "rank.pattern={'v': 2}: is read ",
    ),
    ({"method": {"name": "ia3"}, "shard_model": True}, "shard_model=true: the layers of peft (method=ia3) are not"),
    (
        {"method": {"name": "lora", "peft": {"r": 4}}, "rank": RANK},
        "method.peft={'r': 4}: is read by the methods of the peft package (method=ia3, adalora, ..., or method=peft)",
    ),
    (
        {"method": {"name": "loha"}, "rank": RANK, "trainer": {"learning_rate_A": 1e-3}},
        "trainer.learning_rate_A=0.001: is read by methods with a rank that are not of the peft package",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[text.partition(":")[0] for _, text in REFUSED])
def test_a_config_is_refused_in_these_words(changes: Values, expected: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(values_of(folder, tmp_path, **changes))
    assert [problem.startswith(expected) for problem in caught.value.problems] == [True], caught.value.problems


@pytest.mark.parametrize("name", sorted(set(PEFT_TYPES) - set(USABLE)))
def test_a_type_that_cannot_be_carried_is_refused_with_the_reason(name: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(values_of(folder, tmp_path, method={"name": "peft", "peft": {"peft_type": name}}))
    reason = f"method.peft.peft_type={name}: cannot be run here: {PEFT_TYPES[name].refused}."
    assert [problem.startswith(reason) for problem in caught.value.problems] == [True]


NOT_PLANNED: list[tuple[Values, str]] = [
    (
        {"method": {"name": "peft_lora", "peft": {"layers_to_transform": [0]}}, "rank": RANK},
        "method.peft.layers_to_transform=[0]: decides nothing here: target_layers.blocks chooses the blocks; leave it",
    ),
    (
        {"method": {"name": "peft_lora", "peft": {"rank_pattern": {"nope": 2}}}, "rank": RANK},
        "method.peft.rank_pattern={'nope': 2}: nope is the end of no adapted module's name; those are dense, key, ",
    ),
    (
        {"method": {"name": "peft_lora", "peft": {"init_lora_weights": "eva"}}, "rank": RANK},
        "method.peft.init_lora_weights=eva: peft makes this from data in a step of its own, which a run does not make;",
    ),
    (
        {"method": {"name": "peft_lora", "peft": {"use_qalora": True}}, "rank": RANK},
        "method.peft.use_qalora=True: decides nothing here: bases of GPTQ are not loaded here; leave it out.",
    ),
    (
        {"method": {"name": "adalora", "peft": {"r": 99}}, "rank": RANK},
        "method.peft.r=99: AdaLoRA reads rank.rank, its target, and method.peft.init_r; leave it out.",
    ),
    (
        {"method": {"name": "adalora", "peft": {"deltaT": 0}}, "rank": RANK},
        "method.peft.deltaT=0: must be a whole number of at least 1.",
    ),
    (
        {"method": {"name": "adalora", "peft": {"init_r": 2}}, "rank": RANK},
        "method.peft.init_r=2: must be a whole number of at least the rank that is to be left (4).",
    ),
    (
        {"method": {"name": "vera", "peft": {"r": "two"}}},
        "method.peft.r=two: VeraConfig has no text there, but a number, list or mapping.",
    ),
    (
        {"method": {"name": "vera", "peft": {"r": 0}}},
        "method=vera: peft refuses it: ",
    ),
    (
        {"method": {"name": "peft", "peft": {"peft_type": "HRA", "r": 66}}},
        "method=hra: bert.encoder.layer.0.attention.self.query: rank=66: a 64 -> 64 projection allows 1 to 64.",
    ),
    (
        {
            "method": {"name": "peft", "peft": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 999]}},
            "target_layers": None,
        },
        "method.peft.token_indices=[1, 999]: must be a list of tokens from 0 to 259, as [0,5].",
    ),
    (
        {"method": {"name": "ia3", "peft": {"rr": 3}}},
        f"method.peft.rr=3: IA3Config of peft {peft.__version__} has no such field; it has exclude_modules, ",
    ),
    (
        {"method": {"name": "loha"}, "rank": {"rank": 65, "alpha": 8}},
        "method=loha: bert.encoder.layer.0.attention.self.query: rank=65: a 64 -> 64 projection allows 1 to 64.",
    ),
    (
        {"method": {"name": "adalora"}, "rank": {"rank": 43, "alpha": 8}},
        "method=adalora: bert.encoder.layer.0.attention.self.query: rank=65: a 64 -> 64 projection allows 1 to 64.",
    ),
    (
        {"method": {"name": "c3a", "peft": {"block_size": 48}}},
        "method=c3a: peft refuses it: ",
    ),
    (
        {"method": {"name": "peft_lora", "peft": {"bias": "all"}}, "rank": RANK},
        "method=peft_lora: its settings train bert.embeddings.LayerNorm.bias, ",
    ),
    (
        {
            "method": {"name": "ia3", "peft": {"target_modules": ["query", "nothing"], "feedforward_modules": []}},
            "target_layers": None,
        },
        "method.peft.target_modules=['query', 'nothing']: no module's name ends in nothing, or matches it whole where "
        "it is a text and no list. Its linear layers: 2 x bert.encoder.layer.N.attention.self.",
    ),
    (
        {
            "method": {"name": "ia3", "peft": {"target_modules": "quer", "feedforward_modules": []}},
            "target_layers": None,
        },
        "method.peft.target_modules=quer: no module's name ends in quer, or matches it whole where it is a ",
    ),
    (
        {
            "method": {"name": "ia3", "peft": {"target_modules": ["classifier"], "feedforward_modules": []}},
            "target_layers": None,
        },
        "method.peft.target_modules=['classifier']: classifier is in the task head, which is trained whole; ",
    ),
    (
        {"method": {"name": "boft", "peft": {"boft_n_butterfly_factor": 2}}},
        "method.peft.boft_n_butterfly_factor=2: peft makes 1 of it here; set that, or leave it out.",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), NOT_PLANNED, ids=[text.partition(":")[0] for _, text in NOT_PLANNED])
def test_what_a_model_or_peft_does_not_allow_is_refused_before_training(
    changes: Values, expected: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(PeftMethodError) as caught:
        plan(from_dict(values_of(folder, tmp_path, **changes)))
    assert str(caught.value).startswith(expected)


def test_an_initialisation_that_changes_the_base_is_refused(folder: Path, tmp_path: Path) -> None:
    """What is saved would not fit the base; on the meta device there are no weights that could change."""
    method = {"name": "peft_lora", "peft": {"init_lora_weights": "pissa"}}
    config = from_dict(values_of(folder, tmp_path, method=method, rank=RANK))
    with pytest.raises(PeftMethodError, match="its settings change weights of the base, such as bert"):
        adapt(fresh_base(config), config, ("classifier",))


def test_without_the_package_it_says_how_to_get_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict(values_of(folder, tmp_path, method={"name": "ia3"}))
    monkeypatch.setattr(peft_method.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PeftMethodError, match=r"method=ia3 needs the package peft: pip install 'lora-harness\[peft\]'"):
        plan(config)


def test_one_run_has_one_spelling_and_one_id(folder: Path, tmp_path: Path) -> None:
    spellings = [
        {"name": "peft", "peft": {"peft_type": "LOHA", "r": 4, "alpha": 8}},
        {"name": "peft", "peft": {"alpha": 8, "r": 4, "peft_type": "loha"}},
        {"name": "loha", "peft": {"r": 4, "alpha": 8}},
        {"name": "loha", "peft": {"peft_type": "LOHA", "alpha": 8, "r": 4}},
    ]
    configs = [from_dict(values_of(folder, tmp_path, method=method)) for method in spellings]
    assert len({identify(config).run_id for config in configs}) == 1
    assert configs[0].method.name == "loha" and "peft_type" not in configs[0].method.peft
    other = from_dict(values_of(folder, tmp_path, method={"name": "loha", "peft": {"r": 4, "alpha": 16}}))
    assert identify(other).run_id != identify(configs[0]).run_id


def test_own_targets_are_those_of_peft(folder: Path, tmp_path: Path) -> None:
    method = {"name": "peft_lora", "peft": {"target_modules": ["query"], "layers_to_transform": [1]}}
    planned = plan(from_dict(values_of(folder, tmp_path, method=method, rank=RANK, target_layers=None)))
    assert [str(target) for target in planned.targets] == ["bert.encoder.layer.1.attention.self.query"]
    assert planned.num_adapter_params == 4 * (64 + 64)


def test_ia3_scales_the_input_of_the_mlps_second_matrix_and_the_output_of_all_others(
    folder: Path, tmp_path: Path
) -> None:
    model = fresh_base(config := from_dict(values_of(folder, tmp_path, method={"name": "ia3"})))
    adapt(model, config, ("classifier",))
    sizes = {name: value.numel() for name, value in model.named_parameters() if "layer.0" in name and "ia3_l" in name}
    assert {
        name.removeprefix("bert.encoder.layer.0.").partition(".ia3_l")[0]: size for name, size in sizes.items()
    } == {
        "attention.self.query": 64,
        "attention.self.key": 64,
        "attention.self.value": 64,
        "attention.output.dense": 64,
        "intermediate.dense": 128,
        "output.dense": 128,
    }


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ({"rank": 4, "alpha": 8}, (4, 8, 2.0)),
        ({"rank": 4, "alpha_policy": "proportional", "alpha_per_rank": 2}, (4, 8, 2.0)),
        ({"rank": 4, "alpha_policy": "rslora", "alpha": 8}, (4, 16, 4.0)),
    ],
)
def test_alpha_policies_give_the_scaling_that_they_give_our_own(
    rank: Values, expected: tuple[int, int, float], folder: Path, tmp_path: Path
) -> None:
    config = from_dict(values_of(folder, tmp_path, method={"name": "peft_lora"}, rank=rank))
    model = fresh_base(config)
    adapt(model, config, ("classifier",))
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert (layer.r["default"], layer.lora_alpha["default"], layer.scaling["default"]) == expected
    assert layer.scaling["default"] == config.rank.scaling


def test_a_type_without_layers_for_quantised_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    values = values_of(folder, tmp_path, method={"name": "loha"}, rank=RANK)
    values["model"] = {"name": "saved", "path": "x", "quantization": "nf4"}
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    assert caught.value.problems == [
        "model.quantization=nf4: peft has no layers of method=loha for quantised weights; set model.quantization=none, "
        "or use method=lora."
    ]


def test_parts_of_a_fused_matrix_are_refused(folder: Path, tmp_path: Path) -> None:
    targets = {"name": "q", "projections": ["q"]}
    config = from_dict(values_of(folder, tmp_path, model="gpt2", method={"name": "ia3"}, target_layers=targets))
    with pytest.raises(PeftMethodError, match="are some of the rows of a module, and peft adapts modules whole; name"):
        plan(config)


# ---------------------------------------------------------------- AdaLoRA


def of_adalora(folder: Path, runs_dir: Path, **trainer: Any) -> RunConfig:
    settings = {"tinit": 2, "tfinal": 2, "orth_reg_weight": 0.3}
    trainer = {"max_steps": 8, "batch_size": 8, "eval_every": 3, **trainer}
    values = values_of(folder, runs_dir, method={"name": "adalora", "peft": settings}, rank=RANK, trainer=trainer)
    return from_dict(values)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_HARNESS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return ran(of_adalora(folder, tmp_path_factory.mktemp("undisturbed")))


def test_adalora_ends_at_its_budget_and_says_which_rank_each_module_has(undisturbed: Ran) -> None:
    one = undisturbed
    # 12 modules began with 6 and end with 4 on average. That is what is left of the last step; the best may be earlier.
    left = {
        name: int((value != 0).sum()) for name, value in one.prepared.model.named_parameters() if ".lora_E." in name
    }
    best_step = one.result.metrics["best_step"]
    ranks = json.loads((one.dir / "adapter" / "ranks.json").read_text())
    assert ranks["initial_rank"] == 6 and ranks["target_rank"] == 4
    assert {f"{name}.lora_E.default": rank for name, rank in ranks["ranks"].items()} == left
    assert list(ranks["ranks"]) == one.result.target_modules
    if best_step == 8:
        assert sum(left.values()) == 12 * 4
    else:
        assert 12 * 4 < sum(left.values()) <= 12 * 6
    assert ranks["num_adapter_params_at_start"] == one.result.metrics["num_adapter_params"]
    sizes = load_file(one.dir / "adapter" / "adapter_model.safetensors")
    saved = sum(value.numel() for name, value in sizes.items() if ".lora_" in name)
    assert ranks["num_adapter_params_at_end"] == saved < ranks["num_adapter_params_at_start"] or best_step < 3


def test_adalora_adds_what_peft_adds_to_its_own_loss(folder: Path, tmp_path: Path) -> None:
    config = of_adalora(folder, tmp_path)
    prepared = prepare(config)
    model, ids = prepared.model, torch.arange(4, 44).view(2, 20)
    held = model.__dict__["_held_by_peft"]
    labels = torch.tensor([0, 1])
    plain = model(input_ids=ids, labels=labels).loss
    theirs = held.base_model(input_ids=ids, labels=labels).loss
    ours = prepared.during_training.add_to_loss(plain, share=1.0)
    assert torch.allclose(ours, theirs) and ours > plain
    assert torch.allclose(prepared.during_training.add_to_loss(plain, share=0.5) - plain, (ours - plain) / 2)


def test_rehearsing_leaves_no_trace_in_the_allocation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    stepped = peft_method.RankAllocation.stepped

    def note(self: peft_method.RankAllocation, step: int) -> None:
        if not seen:
            assert self.state() == {}
        seen.append(step)
        stepped(self, step)

    monkeypatch.setattr(peft_method.RankAllocation, "stepped", note)
    ran(of_adalora(folder, tmp_path))
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_resumed_adalora_is_the_undisturbed_one_bitwise(
    stop_at: int, undisturbed: Ran, folder: Path, tmp_path: Path
) -> None:
    """Stopped before ranks are taken away, while they are, and after it."""
    config = of_adalora(folder, tmp_path / "stopped")

    def stop(self: RunCallbacks, step: int) -> bool:
        return step == stop_at

    def keep(self: RunCallbacks, tensors: dict[str, Tensor], position: Any) -> None:
        keep_checkpoint(self, tensors, position)
        if position.step == stop_at:
            raise PreemptedError("stopped")

    keep_checkpoint = RunCallbacks.keep_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallbacks, "wants_checkpoint", stop)
        patch.setattr(RunCallbacks, "keep_checkpoint", keep)
        with pytest.raises(PreemptedError):
            run(config)
    resumed = ran(config)
    ours, theirs = (load_file(one.dir / "adapter" / "adapter_model.safetensors") for one in (resumed, undisturbed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert resumed.losses() == undisturbed.losses()


def test_adalora_needs_steps_between_its_phases(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PeftMethodError) as caught:
        run(of_adalora(folder, tmp_path, max_steps=5))
    assert str(caught.value) == (
        "method.peft.tinit=2 and tfinal=2: AdaLoRA takes ranks away between them, and the run has 5 steps; both "
        "together leave at least 2 of them."
    )
    assert not any(tmp_path.glob("*/result.json"))
