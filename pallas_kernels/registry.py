"""Which implementations an operation has, which of them can run here, and which one `auto` picks."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

Reason = str
"""Why an implementation cannot run."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        run: Takes the operation's arrays and settings.
        refuses: Takes the same arguments as `run`; returns why it cannot compute them here, or None if it can.
    """

    run: Callable[..., Any]
    refuses: Callable[..., Reason | None]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation with its implementations.

    Attributes:
        name: As in error messages.
        implementations: By name. Every operation has `xla`, the reference, which refuses no device.
        prefer: Takes the arguments of `run`; returns the names to try in order, fastest first, where `auto` is asked
            for on a GPU.
    """

    name: str
    implementations: dict[str, Implementation]
    prefer: Callable[..., tuple[str, ...]]

    def choose(self, implementation: str, *args: Any, **kwargs: Any) -> str:
        """Name of the implementation that will compute these arguments.

        Where the kernel that should be fastest on a GPU cannot, `auto` takes the next one, and in the end the XLA
        reference, and warns, with the reasons.

        Raises:
            ValueError: Unknown implementation.
            NotImplementedError: The implementation asked for cannot run; says why.
        """
        if implementation == "auto":
            reasons: list[str] = []
            for name in self.prefer(*args, **kwargs) if default_platform() == "gpu" else ():
                reason = self.implementations[name].refuses(*args, **kwargs)
                if reason is None:
                    if reasons:  # Python shows the same warning once
                        warnings.warn(
                            f"{self.name}: the {name} kernel runs, since a faster one cannot ({'; '.join(reasons)})",
                            stacklevel=3,
                        )
                    return name
                reasons.append(f"{name}: {reason}")
            if reasons:
                warnings.warn(
                    f"{self.name}: no kernel can run ({'; '.join(reasons)}), so the exact but slow XLA reference does",
                    stacklevel=3,
                )
            return "xla"
        if implementation not in self.implementations:
            known = ", ".join(["auto", *self.implementations])
            raise ValueError(f"{self.name}: unknown implementation {implementation!r}; choose one of {known}")
        reason = self.implementations[implementation].refuses(*args, **kwargs)
        if reason is not None:
            raise NotImplementedError(f"{self.name}: implementation {implementation!r} cannot run: {reason}")
        return implementation

    def __call__(self, implementation: str, *args: Any, **kwargs: Any) -> Any:
        """Compute with the implementation asked for; see `choose` for the errors."""
        run = self.implementations[self.choose(implementation, *args, **kwargs)].run
        return inference_function(self.name, run, tuple(sorted(kwargs.items())))(*args)


@functools.cache
def inference_function(name: str, run: Callable[..., Any], settings: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """`run` under the settings, jitted and refusing gradients.

    A jitted function of its own, so that the layers of a model, whose shapes agree, share one trace and one lowering of
    their kernels: that is most of the time before XLA starts.

    Args:
        name: For the error and for profiles.
        run: Takes arrays (or pytrees of them) by position and the settings by name.
        settings: Names and values, hashable.

    Returns:
        A function of the arrays; it raises NotImplementedError where a gradient is asked for.
    """

    # A custom rule, since rounding would otherwise give gradients that are silently zero.
    @jax.custom_jvp
    def without_gradient(*arrays: Any) -> Any:
        return run(*arrays, **dict(settings))

    @without_gradient.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no gradient: the operations on quantised values are for inference; "
            "differentiate the float model instead"
        )

    without_gradient.__name__ = name  # type: ignore[attr-defined]
    return jax.jit(without_gradient)


def never_refuses(*args: Any, **kwargs: Any) -> Reason | None:
    """The check of the XLA references: they run everywhere."""
    return None


def default_platform() -> str:
    """Platform on which JAX places arrays by default: `cpu`, `gpu` or `tpu`."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(device, str):
        return {"cuda": "gpu", "rocm": "gpu"}.get(device, device)
    return device.platform if device is not None else jax.default_backend()


@functools.cache
def device_kind() -> str:
    """Name of the default device, such as `NVIDIA H100 80GB HBM3`."""
    return jax.devices()[0].device_kind


@functools.cache
def compute_capability() -> tuple[int, int] | None:
    """Compute capability of the default NVIDIA GPU, or None without one."""
    if jax.default_backend() != "gpu":
        return None
    version = getattr(jax.devices()[0], "compute_capability", None)
    if version is None:
        return None
    major, _, minor = str(version).partition(".")
    return int(major), int(minor or 0)
