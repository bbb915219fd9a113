"""Faults with exit codes, under the name the engine's modules import."""

from __future__ import annotations

from vtp_plugins.errors import (
    DataFault as DataFault,
)
from vtp_plugins.errors import (
    Fault as Fault,
)
from vtp_plugins.errors import (
    MemoryFault as MemoryFault,
)
from vtp_plugins.errors import (
    NonFinite as NonFinite,
)
from vtp_plugins.errors import (
    PluginFault as PluginFault,
)
from vtp_plugins.errors import (
    StackFault as StackFault,
)
from vtp_plugins.errors import (
    StorageFault as StorageFault,
)
from vtp_plugins.errors import (
    suggestion as suggestion,
)
