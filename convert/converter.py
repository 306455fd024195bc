"""Converts a foreign checkpoint to a model folder, one part at a time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert import hf_config, names
from convert.hub import find_checkpoint
from convert.safetensors_reader import SafetensorsReader, read_index
from convert.tensors import FLOAT_DTYPES, TensorReader, check_finite, check_tensors
from convert.torch_reader import TorchReader
from mixllm_jax.checkpoint import METADATA_FILE, CheckpointWriter, check_target
from mixllm_jax.errors import CheckpointError, OptionError
from mixllm_jax.models.config import ModelConfig
from mixllm_jax.progress_bar import progress_bar

COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a Hugging Face checkpoint that go along as they are."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted: the folder, the model's configuration, its parameters and their bytes."""

    folder: Path
    config: ModelConfig
    parameters: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class _Source:
    """An opened foreign checkpoint.

    Attributes:
        where: The checkpoint, for messages.
        metadata: What the converted folder says of its origin.
        write_companions: Writes the tokenizer and the like into the new folder.
    """

    config: ModelConfig
    reader: TensorReader
    naming: names.Naming
    where: str
    metadata: dict[str, str]
    write_companions: Callable[[CheckpointWriter], None]


def convert_from_hf(
    path_or_id: str, out_dir: str | Path, *, dtype: str = "auto", overwrite: bool = False, progress: bool = True
) -> Conversion:
    """Converts a Hugging Face checkpoint.

    Args:
        path_or_id: Folder with `config.json` and safetensors (or PyTorch .bin) files, or a hub id.
        out_dir: The model folder to create; it appears only when it is whole.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` to keep each tensor's.
        overwrite: Replace an existing model folder.
        progress: Show a progress bar.

    Raises:
        MixLLMError: The input is damaged, incomplete or unsupported, or the output cannot be written.
    """
    _check_dtype(dtype)
    check_target(out_dir, overwrite=overwrite)  # before a model is downloaded
    folder = find_checkpoint(path_or_id)
    if (folder / METADATA_FILE).is_file():
        raise CheckpointError(f"{folder} is a converted model folder already; mixllm takes it as it is")
    config = hf_config.read_config(folder)

    def copy_companions(writer: CheckpointWriter) -> None:
        for name in COMPANION_FILES:
            if (folder / name).is_file():
                writer.copy_file(folder / name)

    name = folder.resolve().name if Path(path_or_id).expanduser().is_dir() else path_or_id
    metadata = {"format": "huggingface", "name": name, "dtype": dtype}
    source = _Source(config, _open_weights(folder), names.HUGGING_FACE, str(folder), metadata, copy_companions)
    return _convert(source, Path(out_dir), dtype, overwrite, progress)


def convert_from_gguf(
    file: str | Path, out_dir: str | Path, *, dtype: str = "auto", overwrite: bool = False, progress: bool = True
) -> Conversion:
    """Converts a GGUF file, with its tokenizer and chat template; arguments and errors as in `convert_from_hf`.

    With `auto`, quantised tensors become float32, which holds their values exactly.
    """
    _check_dtype(dtype)
    check_target(out_dir, overwrite=overwrite)
    file = Path(file).expanduser()
    if not file.is_file():
        reason = "is a folder; give the .gguf file in it" if file.is_dir() else "does not exist"
        raise CheckpointError(f"--from-gguf {file} {reason}")
    # Late: the package gguf is of no use to any other conversion.
    from convert import gguf_config, gguf_tokenizer
    from convert.gguf_reader import GGUFReader

    reader = GGUFReader(file)
    config = gguf_config.read_config(reader)

    def write_companions(writer: CheckpointWriter) -> None:
        for name, content in gguf_tokenizer.tokenizer_files(reader, config).items():
            writer.write_file(name, content)

    metadata = {"format": "gguf", "name": file.name, "dtype": dtype}
    source = _Source(config, reader, names.GGUF, str(file), metadata, write_companions)
    return _convert(source, Path(out_dir), dtype, overwrite, progress)


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in FLOAT_DTYPES:
        raise OptionError(f"dtype must be auto, {', '.join(FLOAT_DTYPES)}, found {dtype!r}")


def _open_weights(folder: Path) -> TensorReader:
    """The weight files of a Hugging Face checkpoint: safetensors, else PyTorch .bin; single, else with an index."""
    for pattern, single, open_files in (
        ("*.safetensors", "model.safetensors", SafetensorsReader),
        ("*.bin", "pytorch_model.bin", TorchReader),
    ):
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _open_shards(index, open_files)
        if (folder / single).is_file():
            return open_files([folder / single])
        shards = sorted(folder.glob(f"{Path(single).stem}-*-of-*{Path(single).suffix}"))
        if shards:
            raise CheckpointError(f"{folder} holds shards but not their index {index.name}: download it too")
        others = sorted(folder.glob(pattern)) if pattern == "*.safetensors" else []
        if len(others) == 1:
            return open_files(others)
    raise CheckpointError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json with its shards, or "
        "pytorch_model.bin"
    )


def _open_shards(index: Path, open_files: Callable[[list[Path]], TensorReader]) -> TensorReader:
    files, weight_map = read_index(index)
    reader = open_files(files)
    lost = sorted(set(weight_map) - set(reader.shapes))
    if lost:
        raise CheckpointError(
            f"{index}: {len(lost)} tensors are in no shard: {', '.join(lost[:20])}{' ...' if len(lost) > 20 else ''}"
        )
    return reader


def _convert(source: _Source, out_dir: Path, dtype: str, overwrite: bool, progress: bool) -> Conversion:
    """Checks all names and shapes first, then reads, checks and writes one part at a time."""
    config, naming = source.config, source.naming
    if config.num_layers > len(source.reader.shapes):  # before as many names are made as the number says
        raise CheckpointError(
            f"{source.where}: the configuration says {config.num_layers} layers, but there are only "
            f"{len(source.reader.shapes)} tensors: the configuration is wrong, or of another model"
        )
    check_tensors(
        names.expected_tensors(naming, config),
        source.reader.shapes,
        names.ignored_tensors(naming, config),
        source.where,
    )
    parameters = nbytes = 0
    metadata = {"kind": "float", "config": config.to_dict(), "source": source.metadata}
    with CheckpointWriter(out_dir, metadata, overwrite) as writer:
        source.write_companions(writer)
        for part in progress_bar(config.part_names(), desc="convert", unit="part", disable=not progress):
            arrays = {
                path: _read_parameter(source, [name for name, _ in tensors], dtype)
                for path, tensors in names.part_sources(naming, config, part).items()
            }
            parameters += sum(array.size for array in arrays.values())
            nbytes += sum(array.nbytes for array in arrays.values())
            writer.write_part(part, arrays)
        writer.finish()
    return Conversion(out_dir, config, parameters, nbytes)


def _read_parameter(source: _Source, tensors: list[str], dtype: str) -> np.ndarray:
    """Reads the tensors a parameter consists of, checks and joins them."""
    pieces = [_read_tensor(source, name, dtype) for name in tensors]
    if len(pieces) == 1:
        return pieces[0]
    dtypes = {piece.dtype for piece in pieces}
    # float16 and bfloat16 hold values the other does not; float32 holds both.
    return np.concatenate(pieces, dtype=dtypes.pop() if len(dtypes) == 1 else np.float32, casting="same_kind")


def _read_tensor(source: _Source, name: str, dtype: str) -> np.ndarray:
    values = source.reader.read(name)
    check_finite(values, f"{source.where}: tensor {name}")
    if dtype == "auto" or values.dtype == FLOAT_DTYPES[dtype]:
        return values
    with np.errstate(over="ignore"):  # looked for below
        converted = values.astype(FLOAT_DTYPES[dtype])
    try:
        check_finite(converted, name)
    except CheckpointError as error:
        raise OptionError(
            f"{source.where}: tensor {name} has values beyond the range of {dtype}; choose another --dtype"
        ) from error
    return converted
