"""The Python API in twenty lines: `python examples/python_api.py MODEL_DIR`."""

import sys

import jax
import jax.numpy as jnp

import mixllm_jax

loaded = mixllm_jax.load(sys.argv[1])  # a float or a quantised folder
prompt = "Once upon a time"
tokens = jnp.asarray([loaded.encode(prompt)])
logits, _ = loaded.model(tokens)  # float32 [batch, length, vocabulary]
print("likeliest next token:", repr(loaded.tokenizer.decode([int(logits[0, -1].argmax())])))
print("greedy:", repr(loaded.generate(prompt, max_tokens=12)))
print("a batch:", loaded.generate([prompt, "The capital of France is"], max_tokens=4))
print("sampled, as it comes:", end=" ")
for piece in loaded.stream(prompt, max_tokens=12, temperature=0.8, top_p=0.95, seed=1):
    print(piece, end="", flush=True)
parameters = jax.tree_util.tree_leaves_with_path(loaded.model)  # the model is a pytree
print(f"\n{len(parameters)} arrays, {sum(array.nbytes for _, array in parameters) / 1e6:.1f} MB")
