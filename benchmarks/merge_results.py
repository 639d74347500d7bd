"""Joins records of one run into benchmarks/results/<device>-<date>.json and prints that path.

python benchmarks/merge_results.py gather.json rgnn.json ...
"""

import re
import sys
from pathlib import Path

from dataeff.bench import read, write

RESULTS = Path(__file__).resolve().parent / "results"


def result_name(device: str, time: str) -> str:
    """`cuda: NVIDIA H100 80GB HBM3` of 2026-01-02 is `nvidia-h100-80gb-hbm3-2026-01-02.json`."""
    name = device.partition(": ")[2] if device.startswith("cuda") else device
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{slug}-{time[:10]}.json"


def merge(paths: list[Path], results: Path = RESULTS) -> Path:
    """Writes the joined records; raises ValueError when they are of several devices."""
    records = [record for path in paths for record in read(path)]
    devices = {record.device for record in records}
    if len(devices) != 1:
        raise ValueError(f"records of one device are wanted, these are of {sorted(devices)}")
    results.mkdir(exist_ok=True)
    target = results / result_name(devices.pop(), records[0].time)
    write(records, target)
    return target


if __name__ == "__main__":
    print(merge([Path(argument) for argument in sys.argv[1:]]))
