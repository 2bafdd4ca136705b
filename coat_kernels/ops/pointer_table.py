"""The table of addresses that a fused step walks: host algebra of one bucket of tensors, no kernels and no arithmetic.

A bucket is all tensors that one launch updates. The CPU kernel reads the table in host memory; for a GPU it is copied
to the device, and only when an address has changed: a step whose gradients stayed where they were uploads nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

_data_ptr = Tensor.data_ptr


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(_data_ptr, tensors))


class PointerTable:
    """int64 [n_tensors, n_columns] of addresses and sizes, one row a tensor.

    Args:
        columns: name -> list of length n_tensors, `param` and `grad` among them. Their order is a contract with the kernels that
            read the table. It keeps no tensor alive.
        device: where the kernels run.
    """

    def __init__(self, columns: dict[str, list[int]], device: torch.device) -> None:
        self.device = device
        self._addresses = {name: columns[name] for name in ("param", "grad")}
        self.rows = len(columns["param"])
        # `torch.tensor` of a list of 1,000 rows costs 1 to 2 ms; filling numpy columns costs 13 us each.
        self.host = torch.empty(self.rows, len(columns), dtype=torch.int64)
        self._numpy = self.host.numpy()
        self._positions = {name: position for position, name in enumerate(columns)}
        for name, position in self._positions.items():
            self._numpy[:, position] = columns[name]
        self._uploaded: Tensor | None = None
        self._in_flight: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._captured: list[Tensor] = []

    def set_params(self, params: Sequence[Tensor]) -> bool:
        """Point the table at these parameters; whether any address is new."""
        return self._set("param", params)

    def set_grads(self, grads: Sequence[Tensor]) -> bool:
        """Point the table at these gradients; whether any address is new."""
        return self._set("grad", grads)

    def _set(self, name: str, tensors: Sequence[Tensor]) -> bool:
        new = addresses(tensors)
        if new == self._addresses[name]:
            return False
        self._addresses[name] = new
        self._numpy[:, self._positions[name]] = new
        self._uploaded = None
        return True

    def on_device(self) -> Tensor:
        """The table on its device, uploaded on the current stream if anything changed.

        Under CUDA graph capture the upload becomes part of the graph: its pinned source is then kept as it is, and the
        copy is not trusted outside the graph, which may never be replayed.
        """
        # the table's device, not the current one: its stream is the one that copies, and that the event must follow
        with torch.cuda.device(self.device):
            capturing = torch.cuda.is_current_stream_capturing()
            if self._uploaded is not None:
                if capturing:
                    self._captured.append(self._uploaded)  # the graph reads this copy at every replay
                return self._uploaded
            if capturing:
                self._captured.append(self.host.clone().pin_memory())
                return self._captured[-1].to(self.device, non_blocking=True)
            staged = self._staging().copy_(self.host)
            self._uploaded = staged.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._in_flight.append((event, staged))
            return self._uploaded

    def _staging(self) -> Tensor:
        """A pinned copy that no upload still reads: the oldest of the ring if its upload is done, else a new one."""
        if self._in_flight and self._in_flight[0][0].query():
            return self._in_flight.popleft()[1]
        return torch.empty_like(self.host, pin_memory=True)
