"""The main job on real input: a relational GNN and a language model, each against its baseline."""

from dataeff.demo.lm import SpillError
from dataeff.demo.run import run_demo

__all__ = ["SpillError", "run_demo"]
