"""Scores of generated texts: equal to the libraries' own command lines and to cases worked by hand."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from test_layering import ROOT, loaded_in_fresh_interpreter

from harness.results.metrics import scores_of
from harness.tasks.generation_scores import one_line, score_texts, write_texts

GENERATED = scores_of(of="generated")

HYPOTHESES = [
    "The Phoenix is a cheap pub near the riverside, rated 3 out of 5.",
    "Dogs  bark\tat\nnight.",
    "",
    "Zürich's café — naïve ☕ “quoted” text costs £1,000.50!",
    "It",
]
REFERENCES = [
    [
        "The Phoenix is a cheap pub by the riverside. It is rated 3 out of 5.",
        "Near the riverside there is a cheap pub, The Phoenix.",
        "The Phoenix, a pub near the riverside, is cheap.",
    ],
    ["Dogs bark at night."],
    ["A sentence that the model never wrote.", "A shorter one."],
    ["Zürich's café — a naïve ☕ — costs £1,000.50!", "The “quoted” text costs £1,000.50 in Zürich."],
    ["It rains in the mountains."],
]


def command_line(directory: Path) -> dict[str, tuple[float, str]]:
    """Score and signature by metric as sacrebleu's command line prints them for the files in `directory`."""
    fields = {line.count("\t") + 1 for line in (directory / "references.tsv").read_text("utf-8").splitlines()}
    (num_refs,) = fields
    files = ["references.tsv", "--num-refs", str(num_refs), "-i", "hypotheses.txt"]
    process = subprocess.run(
        [sys.executable, "-m", "sacrebleu", *files, "-m", "bleu", "chrf", "--width", "12", "--format", "json"],
        cwd=directory,
        env={name: value for name, value in os.environ.items() if name != "SACREBLEU_FORMAT"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert process.returncode == 0, process.stderr
    bleu, chrf = json.loads(process.stdout)
    assert (bleu["name"], chrf["name"]) == ("BLEU", "chrF2")
    return {"bleu": (bleu["score"], bleu["signature"]), "chrf": (chrf["score"], chrf["signature"])}


def equals_the_command_line(directory: Path, hypotheses: list[str], references: list[list[str]]) -> None:
    write_texts(directory, hypotheses, references)
    scored = score_texts(hypotheses, references, ["bleu", "chrf"])
    for metric, (score, signature) in command_line(directory).items():
        assert scored.values[metric] == pytest.approx(score, abs=1e-11)
        # The command line cannot know that some texts have fewer references than the file has columns.
        if len({len(texts) for texts in references}) > 1:
            signature = re.sub(r"nrefs:\d+", "nrefs:var", signature)
        assert scored.signatures[metric] == signature
    assert 5 < scored.values["bleu"] < 95
    assert 5 < scored.values["chrf"] < 95


def test_bleu_and_chrf_are_those_of_the_command_line_with_one_reference(tmp_path: Path) -> None:
    equals_the_command_line(tmp_path, HYPOTHESES, [texts[:1] for texts in REFERENCES])


def test_bleu_and_chrf_are_those_of_the_command_line_with_two_references(tmp_path: Path) -> None:
    references = [[texts[0], texts[-1].upper()] for texts in REFERENCES]
    equals_the_command_line(tmp_path, HYPOTHESES, references)


def test_bleu_and_chrf_are_those_of_the_command_line_with_a_varying_number_of_references(tmp_path: Path) -> None:
    equals_the_command_line(tmp_path, HYPOTHESES, REFERENCES)


@pytest.mark.parametrize(("metric", "best"), [("bleu", 100), ("chrf", 100), ("rouge_l", 1), ("exact_match", 1)])
def test_every_reference_counts(metric: str, best: float) -> None:
    text, other = "the dog sat on the mat", "a dog sat on my mat"
    for references in [[other, text], [text, other], [other, other, text]]:
        assert score_texts([text], [references], [metric]).values[metric] == pytest.approx(best)
    assert score_texts([text], [[other]], [metric]).values[metric] < 0.9 * best


def test_an_empty_reference_beside_others_is_a_placeholder(tmp_path: Path) -> None:
    padded = [[*texts, *["", " "][: 3 - len(texts)]] for texts in REFERENCES]
    assert score_texts(HYPOTHESES, padded, GENERATED) == score_texts(HYPOTHESES, REFERENCES, GENERATED)
    write_texts(tmp_path / "padded", HYPOTHESES, padded)
    write_texts(tmp_path / "plain", HYPOTHESES, REFERENCES)
    files = [(tmp_path / name / "references.tsv").read_bytes() for name in ("padded", "plain")]
    assert files[0] == files[1]


def test_the_files_have_a_line_per_text_and_a_field_per_reference(tmp_path: Path) -> None:
    write_texts(tmp_path / "new", ["a\nb\u2028c", ""], [["x", " ", "y\tz "], ["é"]])
    assert (tmp_path / "new/hypotheses.txt").read_bytes() == b"a b c\n\n"
    assert (tmp_path / "new/references.tsv").read_bytes() == "x\ty z\né\té\n".encode()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["hypotheses.txt", "references.tsv"]


def test_one_line() -> None:
    assert one_line("  a\tb \r\n\n c\u00a0d\u2028e\x1c ") == "a b c d e"
    assert one_line(" \n ") == ""


def test_rouge_l_on_a_case_worked_by_hand() -> None:
    # Against the first reference 3 of 3 and 3 of 7 words, F1 0.6; against the second 2 of 3 and 2 of 3, the better one.
    # The second text: "barked" is not "bark", since nothing is stemmed: 1 of 2 and 1 of 2. The third has no word.
    scored = score_texts(
        ["The cat sat.", "dogs barked", "…"],
        [["the cat sat down on the mat", "a cat sat"], ["Dogs, bark!"], ["one"]],
        ["rouge_l"],
    )
    assert scored.values == {"rouge_l": pytest.approx((2 / 3 + 1 / 2 + 0) / 3)}
    assert scored.signatures == {
        "rouge_l": f"rouge-score {version('rouge-score')}, rougeL F1, stemmer off, best of the references, "
        "mean over texts"
    }


def test_nist_is_nltks_on_13a_tokens() -> None:
    from nltk.translate.nist_score import corpus_nist

    hypotheses = ["The dog, it barked at 3.5 cats.", "No!"]
    references = [["The dog barked at 3.5 cats.", "It barked, the dog, at cats."], ["No, no!"]]
    tokens = [
        [
            ["The", "dog", "barked", "at", "3.5", "cats", "."],
            ["It", "barked", ",", "the", "dog", ",", "at", "cats", "."],
        ],
        [["No", ",", "no", "!"]],
    ]
    expected = corpus_nist(tokens, [["The", "dog", ",", "it", "barked", "at", "3.5", "cats", "."], ["No", "!"]], n=5)
    scored = score_texts(hypotheses, references, ["nist"])
    assert scored.values == {"nist": pytest.approx(expected, abs=1e-12)}
    assert expected > 1
    assert scored.signatures["nist"] == (
        f"nltk {version('nltk')}, corpus_nist n=5, case kept, 13a tokens of sacrebleu {version('sacrebleu')}, "
        "best of the references"
    )


def test_nist_of_five_different_words() -> None:
    # Each word carries log2(5 words / 1 occurrence) bits, every longer n-gram follows from its beginning: 0 bits.
    assert score_texts(["a b c d e"], [["a b c d e"]], ["nist"]).values["nist"] == pytest.approx(math.log2(5))


@pytest.mark.parametrize(
    ("hypothesis", "reference"), [("", "a b c d e"), ("a b c d", "a b c d"), ("a b c d e", "<skipped>")]
)
def test_nist_is_left_out_where_it_does_not_exist(hypothesis: str, reference: str) -> None:
    scored = score_texts([hypothesis], [[reference]], ["nist", "exact_match"])
    assert list(scored.values) == ["exact_match"]
    assert scored.signatures == {}


def test_exact_match_looks_past_whitespace_and_at_every_reference() -> None:
    scored = score_texts(
        [" yes\n", "New  York", "Yes", "b", ""],
        [["yes"], ["New York"], ["yes"], ["a", "b"], ["a"]],
        ["exact_match"],
    )
    assert scored.values == {"exact_match": pytest.approx(3 / 5)}
    assert scored.signatures == {}


@pytest.mark.parametrize(
    ("hypothesis", "reference"),
    [
        ("The answer is 1,234.50.", "She pays 7 + 3.\n#### 1234.5"),
        ("#### 1234.5", "1,234.50"),
        ("it is -3", "#### -3"),
        ("it is \u22123 degrees", "#### -3"),
        ("we lose -$3.00", "$-3"),
        ("so $18", "#### 18"),
        ("about 18 dollars.", "#### $18"),
        ("50%", "#### 50"),
        ("1,000,000", "#### 1000000"),
        ("**18**", "#### 18"),
        ("10-3", "#### 3"),
        ("GPT-3", "#### 3"),
        ("10 - 3 = 7", "#### 7"),
        ("7pm", "#### 7"),
        ("(-7)", "#### -7"),
        ("0.5", "#### .5"),
        ("and so.5", "#### 5"),
        ("1,2,3", "#### 3"),
        ("-0", "#### 0"),
        ("9007199254740993", "#### 9,007,199,254,740,993"),
        ("18", "#### 18 (not 20)\n#### 18"),
    ],
)
def test_number_match(hypothesis: str, reference: str) -> None:
    assert score_texts([hypothesis], [[reference]], ["number_match"]).values == {"number_match": 1.0}


@pytest.mark.parametrize(
    ("hypothesis", "reference"),
    [
        ("no number", "#### 18"),
        ("", "#### 18"),
        ("18 of 20", "#### 18"),
        ("3", "#### -3"),
        ("-3", "#### 3"),
        ("1.234", "#### 1,234"),
        ("9007199254740993", "#### 9007199254740992"),
        ("-1.00000000000000000000000000001", "#### -1"),
        ("7", "7 and #### 8"),
        ("180", "#### 18"),
    ],
)
def test_no_number_match(hypothesis: str, reference: str) -> None:
    assert score_texts([hypothesis], [[reference]], ["number_match"]).values == {"number_match": 0.0}


def test_number_match_is_a_share_of_all_texts_and_looks_at_every_reference() -> None:
    scored = score_texts(["2", "none", "2"], [["1", "2"], ["none"], ["3"]], ["number_match"])
    assert scored.values == {"number_match": pytest.approx(1 / 3)}


@pytest.mark.parametrize("reference", ["none", "7 #### none"])
def test_number_match_is_left_out_where_no_reference_has_a_number(reference: str) -> None:
    assert score_texts(["7"], [[reference]], ["number_match"]).values == {}


def test_every_metric_is_scored_in_the_order_asked_for() -> None:
    scored = score_texts(HYPOTHESES, REFERENCES, GENERATED[::-1])
    assert tuple(scored.values) == GENERATED[::-1]
    assert all(type(value) is float and math.isfinite(value) for value in scored.values.values())
    assert set(scored.signatures) == {"bleu", "chrf", "rouge_l", "nist"}
    assert scored.signatures["bleu"].endswith(f"tok:13a|smooth:exp|version:{version('sacrebleu')}")
    assert scored.signatures["chrf"].endswith(f"nc:6|nw:0|space:no|version:{version('sacrebleu')}")


def test_texts_that_are_all_empty_score_nothing() -> None:
    scored = score_texts(["", ""], [["a 1"], ["b 2"]], GENERATED)
    assert scored.values == {"bleu": 0, "chrf": 0, "rouge_l": 0, "exact_match": 0, "number_match": 0}


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 hypotheses but 2 lists of references"),
        ([], [["a"]], "0 hypotheses but 1 lists of references"),
        ([], [], "no texts to score: 0 hypotheses and 0 lists"),
        (["a", "b"], [["a"], []], r"references\[1\]: a text needs at least one reference .* got \[\]"),
        (["a", "b"], [["", "\n"], ["b"]], r"references\[0\]: a text needs at least one reference that is not empty"),
    ],
)
def test_texts_that_cannot_be_scored(
    tmp_path: Path, hypotheses: list[str], references: list[list[str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_texts(hypotheses, references, ["bleu"])
    with pytest.raises(ValueError, match=message):
        write_texts(tmp_path, hypotheses, references)
    assert list(tmp_path.iterdir()) == []


def test_a_string_is_not_a_list_of_texts() -> None:
    with pytest.raises(TypeError, match=r"references\[0\]: expected a sequence of texts, got one string: \['b'\]\?"):
        score_texts(["a"], ["b"], ["bleu"])
    with pytest.raises(TypeError, match="hypotheses: expected a sequence of texts"):
        score_texts("a", [["b"]], ["bleu"])


def test_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown generation metric meteor; known: bleu, chrf, rouge_l, nist, exact_m"):
        score_texts(["a"], [["a"]], ["bleu", "meteor"])


def test_importing_is_cheap() -> None:
    libraries = {"torch", "numpy", "pandas", "sklearn", "sacrebleu", "rouge_score", "nltk"}
    assert loaded_in_fresh_interpreter(ROOT, "harness.tasks.generation_scores", libraries) == set()


def test_scoring_leaves_the_logging_of_the_process_alone_and_loads_no_torch() -> None:
    script = (
        "import logging, sys; from harness.tasks import generation_scores as scores;"
        "scores.score_texts(['a b c d e 1'], [['a b c d e 1']], scores.scores_of(of='generated'));"
        "print(logging.root.handlers, 'nltk' in sys.modules, 'torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (process.stdout, process.stderr) == ("[] True False\n", "")
