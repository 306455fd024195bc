"""Finds a checkpoint: a local folder, or a model on the Hugging Face hub."""

import re
from pathlib import Path

from convert.hf_config import read_config
from mixllm_jax.errors import CheckpointError, MixLLMError, StorageError

_ALONGSIDE = ["*.json", "*.jinja", "tokenizer.model", "merges.txt"]
# Some repositories hold the weights a second time in their authors' own format.
_DUPLICATES = ["original/*", "consolidated*", "*/*"]


def find_checkpoint(path_or_id: str) -> Path:
    """The folder of a checkpoint; a hub id such as `Qwen/Qwen2.5-0.5B` is downloaded into the hub's cache.

    Raises:
        CheckpointError: Neither a folder nor shaped like a hub id.
        UnsupportedModelError: The model on the hub is of a kind we do not run; its weights are not downloaded.
        StorageError: The hub cannot be reached, or has no such model, or does not let us have it.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        remedy = " (for a GGUF file use --from-gguf)" if path.suffix == ".gguf" else ""
        raise CheckpointError(f"{path} is a file; give the folder of a Hugging Face checkpoint{remedy}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path_or_id):
        raise CheckpointError(f"{path_or_id} is neither a folder nor a hub id of the form owner/name")
    return _download(path_or_id)


def _download(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def download(*weights: str) -> Path:
        return Path(snapshot_download(model_id, allow_patterns=[*_ALONGSIDE, *weights], ignore_patterns=_DUPLICATES))

    try:
        read_config(download())  # a model that we cannot run is refused before its gigabytes come
        folder = download("*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else download("*.bin")
    except MixLLMError:
        raise
    except GatedRepoError as error:
        raise StorageError(
            f"{model_id}: its owner asks for an agreement. Accept it on the model's page and log in (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise StorageError(f"{model_id}: there is no such folder here and no such model on the hub") from error
    except (
        Exception
    ) as error:  # the client passes its HTTP library's exceptions on; which library depends on its version
        raise StorageError(
            f"{model_id}: there is no such folder here, and the model cannot be fetched from the hub "
            f"({type(error).__name__}). Check the network, or give the path of a downloaded checkpoint"
        ) from error
