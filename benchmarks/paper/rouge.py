"""ROUGE-L: how much of a text's words stand in another in the same order (Lin 2004)."""

import re

from utils.files import InputError


def require_rouge() -> None:
    """Raise InputError where the package that counts is not installed."""
    try:
        import rapidfuzz  # noqa: F401
    except ModuleNotFoundError:
        raise InputError("rapidfuzz is not installed; pip install -r requirements-dev.txt") from None


def rouge_l(text: str, reference: str) -> float:
    """F1: twice the longest common subsequence of words over the words of both.

    rapidfuzz calls it the normalised similarity of insertions and deletions.
    """
    from rapidfuzz.distance import Indel

    return float(Indel.normalized_similarity(words(text), words(reference)))


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script, in lower case."""
    return re.findall(r"\w+", text.lower())
