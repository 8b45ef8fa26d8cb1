"""The Hub: finding files and folders locally or there, and pushing. Local paths never touch the network."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import CheckpointError


HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "subfolder")
_OTHER_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.vocab",
    "*.bpe",
    "*.codes",
    "*.tiktoken",
    "merges*",
    "README.md",
]
_SAFE_WEIGHTS = ["model*.safetensors", "*/model*.safetensors"]
_TORCH_WEIGHTS = ["pytorch_model*.bin", "*/pytorch_model*.bin"]


class HubMixin:
    """`push_to_hub` for everything that has `save_pretrained(folder)`."""

    @staticmethod
    def split_hub_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
        """Removes the Hub's arguments from `kwargs` and returns them."""
        return {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **save_kwargs,
    ) -> str:
        """Saves into a temporary folder and uploads it.

        Args:
            repo_id (`str`): The repository, `name` or `namespace/name`; it is created when missing.
            commit_message (`str`, *optional*): Defaults to "Upload merged model".
            private (`bool`, *optional*): Whether a new repository is private.
            token (`bool` or `str`, *optional*): The access token; the stored one by default.
            revision (`str`, *optional*): The branch to push to.
            create_pr (`bool`): Open a pull request instead of pushing.
            save_kwargs: Passed on to `save_pretrained`.

        Returns:
            `str`: The URL of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "upload"
            self.save_pretrained(target, **save_kwargs)
            return upload_folder(
                target,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder to a model repository, which is created when missing. Returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload merged model",
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit)


def is_local(name_or_path: str | Path) -> bool:
    """Whether the name is meant as a path: it exists, or can be no Hub id (absolute, `./`, `../`, `~`, more than one slash)."""
    text = os.fspath(name_or_path)
    return (
        os.path.exists(os.path.expanduser(text))
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or os.sep != "/"
        and os.sep in text
    )


def fetch_file(name_or_path: str | Path, filename: str, **hub_kwargs) -> Path:
    """The local path of one file of a folder or Hub repository.

    Raises:
        CheckpointError: Neither exists or the Hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if is_local(name_or_path):
        candidate = path / (hub_kwargs.get("subfolder") or "") / filename
        if not candidate.is_file():
            raise CheckpointError(f"No file '{filename}' in '{name_or_path}'.")
        return candidate
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(os.fspath(name_or_path), filename, **hub_kwargs))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(_unreachable(name_or_path, error)) from error


def fetch_folder(name_or_path: str | Path, **hub_kwargs) -> tuple[Path, str | None]:
    """The local folder of a model and, for a Hub repository, the commit that its revision resolved to.

    Args:
        name_or_path (`str` or `Path`): A folder or a Hub id.
        hub_kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, `subfolder`.

    Raises:
        CheckpointError: The folder does not exist, or the repository cannot be reached.
    """
    subfolder = hub_kwargs.pop("subfolder", None) or ""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path / subfolder, None
    if is_local(name_or_path):
        raise CheckpointError(f"The folder '{name_or_path}' does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = os.fspath(name_or_path)
    try:
        folder = Path(snapshot_download(name, allow_patterns=_OTHER_FILES + _SAFE_WEIGHTS, **hub_kwargs))
        if not any((folder / subfolder).glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=_OTHER_FILES + _TORCH_WEIGHTS, **hub_kwargs))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(_unreachable(name_or_path, error)) from error
    return folder / subfolder, folder.name


def _unreachable(name_or_path: str | Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"'{name_or_path}' is neither a local folder nor a Hub repository that can be read ({reason}). "
        "Check the spelling, or your token for a private repository."
    )
