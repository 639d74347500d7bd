"""Real data that every machine has: the installed Python as a graph, and as bytes."""

from dataeff.data.byte_corpus import ByteCorpus
from dataeff.data.code_graph import NODE_TYPES, RELATIONS, CodeGraph, build_code_graph

__all__ = ["NODE_TYPES", "RELATIONS", "ByteCorpus", "CodeGraph", "build_code_graph"]
