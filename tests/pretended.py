"""An accelerator that is not there, for tests of what happens on one: shapes without data (fake tensors).

    with Pretended() as there:
        model = there.take(model)

Tensors on the CPU are real as ever. What mixes devices fails as it would on a machine with one, and so does an operation
whose result's shape depends on data. Where the host reads data of the device it is given `told`s, and `reads` counts it;
`copies` counts those to the device that the host waits for. Nothing is computed. The device is called "lazy", the only one
but the CPU that PyTorch without drivers differentiates on.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Pretended"]

DEVICE = torch.device("lazy", 0)
NUMBERS: dict[Any, Any] = {Tensor.item: float, Tensor.__bool__: bool, Tensor.__int__: int, Tensor.__float__: float}


def on_device(x: Any) -> bool:
    return isinstance(x, FakeTensor) and x.device == DEVICE


class Pretended(TorchFunctionMode):
    device = DEVICE

    def __init__(self, told: int = 1) -> None:
        super().__init__()
        self.told = told
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.reads = self.copies = 0

    def take(self, module: nn.Module) -> Any:
        """Move a module as `Module.to` does, and begin to count anew."""
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            return module.to(DEVICE)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
            self.reads = self.copies = 0

    def __enter__(self) -> "Pretended":
        self.tolist, FakeTensor.tolist = FakeTensor.tolist, lambda x: self.__torch_function__(Tensor.tolist, (), (x,))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        FakeTensor.tolist = self.tolist
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        if function is Tensor.pin_memory:
            return args[0]
        if args and on_device(args[0]):
            read = self.read(function, args, kwargs)
            if read is not None:
                self.reads += 1
                return read
        if function is Tensor.copy_ and not isinstance(args[0], FakeTensor) and on_device(args[1]):
            self.reads += 1
            return args[0].fill_(self.told)
        goes = [x for x in given if isinstance(x, torch.device | str) and str(x).startswith("lazy")]
        if not goes and not any(isinstance(x, FakeTensor) for x in given):
            return function(*args, **kwargs)
        if (goes or function is Tensor.new_tensor) and self.waits_for(function, args, kwargs):
            self.copies += 1
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self.without_data, (args, kwargs))
            return function(*args, **kwargs)

    def waits_for(self, function: Any, args: Any, kwargs: Any) -> bool:
        """Say whether the host waits for a copy to the device."""
        if function in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return True
        return bool(args) and isinstance(args[0], Tensor) and not on_device(args[0]) and not kwargs.get("non_blocking")

    def without_data(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def read(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Return what the host is told of a tensor of the device, or None if it does not ask."""
        x = args[0]
        if function in NUMBERS:
            return NUMBERS[function](self.told)
        if function is Tensor.tolist:
            return torch.full(x.shape, self.told, dtype=x.dtype).tolist()
        asked = [y for y in (*args[1:], kwargs.get("device")) if isinstance(y, torch.device | str)]
        if function is Tensor.cpu or (function is Tensor.to and any(str(y) == "cpu" for y in asked)):
            return torch.full(x.shape, self.told, dtype=x.dtype)
        return None
