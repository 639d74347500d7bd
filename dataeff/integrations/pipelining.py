"""Activation offloading under the schedules of `torch.distributed.pipelining`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from dataeff.offload import ActivationOffload

_FORWARD = "forward_one_chunk"
_BACKWARD = ("backward_one_chunk", "backward_weight_one_chunk")


class Action(NamedTuple):
    """One thing that a schedule has a stage do with a microbatch."""

    method: str
    microbatch: int


class PipelineOffload:
    """Runs the steps of a pipeline schedule under an offload, each microbatch with its own order.

    ```python
    offload = dataeff.ActivationOffload(stage.submod, spill=["/nvme{local_rank}"])
    pipeline = PipelineOffload(offload, [stage])
    for x in batches:
        with pipeline:
            schedule.step(x)
    ```
    What the forward of a microbatch on a stage saves is kept apart from all others'. From the
    second step on the schedule's actions are known: when the next one is a backward, its first
    tensors are fetched while the action before it waits for its neighbours.

    Args:
        offload: of the modules of this rank's stages (several: a `torch.nn.ModuleList` of them).
        stages: the `PipelineStage` objects that the schedule of this rank drives.
    """

    def __init__(self, offload: ActivationOffload, stages: Sequence[Any]) -> None:
        self.offload, self._stages = offload, list(stages)
        self._actions: list[Action] = []
        self._expected: list[Action] = []

    def __enter__(self) -> PipelineOffload:
        self.offload.__enter__()
        self._actions = []
        for position, stage in enumerate(self._stages):
            for method in (_FORWARD, *_BACKWARD):
                setattr(stage, method, self._told(getattr(stage, method), method, position))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for stage in self._stages:
            for method in (_FORWARD, *_BACKWARD):
                delattr(stage, method)  # the class's own method is there again
        self._expected = self._actions if error is None else []
        self.offload.__exit__(kind, error, traceback)

    def _told(self, call: Callable[..., Any], method: str, position: int) -> Callable[..., Any]:
        def run(chunk: int, *args: Any, **kwargs: Any) -> Any:
            microbatch = chunk * len(self._stages) + position
            self._actions.append(Action(method, microbatch))
            with self.offload.microbatch(microbatch):
                result = call(chunk, *args, **kwargs)
            self._hint()
            return result

        return run

    def _hint(self) -> None:
        num_done = len(self._actions)
        if num_done >= len(self._expected) or self._expected[num_done - 1] != self._actions[-1]:
            return
        following = self._expected[num_done]
        if following.method in _BACKWARD:
            self.offload.expect_backward(following.microbatch)
