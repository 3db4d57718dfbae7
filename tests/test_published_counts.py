"""What papers print: every parameter count of the shipped files against the model itself, and the files' own rules.

The models are at their real size, on the meta device. The counts are in `analysis/published/*.yaml`.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from test_analysis_load import save_run
from test_analysis_paper import by_name, tables_of
from test_analysis_tables import measured
from transformers import GPT2Config, GPT2Model

from analysis.__main__ import main
from analysis.audit import audit
from analysis.budget import CANNOT_SAY, DOES_NOT_FIT, FITS
from analysis.load import load_runs
from analysis.papers import PUBLISHED_DIR, PaperError, PrintedCount, read_paper, shipped_papers
from harness.forecast.request import own_configs

ROOT = Path(__file__).resolve().parents[1]
LORA = PUBLISHED_DIR / "lora.yaml"


# ---------------------------------------------------------------- the shipped audits


@pytest.fixture(scope="module")
def lora_audit(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, str]]]:
    """The command on the LoRA paper: what it prints, and its CSV."""
    path = tmp_path_factory.mktemp("audit") / "lora.csv"
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr("builtins.print", lambda *words, **options: written.extend(map(str, words)))
        code = main(["budget", "--audit", str(LORA), "--csv", str(path)])
    assert code == DOES_NOT_FIT
    with path.open(encoding="utf-8", newline="") as file:
        return "".join(written), list(csv.DictReader(file))


def test_every_count_of_the_lora_paper(lora_audit: tuple[str, list[dict[str, str]]]) -> None:
    """The audit itself refuses a `formula` that the model does not give, so that these are the models' counts."""
    rows = {row["name"]: row for row in lora_audit[1]}
    assert all(entry.formula is not None for entry in read_paper(LORA).counts.values())
    assert {name for name, row in rows.items() if row["agrees"] == "False"} == {
        "roberta_base_full",
        "roberta_large_full",
        "deberta_xxl_qv_r8",
        "gpt2_medium_qv_r4",
        "gpt2_large_qv_r4",
        "gpt3_qkvo_r64",
    }
    by_hand = {
        "roberta_base_qv_r8": 12 * 2 * 8 * (768 + 768),
        "roberta_base_readme": 12 * 2 * 8 * (768 + 768) + (768 * 768 + 768) + (768 * 3 + 3),
        "deberta_xxl_qv_r16": 48 * 2 * 16 * (1536 + 1536),
        "gpt2_large_qv_r4": 36 * 2 * 4 * (1280 + 1280),
        "gpt3_qkvo_r2": 96 * 4 * 2 * (12288 + 12288),
    }
    assert {name: int(rows[name]["count"]) for name in by_hand} == by_hand
    assert rows["gpt3_qv_r64"]["verdict"] == "agrees to the printed digits, cut and not rounded"
    assert rows["gpt2_medium_qv_r4"]["verdict"] == "does not: the formula gives +43,216 (+12.3%)"
    assert rows["gpt2_medium_qv_r4"]["variants"] == "no simple variant gives it"
    assert "rank 16: 4,718,592" in rows["deberta_xxl_qv_r8"]["variants"]


def test_the_page_shows_what_the_command_prints(lora_audit: tuple[str, list[dict[str, str]]]) -> None:
    page = (ROOT / "docs" / "how-to" / "audit-a-paper.md").read_text(encoding="utf-8")
    assert lora_audit[0] in page


def test_counts_of_llama_have_the_unembedding() -> None:
    with own_configs(None):
        audited = audit(read_paper(PUBLISHED_DIR / "lora_without_regret.yaml"))
    assert [each.count for each in audited] == [
        32 * 256 * 3 * (4096 + 14336),
        32 * 256 * (2 * (4096 + 4096) + 2 * (4096 + 1024)),
        32 * 256 * (3 * (4096 + 14336) + 2 * (4096 + 4096) + 2 * (4096 + 1024)),
        32 * 128 * 3 * (4096 + 14336),
    ]
    for each in audited:
        assert not each.agrees
        words, count = each.variants[0]
        assert words == f"on {each.entry.target_layers} and the unembedding"
        assert count == each.count + (each.entry.rank or 0) * (4096 + 128256)


def test_what_the_documentation_says_of_gpt3() -> None:
    with torch.device("meta"):
        model = GPT2Model(GPT2Config(n_embd=12_288, n_layer=96, n_head=96, n_positions=2_048))
    base = sum(parameter.numel() for parameter in model.parameters())
    adapter = read_paper(LORA).counts["gpt3_qv_r4"].formula
    assert adapter is not None
    page = (ROOT / "docs" / "how-to" / "will-it-fit.md").read_text(encoding="utf-8")
    for shown in (
        f"| {base:,} | {2 * base / 1e9:.1f} GB | 350 GB |",
        f"| {adapter:,} | {2 * adapter / 1e6:.1f} MB, or {2 * adapter / 2**20:.1f} MiB | 35 MB |",
        f"in 32 bits are {12 * adapter / 1e9:.1f} GB more | | {(2 * base + 12 * adapter) / 1e9:.1f} GB | 350 GB |",
        f"| | {6 * base / 1e12:.2f} TB | 1.2 TB |",
        f"| | {8 * base / 1e12:.2f} TB | 1.2 TB |",
        f"16 bytes a parameter, {16 * base / 1e12:.2f} TB",
    ):
        assert shown in page


# ---------------------------------------------------------------- an audit of one's own

TINY = "models:\n  tiny: {model_type: gpt2, n_embd: 8, n_layer: 2, n_head: 2, vocab_size: 32, n_positions: 16}\n"
CLASSIFIER = TINY.replace("n_positions: 16", "n_positions: 16, labels: 4")


def write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("models", "entry", "code", "shown"),
    [
        # 2 blocks x 2 x 2 x (8 + 8) = 128; with the head 4 x 8 = 32 more.
        (TINY, "target_layers: qv, rank: 2, printed: 128", FITS, ["128", "agrees to the printed digits"]),
        (CLASSIFIER, "target_layers: qv, rank: 2, printed: 160, head: true", FITS, ["160"]),
        (CLASSIFIER, "target_layers: qv, rank: 2, printed: 160", DOES_NOT_FIT, ["-32 (-20.0%)", "with the head: 160"]),
        (TINY, "target_layers: qv, rank: 2, printed: 64", DOES_NOT_FIT, ["A alone, without B: 64", "rank 1: 64"]),
        (TINY, "target_layers: qv, rank: 2, printed: 256", DOES_NOT_FIT, ["rank 4: 256", "on qkvo: 256"]),
        (TINY, "target_layers: qv, rank: 2, printed: 12M", DOES_NOT_FIT, ["no simple variant gives it"]),
        (TINY, "method: full, printed: 2.1K", FITS, ["2,144"]),
    ],
)
def test_an_audit_of_ones_own(
    models: str, entry: str, code: int, shown: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["budget", "--audit", str(write(tmp_path, f"{models}counts:\n  a: {{model: tiny, {entry}}}\n"))]) == code
    )
    out = capsys.readouterr().out
    assert all(text in out for text in shown), out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "own.yaml: must be a mapping with the keys paper, version, models, counts, tables."),
        ("count: {}\n", "own.yaml: count: no such key. There are: paper, version, models, counts, tables."),
        ("a: [\n", "own.yaml: is no YAML: "),
        ("paper: a\npaper: b\n", "own.yaml: is no YAML: paper is there twice"),
        ("paper: a\n", "own.yaml: counts: there are none to audit"),
        ("models: {a: {n_embd: 8}}\n", "own.yaml: models.a: give a model_type "),
        (f"{TINY}counts: {{a: {{model: tiny}}}}\n", "own.yaml: counts.a: printed is missing."),
        (f"{TINY}counts: {{a: {{model: big, printed: 1M}}}}\n", "own.yaml: counts.a: model: 'big' is not among "),
        (f"{TINY}counts: {{a: {{model: tiny, printed: much}}}}\n", "own.yaml: counts.a: printed: 'much': must be a "),
        (f"{TINY}counts: {{a: {{model: tiny, printed: 0}}}}\n", "own.yaml: counts.a: printed: '0' is no number"),
        (f"{TINY}counts: {{a: {{model: tiny, printed: 1M, ranks: 1}}}}\n", "own.yaml: counts.a: ranks: no such key."),
        (f"{TINY}counts: {{a: {{model: tiny, printed: 1M, rank: r8}}}}\n", "own.yaml: counts.a: rank: 'r8' must be a "),
        (
            f"{TINY}counts: {{a: {{model: tiny, printed: 1M, head: 1}}}}\n",
            "own.yaml: counts.a: head: '1' must be true ",
        ),
        (
            f"{TINY}counts: {{a: {{model: tiny, target_layers: qv, printed: 1M}}}}\n",
            "counts.a: method=lora needs a rank",
        ),
        (
            f"{TINY}counts: {{a: {{model: tiny, target_layers: gate, rank: 1, printed: 1M}}}}\n",
            "own.yaml: counts.a: target_layers",
        ),
        (
            f"{TINY}counts: {{a: {{model: tiny, target_layers: qv, rank: 2, printed: 128, formula: 64}}}}\n",
            "own.yaml: counts.a: formula: 64 is not what the model gives, 128.",
        ),
        (
            "models: {a: {model_type: gpt2, width: 8}}\ncounts: {a: {model: a, method: full, printed: 1M}}\n",
            "own.yaml: counts.a: models.a: width: a config.json of gpt2 has no such key.",
        ),
        (
            "models: {a: {model_type: gpt9}}\ncounts: {a: {model: a, method: full, printed: 1M}}\n",
            "own.yaml: counts.a: models.a: model_type: transformers has no 'gpt9'",
        ),
        (
            "models: {a: {path: nowhere}}\ncounts: {a: {model: a, method: full, printed: 1M}}\n",
            "nowhere: no config.json there.",
        ),
        (
            "models: {a: {model_type: gpt2, n_embd: wide}}\ncounts: {a: {model: a, method: full, printed: 1M}}\n",
            "own.yaml: counts.a: models.a: ",
        ),
        (
            "models: {a: {model_type: gpt2, n_embd: 7}}\ncounts: {b: {model: a, printed: 1M, method: full}}\n",
            "own.yaml: counts.b: ",
        ),
    ],
)
def test_bad_input_is_one_message(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--audit", str(write(tmp_path, text))]) == CANNOT_SAY
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and message in said.err, said.err
    assert len(said.err.splitlines()) == 1


def test_an_audit_is_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "rank=r8", "--audit", str(tmp_path / "own.yaml")]) == CANNOT_SAY
    assert "takes no overrides; leave out rank=r8." in capsys.readouterr().err
    assert main(["budget", "rank=r8", "--csv", "a.csv"]) == CANNOT_SAY
    assert "--csv a.csv: is of --audit, not given here" in capsys.readouterr().err
    assert main(["budget", "--audit", str(tmp_path / "none.yaml")]) == CANNOT_SAY
    assert "none.yaml: No such file or directory." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value", "rounded", "cut"),
    [
        ("0.3M", 300_000, (250_000, 350_000), (300_000, 399_999)),
        ("18M", 18_000_000, (17_500_000, 18_500_000), (18_000_000, 18_999_999)),
        ("0.70B", 700_000_000, (695_000_000, 705_000_000), (700_000_000, 709_999_999)),
        ("294,912", 294_912, (294_912, 294_912), (294_912, 294_912)),
    ],
)
def test_printed_digits(text: str, value: int, rounded: tuple[int, int], cut: tuple[int, int]) -> None:
    printed = PrintedCount.parse(text)
    assert printed.value == value
    for limits, agrees in ((rounded, printed.is_rounded), (cut, printed.is_cut)):
        assert [agrees(each) for each in (limits[0] - 1, *limits, limits[1] + 1)] == [False, True, True, False]


# ---------------------------------------------------------------- quoted tables without a form of ours


def test_the_files_are_checked(tmp_path: Path) -> None:
    rows = "tables:\n  - {table: T, form: %s, rows: [{model: m%s}]%s}\n"
    for filled, message in (
        (("owned", "", ""), r"tables\[0\]: form: 'owned' must be one of"),
        (("own", ", score: 1", ""), r"tables\[0\]: rows\[0\]: score: no such key"),
        (("own", ", count: a", ""), r"tables\[0\]: rows\[0\]: count: 'a' is not among the counts"),
        (("own", "", ", measured: {BLEU: test_blue}"), r"measured: test_blue is no metric"),
        (("own", ", by_rank: {r1: 3}", ""), r"by_rank: its keys must be ranks"),
    ):
        with pytest.raises(PaperError, match=message):
            read_paper(write(tmp_path, rows % filled))
    assert len(shipped_papers()) == len(list(PUBLISHED_DIR.glob("*.yaml")))


def test_e2e_is_quoted_with_counts_and_errata(tmp_path: Path) -> None:
    scores = measured(test_bleu=69.5, num_adapter_params=393_216)
    save_run(tmp_path, "a", rank=4, dataset__name="e2e", model__name="gpt2_medium", metrics=scores)
    frame = load_runs(tmp_path).frame
    assert "published_lora_table_3" not in by_name(frame)
    table = {each.name: each for each in tables_of(frame, published=True)}["published_lora_table_3"]
    rows = [dict(zip(table.text.titles, row, strict=True)) for row in table.text.rows]
    assert (rows[0]["BLEU"], rows[0]["NIST"]) == ("69.50", "\N{EN DASH}")
    quoted = next(row for row in rows[1:] if row["method"] == "lora")
    assert (quoted["BLEU"], quoted["printed ‡"], quoted["formula / printed"]) == ("70.4 ± 0.1", "0.35M", "+12.3%")
    assert "393,216" in quoted.values()
    assert any("no rank gives 0.35M" in note for note in table.notes)
    assert len(table.run_ids) == len(rows) and table.run_ids[1:] == [()] * (len(rows) - 1)


def test_epochs_stand_beside_those_of_the_paper(tmp_path: Path) -> None:
    for epochs in (1, 2):
        options = {"dataset__name": "gsm8k", "trainer__num_epochs": epochs}
        save_run(tmp_path, f"e{epochs}", rank=16, metrics=measured(test_number_match=0.1 * epochs), **options)
    (table,) = (each for each in tables_of(load_runs(tmp_path).frame, published=True) if "less" in each.name)
    rows = [dict(zip(table.text.titles, row, strict=True)) for row in table.text.rows]
    assert [(row["rank"], row["epochs"], row["GSM8K"]) for row in rows[:4]] == [
        ("16", "1", "0.1000"),
        ("16", "2", "0.2000"),
        ("16", "1", "0.447"),
        ("16", "2", "0.528"),
    ]
    assert "printed ‡" not in table.text.titles
