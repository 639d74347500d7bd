"""What another process does with a table that it was sent."""

import torch


def read_some_rows(table, device, answers):
    """Puts rows 3, 0 and the last, gathered on `device`, into a queue."""
    answers.put(table[torch.tensor([3, 0, -1], device=device)].tolist())
