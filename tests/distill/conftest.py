"""The tiny teacher that all tests of distillations read, and its prompts."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    import tiny_distillation  # here, because what is imported before pytest is configured has unchecked signatures

    folder = tmp_path_factory.mktemp("distill")
    tiny_distillation.teacher(folder)
    tiny_distillation.prompts_file(folder)
    return folder
