"""What the choice of settings has to know about a GPU: how many multiprocessors it has, and how fast its memory is."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings


@dataclasses.dataclass(frozen=True)
class DeviceTraits:
    """Figures of a GPU's data sheet.

    Attributes:
        multiprocessors: That are enabled.
        bandwidth: Bytes a second between memory and chip.
    """

    multiprocessors: int
    bandwidth: float


_KNOWN = (  # what the kind of a device, as JAX names it, contains; of two that match the first counts
    (r"\bGH200\b", DeviceTraits(132, 4.0e12)),
    (r"\bH200\b", DeviceTraits(132, 4.8e12)),
    (r"\bH800\b", DeviceTraits(132, 3.35e12)),
    (r"\bH100 PCIe\b", DeviceTraits(114, 2.0e12)),
    (r"\bH100 NVL\b", DeviceTraits(132, 3.9e12)),
    (r"\bH100\b", DeviceTraits(132, 3.35e12)),
    (r"\bA100\b.*80GB", DeviceTraits(108, 2.0e12)),
    (r"\bA100\b", DeviceTraits(108, 1.555e12)),
    (r"\bL40S?\b", DeviceTraits(142, 0.864e12)),
    (r"\bL4\b", DeviceTraits(58, 0.3e12)),
    (r"\bA10\b", DeviceTraits(72, 0.6e12)),
    (r"RTX 4090\b", DeviceTraits(128, 1.008e12)),
    (r"RTX 3090\b", DeviceTraits(82, 0.936e12)),
)

UNKNOWN = DeviceTraits(132, 3.35e12)
"""Taken for a device that is not in the list: those of an H100, on which the rules were found."""


@functools.cache
def traits_of(device_kind: str) -> DeviceTraits:
    """The traits of a device; for one that is not known `UNKNOWN`, with a warning, once.

    Args:
        device_kind: As JAX names it, such as `NVIDIA H100 80GB HBM3`.
    """
    for pattern, traits in _KNOWN:
        if re.search(pattern, device_kind):
            return traits
    warnings.warn(
        f"{device_kind!r} is no GPU that pallas_kernels.device_traits knows: settings are carried over from tuned "
        "shapes to others as on an H100, which costs speed at most",
        stacklevel=2,
    )
    return UNKNOWN
