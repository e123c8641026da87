"""Whose the built-in data are and on what terms: what a model card says of them where its author says nothing."""

from __future__ import annotations

from cmt_fast.data.photos import PHOTOS

KNOWN = {
    "digits": "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository (CC BY 4.0)",
    "photos": f"photographs: {'; '.join(f'{p.name} by {p.author} ({p.rights})' for p in PHOTOS)}",
    "gmm": "drawn at random from a formula",
}


def known(kind: str) -> str | None:
    """A sentence without its full stop on `data.kind`; None where the data are the user's."""
    return KNOWN.get(kind)
