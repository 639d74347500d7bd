"""What `policy="auto"` has to tell its user, beside the plan: one text for each."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dataeff.offload.recompute import TRANSFORM


def of_blindness(blocks: Collection[str]) -> str:
    """Nothing was saved by the blocks that are to be planned for."""
    return (
        f"none of what the model saved was saved by its {len(blocks)}"
        f" blocks, {next(iter(blocks))} for one, so policy='auto' has nothing to plan "
        "with and moves everything. If the model is compiled as a whole, compile its blocks "
        "one by one instead; if it checkpoints functions that call them, hand the blocks "
        "themselves to checkpoint(block, x)."
    )


def of_changes(changed: Mapping[str, str], num_blocks: int) -> str:
    """Blocks cannot be run again; `changed` are their names, and the kind of what changes."""
    name, kind = next(iter(changed.items()))
    why = (
        "it runs inside a transform of torch.func, such as vmap, which backward is outside of."
        if kind == TRANSFORM
        else f"a {kind} that it is called with, or a buffer of it, changes during the step, and "
        "running the block again would see, or make, another change. A model that caches keys and "
        "values does not with use_cache=False."
    )
    return f"{len(changed)} of {num_blocks} blocks are not recomputed, {name} for one: {why}"


def of_no_backward() -> str:
    """The backward of no block was seen."""
    return (
        "no backward was measured, so that policy='auto' takes it for free: it belongs in "
        "the same `with` block as the forward."
    )


def of_no_plan(budget: float, expected_nbytes: float) -> str:
    """No plan keeps within the budget."""
    return (
        f"no plan keeps within memory_budget={budget:.0f} what is held for backward: "
        f"{expected_nbytes:.0f} bytes are expected. explain() tells more; a "
        "smaller batch holds less."
    )


def of_size(budget: float, share: float, peak_nbytes: int) -> str:
    """A step had inputs `share` times as large as the plan's, and held `peak_nbytes`."""
    return (
        f"a step has inputs {share:.2g} times as large as those that the plan was made for, "
        f"which would not keep within memory_budget={budget:.0f}. All that can be moved "
        f"is moved in such steps; {peak_nbytes} bytes were held in this one. This is said once."
    )


def of_excess(budget: float, peak_nbytes: int) -> str:
    """A step held more than the plan was to keep within."""
    return (
        f"a step held {peak_nbytes} bytes for backward, more than memory_budget="
        f"{budget:.0f}, with inputs no larger than those that the plan was made for: it "
        "is measured and planned anew. More of the model may be trained than before."
    )
