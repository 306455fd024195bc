"""What to quantise to, and how: the frozen settings of one quantisation."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from mixllm_jax.errors import OptionError
from mixllm_jax.models.config import LINEAR_NAMES, ModelConfig
from mixllm_jax.quantization.allocation import ALLOCATIONS
from pallas_kernels.packing import GROUP_SIZES

METHODS = ("gptq", "rtn")


@dataclasses.dataclass(frozen=True)
class QuantizationScheme:
    """Settings of a quantisation.

    Attributes:
        eight_bit_share: share of *all output channels* of the quantised linears that get 8 bits; the others get 4.
        group_size: consecutive input channels that share a scale, of weights and of activations.
        activation_bits: 8, or 16 for float activations (for comparison).
        method: ``gptq`` or ``rtn`` (rounding to nearest).
        allocation: how 8-bit channels are chosen: ``global``, ``per-layer`` or ``random`` (the last two to compare).
        samples: calibration sequences.
        sequence_length: tokens of each.
        seed: of the choice of calibration sequences, and of a random allocation; 0 to 2**32 - 1.

    Raises:
        OptionError: a value that cannot work; the message names the value and what would.
    """

    eight_bit_share: float = 0.1
    group_size: int = 128
    activation_bits: int = 8
    method: str = "gptq"
    allocation: str = "global"
    samples: int = 16
    sequence_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.eight_bit_share <= 1:
            raise OptionError(f"the share of 8-bit channels must be between 0 and 1, found {self.eight_bit_share}")
        for name, options in (
            ("group_size", GROUP_SIZES),
            ("activation_bits", (8, 16)),
            ("method", METHODS),
            ("allocation", ALLOCATIONS),
        ):
            if (value := getattr(self, name)) not in options:
                option = name.replace("_", "-")
                raise OptionError(f"--{option} must be one of {', '.join(map(str, options))}, found {value}")
        if self.samples < 1:
            raise OptionError(f"--samples must be at least 1, found {self.samples}")
        if self.sequence_length < 2:
            raise OptionError(f"--sequence-length must be at least 2, found {self.sequence_length}")
        if not 0 <= self.seed < 1 << 32:
            raise OptionError(f"--seed must be between 0 and 2**32 - 1, found {self.seed}")

    @property
    def weight_bits(self) -> float:
        """Average bits per output channel, without scales: 4.4 at a share of 0.1."""
        return 4 + 4 * self.eight_bit_share

    @property
    def name(self) -> str:
        """The paper's way to write it, such as ``W4.4A8``."""
        return f"W{self.weight_bits:g}A{self.activation_bits}"

    @property
    def needs_salience(self) -> bool:
        """Whether the scores decide anything: not if all channels get the same width, or chance decides."""
        return 0 < self.eight_bit_share < 1 and self.allocation != "random"

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is read at all."""
        return self.method == "gptq" or self.needs_salience

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`."""
        return cls(**values)


def share_of_bits(bits: float) -> float:
    """The 8-bit share that gives an average of ``bits`` per output channel: 0.1 for 4.4.

    Raises:
        OptionError: bits outside 4 to 8.
    """
    if not 4 <= bits <= 8:
        raise OptionError(f"--bits is the average bits per output channel and must be between 4 and 8, found {bits}")
    return round((bits - 4) / 4, 9)  # 4.4 - 4 is 0.40000000000000036


def choose_group_size(config: ModelConfig, group_size: int | None) -> int:
    """The group size to use: the largest that divides all layers, or the given one if it does.

    Raises:
        OptionError: the given size is not one of the format's or does not divide, or none divides.
    """
    inputs = {name: config.linear_shape(name)[1] for name in LINEAR_NAMES}
    fitting = [size for size in sorted(GROUP_SIZES, reverse=True) if not any(n % size for n in inputs.values())]
    widths = ", ".join(f"{name} {width}" for name, width in inputs.items())
    if not fitting:
        raise OptionError(
            f"no group size of {', '.join(map(str, GROUP_SIZES))} divides the input features of all layers ({widths}): "
            "this model cannot be quantized in this format"
        )
    if group_size is None:
        return fitting[0]
    if group_size not in GROUP_SIZES:
        raise OptionError(f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}, found {group_size}")
    if group_size not in fitting:
        raise OptionError(
            f"--group-size {group_size} does not divide the input features of all layers ({widths}): "
            f"use {' or '.join(map(str, fitting))}"
        )
    return group_size
