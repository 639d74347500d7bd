"""Train PyG's GraphSAGE with features as they are, in 8 bits, or on disk.

    python examples/train_graphsage.py --table disk

The graph is the code of the installed Python; the task: to which package does a function belong?
Two lines differ from PyG's own loop: the loader's import, and what `data.x` is.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.nn import GraphSAGE

import dataeff
from dataeff.data import build_code_graph
from dataeff.integrations.pyg import NeighborLoader


def make_table(x: torch.Tensor, kind: str, folder: Path) -> dataeff.FeatureTable:
    if kind == "disk":
        path = dataeff.convert(x, folder / "x.npy")
        return dataeff.FeatureTable.open(path, cache_bytes=x.nbytes // 10)
    return dataeff.FeatureTable(x, store=None if kind == "plain" else kind)


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: NeighborLoader) -> float:
    model.eval()
    hits = [
        model(batch.x, batch.edge_index)[: batch.batch_size].argmax(1)
        == batch.y[: batch.batch_size]
        for batch in loader
    ]
    return torch.cat(hits).float().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", choices=["plain", "fp16", "int8", "disk"], default="plain")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    graph = build_code_graph(scale=0.04, min_files=4) if args.tiny else build_code_graph()
    model = GraphSAGE(graph.x.shape[1], 64, 2, len(graph.class_names)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with tempfile.TemporaryDirectory() as folder:
        table = make_table(graph.x, args.table, Path(folder))
        data = Data(x=table, edge_index=graph.edge_index, y=graph.y, num_nodes=graph.num_nodes)
        options = {"num_neighbors": [10, 5], "batch_size": 512, "device": device}
        train = NeighborLoader(
            data, input_nodes=graph.nodes_of("train"), shuffle=True, num_workers=1, **options
        )
        test = NeighborLoader(data, input_nodes=graph.nodes_of("test"), **options)
        for epoch in range(args.epochs):
            model.train()
            for batch in train:
                scores = model(batch.x, batch.edge_index)[: batch.batch_size]
                loss = F.cross_entropy(scores, batch.y[: batch.batch_size])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            print(
                f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy(model, test):.1%}"
            )
        print(table.stats())
        table.close()


if __name__ == "__main__":
    main()
