"""Ids that stand for no text: the end-of-text token, and what a model from elsewhere has beside."""

from typing import Any, NamedTuple


class Marks(NamedTuple):
    specials: dict[str, int] = {}
    """Tokens that no text has, by name, where there are others than the end-of-text token."""
    ends: tuple[int, ...] = ()
    """Generation stops after these, too."""
    begin: int | None = None
    """Stands before every prompt."""

    def named_specials(self, name: str, eot: int | None) -> dict[str, int]:
        """Every special token; without others the end-of-text token alone, by its name."""
        return self.specials or ({} if eot is None else {name: eot})

    def to_json(self) -> dict[str, Any]:
        """Only what there is: the document of a tokenizer without marks stays what it was."""
        return {
            name: value for name, value in self._asdict().items() if value not in ({}, (), None)
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Marks":
        made = cls(
            dict(saved.get("specials", {})), tuple(saved.get("ends", ())), saved.get("begin")
        )
        ids = [*made.specials.values(), *made.ends, made.begin]
        if not all(i is None or (type(i) is int and i >= 0) for i in ids):
            raise ValueError("marks that are no ids")
        return made


NO_MARKS = Marks()
