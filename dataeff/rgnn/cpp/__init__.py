"""The CPU backend: programs as generated C++, compiled by the system compiler."""
