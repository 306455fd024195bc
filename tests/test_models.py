"""The pieces of the decoder: norms, rope, cache, linears, blocks, building from parts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixllm_jax.errors import CheckpointError
from mixllm_jax.models.block import Block
from mixllm_jax.models.cache import KVCache
from mixllm_jax.models.config import LINEAR_NAMES, LINEAR_PATHS, ModelConfig, RopeScaling
from mixllm_jax.models.decoder import Decoder, Embedding, Head, random_parameters
from mixllm_jax.models.linear import Linear
from mixllm_jax.models.norm import RMSNorm
from mixllm_jax.models.parameters import Execution
from mixllm_jax.models.rope import inverse_frequencies, rotary_embedding
from pallas_kernels import PackedWeight, packing, quantize_activations
from pallas_kernels.decode_attention.xla import masked_attention
from pallas_kernels.kv_cache import LayerCache
from pallas_kernels.rotary import rotate

pytestmark = pytest.mark.quick_compile

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=37,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    qkv_bias=True,
)


def random_packed(shape, group_size=16, seed=0):
    """A packed weight of random codes, every third channel with 8 bits, and the weight it stands for in float64."""
    out_features, in_features = shape
    generator = np.random.default_rng(seed)
    groups = in_features // group_size
    order = generator.permutation(out_features)
    n8 = out_features // 3
    n4 = out_features - n8
    codes4 = generator.integers(0, 16, (n4, in_features))
    zero_points = generator.integers(0, 16, (n4, groups))
    codes8 = generator.integers(-127, 128, (n8, in_features))
    scales4 = generator.uniform(0.005, 0.01, (n4, groups)).astype(np.float16)
    scales8 = generator.uniform(0.0005, 0.001, (n8, groups)).astype(np.float16)
    channels = np.concatenate([np.sort(order[:n4]), np.sort(order[n4:])]).astype(np.int32)
    packed = packing.pack(
        codes4.astype(np.uint8),
        scales4,
        zero_points.astype(np.uint8),
        codes8.astype(np.int8),
        scales8,
        channels,
        group_size=group_size,
    )
    rows = np.concatenate(
        [
            (codes4 - zero_points.repeat(group_size, 1)) * scales4.astype(np.float64).repeat(group_size, 1),
            codes8 * scales8.astype(np.float64).repeat(group_size, 1),
        ]
    )
    weight = np.empty_like(rows)
    weight[channels] = rows
    return packed, weight


def quantized_parameters(config, part):
    """Random parameters of a part, all linears packed."""
    parameters = random_parameters(config, part, seed=1, scale=0.2)
    for seed, path in enumerate(LINEAR_PATHS.values()):
        if f"{path}.weight" in parameters:
            parameters[f"{path}.weight"] = random_packed(parameters[f"{path}.weight"].shape, seed=seed)[0]
    return parameters


def float_parameters(config, part):
    return random_parameters(config, part, seed=1, scale=0.2)


@pytest.fixture(scope="module")
def hidden():
    generator = np.random.default_rng(2)
    return jnp.asarray(generator.standard_normal((2, 5, CONFIG.hidden_size)), jnp.float32)


@pytest.fixture(scope="module")
def rotary():
    return rotary_embedding(CONFIG, jnp.broadcast_to(jnp.arange(5), (2, 5)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_against_float64(dtype):
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((3, 40)) * 100, dtype)
    weight = generator.standard_normal(40).astype(np.float32)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * weight
    found = RMSNorm(weight, 1e-3)(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=4e-3 if dtype == jnp.bfloat16 else 1e-6)


def test_llama3_frequencies_by_range():
    """High frequencies stay, low ones are divided, those between lie between (independent of the interpolation)."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(CONFIG, head_dim=128, rope_theta=500000.0)
    plain = inverse_frequencies(config)
    scaled = inverse_frequencies(dataclasses.replace(config, rope_scaling=scaling))
    turns = 8192 * plain / (2 * math.pi)
    np.testing.assert_array_equal(scaled[turns > 4.001], plain[turns > 4.001])
    np.testing.assert_allclose(scaled[turns < 0.999], plain[turns < 0.999] / 8, rtol=1e-6)
    between = (turns > 1.001) & (turns < 3.999)
    assert between.any()
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_rotary_products_depend_on_distance_alone():
    """The defining property: <rotate(q, m), rotate(k, n)> is a function of m - n."""
    generator = np.random.default_rng(3)
    q, k = (jnp.asarray(generator.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(m, n):
        tables = [rotary_embedding(CONFIG, jnp.asarray([[position]])) for position in (m, n)]
        rotated = [rotate(x, table.cos, table.sin) for x, table in zip((q, k), tables, strict=True)]
        return float((rotated[0] * rotated[1]).sum())

    assert product(9, 4) == pytest.approx(product(25, 20), rel=1e-5)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-2)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.usefixtures("exact_matmul")
def test_attention_against_float64(window):
    generator = np.random.default_rng(4)
    q = generator.standard_normal((2, 3, 4, 8)).astype(np.float32)
    k, v = generator.standard_normal((2, 2, 7, 2, 8)).astype(np.float32)
    positions = np.asarray([[0, 1, 2], [4, 5, 6]])
    found = masked_attention(*map(jnp.asarray, (q, k, v, positions)), window)
    for row in range(2):
        for i, position in enumerate(positions[row]):
            seen = slice(max(0, position + 1 - (window or 100)), position + 1)
            for head in range(4):
                scores = k[row, seen, head // 2].astype(np.float64) @ q[row, i, head] / math.sqrt(8)
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ v[row, seen, head // 2]
                np.testing.assert_allclose(found[row, i, head], expected, rtol=1e-4, atol=1e-6)


def test_cache_writes_beyond_the_end_are_dropped():
    cache = LayerCache(jnp.full((2, 4, 1, 2), -1.0), jnp.full((2, 4, 1, 2), -1.0))
    new = jnp.arange(8.0).reshape(2, 2, 1, 2)
    written = cache.write(jnp.asarray([[1, 2], [3, 4]]), new, 10 * new)
    assert written.keys[..., 0, 0].tolist() == [[-1, 0, 2, -1], [-1, -1, -1, 4]]
    assert written.values[..., 0, 1].tolist() == [[-1, 10, 30, -1], [-1, -1, -1, 50]]


def test_tokens_that_do_not_fit_the_cache():
    model = Decoder.from_parameters(CONFIG, lambda part: float_parameters(CONFIG, part))
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8 positions"):
        model(jnp.zeros((1, 9), jnp.int32), KVCache.zeros(CONFIG, 1, 8, jnp.float32))


class TestLinear:
    """The linear layer: float, packed with int8 activations, packed with float activations."""

    x = np.random.default_rng(5).standard_normal((2, 3, 32)).astype(np.float32)
    bias = np.random.default_rng(6).standard_normal(24).astype(np.float32)

    @pytest.mark.usefixtures("exact_matmul")
    def test_float(self):
        weight = np.random.default_rng(7).standard_normal((24, 32)).astype(np.float32)
        found = Linear(weight, self.bias, dtype=jnp.float32)(jnp.asarray(self.x))
        np.testing.assert_allclose(found, self.x.astype(np.float64) @ weight.T + self.bias, rtol=1e-4, atol=1e-5)

    def test_packed_with_int8_activations(self):
        packed, weight = random_packed((24, 32))
        layer = Linear(packed, self.bias, dtype=jnp.float32)
        groups = self.x.reshape(2, 3, 2, 16).astype(np.float64)
        scales = np.abs(groups).max(-1, keepdims=True) / 127
        rounded = (np.round(groups / scales) * scales).reshape(2, 3, 32)
        np.testing.assert_allclose(layer(jnp.asarray(self.x)), rounded @ weight.T + self.bias, rtol=1e-4, atol=1e-4)

    def test_packed_with_float_activations(self):
        packed, weight = random_packed((24, 32))
        layer = Linear(packed, self.bias, dtype=jnp.float32, activation_bits=16)
        with jax.default_matmul_precision("highest"):
            found = layer(jnp.asarray(self.x))
        np.testing.assert_allclose(found, self.x @ weight.T + self.bias, rtol=1e-4, atol=1e-5)

    def test_activations_quantised_before(self):
        packed, _ = random_packed((24, 32))
        layer = Linear(packed, self.bias, dtype=jnp.float32)
        codes = quantize_activations(jnp.asarray(self.x.reshape(6, 32)), 16)
        np.testing.assert_array_equal(layer(codes), layer(jnp.asarray(self.x)).reshape(6, 24))

    def test_what_cannot_take_quantised_activations(self):
        packed, weight = random_packed((24, 32))
        codes = quantize_activations(jnp.asarray(self.x.reshape(6, 32)), 16)
        for layer in (Linear(weight, dtype=jnp.float32), Linear(packed, dtype=jnp.float32, activation_bits=16)):
            assert layer.group_size is None
            with pytest.raises(ValueError, match="takes no QuantizedActivations"):
                layer(codes)
        with pytest.raises(ValueError, match="must be 8 or 16, found 4"):
            Linear(packed, dtype=jnp.float32, activation_bits=4)


class TestBlock:
    """A block: fused and plain paths, calling linears from outside, gradients."""

    def test_fused_path_equals_the_plain_one(self, hidden, rotary):
        """What norm, residual addition and SwiGLU quantise in one operation equals doing it step by step."""
        block = Block.from_parameters(CONFIG, 0, quantized_parameters(CONFIG, "layer_0000"))
        fused, _ = block(hidden, rotary)
        plain, _ = block(hidden, rotary, linear_call=lambda name, linear, x: linear(x))
        assert np.abs(fused - hidden).max() > 0.1
        # A code may round the other way where float32 sums associate differently.
        assert np.linalg.norm(fused - plain) / np.linalg.norm(plain) < 1e-3

    def test_pending_update_equals_added_update(self, hidden, rotary):
        for parameters in (quantized_parameters, float_parameters):
            block = Block.from_parameters(CONFIG, 0, parameters(CONFIG, "layer_0000"))
            added, _ = block(hidden + 0.5 * hidden, rotary)
            x, update, _ = block.step(hidden, 0.5 * hidden, rotary)
            assert np.linalg.norm(x + update - added) / np.linalg.norm(added) < 1e-3

    def test_linear_call_sees_every_linear_once_with_its_float_input(self, hidden, rotary):
        block = Block.from_parameters(CONFIG, 1, quantized_parameters(CONFIG, "layer_0001"))
        seen = []

        def call(name, linear, x):
            assert linear is block.linears()[name]
            seen.append((name, x.shape, x.dtype))
            return linear(x)

        block(hidden, rotary, linear_call=call)
        assert seen == [(name, (2, 5, CONFIG.linear_shape(name)[1]), jnp.float32) for name in LINEAR_NAMES]

    def test_gradient_reaches_input_and_parameters(self, hidden, rotary):
        """Against a central difference along a random direction."""
        block = Block.from_parameters(CONFIG, 0, float_parameters(CONFIG, "layer_0000"))
        direction = jnp.asarray(np.random.default_rng(8).standard_normal(hidden.shape), jnp.float32)

        def loss(block, x):
            return jnp.sum(jnp.sin(block(x, rotary)[0]))

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        by_block, by_x = gradient(block, hidden)
        step = 2e-3 * direction
        numeric = (loss(block, hidden + step) - loss(block, hidden - step)) / 4e-3
        assert float((by_x * direction).sum()) == pytest.approx(float(numeric), rel=2e-2)
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(by_block))


class TestParts:
    """Building models from checkpoint parts."""

    def test_all_mismatches_in_one_error(self):
        parameters = float_parameters(CONFIG, "layer_0000")
        del parameters["mlp_norm.weight"]
        parameters["mlp.down_proj.weight"] = random_packed((32, 48))[0]
        parameters["attention.o_proj.bias"] = np.zeros(32, np.float32)
        with pytest.raises(CheckpointError) as error:
            Block.from_parameters(CONFIG, 0, parameters)
        for expected in (
            "part 'layer_0000'",
            "missing mlp_norm.weight (32,)",
            "unexpected attention.o_proj.bias (32,)",
            "mlp.down_proj.weight has shape (32, 48), expected (32, 64)",
        ):
            assert expected in str(error.value)

    def test_number_of_layers(self):
        model = Decoder.from_parameters(CONFIG, lambda part: float_parameters(CONFIG, part))
        with pytest.raises(ValueError, match="2 layers expected, 1 given"):
            Decoder(CONFIG, model.embedding, [model.layers[0]], model.final)

    def test_pieces_equal_the_decoder(self):
        """Streaming block by block, as the quantiser does, gives the decoder's logits."""
        model = Decoder.from_parameters(CONFIG, lambda part: quantized_parameters(CONFIG, part))
        tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
        embedding = Embedding.from_parameters(CONFIG, quantized_parameters(CONFIG, "embedding"))
        rotary = rotary_embedding(CONFIG, jnp.arange(3)[None])
        x = embedding(tokens)
        for layer in range(CONFIG.num_layers):
            x, _ = Block.from_parameters(CONFIG, layer, quantized_parameters(CONFIG, f"layer_{layer:04d}"))(x, rotary)
        logits = Head.from_parameters(CONFIG, quantized_parameters(CONFIG, "final"))(x, embedding)
        expected, _ = model(tokens)
        assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 1e-3

    def test_tied_head_may_have_a_packed_projection_of_its_own(self):
        config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
        parameters = float_parameters(config, "final")
        assert parameters.keys() == {"norm.weight"}
        embedding = Embedding.from_parameters(config, float_parameters(config, "embedding"))
        packed, weight = random_packed((37, 32))
        x = jnp.asarray(np.random.default_rng(9).standard_normal((2, 32)), jnp.float32)
        head = Head.from_parameters(config, parameters | {"lm_head.weight": packed})
        expected = np.asarray(head.norm(x), np.float64) @ weight.T
        assert np.linalg.norm(head(x, embedding) - expected) / np.linalg.norm(expected) < 2e-2


class TestJit:
    """Models as arguments of plain `jax.jit`."""

    def test_packed_weights_are_leaves_and_do_not_retrace(self):
        model = Decoder.from_parameters(CONFIG, lambda part: quantized_parameters(CONFIG, part))
        packed = [linear.weight.get_value() for block in model.layers for linear in block.linears().values()]
        assert all(isinstance(weight, PackedWeight) for weight in packed)
        leaves = {id(leaf) for leaf in jax.tree.leaves(model)}
        assert all(id(leaf) in leaves for weight in packed for leaf in jax.tree.leaves(weight))

        traces = []

        @jax.jit
        def forward(model, tokens):
            traces.append(1)
            return model(tokens)[0]

        tokens = jnp.asarray([[1, 2, 3]], jnp.int32)
        first = forward(model, tokens)
        again = Decoder.from_parameters(CONFIG, lambda part: quantized_parameters(CONFIG, part))
        np.testing.assert_array_equal(forward(again, tokens), first)
        assert len(traces) == 1

    def test_cache_may_be_donated(self):
        model = Decoder.from_parameters(CONFIG, lambda part: float_parameters(CONFIG, part))
        cache = KVCache.zeros(CONFIG, 1, 8, jnp.float32)
        step = jax.jit(lambda model, tokens, cache: model(tokens, cache), donate_argnums=2)
        _, cache = step(model, jnp.asarray([[1, 2]], jnp.int32), cache)
        _, cache = step(model, jnp.asarray([[3, 4]], jnp.int32), cache)
        assert cache.lengths.tolist() == [4]

    def test_last_only_is_the_last_valid_token(self):
        model = Decoder.from_parameters(CONFIG, lambda part: float_parameters(CONFIG, part))
        tokens = jnp.asarray([[1, 2, 3], [4, 5, 0]], jnp.int32)
        every, _ = model(tokens)
        last, _ = model(tokens, lengths=jnp.asarray([3, 2]), last_only=True)
        np.testing.assert_allclose(last, np.stack([every[0, 2], every[1, 1]]), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("parameters", [float_parameters, quantized_parameters])
    def test_bfloat16_stays_near_float32(self, parameters):
        tokens = jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32)
        logits = [
            jax.jit(lambda model, tokens: model(tokens)[0])(
                Decoder.from_parameters(CONFIG, lambda part: parameters(CONFIG, part), Execution(dtype=dtype)), tokens
            )
            for dtype in (jnp.float32, jnp.bfloat16)
        ]
        assert logits[1].dtype == jnp.float32
        assert 0 < np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0]) < 0.05


def test_linear_segments_add_up():
    for name in LINEAR_NAMES:
        segments = CONFIG.linear_segments(name)
        assert sum(channels for _, channels in segments) == CONFIG.linear_shape(name)[0]
    assert CONFIG.linear_segments("qkv_proj") == (("q", 32), ("k", 16), ("v", 16))
    assert CONFIG.part_names() == ("embedding", "layer_0000", "layer_0001", "final")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 0},
        {"vocab_size": 1.5},
        {"num_kv_heads": 3},
        {"head_dim": 7},
        {"rope_theta": -1.0},
        {"sliding_window": 0},
    ],
)
def test_impossible_configurations(changes):
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "arguments", [("yarn", 2.0), ("linear", 0.0), ("llama3", 8.0, 4.0, 1.0), ("llama3", 8.0, 1.0, 4.0, 0)]
)
def test_impossible_rope_scaling(arguments):
    with pytest.raises(CheckpointError, match="rope scaling"):
        RopeScaling(*arguments)
