"""The Hub: finding files and folders locally or there, and pushing. Local paths never touch the network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError, ConfigError, OutputError, suggest


HEADS_FOLDER = "heads"
MEMBERS_FOLDER = "members"
CONFIG_NAME = "merge_config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"  # PEFT's
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
_SAFE_WEIGHTS = [
    "model*.safetensors",
    "*/model*.safetensors",
    "adapter_model.safetensors",
    "*/adapter_model.safetensors",
    "*/surgery.safetensors",
    "twin/*.safetensors",
    "*/twin/*.safetensors",
]
_TORCH_WEIGHTS = ["pytorch_model*.bin", "*/pytorch_model*.bin", "adapter_model.bin", "*/adapter_model.bin"]


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

        Raises:
            OutputError: The Hub refuses, or cannot be reached.
        """
        upload = {
            "commit_message": commit_message,
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
        }
        return self._save_and_upload(lambda folder: upload_folder(folder, repo_id, **upload), **save_kwargs)

    def _save_and_upload(self, upload: Callable[[Path], str], **save_kwargs) -> str:
        """Uploads what `save_pretrained` writes into a temporary folder."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "upload"
            self.save_pretrained(target, **save_kwargs)
            return upload(target)


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    path_in_repo: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a folder to a model repository. Repository and branch are made when missing. Returns the URL of the commit.

    Args:
        folder (`Path`): What is uploaded.
        repo_id (`str`): The repository, `name` or `namespace/name`.
        path_in_repo (`str`, *optional*): Where to in the repository; its root by default.
        commit_message, private, token, revision, create_pr: As in [`~Merger.push_to_hub`].

    Raises:
        OutputError: The Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=commit_message or "Upload merged model",
            revision=revision,
            create_pr=create_pr,
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise OutputError(
            f"Cannot push to '{repo_id}': {_reason(error)}. Check the name and the network, and log in with `hf auth login`."
        ) from error
    return str(commit)


def push_folder(folder: str | Path, repo_id: str, **upload_kwargs) -> str:
    """Uploads a merged folder, or a folder with a recipe, as it is.

    Args:
        folder (`str` or `Path`): Written by `save_pretrained`.
        repo_id (`str`): The repository.
        upload_kwargs: `commit_message`, `private`, `token`, `revision`, `create_pr`.

    Returns:
        `str`: The URL of the commit.
    """
    folder = merged_folder(folder)
    return upload_folder(folder, repo_id, **upload_kwargs)


def push_heads(folder: str | Path, repo_id: str, tasks: Sequence[str], **upload_kwargs) -> str:
    """Uploads heads that a merged folder keeps per task, beside the backbone that the repository has.

    Args:
        folder (`str` or `Path`): Written by `save_pretrained`.
        repo_id (`str`): The repository.
        tasks (`Sequence[str]`): Whose heads.
        upload_kwargs: `commit_message`, `private`, `token`, `revision`, `create_pr`.

    Returns:
        `str`: The URL of the last commit.
    """
    heads = merged_folder(folder) / HEADS_FOLDER
    known = sorted(path.name for path in heads.iterdir() if path.is_dir()) if heads.is_dir() else []
    unknown = [task for task in tasks if task not in known]
    if unknown or not tasks:
        wanted = f"'{unknown[0]}'" if unknown else "no task"
        raise ConfigError(
            f"'{folder}' keeps no head for {wanted}.{suggest(unknown[0], known) if unknown else ''} "
            f"Tasks: {', '.join(known) or 'none'}."
        )
    message = upload_kwargs.pop("commit_message", None)
    for task in tasks:
        commit = upload_folder(
            heads / task,
            repo_id,
            path_in_repo=f"{HEADS_FOLDER}/{task}",
            commit_message=message or f"Upload the head of {task}",
            **upload_kwargs,
        )
    return commit


def merged_folder(folder: str | Path, *needed: str) -> Path:
    """A folder that this library wrote; anything else is not uploaded or described by accident.

    Args:
        folder (`str` or `Path`): The folder.
        needed (`str`): Files that have to be there beside the recipe.

    Raises:
        CheckpointError: It does not exist, or lacks some of them.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"The folder '{folder}' does not exist.")
    missing = [name for name in (CONFIG_NAME, *needed) if not (path / name).is_file()]
    if missing:
        recipe = "" if needed else " and no recipe"
        raise CheckpointError(
            f"'{folder}' holds no {' and no '.join(missing)}, so it is no merged model{recipe}: name a folder that `hf-merge run` or "
            "Merger.save_pretrained wrote."
        )
    return path


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
    subfolder = _checked_subfolder(hub_kwargs.get("subfolder"))
    if is_local(name_or_path):
        candidate = path / subfolder / filename
        if not candidate.is_file():
            raise CheckpointError(f"No file '{filename}' in '{name_or_path}'.")
        return candidate
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return Path(hf_hub_download(os.fspath(name_or_path), filename, **hub_kwargs))
    except (HTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(_unreachable(name_or_path, error)) from error


def fetch_folder(name_or_path: str | Path, *, weights: bool = True, **hub_kwargs) -> tuple[Path, str | None]:
    """The local folder of a model and, for a Hub repository, the commit that its revision resolved to.

    Args:
        name_or_path (`str` or `Path`): A folder or a Hub id.
        weights (`bool`): Whether the weights are wanted too.
        hub_kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, `subfolder`.

    Raises:
        CheckpointError: The folder does not exist, or the repository cannot be reached.
    """
    subfolder = _checked_subfolder(hub_kwargs.pop("subfolder", None))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path / subfolder, None
    if is_local(name_or_path):
        raise CheckpointError(f"The folder '{name_or_path}' does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    name = os.fspath(name_or_path)
    try:
        wanted = _OTHER_FILES + (_SAFE_WEIGHTS if weights else [])
        folder = Path(snapshot_download(name, allow_patterns=wanted, **hub_kwargs))
        if weights and not any((folder / subfolder).glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=_OTHER_FILES + _TORCH_WEIGHTS, **hub_kwargs))
    except (HTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(_unreachable(name_or_path, error)) from error
    return folder / subfolder, folder.name


def _checked_subfolder(subfolder: str | None) -> str:
    """A recipe may say which folder inside of a repository is meant, and none beside it."""
    subfolder = subfolder or ""
    parts = PurePosixPath(subfolder).parts
    if subfolder.startswith("/") or ".." in parts or any(character in subfolder for character in "\\\0:"):
        raise ConfigError(f"subfolder={subfolder!r} is no folder inside of the model's.")
    return subfolder


def _reason(error: Exception) -> str:
    """The first line of an error."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _unreachable(name_or_path: str | Path, error: Exception) -> str:
    return (
        f"'{name_or_path}' is neither a local folder nor a Hub repository that can be read ({_reason(error)}). "
        "Check the spelling and the network, or your token for a private repository."
    )
