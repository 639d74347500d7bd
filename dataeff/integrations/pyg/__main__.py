"""`python -m dataeff.integrations.pyg data.pt folder`: see `dataeff.integrations.pyg.dataset`."""

import sys

from dataeff.integrations.pyg.dataset import main

main(sys.argv[1:])
