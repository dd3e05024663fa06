"""Checkpoints on the Hub: a repository holds the files of a checkpoint folder."""

import os
import re
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from vca.checkpoint import AUTOENCODER_FILES, FILES, CheckpointError, load_folder, place, sha256

NO_TOKEN = "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN or token=. Nothing was sent."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
REPO_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)

TIMEOUT = 10  # seconds without an answer of the Hub
SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


class PushError(RuntimeError):
    """A repository that cannot be written; the message says why. What was there before is still there."""


def load(
    path_or_repo: str | os.PathLike,
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Loads a trained model, in evaluation mode, from a checkpoint folder or from the Hub.

    The model carries `label_names` (a list of class names) and `training_history` (what `save` was given as
    `training`); a classifier also `pretrained_cfg` (its preprocessing, for timm's `create_transform`).

    Args:
        path_or_repo: a folder, or else a repository as "user/repo" or "hf-hub:user/repo", either with "@revision".
        device: where the model shall be.
        revision, token, cache_dir, local_files_only: of a repository, as in huggingface_hub: a branch, tag or commit;
            False for no token; another folder than HF_HUB_CACHE; True to look in the cache alone, as HF_HUB_OFFLINE=1.

    Raises:
        CheckpointError: a file is missing or damaged, a config field is unknown, a tensor is missing, left over, of the
            wrong shape or type, NaN or infinite, a file is not what `save` wrote, or the repository cannot be had.
    """
    folder = fetch(path_or_repo, revision, token, cache_dir, local_files_only)
    try:
        return load_folder(folder).to(device)
    except CheckpointError as error:
        if folder == Path(path_or_repo):
            raise
        message = str(error).replace(str(folder), str(path_or_repo))  # says more than a place in the cache
        raise CheckpointError(message) from error.__cause__


def fetch(
    path_or_repo: str | os.PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint, on this machine; a repository's is downloaded to the cache if it is not there.

    Without a network the newest copy in the cache is taken. Arguments and errors are those of `load`.
    """
    name = os.fspath(path_or_repo)
    if name and not name.startswith("hf-hub:") and Path(name).is_dir():
        return Path(name)
    match = REPO_ID.fullmatch(name.removeprefix("hf-hub:")) if isinstance(path_or_repo, str) else None
    if not match:
        raise CheckpointError(f"{name}: no such checkpoint folder, and not a repository such as user/name.")
    repo, revision = match["repo"], revision or match["revision"]
    if revision is not None and not _is_inside(revision):
        raise CheckpointError(f"{name}: {revision!r} is not the name of a revision.")
    shown = f"{repo}@{revision}" if revision else repo
    no_folder = "" if name.startswith("hf-hub:") else "no such folder, and "
    unreachable = None
    if not local_files_only:
        try:
            listing = HfApi(token=token).model_info(repo, revision=revision, timeout=TIMEOUT).siblings
        except (HTTPError, OSError, HFValidationError) as error:
            if reason := _refusal(error, no_folder):
                raise CheckpointError(f"{shown}: {reason}") from error
            unreachable = error
        else:
            _check_listing(shown, [file.rfilename for file in listing])
    try:
        folder = snapshot_download(
            repo, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=[*FILES, *AUTOENCODER_FILES],
            local_files_only=local_files_only or unreachable is not None,
        )  # fmt: skip
    except LocalEntryNotFoundError as error:
        why = f"the Hub cannot be reached ({unreachable})" if unreachable else "the network is not to be used"
        raise CheckpointError(f"{shown}: {no_folder}{why}, and the cache has no complete copy.") from error
    except (HTTPError, OSError, HFValidationError) as error:
        raise CheckpointError(f"{shown}: the download failed ({error}).") from error
    return Path(folder)


def _is_inside(path: str) -> bool:
    """Whether a relative path stays below where it starts."""
    return not path.startswith("/") and "\\" not in path and ".." not in PurePosixPath(path).parts


def _refusal(error: Exception, no_folder: str) -> str | None:
    """What the Hub's answer means, or None if there was no answer or the Hub is out of order."""
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision."
    if isinstance(error, HFValidationError):
        return f"not the name of a repository ({error})."
    response = getattr(error, "response", None)
    if response is not None and response.headers.get("X-Error-Message", "").startswith("Invalid credentials"):
        return "the Hub does not accept the token."
    if isinstance(error, RepositoryNotFoundError) or (response is not None and response.status_code in (401, 403)):
        return (
            f"{no_folder}no repository on the Hub that may be read. If it is private or gated, log in with "
            "`hf auth login`, or set HF_TOKEN or token=."
        )
    return None


def _check_listing(shown: str, files: list[str]) -> None:
    """Refuses a repository for the names of its files, before any is downloaded."""
    if outside := [file for file in files if not _is_inside(file)]:
        raise CheckpointError(f"{shown}: the file name {outside[0]!r} leads out of the folder; nothing was downloaded.")
    if "model.safetensors" not in files:
        pickles = [file for file in files if file.endswith(PICKLES)]
        instead = f"; {pickles[0]} is a pickle, which may run code and is not read" if pickles else ""
        raise CheckpointError(f"{shown}: the repository has no model.safetensors{instead}.")


def push(
    path: str | os.PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Publishes a checkpoint folder as a repository of the Hub, in one commit.

    Only what has changed is sent, so that an interrupted push goes on where it was. On the card, the repository's name
    takes the place of the folder's.

    Args:
        path: a folder that `load` accepts, with a card.
        repo: "user/name"; made if it is not there.
        private: make it private; one that is there and public is refused.
        revision: a branch; made if it is not there.
        token: as in `load`.

    Returns:
        The address of the commit, which is the one before if nothing has changed.

    Raises:
        CheckpointError: the folder must not be published.
        PushError: there is no token, the Hub refuses it, or the connection breaks.
    """
    files = published_files(path, repo)
    return upload(files, repo, private=private, revision=revision, token=token)


def published_files(path: str | os.PathLike, repo: str) -> dict[str, Path | bytes]:
    """What `push` would send, by name in the repository.

    Raises:
        CheckpointError: `load` does not accept the folder, it has no card, or it holds a pickle or a link to elsewhere.
    """
    folder = Path(path)
    load(folder)
    if not (folder / "README.md").is_file():
        raise CheckpointError(f"{folder}: no README.md; `python -m training.card` writes the card.")
    files: dict[str, Path | bytes] = {}
    for file in sorted(file for file in folder.rglob("*") if not file.is_dir() and not file.name.startswith(".")):
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{file}: is a link that leads out of the folder; nothing was sent.")
        if file.name.endswith(PICKLES):
            raise CheckpointError(f"{file}: is a pickle; a repository holds safetensors alone. Nothing was sent.")
        files[file.relative_to(folder).as_posix()] = file
    card = (folder / "README.md").read_text(encoding="utf-8")
    if (stated := SHA256.findall(card)) and sha256(folder / "model.safetensors") not in stated:
        raise CheckpointError(f"{folder}: README.md is of other weights; `python -m training.card` writes the card.")
    local = re.escape(place(folder)) + r"(?![\w.-])"
    files["README.md"] = re.sub(local, repo, re.sub(f"local-dir:{local}", f"hf-hub:{repo}", card)).encode()
    return files


def upload(
    files: dict[str, Path | bytes],
    repo: str,
    *,
    kind: str = "model",
    private: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    owned: tuple[str, ...] = (),
) -> str:
    """Sends files to a repository of the Hub in one commit; arguments, result and errors are those of `push`.

    Args:
        files: content, or the file that holds it, by name in the repository.
        kind: "model" or "space".
        owned: folders of the repository, such as "app/", of which nothing but `files` shall stay.
    """
    if token is False or not (token or get_token()):
        raise PushError(NO_TOKEN)
    api = HfApi(token=token)
    try:
        api.create_repo(
            repo,
            repo_type=kind,
            private=private or None,
            exist_ok=True,
            space_sdk="gradio" if kind == "space" else None,
        )
        if private and not api.repo_info(repo, repo_type=kind).private:
            raise PushError(
                f"{repo}: is there already and public; make it private on its page first. Nothing was sent."
            )
        if revision is not None:
            api.create_branch(repo, repo_type=kind, branch=revision, exist_ok=True)
        changes = [CommitOperationAdd(name, content) for name, content in files.items()]
        if owned:
            there = api.list_repo_files(repo, repo_type=kind, revision=revision)
            stale = [name for name in there if name.startswith(owned) and name not in files]
            changes += [CommitOperationDelete(name, is_folder=False) for name in stale]
        return api.create_commit(
            repo, changes, commit_message=f"Publish {kind}", repo_type=kind, revision=revision
        ).commit_url
    except PushError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            reason = "the Hub does not accept the token" if status == 401 else "the token may not write there"
        elif isinstance(error, ValueError):
            reason = f"the Hub refuses it: {error}"
        else:
            reason = f"the upload was interrupted; repeat it to go on ({error.__cause__ or error})"
        raise PushError(f"{repo}: {reason}.") from error
