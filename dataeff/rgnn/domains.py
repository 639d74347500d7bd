"""Row domains and the maps between them: the index structure of the inter-operator IR.

A value has one row per element of its domain. A map `"edge.src"` sends each row of one domain to
a row of another; `gather[map]` reads along it and `sum[map]` adds back along it, so each is the
other's derivative. Values in the domain `one` have a single row and stand for plain parameters.
"""

from __future__ import annotations

from typing import Final

DOMAINS: Final = {
    "node": "node",
    "dst": "destination node",
    "edge": "edge",
    "given": "edge, as given",
    "src_pair": "(source, relation) pair",
    "dst_pair": "(destination, relation) pair",
    "etype": "relation",
    "ntype": "node type",
    "one": "parameter",
}

# map -> (domain it reads rows of, domain it leads to)
_NAMED: Final = {
    "edge.src": ("edge", "node"),
    "edge.dst": ("edge", "dst"),
    "edge.etype": ("edge", "etype"),
    "edge.src_pair": ("edge", "src_pair"),
    "edge.dst_pair": ("edge", "dst_pair"),
    "edge.given": ("edge", "given"),
    "src_pair.src": ("src_pair", "node"),
    "src_pair.etype": ("src_pair", "etype"),
    "dst_pair.dst": ("dst_pair", "dst"),
    "dst_pair.etype": ("dst_pair", "etype"),
    "node.ntype": ("node", "ntype"),
    "dst.ntype": ("dst", "ntype"),
    # Only where all sources, and all destinations, of a relation have one type.
    "etype.src_ntype": ("etype", "ntype"),
    "etype.dst_ntype": ("etype", "ntype"),
}
_TO_ONE: Final = {f"{d}.one": (d, "one") for d in DOMAINS if d != "one"}
MAPS: Final = {**_NAMED, **_TO_ONE}

# A typed parameter stands in one of these domains; `linear` finds the row's type by itself.
TYPE_DOMAINS: Final = ("etype", "ntype", "one")


def a_value(*domains: str) -> str:
    """What a message calls a value of one of these domains."""
    names = " or ".join(DOMAINS[d].removesuffix(", as given") for d in domains)
    return f"{'an' if names[0] in 'aeiou' else 'a'} {names} value"


def map_source(name: str) -> str:
    """The domain whose rows the map starts from."""
    return MAPS[name][0]


def map_target(name: str) -> str:
    """The domain the map leads to."""
    return MAPS[name][1]


def path(source: str, target: str) -> str | None:
    """The one map from `source` to the type domain (or pair domain) `target`, if there is one."""
    name = f"{source}.{target}"
    return name if name in MAPS else None


def factor(name: str, via: str) -> str | None:
    """The map m that, after (edge -> via), makes `name`.

    `factor("edge.src", "src_pair")` is `"src_pair.src"`.
    """
    source, _, role = name.partition(".")
    if path(source, via) is None:
        return None
    if role == "one":
        return f"{via}.one"
    rest = f"{via}.{role}"
    return rest if rest in MAPS else None
