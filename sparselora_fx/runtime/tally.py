"""How many tokens sparse calls had, and what users are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparselora_fx.notices import Notices

_UNKNOWN = (
    "no labels of the shape of its tokens reach the model, so nobody knows which predictions carry "
    "loss: every token is sparse, those that carry loss too. Pass labels[B, L] to the model; add "
    "sparselora_fx.SparsityCallback() to a Trainer that keeps them from it; or name the tokens: "
    "`with sparselora_fx.output_tokens(mask):` around the forward, or the batch's key "
    "'output_tokens' (bool[B, L], true where a token's prediction counts). If every token is meant "
    'to be sparse, say so: tokens="all" in the plan'
)


@dataclass
class TokenTally:
    """Counts of a compiled model's training calls that the schedule makes sparse."""

    sparse: int = 0  # tokens that were sparse,
    real: int = 0  # of so many, in so many calls that could tell them apart
    calls: int = 0
    dense_calls: int = 0  # calls that ran dense, as hardly a token was sparse
    all_sparse: int = 0  # calls in which every token was sparse
    notices: Notices = field(default_factory=Notices)
    due: list[tuple[str, str]] = field(default_factory=list)  # texts, and what they are about

    def copy(self) -> TokenTally:
        """The counts as they stand."""
        return TokenTally(
            self.sparse, self.real, self.calls, self.dense_calls, self.all_sparse, self.notices,
            list(self.due),
        )  # fmt: skip

    def add(self, sparse: int, real: int, *, dense: bool) -> None:
        """Count one call whose tokens are told apart."""
        self.calls += 1
        self.dense_calls += dense
        self.sparse += 0 if dense else sparse
        self.real += real

    def warn_few(self, sparse: int, real: int, least: float) -> None:
        """Say once that calls run dense, as hardly any token is sparse."""
        self._tell_later(
            f"{sparse} of the {real} tokens of this batch ({sparse / max(real, 1):.1%}) would be "
            "sparse, since the predictions made from all others carry loss. A sparse step costs "
            f"more than it saves there: steps in which less than {least:.0%} of the tokens are "
            "sparse run dense (the plan's min_sparse). Set the labels of the prompt to -100, or "
            "let output tokens be sparse too: sparse_outputs=0.5 or tokens='all' in the plan",
            about="few sparse tokens",
        )

    def warn_unknown(self) -> None:
        """Say once that every token is sparse because no labels tell them apart."""
        self._tell_later(_UNKNOWN)

    def warn_untrimmed(self) -> None:
        """Say once that logits are not trimmed, as it is not known which ones count."""
        self._tell_later(
            "trim_logits: no traced loss shows whether labels are shifted, so every logit is "
            "computed; say shift=True or shift=False to sparselora_fx.compile, or leave "
            "trim_logits out",
        )

    def _tell_later(self, text: str, *, about: str = "") -> None:
        self.due.append((text, about))

    def tell(self) -> None:
        """Warn of what is due: a call has run, and does not begin anew with other tokens."""
        due, self.due = self.due, []
        for text, about in due:
            self.notices.warn(text, about=about)

    def describe(self) -> str:
        """One line for `explain`; empty before any call."""
        parts = []
        if self.calls:
            share = self.sparse / max(self.real, 1)
            parts.append(f"{share:.1%} of {self.real} tokens in {self.calls} calls were sparse")
        if self.dense_calls:
            parts.append(f"{self.dense_calls} of these calls ran dense: hardly a token was sparse")
        if self.all_sparse:
            parts.append(f"every token was sparse in {self.all_sparse} calls")
        return "tokens: " + "; ".join(parts) if parts else ""

    @property
    def only_dense(self) -> bool:
        """Whether sparse calls were due, and every one of them ran dense."""
        return 0 < self.calls == self.dense_calls and not self.all_sparse
