"""What the processes of the sharing tests run: importable, so that spawned ones find it."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dataeff


class Rows(torch.utils.data.Dataset):
    """Item i is row i of every source; taking it also writes to that row, where it can be written.

    The parent sees what is written when the memory is one.
    """

    def __init__(self, sources):
        self.sources = sources

    def __len__(self):
        return len(next(iter(self.sources.values())))

    def __getitem__(self, i):
        index = torch.tensor([i])
        with torch.no_grad():
            rows = {name: source[index].squeeze(0) for name, source in self.sources.items()}
            for name, source in self.sources.items():
                write_row(name, source, index)
        return rows


class Embedded:
    """A `HostEmbedding` as a dataset's source: rows by index."""

    def __init__(self, embedding):
        self.embedding = embedding

    def __len__(self):
        return self.embedding.num_embeddings

    def __getitem__(self, index):
        return self.embedding(index)


def write_row(name, source, index):
    value = 100.0 + index.item()
    if name == "disk":
        return
    if name == "unified":
        source[index] = value
    elif name == "embedding":
        source.embedding.weight[index] = value
    else:
        source.scatter_(index, torch.full((1, *source.shape[1:]), value))


def prefetch_in_child(table, answers):
    answers.put(table.prefetch(torch.tensor([1])).wait().tolist())


def load_in_child(table, answers):
    """Every row of a table through a `FeatureLoader`, and one written."""
    items = torch.arange(len(table)).split(3)
    answers.put([rows.tolist() for _, rows in dataeff.FeatureLoader(items, table, num_threads=2)])
    table.scatter_(torch.tensor([0]), torch.full((1, *table.shape[1:]), 96.0))


def proportional_bytes():
    """This process's share of the memory it maps: of shared buffers, and of all else.

    A page that n processes map counts 1/n.
    """
    shares, shared = {True: 0, False: 0}, False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            if line.startswith("Pss:"):
                shares[shared] += int(line.split()[1]) << 10
            elif line[0] in "0123456789abcdef":  # a mapping begins; its fields are capitalised
                shared = "/memfd:dataeff" in line
    return shares[True], shares[False]


def small_rows_of_rank(rank, store, barrier, answers, shape, kind):
    """One rank of three: the table it shares, its share of that, and what else it came to hold."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    made = []

    def make():
        made.append(rank)
        return (torch.arange(shape[0]) % 97.0).half()[:, None].expand(shape).contiguous()

    table = dataeff.FeatureTable.shared(make, store=kind)
    rows = table[torch.tensor([3, -1])][:, 0].tolist()
    barrier.wait()
    _, before = proportional_bytes()
    barrier.wait()
    for ids in torch.arange(shape[0]).split(256):  # touches every page
        table[ids]
    barrier.wait()
    shared, after = proportional_bytes()
    barrier.wait()
    if rank == 1:
        table.scatter_(torch.tensor([5]), torch.full((1, *shape[1:]), 55.0, dtype=torch.half))
    barrier.wait()
    answers.put((rank, made, table.dtype, rows, shared, after - before, table[5][0].item()))
    dist.destroy_process_group()


class Ranker(torch.nn.Module):
    """Rows and a dense layer over them."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.score = torch.nn.Linear(4, 1)

    def forward(self, index):
        return self.score(self.rows(index)).square().mean()


def ranker():
    """The same model in every process."""
    torch.manual_seed(7)
    return Ranker(dataeff.HostEmbedding(20, 4))


BATCHES = torch.tensor([[[1, 2, 2, 5], [3, 3, 9, 1]], [[0, 4, 4, 4], [4, 19, 0, 2]]])


@torch.no_grad()
def descend(model):
    """A step of SGD; making an optimizer imports torch's compiler, for seconds in every process."""
    for weight in model.parameters():
        weight.add_(weight.grad, alpha=-0.5)
        weight.grad = None


def train_rank(rank, store, answers, by_ddp, checkpoint):
    """Two steps of data-parallel training; the rows at the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    answers.put((rank, trained_rows(rank, by_ddp, checkpoint)))
    dist.barrier()
    dist.destroy_process_group()


def wrap(model, by_ddp):
    """The model under DistributedDataParallel, which does the rows' gradients too if `by_ddp`."""
    if not by_ddp:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["rows.weight"])
    return DistributedDataParallel(model)


def trained_rows(rank, by_ddp, checkpoint):
    """With a `checkpoint` each step begins with a new model that reads the last one's state.

    The wrapped model ends here: the group must not end with it.

    DistributedDataParallel holds the interpreter's lock while it frees the last reference to a
    group, which joins gloo's thread, which may wait for that lock to free a tensor.
    """
    model = ranker()
    wrapped = wrap(model, by_ddp)
    for step in range(2):
        if checkpoint and step:
            if rank == 0:
                torch.save(model.state_dict(), checkpoint)
            dist.barrier()
            model = ranker()
            model.load_state_dict(torch.load(checkpoint, weights_only=True))
            wrapped = wrap(model, by_ddp)
        wrapped(BATCHES[step, rank]).backward()
        if not by_ddp:
            model.rows.average_gradients()
        descend(model)
    return model.rows.weight.detach().tolist()
