"""Train GraphSAGE of PyTorch Geometric with features that a GPU fetches itself: two changed lines.

    python examples/train_sage_unified.py

The graph is the code of the installed Python; the task: to which package does a function belong?
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv

import dataeff
from dataeff.data import build_code_graph
from dataeff.integrations.pyg import NeighborLoader


class SAGE(nn.Module):
    def __init__(self, inputs: int, width: int, classes: int):
        super().__init__()
        self.first, self.second = SAGEConv(inputs, width), SAGEConv(width, width)
        self.classify = nn.Linear(width, classes)

    def forward(self, x, edge_index):
        x = F.relu(self.first(x, edge_index))
        return self.classify(F.relu(self.second(x, edge_index)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    code = build_code_graph(scale=0.04, min_files=4) if args.tiny else build_code_graph()
    data = Data(edge_index=code.edge_index, y=code.y, num_nodes=code.num_nodes)

    def loader(split: str) -> NeighborLoader:
        seeds = code.nodes_of(split)
        return NeighborLoader(data, [10, 5], seeds, batch_size=512, shuffle=split == "train")

    x = dataeff.unified(code.x)  # 1. was: code.x; the rows stay in host memory
    model = SAGE(x.shape[1], 64, len(code.class_names)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def run(batch):
        rows = x[batch.n_id.to(device)]  # 2. was: x[batch.n_id].to(device)
        scores = model(rows, batch.edge_index.to(device))
        return scores[: batch.batch_size], batch.y[: batch.batch_size].to(device)

    for epoch in range(args.epochs):
        for batch in loader("train"):
            loss = F.cross_entropy(*run(batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            pairs = [run(batch) for batch in loader("test")]
        accuracy = torch.cat([scores.argmax(1) == y for scores, y in pairs]).float().mean()
        print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
