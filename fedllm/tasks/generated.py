"""What generated answers are worth beside those that are wanted; counted by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bleu", "exact_match", "rouge_l"]


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of answers that are the wanted ones, blanks at their ends aside.

    >>> exact_match([" 42", "43"], ["42", "42"])
    0.5
    """
    hits = sum(one.strip() == other.strip() for one, other in zip(written, wanted, strict=True))
    return hits / max(len(wanted), 1)


def rouge_l(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the mean F-measure of longest common subsequences of words (Lin, 2004), in [0, 1]."""
    from torchmetrics.functional.text import rouge_score

    if not wanted:
        return 0.0
    found = rouge_score(list(written), list(wanted), rouge_keys="rougeL")
    return float(found["rougeL_fmeasure"])


def bleu(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the corpus's BLEU with sacreBLEU's tokens (Post, WMT 2018), 0 to 100."""
    from torchmetrics.functional.text import sacre_bleu_score

    if not any(one.strip() for one in written):
        return 0.0
    return 100.0 * float(sacre_bleu_score(list(written), [[one] for one in wanted]))
