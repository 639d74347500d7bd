"""`python -m dataeff`: the same as the `dataeff` command."""

from dataeff.cli import main

if __name__ == "__main__":
    main()
