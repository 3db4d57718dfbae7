"""Every optimizer: the steps of its reference, its state counted and kept, and what it does not read refused."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from test_run import config, rows  # noqa: F401
from test_trainer import BagOfWords, Objective, Record, Rows, parameters, recipe
from test_trainer import run as run_loop
from torch import Tensor, nn
from torch.nn import functional

from harness import run as run_module
from harness.config.schema import Optimizer, TrainerConfig
from harness.config.validation import ConfigError, find_problems
from harness.content.identity import identify
from harness.methods.rates import Kind, LearningRates
from harness.plan import plan
from harness.processes.stopping import PreemptedError
from harness.results.schema import Status
from harness.training import optimizer as optimizer_module
from harness.training.checkpoint import pack_training, read_checkpoint, unpack_training, write_checkpoint
from harness.training.learner import Position
from harness.training.lion import Lion
from harness.training.optimizer import build_optimizer, hidden_matrices, learning_rate_at, require_optimizer

# Rates at which each lowers the loss of the model below.
RATES = {"adamw": 1e-2, "sgd": 0.5, "adafactor": 5e-2, "muon": 1e-2, "lion": 3e-3, "adamw8bit": 1e-2}
WIDTH = 64


class Deep(BagOfWords):
    """With a hidden matrix, and large enough for a state in 8 bits (4,096 entries)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.embedding = nn.Embedding(WIDTH, WIDTH, padding_idx=0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        real = (input_ids > 0).unsqueeze(-1)
        mean = (self.embedding(input_ids) * real).sum(1) / real.sum(1)
        return self.head(functional.relu(self.body(self.dropout(mean))))


def of(name: str, **values: Any) -> TrainerConfig:
    return recipe(optimizer=Optimizer(name), learning_rate=RATES[name], weight_decay=0.1, **values)


def kinds(config: TrainerConfig) -> LearningRates:
    return LearningRates(dict.fromkeys(Kind, config.learning_rate), ["head"])


def run(model: Deep, rows: Rows, config: TrainerConfig, record: Record | None = None) -> Record:  # noqa: F811
    return run_loop(model, rows, config, Objective(), record, kinds(config))[1]


@pytest.mark.parametrize("name", Optimizer)
def test_the_loss_falls_and_what_is_frozen_stays(name: str) -> None:
    model = Deep()
    model.body.bias.requires_grad_(False)
    before = parameters(model)
    record = run(model, Rows(size=8, num_rows=8), of(name, max_steps=20))
    assert record.losses[-1] < 0.7 * record.losses[0]
    moved = {key for key, value in parameters(model).items() if not torch.equal(value, before[key])}
    assert moved == before.keys() - {"body.bias"}


# ---------------------------------------------------------------- steps


def matrices_and_vectors(model: nn.Module) -> list[dict[str, Any]]:
    every = list(model.parameters())
    return [
        {"params": [parameter for parameter in every if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in every if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


class LionByHand:
    """Lion in the words of its paper, on everything at once; vectors do not decay."""

    def __init__(self, model: nn.Module) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0}]
        self.momenta = [(parameter, torch.zeros_like(parameter)) for parameter in model.parameters()]

    @torch.no_grad()
    def step(self) -> None:
        rate = self.param_groups[0]["lr"]
        for parameter, momentum in self.momenta:
            assert parameter.grad is not None
            decay = 0.1 if parameter.ndim > 1 else 0.0
            update = torch.sign(0.9 * momentum + 0.1 * parameter.grad)
            parameter -= rate * (update + decay * parameter)
            momentum.copy_(0.99 * momentum + 0.01 * parameter.grad)


class MuonBesideAdamW:
    """PyTorch's Muon on `body.weight`, and its AdamW on the rest."""

    def __init__(self, model: Deep) -> None:
        others = [value for name, value in model.named_parameters() if name != "body.weight"]
        groups = [
            {"params": [value for value in others if value.ndim > 1], "weight_decay": 0.1},
            {"params": [value for value in others if value.ndim <= 1], "weight_decay": 0.0},
        ]
        self.muon = torch.optim.Muon([model.body.weight], momentum=0.95, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(groups, lr=1.0)
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()


REFERENCES: dict[str, Callable[[Deep], Any]] = {
    "adamw": lambda model: torch.optim.AdamW(matrices_and_vectors(model), lr=1.0),
    "sgd": lambda model: torch.optim.SGD(matrices_and_vectors(model), lr=1.0, momentum=0.9),
    "adafactor": lambda model: torch.optim.Adafactor(matrices_and_vectors(model), lr=1.0),
    "muon": MuonBesideAdamW,
    "lion": LionByHand,
    "adamw8bit": lambda model: importlib.import_module("bitsandbytes.optim").AdamW8bit(
        matrices_and_vectors(model), lr=1.0
    ),
}


@pytest.mark.parametrize("name", Optimizer)
def test_a_training_is_that_of_the_reference(name: str) -> None:
    config = of(name, max_gradient_norm=None)
    model, expected = Deep(), Deep()
    reference = REFERENCES[name](expected)
    steps = [step for epoch in range(3) for step in Rows(size=8).epoch(epoch)]
    for number, (batch,) in enumerate(steps, start=1):
        for group in reference.param_groups:
            group["lr"] = learning_rate_at(number, 6, config)
        functional.cross_entropy(expected(batch.inputs["input_ids"]), batch.labels).backward()
        reference.step()
        expected.zero_grad()
    before = parameters(model)
    run(model, Rows(size=8), config)
    # The sign of what is almost zero can tip over a rounding.
    tolerance = 2e-3 if name == "lion" else 1e-5
    for key, value in parameters(expected).items():
        change, own = value - before[key], parameters(model)[key] - before[key]
        assert change.norm() > 0
        assert (own - change).norm() <= tolerance * change.norm(), key


def test_muon_has_the_hidden_matrices_alone() -> None:
    config = of("muon")
    model = Deep()
    model.norm = nn.LayerNorm(3)
    assert list(hidden_matrices(model, kinds(config))) == ["body.weight"]
    muon, matrices, vectors = build_optimizer(model, config, kinds(config)).param_groups
    assert [len(group["params"]) for group in (muon, matrices, vectors)] == [1, 2, 4]
    assert ("ns_steps" in muon, "betas" in matrices) == (True, True)
    assert (muon["weight_decay"], matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.1, 0.0)


def test_muon_leaves_the_unembedding_to_adamw() -> None:
    class Language(Deep):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

    assert list(hidden_matrices(Language(), LearningRates(dict.fromkeys(Kind, 1.0)))) == ["body.weight"]


def test_a_closure_is_called_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    muon = torch.optim.Muon([weight], lr=0.1)
    for optimizer in (Lion([weight], lr=0.1, betas=(0.9, 0.99)), optimizer_module.MuonWithAdamW(muon, None)):
        weight.grad = None
        before = weight.detach().clone()
        assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
        assert (weight < before).all()


# ---------------------------------------------------------------- state


def entries(model: Deep, *, hidden: bool | None = None) -> list[tuple[int, ...]]:
    named = model.named_parameters()
    return [tuple(value.shape) for name, value in named if hidden is None or (name == "body.weight") == hidden]


def state_by_hand(name: str) -> int:
    """Bytes of the state of `Deep`."""
    shapes = entries(Deep())

    def adam(shapes: list[tuple[int, ...]]) -> int:
        return sum(8 * math.prod(shape) + 4 for shape in shapes)  # two moments and a count of steps

    match name:
        case "adamw":
            return adam(shapes)
        case "sgd" | "lion":
            return sum(4 * math.prod(shape) for shape in shapes)
        case "adafactor":
            return sum(4 * sum(shape) + 4 for shape in shapes)  # a row and a column; of a vector, itself
        case "muon":
            (body,) = entries(Deep(), hidden=True)
            return adam(entries(Deep(), hidden=False)) + 4 * math.prod(body)
    tables = 2 * 256 * 4  # read by all states of 8 bits
    sizes = [math.prod(shape) for shape in shapes]
    return tables + sum(2 * size + 2 * 4 * math.ceil(size / 256) if size >= 4096 else 8 * size for size in sizes)


@pytest.mark.parametrize("name", Optimizer)
def test_the_memory_of_a_state_is_worked_by_hand(name: str) -> None:
    record = run(Deep(), Rows(size=8), of(name, max_steps=1))
    assert record.measured["optimizer_bytes"] == state_by_hand(name)


class OnDisk(Record):
    """Keeps its checkpoint in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.position: Position | None = None

    def keep_checkpoint(self, tensors: dict[str, Tensor], position: Position) -> None:
        write_checkpoint(self.path, tensors, {})
        self.position = deepcopy(position)
        if self.stop:
            raise PreemptedError("stopped")

    def last_checkpoint(self) -> tuple[dict[str, Tensor], Position] | None:
        found = read_checkpoint(self.path)
        return None if found is None or self.position is None else (found[0], self.position)


@pytest.mark.parametrize("name", Optimizer)
def test_a_run_that_resumes_equals_an_undisturbed_one_bitwise(name: str, tmp_path: Path) -> None:
    config = of(name)
    torch.manual_seed(7)
    whole = Deep(dropout=0.5)
    torch.manual_seed(7)
    record = run(whole, Rows(size=4), config)

    first = OnDisk(tmp_path / "checkpoint.safetensors")
    first.checkpoint_at, first.stop = 3, True
    torch.manual_seed(7)
    stopped = Deep(dropout=0.5)
    torch.manual_seed(7)
    with pytest.raises(PreemptedError):
        run(stopped, Rows(size=4), config, first)
    first.stop = False
    losses = list(first.losses)
    first.losses.clear()
    resumed = Deep(dropout=0.5)
    torch.manual_seed(99)  # another process
    run(resumed, Rows(size=4), config, first)
    assert (len(losses), losses + first.losses) == (3, record.losses)
    assert all(torch.equal(value, parameters(whole)[key]) for key, value in parameters(resumed).items())


def test_a_state_in_8_bits_is_unpacked_as_it_was(tmp_path: Path) -> None:
    """Two parameters are read by one pair of tables, and the count of steps is no tensor."""
    config, process = of("adamw8bit"), Accelerator(cpu=True)

    def stepped() -> tuple[Deep, Any]:
        model = Deep()
        optimizer = build_optimizer(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return model, optimizer

    model, optimizer = stepped()
    optimizer.step()
    write_checkpoint(
        tmp_path / "state", pack_training(model, optimizer, None, method_state={}, accelerator=process), {}
    )
    found = read_checkpoint(tmp_path / "state")
    assert found is not None
    other, resumed = stepped()
    unpack_training(found[0], other, resumed, accelerator=process)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        before, after = optimizer.state[one], resumed.state[two]
        assert before.keys() == after.keys()
        assert {type(value) for value in after.values()} == {int, Tensor}
        assert all(torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)) for key, value in before.items())
    assert "qmap1" in optimizer.state[model.body.weight] and "qmap1" in optimizer.state[model.embedding.weight]


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["muon", "adamw8bit"])
def test_a_run_ends_and_is_another_cell(rows: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    wanted = config(rows, tmp_path, trainer={"optimizer": name})
    result = run_module.run(wanted)
    assert result.status is Status.FINISHED, result.error
    assert result.config["trainer"]["optimizer"] == name
    usual = identify(config(rows, tmp_path))
    assert identify(wanted).cell_id != usual.cell_id
    assert identify(config(rows, tmp_path, trainer={"optimizer": "adamw"})) == usual


@pytest.mark.parametrize(
    ("method", "trainer", "expected"),
    [
        (
            "lora",
            {"momentum": 0.5},
            "trainer.momentum=0.5: is read by trainer.optimizer=sgd and muon, and would decide nothing here; set it to "
            "null, its default.",
        ),
        (
            "lora",
            {"optimizer": "sgd", "beta1": 0.8},
            "trainer.beta1=0.8: is read by trainer.optimizer=lion, adamw and adamw8bit, and by muon where not all are "
            "hidden matrices, and would decide nothing here; set it to 0.9, its default.",
        ),
        (
            "full",
            {"optimizer": "adafactor", "adam_epsilon": 1e-6},
            "trainer.adam_epsilon=1e-06: is read by trainer.optimizer=adamw and adamw8bit, and by muon where not all "
            "are hidden matrices, and would decide nothing here; set it to 1e-08, its default.",
        ),
        (
            "full",
            {"optimizer": "lion", "beta2": 0.99},
            "trainer.beta2=0.99: is read by trainer.optimizer=adamw and adamw8bit, and by muon where not all are "
            "hidden matrices, and would decide nothing here; set it to 0.999, its default.",
        ),
        (
            "full",
            {"optimizer": "adamw8bit", "lion_beta2": 0.9},
            "trainer.lion_beta2=0.9: is read by trainer.optimizer=lion, and would decide nothing here; set it to 0.99, "
            "its default.",
        ),
        ("full", {"optimizer": "sgd", "momentum": 1.0}, "trainer.momentum=1.0: allowed is 0 <= momentum < 1, or null."),
        ("full", {"optimizer": "lion", "lion_beta2": 1}, "trainer.lion_beta2=1.0: allowed is 0 <= lion_beta2 < 1."),
    ],
)
def test_a_setting_that_is_not_read_is_refused(
    rows: Path,  # noqa: F811
    tmp_path: Path,
    method: str,
    trainer: dict[str, Any],
    expected: str,
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(rows, tmp_path, method, trainer=trainer)
    assert caught.value.problems == [expected]


def test_muon_reads_what_its_adamw_does_where_there_is_one(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    trainer = {"optimizer": "muon", "beta2": 0.99, "momentum": 0.9}
    assert find_problems(config(rows, tmp_path, trainer=trainer)) == []
    language = {"dataset": {"task": "causal_lm", "metrics": [], "best_metric": "nll"}, "model": {"tiny": "gpt2"}}
    placement = {"target_layers": {"name": "qkv", "projections": ["qkv"]}}
    with pytest.raises(ConfigError, match=r"^trainer.beta2=0.99: is read by"):
        config(rows, tmp_path, trainer=trainer, **language, **placement)


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw8bit"])
def test_an_optimizer_of_whole_matrices_is_refused_on_parts(rows: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    with pytest.raises(ConfigError) as caught:
        config(rows, tmp_path, trainer={"optimizer": name}, shard_model=True)
    assert caught.value.problems == [
        f"shard_model=true: trainer.optimizer={name} reads whole matrices, of which each process has a part; use "
        "adamw, sgd, lion."
    ]


def test_muon_without_a_hidden_matrix_is_refused_before_training(rows: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError) as caught:
        plan(config(rows, tmp_path, "head_only", trainer={"optimizer": "muon"}))
    assert caught.value.problems == [
        "trainer.optimizer=muon: method=head_only trains no hidden matrix of tiny_bert, and Muon updates nothing else; "
        "use trainer.optimizer=adamw."
    ]


def test_8_bits_need_bitsandbytes_and_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    require_optimizer(of("adamw8bit"), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"no 8-bit optimizer for the device mps; run on another device, install"):
        require_optimizer(of("adamw8bit"), torch.device("mps"))
    monkeypatch.setattr(optimizer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes; pip install 'lora-harness\[quant\]'"):
        require_optimizer(of("adamw8bit"), torch.device("cpu"))
    require_optimizer(of("adamw"), torch.device("mps"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", Optimizer)
def test_every_optimizer_trains_on_cuda(rows: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    if name == Optimizer.adamw8bit:
        pytest.importorskip("bitsandbytes")
    trainer = {"optimizer": name, "learning_rate": RATES[name], "max_steps": 6}
    result = run_module.run(config(rows, tmp_path, "full", device="cuda", trainer=trainer, allow_busy_device=True))
    assert result.status is Status.FINISHED, result.error
    assert result.metrics["optimizer_bytes"] > 0
