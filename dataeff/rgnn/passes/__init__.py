"""Passes over the inter-operator IR: one file, one function from program to program."""
