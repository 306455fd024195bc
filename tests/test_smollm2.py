"""SmolLM2-135M, a real trained model, against `transformers` reading the same GGUF file, and by its known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixllm_jax
from mixllm_jax.cli import main as cli
from mixllm_jax.models.cache import KVCache

pytestmark = pytest.mark.real_model

PARAGRAPH = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889. Although initially "
    "criticised by some of France's leading artists and intellectuals for its design, it has since become a global "
    "cultural icon of France and one of the most recognisable structures in the world. In 2022, 5,889,000 people "
    "visited it; at 330 metres it is about as tall as an 81-storey building."
)


@pytest.fixture(scope="module")
def loaded(smollm2_folder):
    return mixllm_jax.load(smollm2_folder, dtype="float32")


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    """The torch model with the weights as `transformers` itself reads them from the file."""
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # What from_pretrained(gguf_file=...) does, without its need of the package accelerate.
    config = AutoConfig.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    model.tie_weights()
    return model.eval()


def test_tokenizer_agrees_with_transformers(loaded, smollm2_gguf):
    pytest.importorskip("torch", reason="transformers reads tokenizers from GGUF files with torch only")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in (PARAGRAPH, "<|im_start|>user\nI'll be 1234567 — naïve 東京 🙂\n\n\tx = [1, 2]<|im_end|>\n"):
        assert loaded.tokenizer.encode(text) == theirs.encode(text)
        assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    assert loaded.tokenizer.special_tokens_map == theirs.special_tokens_map
    assert loaded.tokenizer.chat_template == theirs.chat_template


@pytest.mark.usefixtures("exact_matmul")
def test_logits_agree_with_transformers_on_real_text(loaded, reference):
    import torch

    tokens = loaded.tokenizer.encode(PARAGRAPH)
    assert len(tokens) > 100
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].numpy()
    logits, _ = jax.jit(lambda model, tokens: model(tokens))(loaded.model, jnp.asarray([tokens], jnp.int32))
    assert np.linalg.norm(logits[0] - expected) / np.linalg.norm(expected) < 1e-4


@pytest.mark.usefixtures("exact_matmul")
def test_greedy_answer_under_the_chat_template(loaded):
    """The answer that the model's own tools give; decoding goes token by token through the cache."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache, last_only=True))
    cache = KVCache.zeros(loaded.config, 1, len(prompt) + 16, jnp.float32)
    tokens, answer = prompt, []
    while len(answer) < 16:
        logits, cache = step(loaded.model, jnp.asarray([tokens], jnp.int32), cache)
        tokens = [int(logits[0].argmax())]
        if tokens[0] == loaded.tokenizer.eos_token_id:
            break
        answer += tokens
    assert loaded.tokenizer.decode(answer) == "The capital of France is Paris."


QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."  # of llama.cpp and of transformers, greedily


def test_float_model_by_command_and_by_python(smollm2_folder, capsys):
    capsys.readouterr()
    assert cli.main(["generate", str(smollm2_folder), "--chat", "--prompt", QUESTION, "--max-tokens", "24"]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"
    assert "Paris" in mixllm_jax.load(smollm2_folder).generate(QUESTION, chat=True, max_tokens=24)


def test_quantised_model(smollm2_folder, tmp_path, capsys):
    out = str(tmp_path / "w8a8")
    assert cli.main(["quantize", str(smollm2_folder), "--out", out, "--bits", "8", "--method", "rtn"]) == 0
    capsys.readouterr()
    # Prompts whose answer is certain: the question above is a near-tie between languages even for the float model.
    prompts = ["--prompt", "The capital of France is", "--prompt", "To be or not to"]
    assert cli.main(["generate", out, *prompts, "--max-tokens", "1"]) == 0
    assert capsys.readouterr().out == "=== The capital of France is\n Paris\n\n=== To be or not to\n be\n\n"
