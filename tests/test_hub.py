"""The Hub, with a stand-in for its API: what is uploaded where, and one clear error when it refuses."""

from __future__ import annotations

import json
import socket
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from hf_merge import (
    CheckpointError,
    ConfigError,
    LinearConfig,
    MergeConfig,
    MergeError,
    Merger,
    OutputError,
    SurgeryConfig,
    TaskArithmeticConfig,
    TwinConfig,
)
from hf_merge import hub as hub_module
from hf_merge.hub import fetch_file, fetch_folder, push_folder, push_heads

from .methods.helpers_models import models, samples
from .processes import launch
from .testing_utils import Bed, llama_bed, run_cli


@dataclass
class FakeApi:
    """Remembers what it was asked for, and what the folder held at that time."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    token: Any = None
    error: Exception | None = None

    def __call__(self, token: Any = None) -> FakeApi:
        self.token = token
        return self

    def create_repo(self, repo_id: str, **kwargs) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **kwargs}))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"someone/{repo_id}")

    def create_branch(self, repo_id: str, **kwargs) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **kwargs}))

    def upload_folder(self, *, folder_path: Path, **kwargs) -> str:
        files = {
            path.relative_to(folder_path).as_posix(): path.read_bytes()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        }
        self.calls.append(("upload_folder", kwargs | {"files": files}))
        return f"https://huggingface.co/{kwargs['repo_id']}/commit/1"

    @property
    def upload(self) -> dict[str, Any]:
        return next(kwargs for name, kwargs in reversed(self.calls) if name == "upload_folder")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    return fake


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base, experts = models()
    folder = tmp_path_factory.mktemp("hub") / "merged"
    Merger.from_pretrained(experts, TaskArithmeticConfig(), base_model=base).save_pretrained(folder)
    return folder


def test_config_is_uploaded(api: FakeApi) -> None:
    url = LinearConfig(weights=[1.0, 2.0]).push_to_hub("recipe", token="secret", private=True)
    assert url == "https://huggingface.co/someone/recipe/commit/1"
    assert api.token == "secret"
    assert api.calls[0] == ("create_repo", {"repo_id": "recipe", "private": True, "exist_ok": True})
    assert list(api.upload["files"]) == ["merge_config.json"]
    assert json.loads(api.upload["files"]["merge_config.json"])["weights"] == [1.0, 2.0]


def test_merged_model_is_uploaded_with_its_heads(api: FakeApi, merged: Path) -> None:
    base, experts = models()
    merger = Merger.from_pretrained(experts, TaskArithmeticConfig(), base_model=base)
    merger.push_to_hub("me/merged", commit_message="First", create_pr=True)
    assert set(api.upload["files"]) == {
        path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()
    }
    assert "heads/b/model.safetensors" in api.upload["files"]
    assert (api.upload["commit_message"], api.upload["create_pr"]) == ("First", True)


def test_save_and_push_in_one_call(api: FakeApi, tmp_path: Path) -> None:
    _, experts = models()
    merger = Merger.from_pretrained(experts, LinearConfig())
    merger.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved", revision="v1")
    assert ("create_branch", {"repo_id": "me/saved", "branch": "v1", "exist_ok": True}) in api.calls
    assert api.upload["revision"] == "v1"
    assert (tmp_path / "saved" / "config.json").is_file()


def test_folder_is_uploaded_as_it_is(api: FakeApi, merged: Path) -> None:
    push_folder(merged, "me/merged")
    assert api.upload["files"]["config.json"] == (merged / "config.json").read_bytes()
    assert api.upload["path_in_repo"] is None


def test_single_heads_join_a_repository(api: FakeApi, merged: Path) -> None:
    push_heads(merged, "me/merged", ["b"])
    assert api.upload["path_in_repo"] == "heads/b"
    assert set(api.upload["files"]) == {path.name for path in (merged / "heads" / "b").iterdir()}
    assert api.upload["commit_message"] == "Upload the head of b"


@pytest.mark.parametrize("revision", ["refs/pr/3", None])
def test_no_branch_is_made_for_a_pull_request(api: FakeApi, merged: Path, revision: str | None) -> None:
    push_folder(merged, "me/merged", revision=revision)
    assert "create_branch" not in [name for name, _ in api.calls]


def test_only_what_was_merged_is_uploaded(api: FakeApi, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no merged model"):
        push_folder(tmp_path, "me/home")
    with pytest.raises(ConfigError, match="keeps no head for 'bb'.*Did you mean 'b'"):
        push_heads(merged, "me/merged", ["bb"])
    with pytest.raises(ConfigError, match="no task"):
        push_heads(merged, "me/merged", [])
    assert api.calls == []


def _refusal(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    return kind("401 Unauthorized.\nMore lines.", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("error", [_refusal(HfHubHTTPError), OSError("no route to host")])
def test_refusal_is_one_line(api: FakeApi, merged: Path, error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    api.error = error
    with pytest.raises(OutputError, match="Cannot push to 'me/merged': (401 Unauthorized|no route to host)"):
        push_folder(merged, "me/merged")
    assert run_cli(["push", str(merged), "me/merged"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_name_that_is_none(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client checks the name before it asks the network."""
    with pytest.raises(OutputError, match="Cannot push to"):
        push_folder(merged, "not//a--name", token=False)


def test_command_pushes_folder_or_heads(api: FakeApi, merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["push", str(merged), "me/merged", "--revision", "v2", "--private", "-m", "Second"]) == 0
    assert capsys.readouterr().out.strip() == "https://huggingface.co/me/merged/commit/1"
    assert api.calls[0][1]["private"] is True
    assert api.upload["commit_message"] == "Second"
    assert run_cli(["push", str(merged), "me/merged", "--head", "a", "--head", "b"]) == 0
    assert [kwargs["path_in_repo"] for name, kwargs in api.calls if name == "upload_folder"] == [
        None,
        "heads/a",
        "heads/b",
    ]


def test_local_paths_never_reach_the_network(monkeypatch: pytest.MonkeyPatch, merged: Path, tmp_path: Path) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert fetch_folder(merged) == (merged, None)
    assert fetch_file(merged, "config.json") == merged / "config.json"
    for name in (tmp_path / "absent", "./absent", "a/b/c"):
        with pytest.raises(CheckpointError):
            fetch_folder(name)
        with pytest.raises(CheckpointError):
            fetch_file(name, "config.json")


def test_revision_resolves_to_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str], **kwargs) -> str:
        asked.append((name, kwargs, allow_patterns))
        folder = tmp_path / "abc123"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").touch()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder, commit = fetch_folder("me/model", revision="main", token="t")
    assert (folder.name, commit) == ("abc123", "abc123")
    assert asked[0][:2] == ("me/model", {"revision": "main", "token": "t"})
    assert any("safetensors" in pattern for pattern in asked[0][2])
    fetch_folder("me/model", weights=False)
    assert not any("safetensors" in pattern for pattern in asked[1][2])


def test_repository_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args, **kwargs):
        raise _refusal(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="neither a local folder nor a Hub repository.*401"):
        fetch_folder("me/absent")


@pytest.mark.parametrize(
    "config", [TaskArithmeticConfig(), SurgeryConfig(epochs=1), TwinConfig(epochs=1)], ids=lambda one: one.merge_type
)
def test_patterns_cover_what_a_merged_folder_holds(config: MergeConfig, tmp_path: Path) -> None:
    from fnmatch import fnmatch

    base, experts = models()
    data = samples() if config.merge_type != "task_arithmetic" else None
    Merger.from_pretrained(experts, config, base_model=base).save_pretrained(tmp_path / "out", data=data)
    patterns = hub_module._OTHER_FILES + hub_module._SAFE_WEIGHTS
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        names = [path.relative_to(tmp_path / "out").as_posix()]
        if path.suffix == ".safetensors":
            names.append(path.relative_to(tmp_path).as_posix())  # the same in a folder of a repository
        for name in names:
            assert any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize("name", ["me/nowhere", "not a valid id", "me/x--y..z"])
def test_names_that_cannot_be_fetched_are_one_clear_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that no repository can have, and a network that is down."""
    from huggingface_hub.errors import HTTPError

    def unreachable(*args, **kwargs):
        huggingface_hub.utils.validate_repo_id(args[0])
        raise HTTPError("connection refused")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    for fetch in (fetch_folder, lambda one: fetch_file(one, "merge_config.json")):
        with pytest.raises(CheckpointError, match="neither a local folder nor a Hub repository"):
            fetch(name)


# -- in a job of several processes ------------------------------------------------------------------------------------


def push_as_rank(bed: Bed, folder: Path, hosts: int, error: Exception | None, rank: int) -> None:
    """Pushes on every rank, leaves what it gave and what the API was asked for."""
    api = FakeApi(error=error)
    huggingface_hub.HfApi = api
    tempfile.tempdir = str(folder / "temporary")
    socket.gethostname = lambda: f"host{rank % hosts}"
    merger = Merger.from_pretrained(bed.experts, TaskArithmeticConfig(), base_model=bed.base)
    try:
        given = merger.push_to_hub("me/merged", private=True, max_shard_size="20KB")
    except (MergeError, OutputError) as failure:
        given = f"{type(failure).__name__}: {failure}"
    asked = [(name, kwargs.get("private"), sorted(kwargs.get("files", ()))) for name, kwargs in api.calls]
    done = {"given": given, "asked": asked, "ranks": len(merger.report.ranks) if merger.report else None}
    (folder / f"rank{rank}.json").write_text(json.dumps(done))


def push_in_job(bed: Bed, folder: Path, hosts: int = 1, error: Exception | None = None) -> list[dict[str, Any]]:
    (folder / "temporary").mkdir()
    _, logs = launch(["--version"], 2, folder / "logs", partial(push_as_rank, bed, folder, hosts, error))
    assert all((folder / f"rank{rank}.json").exists() for rank in range(2)), logs
    assert not list((folder / "temporary").glob("*/upload*")), "the temporary folder is removed"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("hosts", [1, 2])
def test_rank_0_uploads_and_the_others_wait(hosts: int, tmp_path: Path) -> None:
    bed = llama_bed(tmp_path / "bed")
    first, second = push_in_job(bed, tmp_path, hosts)
    assert first["given"] == second["given"] == "https://huggingface.co/me/merged/commit/1"
    bed.merge(TaskArithmeticConfig(), max_shard_size="20KB")
    files = sorted(path.relative_to(bed.out).as_posix() for path in bed.out.rglob("*") if path.is_file())
    assert first["asked"] == [["create_repo", True, []], ["upload_folder", None, files]]
    assert second["asked"] == []
    assert first["ranks"] == second["ranks"] == (2 if hosts == 1 else 0), "ranks of one host divide the merge"


def test_refused_upload_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    first, second = push_in_job(llama_bed(tmp_path / "bed"), tmp_path, error=OSError("no route to host"))
    assert first["given"].startswith("OutputError: Cannot push to 'me/merged': no route to host")
    assert second["given"].startswith("MergeError: Rank 0 on host0 could not upload: Cannot push to 'me/merged'")
