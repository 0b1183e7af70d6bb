"""Naming a checkpoint: folders, hub ids, and what is said when there is none."""

import pytest

import jaxvqa
from jaxvqa.convert import ConversionError, resolve
from jaxvqa.convert.source import FILES


def message_of(*args, **kwargs):
    with pytest.raises(ConversionError) as e:
        resolve(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_home_folder_is_found_wherever_a_source_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "jaxvqa.json").write_text('{"format": 0}')
    assert resolve("~/converted") == tmp_path / "converted"
    with pytest.raises(ConversionError, match="incomplete converted folder"):
        jaxvqa.convert.load("~/converted")


def test_a_missing_folder_is_one_clear_line(tmp_path):
    assert "no folder" in message_of(tmp_path / "missing")
    assert "no folder './missing'" in message_of("./missing")


def test_a_file_names_its_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert f"give {tmp_path}" in message_of(tmp_path / "model.safetensors")


def test_offline_a_hub_id_must_be_in_the_cache(tmp_path, monkeypatch):
    message = message_of("nobody/nothing", offline=True)
    assert "nobody/nothing" in message
    assert "not in the hub's cache" in message


def test_only_configuration_safetensors_and_tokenizer_are_fetched(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **kwargs):
        asked.update(kwargs, name=name)
        (tmp_path / "model.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/model", revision="abc", offline=True) == tmp_path
    assert asked["allow_patterns"] == list(FILES)
    assert not any(p.endswith((".pt", ".py", "*.bin")) for p in asked["allow_patterns"])
    assert (asked["revision"], asked["local_files_only"]) == ("abc", True)
    resolve("owner/model", from_pickle=True)
    assert "*.bin" in asked["allow_patterns"]


def test_a_repository_of_pickles_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(tmp_path))
    assert "jaxvqa convert --from-pickle owner/model OUT" in message_of("owner/model")
