"""Checks of device code without a GPU: tensors of the meta device, and counted operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
_FACTORIES = ("empty", "zeros", "ones", "arange", "full", "scalar_tensor", "lift_fresh")


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that run on the device.

    Views cost nothing on the device and are not counted. A tensor of another device than `device`
    among the arguments raises AssertionError (a CPU scalar is an argument of a kernel, not a
    tensor of it), as does an operation that reads a value back to the host.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), f"{func} reads from the device"
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        if name not in ("_to_copy", "copy_"):  # these may copy from the host
            strays = [t for t in tensors if t.device.type != self.device.type and t.ndim]
            assert not strays, f"{func} mixes devices: {[t.device for t in tensors]}"
        else:
            target = (kwargs or {}).get("device") or tensors[0].device
            assert torch.device(target).type == self.device.type, f"{func} copies to {target}"
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not name.startswith(_FACTORIES) and name != "_unsafe_view":
            self.counts[name] += 1
        return result
