"""Which prediction a label belongs to: the one made from its own token, or from the one before."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from sparselora_fx.errors import CompileError
from sparselora_fx.model.signature import base_model
from sparselora_fx.notices import Notices

# Losses that predict label t at token t; every other model with labels[B, L] is taken for a causal
# one.
_UNSHIFTED = ("MaskedLM", "TokenClassification", "PreTraining")


@dataclass
class Convention:
    """What is known of a model's loss.

    ``assumed`` goes by its class, or is what the user ``said``; ``shown`` are the conventions that
    its traced graphs use. True: label t + 1 is compared with what becomes of token t.
    """

    assumed: bool | None
    said: bool = False
    shown: set[bool] = field(default_factory=set)
    notices: Notices = field(default_factory=Notices)

    @property
    def shift(self) -> bool | None:
        """True or False as above; None: not known, so that a token is dense if either holds."""
        if self.said or not self.shown:
            return self.assumed
        return next(iter(self.shown)) if len(self.shown) == 1 else None

    def learn(self, shown: set[bool]) -> bool:
        """Take in what a graph shows; whether `shift` is another one now. What the user said
        stands, with a warning."""
        before = self.shift
        self.shown |= shown
        if self.said and self.shown - {self.assumed}:
            loss = "the token before it" if True in self.shown else "its own token"
            self.notices.warn(
                f"shift={self.assumed} was said, but the model's loss compares each label with the "
                f"prediction made from {loss}: tokens that carry loss are sparse. Leave shift out, "
                "unless the loss that counts is another one",
                about="shift",
            )
        return self.shift != before


def convention_of(model: nn.Module, said: bool | None) -> Convention:
    """What is known of a model's loss before any graph is traced. A loss function that the user has
    set, and models that are not transformers' own, are believed only once a graph shows them.
    `CompileError` if what was said is no answer."""
    if said is not None and not isinstance(said, bool):
        raise CompileError(
            "shift must be True (token t predicts label t + 1), False (label t) or None, "
            f"got {said!r}"
        )
    if said is not None:
        return Convention(said, said=True)
    base = base_model(model)
    library = type(base).__module__.startswith("transformers.")
    if not library or hasattr(base, "_loss_function"):
        return Convention(None)
    kind = str(getattr(base, "loss_type", None) or type(base).__name__)
    return Convention(not any(word in kind for word in _UNSHIFTED))
