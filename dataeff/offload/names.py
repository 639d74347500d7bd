"""Names of modules as people write them: with the names that wrappers put in, or without."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What DDP, torch.compile, FSDP and its checkpoint wrapper name the module that they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = {"module", *_WRAPPED}
_MOST_NEAR = 3


def find_name(name: str, known: Iterable[str]) -> str | None:
    """The one of the `known` names that is `name`, or is so but for wrappers; the outermost.

    What is wrapped stands for its wrapper: nothing within what is compiled has a name.
    """
    known = list(known)
    while name.rpartition(".")[2] in _WRAPPED and name.rpartition(".")[0] in known:
        name = name.rpartition(".")[0]
    if name in known:
        return name
    bare = _bare(name)
    return next((other for other in known if _bare(other) == bare), None)


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Those of the `known` names that may have been meant: that end alike, or are spelt alike."""
    bare = {other: _bare(other) for other in known if other}
    alike = [other for other in bare if bare[other].endswith(f".{_bare(name)}")]
    alike += difflib.get_close_matches(name, bare, _MOST_NEAR)
    return list(dict.fromkeys(alike))[:_MOST_NEAR]


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
