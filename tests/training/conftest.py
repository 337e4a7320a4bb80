from pathlib import Path

import pytest

from training.teacher import write_tokenizers


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """flash-mini's own three tokenizers, trained anew. Read them only."""
    return write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
