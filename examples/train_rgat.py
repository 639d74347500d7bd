"""Train a relational graph attention network in mini-batches, its features in host memory.

    python examples/train_rgat.py

The graph is the code of the installed Python; the task: to which package does a function belong?
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import dataeff
from dataeff import rgnn
from dataeff.data import RELATIONS, build_code_graph
from dataeff.sampling import CSCGraph, NeighborSampler


@rgnn.layer
def rgat(g, x, W, a_src, a_dst):
    z_src, z_dst = rgnn.linear(g.src(x), W[g.etype]), rgnn.linear(g.dst(x), W[g.etype])
    score = rgnn.dot(z_src, a_src[g.etype]) + rgnn.dot(z_dst, a_dst[g.etype])
    return g.sum(rgnn.edge_softmax(rgnn.leaky_relu(score, 0.2)) * z_src)


class RGAT(nn.Module):
    def __init__(self, inputs: int, width: int, classes: int, layers: int = 2):
        super().__init__()
        self.encode, self.classify = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.W = nn.Parameter(torch.randn(layers, len(RELATIONS), width, width) * width**-0.5)
        self.a = nn.Parameter(torch.randn(layers, 2, len(RELATIONS), width) * width**-0.5)

    def forward(self, x, graph, num_seeds: int):
        x = F.relu(self.encode(x))
        for own, W, a in zip(self.own, self.W, self.a, strict=True):
            x = x + F.relu(own(x) + rgat(graph, x, W, a[0], a[1]))
        return self.classify(x[:num_seeds])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    data = build_code_graph(scale=0.04, min_files=4) if args.tiny else build_code_graph()
    graph = CSCGraph(data.edge_index, data.edge_type, num_nodes=data.num_nodes)
    sampler = NeighborSampler(graph, [10, 5])
    table = dataeff.FeatureTable(data.x)  # stays in host memory: a GPU reads the rows in place
    model = RGAT(data.x.shape[1], 64, len(data.class_names)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def run(seeds, seed: int):
        block = sampler.sample(seeds, seed=seed)
        x = table[block.n_id.to(device)]
        local = rgnn.Graph.from_block(block, num_relations=len(RELATIONS), device=device)
        return model(x, local, len(seeds)), data.y[seeds].to(device)

    train, test = data.nodes_of("train"), data.nodes_of("test")
    for epoch in range(args.epochs):
        for seeds in train[torch.randperm(len(train))].split(512):
            loss = F.cross_entropy(*run(seeds, seed=int(torch.randint(2**31, ()))))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            pairs = [run(seeds, seed=0) for seeds in test.split(512)]
        accuracy = torch.cat([scores.argmax(1) == y for scores, y in pairs]).float().mean()
        print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")
    print(table.stats())


if __name__ == "__main__":
    main()
