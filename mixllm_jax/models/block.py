"""A decoder block: attention and SwiGLU feed-forward, each behind an RMSNorm, on a residual stream."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mixllm_jax.models.attention import Attention
from mixllm_jax.models.config import LINEAR_PATHS, ModelConfig, layer_part_name
from mixllm_jax.models.linear import Linear
from mixllm_jax.models.norm import RMSNorm
from mixllm_jax.models.parameters import Execution, Parameters, check_parameters
from mixllm_jax.models.rope import RotaryEmbedding
from pallas_kernels import QuantizedActivations, rms_norm_quantize, swiglu_quantize
from pallas_kernels.kv_cache import LayerCache

Hidden = Float[Array, "batch length hidden"]


class LinearCall(Protocol):
    """A caller of linears in place of the block: gets the linear's name, the linear and its float input."""

    def __call__(self, name: str, linear: Linear, x: Float[Array, "batch length in_features"], /) -> Array:
        """Returns the output, `[batch, length, out_features]`."""
        ...


class MLP(nnx.Module):
    """The two linears of the feed-forward layer, y = down(silu(gate) * up)."""

    def __init__(self, gate_up_proj: Linear, down_proj: Linear) -> None:
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj


class Block(nnx.Module):
    """One decoder layer.

    Where a linear takes int8 activations, norm (with the residual addition) and SwiGLU produce them in one fused
    operation; otherwise, and under `linear_call`, the linears get float inputs.
    """

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: MLP) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    @classmethod
    def from_parameters(
        cls, config: ModelConfig, layer: int, parameters: Parameters, execution: Execution | None = None
    ) -> "Block":
        """Builds layer number `layer` from its checkpoint part.

        Raises:
            CheckpointError: The parameters do not fit the configuration.
        """
        check_parameters(config, layer_part_name(layer), parameters)
        execution = execution or Execution()

        def linear(name: str) -> Linear:
            path = LINEAR_PATHS[name]
            return Linear(
                parameters[f"{path}.weight"],
                parameters.get(f"{path}.bias"),
                dtype=execution.dtype,
                activation_bits=execution.activation_bits,
                implementation=execution.implementation,
            )

        def norm(path: str) -> RMSNorm:
            return RMSNorm(parameters[f"{path}.weight"], config.norm_epsilon)

        attention = Attention(
            config,
            qkv_proj=linear("qkv_proj"),
            o_proj=linear("o_proj"),
            q_norm=norm("attention.q_norm") if config.qk_norm else None,
            k_norm=norm("attention.k_norm") if config.qk_norm else None,
            window=config.window_of_layer(layer),
        )
        return cls(
            norm("attention_norm"), attention, norm("mlp_norm"), MLP(linear("gate_up_proj"), linear("down_proj"))
        )

    def linears(self) -> dict[str, Linear]:
        """The four linears by name, in calling order."""
        return {
            "qkv_proj": self.attention.qkv_proj,
            "o_proj": self.attention.o_proj,
            "gate_up_proj": self.mlp.gate_up_proj,
            "down_proj": self.mlp.down_proj,
        }

    def __call__(
        self,
        x: Hidden,
        rotary: RotaryEmbedding,
        cache: LayerCache | None = None,
        *,
        linear_call: LinearCall | None = None,
    ) -> tuple[Hidden, LayerCache | None]:
        """Runs the block.

        Args:
            x: Residual stream.
            rotary: Positions of the tokens and their rotation.
            cache: Keys and values before these tokens; without it, the tokens attend to each other alone.
            linear_call: Calls the four linears in the block's place, each with its float input.

        Returns:
            The residual stream after the block and the cache with the new keys and values (None without a cache).
        """
        x, update, cache = self.step(x, None, rotary, cache, linear_call=linear_call)
        return x + update, cache

    def step(
        self,
        x: Hidden,
        update: Hidden | None,
        rotary: RotaryEmbedding,
        cache: LayerCache | None = None,
        *,
        linear_call: LinearCall | None = None,
        history: int | None = None,
        only: Int[Array, " batch"] | None = None,
    ) -> tuple[Hidden, Hidden, LayerCache | None]:
        """Runs the block on the residual stream `x + update` and returns its own last update not yet added.

        Leaving the addition to the next block lets its fused norm do it. `history`: see `attention.attend`. `only` is
        the one token of each row that is wanted behind the attention: the last block of a prefill need not run its
        linears for the others.
        """
        call = functools.partial(_call, batch=x.shape[0], linear_call=linear_call)
        attention, mlp = self.attention, self.mlp
        fused = linear_call is None

        normed, x = _norm(self.attention_norm, x, update, attention.qkv_proj, fused)
        qkv = call("qkv_proj", attention.qkv_proj, normed)
        mixed, cache = attention.mix(
            qkv, rotary, cache, history=history, may_quantize=fused and _takes_signed(attention.o_proj, x)
        )
        if only is not None and not isinstance(mixed, QuantizedActivations):
            mixed, x = (jnp.take_along_axis(y, only[:, None, None], axis=1) for y in (mixed, x))
        update = call("o_proj", attention.o_proj, mixed)

        normed, x = _norm(self.mlp_norm, x, update, mlp.gate_up_proj, fused)
        activated = _swiglu(call("gate_up_proj", mlp.gate_up_proj, normed), mlp.down_proj, fused)
        return x, call("down_proj", mlp.down_proj, activated), cache


def _call(
    name: str, linear: Linear, x: Array | QuantizedActivations, batch: int, linear_call: LinearCall | None
) -> Array:
    """`[batch, length, out_features]`; quantised activations are flat `[batch * length, features]`."""
    if linear_call is not None and not isinstance(x, QuantizedActivations):
        return linear_call(name, linear, x)
    y = linear(x)
    return y.reshape(batch, -1, y.shape[-1])


def _takes_signed(linear: Linear, x: Hidden) -> bool:
    """Whether the linear takes as many tokens as `x` has in the layout in which the attention quantises them."""
    return linear.group_size is not None and linear.activation_layout(x.shape[0] * x.shape[1]) == "signed"


def _norm(
    norm: RMSNorm, x: Hidden, update: Hidden | None, consumer: Linear, fused: bool
) -> tuple[Array | QuantizedActivations, Hidden]:
    """The norm of `x + update` in the form that `consumer` takes best, and `x + update`."""
    if not fused or consumer.group_size is None:
        x = x if update is None else x + update
        return norm(x), x
    features = x.shape[-1]
    flat = x.reshape(-1, features)
    codes, total = rms_norm_quantize(
        flat,
        norm.weight.get_value(),
        norm.epsilon,
        consumer.group_size,
        residual=None if update is None else update.reshape(-1, features),
        layout=consumer.activation_layout(flat.shape[0]),
        implementation=consumer.implementation,
    )
    return codes, total.reshape(x.shape)


def _swiglu(gate_up: Array, consumer: Linear, fused: bool) -> Array | QuantizedActivations:
    """silu(gate) * up, in float32 inside, in the form that `consumer` takes best."""
    if fused and consumer.group_size is not None:
        flat = gate_up.reshape(-1, gate_up.shape[-1])
        layout = consumer.activation_layout(flat.shape[0])
        return swiglu_quantize(flat, consumer.group_size, layout=layout, implementation=consumer.implementation)
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)
