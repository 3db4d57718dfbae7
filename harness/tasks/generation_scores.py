"""Scores of generated texts against references, by the libraries that papers quote.

BLEU and chrF come from sacrebleu, ROUGE-L from rouge-score and NIST from nltk, each with a signature that says how.
Whitespace is normalised before anything is scored, so that the files of `write_texts`, a line per text, hold what was
scored and sacrebleu's own command line gives the same BLEU and chrF from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

from harness.results.files import HYPOTHESES_FILE, REFERENCES_FILE, write_atomically
from harness.results.metrics import find_scorer, scores_of

Scorer = Callable[[list[str], list[list[str]]], tuple[float | None, str | None]]
"""From texts and the references of each to a score (None where it does not exist) and how it was computed."""

# The libraries are imported where they are used: nltk and rouge-score bring pandas and scikit-learn with them, seconds
# that nobody should wait for who only wants the names below.


@dataclass(frozen=True)
class Scored:
    """Corpus scores by metric, and how they were computed.

    `values` is in the units of `score_texts`; a score that does not exist has no key. `signatures` has one entry for
    each value that a library computed: sacrebleu's own signature, or a sentence with the library's version.
    """

    values: dict[str, float]
    signatures: dict[str, str]


def score_texts(hypotheses: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]) -> Scored:
    """Scores `hypotheses[i]` against every text of `references[i]`, whose number may differ from text to text.

    bleu: sacrebleu's defaults (13a tokens, case kept), 0 to 100.
    chrf: sacrebleu's defaults (chrF2, character 6-grams), 0 to 100.
    rouge_l: F1 of the longest common subsequence (Lin 2004), of each text the best over its references, mean over
        texts, 0 to 1. rouge-score lowercases and knows the letters a-z and digits only; a text without any scores 0.
    nist: nltk's corpus NIST up to 5-grams on sacrebleu's 13a tokens, case kept, from 0 upwards. It does not exist where
        no hypothesis has five tokens. Of several references nltk takes the n-grams and the length of the one that
        matches best, where Doddington (2002) and mteval pool them: the two can differ.
    exact_match: share of the texts that equal one of their references, 0 to 1.
    number_match: share of the texts whose last number equals the last number of one of their references, 0 to 1; of a
        reference with GSM8K's `####`, the last number behind it. Numbers are compared by value, without thousands
        separators, currency and percent signs. It does not exist where no reference has a number.

    Every text goes through `one_line` first. A reference that is empty then is a placeholder and dropped. Raises
    `ValueError` for an unknown metric, for no text at all, for different numbers of hypotheses and references, and for
    a text without reference; `TypeError` for a string where a list of texts belongs.
    """
    known = scores_of(of="generated")
    unknown = [metric for metric in metrics if metric not in known]
    if unknown:
        raise ValueError(f"unknown generation metric {', '.join(unknown)}; known: {', '.join(known)}")
    hypotheses, references = _checked(hypotheses, references)
    values: dict[str, float] = {}
    signatures: dict[str, str] = {}
    for metric in metrics:
        scorer: Scorer = find_scorer(metric)
        value, signature = scorer(hypotheses, references)
        if value is None:
            continue
        values[metric] = value
        if signature is not None:
            signatures[metric] = signature
    return Scored(values, signatures)


def write_texts(directory: Path, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Writes `hypotheses.txt` and `references.tsv` into `directory`, UTF-8, a line per text, each file atomically.

    Every line of references has N fields, N being the largest number of references of a text: sacrebleu's command
    line refuses lines with fewer. Where a text has fewer, its last one is repeated, which changes neither BLEU nor
    chrF (an empty field would: BLEU takes its length, 0, for a reference length). So

        sacrebleu references.tsv --num-refs N -i hypotheses.txt -m bleu chrf

    prints what `score_texts` returns, but names N references in its signature where `score_texts` has `nrefs:var`.
    Raises the errors of `score_texts`.
    """
    hypotheses, references = _checked(hypotheses, references)
    width = max(map(len, references))
    lines = ["\t".join([*texts, *[texts[-1]] * (width - len(texts))]) for texts in references]
    write_atomically(directory / HYPOTHESES_FILE, _lines(hypotheses))
    write_atomically(directory / REFERENCES_FILE, _lines(lines))


def one_line(text: str) -> str:
    """Returns `text` with every run of whitespace (line breaks and tabs too) as one space, and none at its ends."""
    return " ".join(text.split())


def _lines(texts: Sequence[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def _checked(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Both with `one_line` applied, references without the empty ones; raises the errors of `score_texts`."""
    if isinstance(hypotheses, str):
        raise TypeError("hypotheses: expected a sequence of texts, got one string")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses but {len(references)} lists of references: each text needs its own"
        )
    if not hypotheses:
        raise ValueError("no texts to score: 0 hypotheses and 0 lists of references")
    kept: list[list[str]] = []
    for index, texts in enumerate(references):
        if isinstance(texts, str):
            raise TypeError(f"references[{index}]: expected a sequence of texts, got one string: [{texts!r}]?")
        kept.append([line for line in map(one_line, texts) if line])
        if not kept[-1]:
            raise ValueError(f"references[{index}]: a text needs at least one reference that is not empty, got {texts}")
    return [one_line(text) for text in hypotheses], kept


def _streams(references: list[list[str]]) -> list[tuple[str | None, ...]]:
    """The references as sacrebleu wants them: one stream per position, with None where a text has no more."""
    return list(zip_longest(*references))


def bleu(hypotheses: list[str], references: list[list[str]]) -> tuple[float, str]:
    """BLEU by sacrebleu's defaults, 0 to 100, and its signature."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU()
    score = bleu.corpus_score(hypotheses, _streams(references)).score
    return score, bleu.get_signature().format()


def chrf(hypotheses: list[str], references: list[list[str]]) -> tuple[float, str]:
    """The chrF2 of sacrebleu's defaults, 0 to 100, and its signature."""
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    score = chrf.corpus_score(hypotheses, _streams(references)).score
    return score, chrf.get_signature().format()


def rouge_l(hypotheses: list[str], references: list[list[str]]) -> tuple[float, str]:
    """Mean over texts of the best F1 of the longest common subsequence, 0 to 1; see `score_texts`."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # The tokenizer is the default one. Left to itself the scorer logs that through absl, which then puts a handler on
    # the root logger of the whole process.
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=False))
    scores = [
        scorer.score_multi(texts, hypothesis)["rougeL"].fmeasure
        for hypothesis, texts in zip(hypotheses, references, strict=True)
    ]
    how = "rougeL F1, stemmer off, best of the references, mean over texts"
    return fmean(scores), f"rouge-score {version('rouge-score')}, {how}"


def nist(hypotheses: list[str], references: list[list[str]]) -> tuple[float | None, str]:
    """Corpus NIST up to 5-grams; None where no hypothesis has five tokens."""
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    signature = (
        f"nltk {version('nltk')}, corpus_nist n=5, case kept, "
        f"13a tokens of sacrebleu {version('sacrebleu')}, best of the references"
    )
    try:
        score = corpus_nist(
            [[tokenize(text).split() for text in texts] for texts in references],
            [tokenize(hypothesis).split() for hypothesis in hypotheses],
            n=5,
        )
    except ZeroDivisionError:  # there is an order of which no hypothesis has an n-gram, or no reference has a token
        return None, signature
    return float(score), signature


def exact_match(hypotheses: list[str], references: list[list[str]]) -> tuple[float, None]:
    """Share of the texts that equal one of their references."""
    pairs = zip(hypotheses, references, strict=True)
    return fmean(hypothesis in texts for hypothesis, texts in pairs), None


def number_match(hypotheses: list[str], references: list[list[str]]) -> tuple[float | None, None]:
    """Share of the texts whose last number is that of a reference; see `score_texts`."""
    # Without `####`, rpartition leaves the whole text behind it.
    answers = [{_last_number(text.rpartition("####")[2]) for text in texts} - {None} for texts in references]
    if not any(answers):
        return None, None
    return fmean(_last_number(text) in numbers for text, numbers in zip(hypotheses, answers, strict=True)), None


# A minus is a sign only where nothing stands before it that it could be subtracted from or joined to: "10-3" ends in
# 3, and so does "GPT-3". The currency may stand on either side of it. A comma belongs to the number where it separates
# thousands, a point where digits follow.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%.\u2212-])[\u2212-])?[$€£¥]?"  # u2212 is the typographic minus
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
)


def _last_number(text: str) -> Decimal | None:
    """The last number of `text`, written the English way, or None."""
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    # The sign goes into the text: a Decimal from a text is exact, minus a Decimal is rounded to 28 digits.
    return Decimal(("-" if found[-1]["sign"] else "") + found[-1]["digits"].replace(",", ""))
