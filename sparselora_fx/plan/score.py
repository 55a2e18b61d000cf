"""How a plan names the function that scores channels.

A score is a term for what is looked at, and terms for what is made of it, joined by ``+``:
``"tokens+prior+weighted"``. h_tn is channel n of a region's hidden state at token t, h~ its
approximation from the factors, w_n the norm of the consumer's column n. A region keeps the
channels of largest score.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparselora_fx.errors import PlanError

TERMS = {
    "pooled": "f of the factors on each sample's mean token (the paper's, for feed-forward)",
    "tokens": "mean over context tokens of h~_tn^2",
    "strided": "the same over 64 evenly spaced context tokens; strided:N over N of them",
    "prior": "mean of h_tn^2 over the calibration tokens; with one of the above, the mean of both",
    "weighted": "times w_n^2: what dropping channel n costs in the consumer's output",
    "normalised": "each token divided by its own sum over n of (h_tn w_n)^2",
}
_CONTEXT = ("pooled", "tokens", "strided")
_SAMPLES = 64
DEFAULT = "strided+weighted"  # for factors alone; docs/estimator.md says why
DEFAULT_CALIBRATED = "strided+prior+weighted"  # the same page


@dataclass(frozen=True)
class Score:
    """What a plan's score says; see `TERMS`.

    Attributes:
        context: "pooled", "tokens", "strided", or "" (the prior alone).
        samples: tokens that "strided" looks at.
    """

    context: str = "pooled"
    samples: int = _SAMPLES
    prior: bool = False
    weighted: bool = False
    normalised: bool = False


def parse_score(text: str) -> Score:
    """Read terms joined by ``+``, in any order; `PlanError` names what is allowed."""
    given = [term.strip() for term in text.split("+")] if isinstance(text, str) else [""]
    terms = [term.partition(":")[0] for term in given]
    for term in terms:
        if term not in TERMS:
            raise PlanError(
                f"score is {text!r}; allowed: one of {', '.join(_CONTEXT)} and prior, or several "
                f"joined by '+', with any of {', '.join(list(TERMS)[4:])}: for example "
                "'tokens+prior+weighted'"
            )
    context = [term for term in terms if term in _CONTEXT]
    if len(set(terms)) != len(terms) or len(context) > 1:
        raise PlanError(f"score {text!r} says a thing twice; name one of {', '.join(_CONTEXT)}")
    if not context and "prior" not in terms:
        raise PlanError(f"score {text!r} looks at nothing; add one of {', '.join(_CONTEXT)}, prior")
    samples = _SAMPLES
    for term, full in zip(terms, given, strict=True):
        if ":" in full:
            number = full.partition(":")[2]
            if term != "strided" or not number.isdecimal() or int(number) < 1:
                raise PlanError(f"score has {full!r}; only 'strided' takes a count: 'strided:64'")
            samples = int(number)
    return Score(
        context[0] if context else "",
        samples,
        "prior" in terms,
        "weighted" in terms,
        "normalised" in terms,
    )


def check_score(text: str | None) -> str | None:
    """A plan's score as it is if it can be read; None: the default for the estimator."""
    if text is not None:
        parse_score(text)
    return text


def check_flag(what: str, value: object) -> bool:
    """A plan's yes or no; `PlanError` for anything else."""
    if isinstance(value, bool):
        return value
    raise PlanError(f"{what} is {value!r}; allowed: true, false")
