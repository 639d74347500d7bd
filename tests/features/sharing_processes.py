"""What the processes of the sharing tests run: importable, so that spawned ones find it."""

import torch


class Rows(torch.utils.data.Dataset):
    """A dataset over a table or a unified tensor, which says where its memory is."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 12

    def __getitem__(self, i):
        row = self.source[torch.tensor([i])]
        self.source_rows()[i, 1] = 100 + i  # the parent sees it when the memory is one
        return row.squeeze(0)

    def source_rows(self):
        return getattr(self.source, "x", self.source)


def prefetch_in_child(table, answers):
    answers.put(table.prefetch(torch.tensor([1])).wait().tolist())
