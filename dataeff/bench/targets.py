"""What dataeff means to reach, beside its peers and the limits of the machine."""

from __future__ import annotations

from dataclasses import replace

from dataeff.bench.target import GPU, Cases, Target, figure, share, speedup

ROWS = Cases("gather", "random rows of 64 to 4096 bytes")
INTO_A_BUFFER = replace(ROWS, ours="dataeff into a buffer")
COLD = Cases("gather", "rows on disk, cold", ours="dataeff (threads|io_uring)")
HOT = Cases("gather", "rows asked for by a power law", ours="dataeff 10 % hot")

GATHER = (
    Target(
        INTO_A_BUFFER,
        "random rows of 64 to 4096 bytes into a buffer",
        "`torch.index_select`",
        speedup("index_select into a buffer$"),
        mean=1.5,
        each=1.0,
    ),
    Target(
        replace(INTO_A_BUFFER, sizes="dim=(512|1024) "),
        "random rows of 2 KiB and more into a buffer",
        "copying as many bytes",
        figure("share_of_memcpy"),
        each=0.6,
        percent=True,
    ),
    Target(
        COLD,
        "4096 random rows of a file, cold",
        "`numpy.memmap`",
        speedup("numpy.memmap"),
        each=8.0,
    ),
    Target(
        COLD,
        "4096 random rows of a file, cold",
        "fio, reads a second",
        figure("share_of_fio"),
        each=0.8,
        percent=True,
    ),
    Target(
        replace(ROWS, sizes="dim=(64|128|256|512|1024) "),
        "random rows of 256 bytes and more",
        "copying as many pinned bytes",
        figure("share_of_host_to_device"),
        each=0.95,
        percent=True,
        kind=GPU,
    ),
    Target(
        ROWS,
        "random rows of 64 to 4096 bytes",
        "the best of CPU gather and copy, mapped memory, WholeGraph",
        speedup("(?!dataeff)"),
        each=1.0,
        kind=GPU,
    ),
    Target(
        HOT,
        "a tenth of the rows hot, asked for by a power law",
        "no row hot",
        speedup("dataeff f32"),
        each=2.0,
        kind=GPU,
    ),
)

SAMPLE = (
    Target(
        Cases("sample", "neighbour sampling", "edges=10000000 "),
        "sampling of 10^7 edges, fan-outs 15-10-5",
        "DGL 2.1",
        speedup("DGL"),
        each=1.5,
    ),
    Target(
        Cases("sample", "GraphSAGE epoch, trained"),
        "an epoch of GraphSAGE",
        "PyG's loader, prefetching",
        speedup("PyG"),
        each=1.5,
        kind=GPU,
    ),
)

LAYERS = "(RGCN|RGAT|HGT)Conv"
DATASETS = "^(?!.* (growth|block) )"  # graphs that stand for real ones
LARGE = rf"{DATASETS}.*edges=([5-9]\d{{5}}|\d{{7,}}) "  # fb15k-237 and larger
TRAINING = Cases("rgnn", f"{LAYERS} training")
TRAINING_ON_DATASETS = replace(TRAINING, sizes=DATASETS)
IN_A_LIBRARY = speedup("PyG|DGL")

RGNN = (
    Target(
        TRAINING_ON_DATASETS,
        "training step of a relational layer",
        "the best layer of PyG and DGL",
        IN_A_LIBRARY,
        mean=15.0,
        each=3.0,
    ),
    Target(
        TRAINING,
        "training step of a relational layer",
        "the same by hand: sorted, compacted, `mm` per relation",
        speedup("hand-written ATen"),
        mean=1.3,
    ),
    Target(
        Cases("rgnn", f"{LAYERS} inference", DATASETS),
        "inference of a relational layer",
        "the best layer of PyG and DGL",
        IN_A_LIBRARY,
        mean=15.0,
    ),
    Target(
        replace(TRAINING, sizes=LARGE),
        "training step of a relational layer, fb15k-237 and larger",
        "the roofline",
        figure("share_of_roofline"),
        each=0.4,
        percent=True,
    ),
    Target(
        TRAINING,
        "peak memory of a training step",
        "inputs, outputs, parameters and their gradients",
        figure("peak_over_tensors"),
        each=3.0,
        upper=True,
    ),
    Target(
        TRAINING,
        "compaction and reordering, where they are chosen",
        "both off",
        speedup("dataeff, passes off"),
        each=0.97,
    ),
    Target(
        Cases("rgnn", f"{LAYERS} inference", " block "),
        "indices of a sampled block of 10^5 edges",
        "one forward",
        share("index_build_s", "dataeff", "time_s"),
        each=1.0,
        upper=True,
    ),
    Target(
        TRAINING_ON_DATASETS,
        "training step of a relational layer",
        "the best layer of PyG",
        IN_A_LIBRARY,
        mean=5.0,
        kind=GPU,
    ),
    Target(
        replace(TRAINING, sizes=" (am|mag|wikikg2|biokg) "),
        "training step of a relational layer: am, mag, wikikg2, biokg",
        "the roofline",
        figure("share_of_roofline"),
        each=0.7,
        percent=True,
        kind=GPU,
    ),
)

TIME = figure("time_ratio")  # over the first provider's, which keeps all
HELD = share("peak_saved_bytes", "keep")
GPT = Cases("offload", "GPT of 12 layers, 768 wide", ours="dataeff disk")
IDLE = Cases("offload", "a small GPT", ours="dataeff with nothing to offload")
PLANNED = Cases("offload", "planned for a share|recompute, offload, keep", ours="dataeff auto .*")
SSDTRAIN = Cases("offload", r"SSDTrain's \w+$", ours="dataeff host")
SSDTRAIN_PLANNED = replace(SSDTRAIN, ours="dataeff auto 53%")  # of what keeping holds

OFFLOAD = (
    Target(
        GPT,
        "step of a GPT of 12 layers, 768 wide, its activations on disk",
        "keeping them",
        TIME,
        each=1.05,
        upper=True,
    ),
    Target(GPT, "bytes it holds for backward", "keeping them", HELD, each=0.2, upper=True),
    Target(IDLE, "step with nothing to offload", "no offload", TIME, each=1.01, upper=True),
    Target(
        PLANNED,
        "error of a plan's step time",
        "measured",
        figure("step_error"),
        each=0.1,
        upper=True,
        percent=True,
    ),
    Target(
        PLANNED,
        "error of a plan's peak",
        "measured",
        figure("peak_error"),
        each=0.1,
        upper=True,
        percent=True,
    ),
    Target(
        SSDTRAIN_PLANNED,
        "step of SSDTrain's cases, planned, host memory",
        "keeping the activations",
        TIME,
        each=1.01,
        upper=True,
        kind=GPU,
    ),
    Target(
        SSDTRAIN_PLANNED,
        "bytes they hold for backward",
        "keeping the activations",
        HELD,
        each=0.53,
        upper=True,
        kind=GPU,
    ),
    Target(
        SSDTRAIN,
        "step of SSDTrain's cases, host memory",
        "the best of torch's, torchtune's and TRL's offloaders, recompute",
        speedup("torch|trl"),
        each=1.0,
        kind=GPU,
    ),
)

STORAGE = (
    Target(
        Cases("storage", "(write|read) past the page cache", ours="dataeff threads"),
        "blocks of 1 MiB and more past the page cache, by threads, the default engine",
        "fio, bytes a second",
        figure("share_of_fio"),
        each=0.95,
        percent=True,
    ),
)

TARGETS = (*GATHER, *SAMPLE, *RGNN, *OFFLOAD, *STORAGE)
