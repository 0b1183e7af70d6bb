"""From what the user names (a folder or a hub id) to a folder on this disk."""

import os
import re
from pathlib import Path

from jaxvqa.convert.errors import ConversionError

# What a checkpoint is made of here: configuration, weights as safetensors, tokenizer. Never pickles, never code.
# The one exception is fetched to be noticed: beside a LoRA adapter it holds a projector that must not be passed over.
FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt", "non_lora_trainables.bin")
PICKLES = ("*.bin", "*.pt", "*.pth")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(
    source: str | os.PathLike[str],
    revision: str | None = None,
    offline: bool = False,
    from_pickle: bool = False,
    command: str | None = None,
) -> Path:
    """The folder of `source`: itself if it is a folder, else the hub repository's snapshot in the hub's cache.

    revision: commit, tag or branch of the repository. offline: use the cache only. from_pickle: fetch pickled weights
    too. command: what a refusal of pickled weights names, where `source` is only a part of what is loaded.
    Raises `ConversionError` in one line when there is no such folder, repository, revision or network.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ConversionError(f"{path} is a file; expected the checkpoint's folder", remedy=f"give {path.parent}")
    name = os.fspath(source)
    if not _HUB_ID.fullmatch(name):
        raise ConversionError(f"no folder {name!r}; expected a checkpoint's folder or a hub id (owner/name)")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = name if revision is None else f"{name} at revision {revision}"
    try:
        files: list[str] = [*FILES, *(PICKLES if from_pickle else ())]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=offline))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as e:
        raise ConversionError(
            f"neither a folder nor a hub repository: {wanted}",
            remedy="check the spelling; a gated or private repository needs `hf auth login`",
        ) from e
    except LocalEntryNotFoundError as e:
        where = "is not in the hub's cache" if offline else "is not in the hub's cache and the hub cannot be reached"
        raise ConversionError(
            f"{wanted} {where} (no folder of that name either)",
            remedy="run once with a network, or give the path of a folder",
        ) from e
    except (HfHubHTTPError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ConversionError(f"cannot fetch {wanted} from the hub: {reason}") from e
    if not from_pickle and not any(folder.glob("*.safetensors")):
        raise ConversionError(
            f"{wanted}: no safetensors in this hub repository",
            remedy="where its weights are pickled, convert them with the restricted reader: "
            + (command or f"jaxvqa convert --from-pickle {name} OUT"),
        )
    return folder
