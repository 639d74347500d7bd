"""What one probe found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at.
        ok: whether it is as dataeff wants it.
        value: what is there, for people.
        cost: when not ok, what the user loses by it.
        remedy: when not ok, how to get it.
        area: the part of the screen it belongs to.
        essential: nothing works without it.
        figures: the same for programs: name -> number or text.
    """

    name: str
    ok: bool
    value: str
    cost: str = ""
    remedy: str = ""
    area: str = ""
    essential: bool = False
    figures: dict[str, float | str] = field(default_factory=dict)
