"""The model folder: one Orbax checkpoint per part of the model, and a JSON that describes them.

docs/architecture.md shows the layout. A folder is written beside its final place (`.NAME.partial`) and renamed at the
end, so that a model folder is either whole or absent. Every array's CRC-32 is in `mixllm.json` and checked on reading:
Orbax notices a shortened file, but not a part that was copied from another model.

The same arrays give the same bytes: one uncompressed file per array, no times, no absolute paths.
"""

from mixllm_jax.checkpoint.layout import FORMAT_VERSION, METADATA_FILE, TOKENIZER_FILES, Part
from mixllm_jax.checkpoint.reader import CheckpointReader
from mixllm_jax.checkpoint.writer import CheckpointWriter, check_target

__all__ = [
    "FORMAT_VERSION",
    "METADATA_FILE",
    "TOKENIZER_FILES",
    "CheckpointReader",
    "CheckpointWriter",
    "Part",
    "check_target",
]
