"""Calibration sequences: token sequences cut from a text file, a data set, or the text that comes with the package."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import numpy as np

from mixllm_jax.errors import OptionError, StorageError

DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    "c4": ("allenai/c4", "en", "train"),
}
"""Names that need the package `datasets`: repository, configuration and split on the Hugging Face hub."""

_DATASET_CHARACTERS = 20_000_000
"""As much of a data set is read: enough for any usual calibration, and c4 has no end."""


def read_text(source: str | Path | None) -> str:
    """The calibration text.

    Args:
        source: path of a UTF-8 text file, or a name in `DATASETS`; None is the embedded text (excerpts of Wikipedia,
            about 200 kB, CC BY-SA 3.0).

    Raises:
        OptionError: neither a file nor a known name, not UTF-8, empty, or `datasets` is missing.
        StorageError: the data set cannot be fetched.
    """
    if source is None:
        return importlib.resources.files("mixllm_jax").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    path = Path(source)
    if str(source) in DATASETS and not path.exists():
        return _read_dataset(str(source))
    if path.is_dir():
        raise OptionError(f"--calibration {source} is a folder; give a text file in it")
    if not path.is_file():
        raise OptionError(
            f"--calibration {source}: no such file, and not one of the data sets {', '.join(DATASETS)}; "
            "without --calibration the text that comes with the package is used"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"--calibration {source} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise StorageError(f"--calibration {source} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise OptionError(f"--calibration {source} is empty; give a text in the language the model is used for")
    return text


def _read_dataset(name: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise OptionError(
            f"--calibration {name} needs the package datasets: pip install 'mixllm-jax[datasets]', or give a text file"
        ) from error
    repository, configuration, split = DATASETS[name]
    try:
        rows = datasets.load_dataset(repository, configuration, split=split, streaming=True)
        texts, characters = [], 0
        for row in rows:
            texts.append(row["text"])
            characters += len(row["text"])
            if characters >= _DATASET_CHARACTERS:
                break
    except Exception as error:  # the hub, the network and the file system each raise their own kind
        raise StorageError(
            f"the data set {name} ({repository}) cannot be read: {error}. Give a text file to --calibration, or leave "
            "the option out to use the text that comes with the package"
        ) from error
    return "\n\n".join(texts)


def cut_windows(tokens: np.ndarray, samples: int, sequence_length: int, seed: int, source: str) -> np.ndarray:
    """Draws windows of a text that do not overlap, in the order of the text.

    Args:
        tokens: int [tokens] of the whole text.
        samples: how many windows.
        sequence_length: tokens of each.
        seed: of the draw.
        source: what to call the text in an error.

    Returns:
        int32 [samples, sequence_length].

    Raises:
        OptionError: the text is too short.
    """
    available = len(tokens) // sequence_length
    if available < samples:
        raise OptionError(
            f"{source} has {len(tokens)} tokens, enough for {available} sequences of {sequence_length}, not for "
            f"{samples}: give a longer text, or fewer --samples, or a shorter --sequence-length"
        )
    chosen = np.sort(np.random.default_rng(seed).choice(available, samples, replace=False))
    windows = np.asarray(tokens[: available * sequence_length], np.int32).reshape(available, sequence_length)
    return windows[chosen]


def calibration_sequences(
    source: str | Path | None, model_path: Path, samples: int, sequence_length: int, seed: int
) -> np.ndarray:
    """Token sequences for a model, int32 [samples, sequence_length].

    Args:
        source: see `read_text`; also a `.npy` file of token ids, int [sequences, tokens], of which the first rows and
            columns are taken as they are.
        model_path: the model folder, for its tokenizer.
        samples: how many sequences.
        sequence_length: tokens of each.
        seed: of the choice of windows.

    Raises:
        OptionError: the text is missing, empty or too short.
        CheckpointError: the model has no tokenizer.
    """
    if source is not None and Path(source).suffix == ".npy":
        return _read_token_file(Path(source), samples, sequence_length)
    text = read_text(source)
    from mixllm_jax.loaded_model import load_tokenizer

    tokenizer = load_tokenizer(model_path)
    # No special tokens: windows come from the middle of the text, which may be longer than the context (verbose=False).
    tokens = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    where = "the calibration text that comes with the package" if source is None else f"--calibration {source}"
    return cut_windows(tokens, samples, sequence_length, seed, where)


def _read_token_file(path: Path, samples: int, sequence_length: int) -> np.ndarray:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise OptionError(f"--calibration {path} cannot be read as a NumPy array: {error}") from error
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise OptionError(
            f"--calibration {path} must hold integers [sequences, tokens], found {tokens.dtype} {list(tokens.shape)}"
        )
    if tokens.shape[0] < samples or tokens.shape[1] < sequence_length:
        raise OptionError(
            f"--calibration {path} holds {tokens.shape[0]} sequences of {tokens.shape[1]} tokens, but --samples "
            f"{samples} and --sequence-length {sequence_length} were asked for"
        )
    return tokens[:samples, :sequence_length].astype(np.int32)
