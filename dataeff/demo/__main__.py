"""`python -m dataeff.demo`: the demo with its default sizes."""

import sys

from dataeff.demo import SpillError, run_demo

if __name__ == "__main__":
    try:
        run_demo(tiny="--tiny" in sys.argv[1:])
    except SpillError as error:
        sys.exit(f"dataeff demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
