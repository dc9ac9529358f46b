"""What this processor can do, and the dtype that follows."""

from hpckv.device.capability import Capability, choose_dtype, probe

__all__ = ["Capability", "choose_dtype", "probe"]
