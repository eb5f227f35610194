"""METEOR by nltk: words that are alike, of one stem, or synonyms in WordNet."""

from __future__ import annotations

from collections.abc import Sequence

_EXTRA = "METEOR needs nltk: pip install 'tfgptopt[evaluation]'."
_DATA = (
    "METEOR needs the data of WordNet, which nltk does not bring: `python -m nltk.downloader "
    "wordnet`, or give `wordnet=False` to compare words and stems alone."
)


def has_wordnet() -> bool:
    """Returns whether nltk and its data of WordNet are installed."""
    try:
        from nltk import corpus

        corpus.wordnet.ensure_loaded()
    except (ImportError, LookupError):
        return False
    return True


def meteor_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]], wordnet: bool = True
) -> list[float]:
    """Returns METEOR of texts, the best of their references each, in [0, 1].

    Args:
        answers: Texts.
        references: References of each.
        wordnet: bool. Whether synonyms are alike too, as METEOR has it. Defaults to `True`.

    Raises:
        FileNotFoundError: If the data of WordNet are not installed.
        ImportError: If nltk is not.

    Example:

    ```python
    from tfgptopt.evaluation.meteor import meteor_scores

    print(meteor_scores(["the cat sat"], [["the cat sits"]], wordnet=False))
    ```

    Reference: Banerjee and Lavie, 2005, "METEOR: An Automatic Metric for MT Evaluation with
        Improved Correlation with Human Judgments".
    """
    try:
        from nltk import corpus
        from nltk.tokenize.destructive import NLTKWordTokenizer
        from nltk.translate.meteor_score import meteor_score
    except ImportError:
        raise ImportError(_EXTRA) from None
    if wordnet and not has_wordnet():
        raise FileNotFoundError(_DATA)
    known = corpus.wordnet if wordnet else _NoSynonyms()
    words = NLTKWordTokenizer().tokenize
    return [
        float(meteor_score([words(text) for text in texts], words(answer), wordnet=known))
        for answer, texts in zip(answers, references, strict=True)
    ]


class _NoSynonyms:
    """A WordNet that knows no word."""

    def synsets(self, word: str) -> list[object]:
        return []
