"""The command, with FSDP on CPUs too: accelerate passes over `accelerate launch --use_fsdp` there.

To be launched as a file, like `cropi` by `-m cropi`.
"""

import runpy
import sys
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

_as_it_is = AcceleratorState.__init__


def _with_fsdp(self: Any, *args: Any, **options: Any) -> None:
    _as_it_is(self, *args, **options)
    plugin = options.get("fsdp_plugin") or self.__dict__.get("fsdp_plugin")
    if plugin is None:
        return
    self.distributed_type = DistributedType.FSDP
    if "fsdp_plugin" not in self.__dict__ and self._mixed_precision != "no":
        plugin.set_mixed_precision(self._mixed_precision)
    self.fsdp_plugin = plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = _with_fsdp  # type: ignore[method-assign]
    sys.argv[0] = "cropi"
    runpy.run_module("cropi", run_name="__main__")
