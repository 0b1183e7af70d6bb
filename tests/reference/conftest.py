import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random LLaVA of three layers: 56 px, 4x4 cells."""
    from tiny import tiny_llava

    return tiny_llava(tmp_path_factory.mktemp("reference") / "llava")


@pytest.fixture(scope="session")
def tiny_matcher(tmp_path_factory):
    """A random BLIP of three text layers."""
    from tiny_blip import tiny_blip

    return tiny_blip(tmp_path_factory.mktemp("reference") / "blip")
