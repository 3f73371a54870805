"""LoRA adapters as the library PEFT writes them: their settings, and which tensors they change in which way.

Here: reading and checking an adapter's folder. Not here: which model it goes on (``planning``), arithmetic
(``kernels``). To take in another kind of adapter, refuse less in ``config`` and give ``adapter`` its tensor names.
"""

from mergekit.adapters.adapter import Adapter, LowRank, Patch, open_adapter
from mergekit.adapters.config import AdapterConfig, is_four_bit_name

__all__ = ["Adapter", "AdapterConfig", "LowRank", "Patch", "is_four_bit_name", "open_adapter"]
