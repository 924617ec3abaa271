"""Models on the Hugging Face Hub: what is named, what is fetched, what went wrong.

Only safetensors weights and the files beside them are fetched, settings first, so that a repository
nothing can be done with is refused before its weights are on their way. What is in the local cache
is not fetched again; with ``HF_HUB_OFFLINE=1`` (or without a network) the cache is all there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from compressor.errors import CheckpointError, InputError, OutputError

_REF = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>\w[\w./-]*))?")
_IN_CACHE = re.compile(r"models--(?P<repo>.+)/snapshots/(?P<commit>[0-9a-f]{40})$")
_SETTINGS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "SHA256SUMS*", "README.md")
_DELTAS = "impart-deltas"  # folder in the Hub's cache; an artifact must not consist of links


@dataclass(frozen=True, slots=True)
class HubRef:
    """``org/name`` or ``org/name@revision``; a revision is a branch, a tag or a commit."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_ref(text: str) -> HubRef | None:
    """Read a Hub id with or without a revision; None if it cannot be one."""
    match = _REF.fullmatch(text)
    return match and HubRef(match["repo"], match["revision"])


def with_revision(name: str, revision: str | None, option: str = "--revision") -> str:
    """Return ``name@revision``. Raises InputError where a revision makes no sense."""
    if revision is None:
        return name
    if Path(name).exists():
        raise InputError(f"{option} is for Hub ids; {name} is a local directory")
    if parse_ref(name) is not None and "@" in name:
        raise InputError(f"{name} names a revision already; leave {option} out")
    if parse_ref(f"{name}@{revision}") is None:
        raise InputError(f"{option} {revision}: not a branch, tag or commit")
    return f"{name}@{revision}"


def cached_ref(path: Path) -> HubRef | None:
    """Return the repository and commit of a snapshot directory in the Hub's cache, or None."""
    match = _IN_CACHE.search(path.resolve().as_posix())
    return match and HubRef(match["repo"].replace("--", "/", 1), match["commit"])


def hub_cache() -> Path:
    """Return the folder that keeps what came from the Hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def fetch_settings(ref: HubRef) -> Path:
    """Fetch everything small of the repository and return its snapshot directory."""
    return _snapshot(ref, _SETTINGS)


def fetch_files(ref: HubRef, snapshot: Path, names: Sequence[str]) -> None:
    """Fetch further files of the commit whose snapshot directory is given; all must exist."""
    commit = cached_ref(snapshot) or ref
    _snapshot(HubRef(ref.repo, commit.revision), names, asked=ref)
    for name in names:
        if not (snapshot / name).is_file():
            raise CheckpointError(
                f"{ref}: the repository has no {name}, so no safetensors weights; pickles "
                "are never fetched. Convert it once (from_pretrained, save_pretrained)"
            )


def fetch_artifact(ref: HubRef, snapshot: Path) -> Path:
    """Fetch a delta artifact as plain files and return their directory."""
    commit = cached_ref(snapshot) or ref
    folder = f"{ref.repo.replace('/', '--')}@{commit.revision or 'main'}"
    local = hub_cache() / _DELTAS / folder
    names = (*_SETTINGS, "delta.safetensors")
    return _snapshot(HubRef(ref.repo, commit.revision), names, asked=ref, local_dir=local)


def download(ref: HubRef, folder: Path, names: Sequence[str]) -> None:
    """Fetch those of these files that there are, as plain files, into `folder`."""
    _snapshot(ref, names, local_dir=folder)


def file_names(repo: str, revision: str | None = None) -> list[str]:
    """Return the names of all files of a repository; empty if there is no such branch yet."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    try:
        return list(HfApi().list_repo_files(repo, revision=revision))
    except RevisionNotFoundError:
        return []
    except (HfHubHTTPError, OSError, ValueError) as error:
        _refuse_push(HubRef(repo, revision), error)


def commit_files(
    ref: HubRef,
    folder: Path,
    names: Sequence[str],
    *,
    replaced: Sequence[str],
    check: Callable[[Sequence[str]], None],
    private: bool | None = None,
) -> str:
    """Put files of a folder into a repository in one commit; return the commit's address.

    replaced  other files of these names are removed in the same commit
    check     is told the files that are there already, and may refuse
    private   of a repository that is made
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(ref.repo, private=private, exist_ok=True)
        there = file_names(ref.repo, ref.revision)
        check(there)
        if ref.revision is not None:
            api.create_branch(ref.repo, branch=ref.revision, exist_ok=True)
        gone = sorted(set(there).intersection(replaced).difference(names))
        commit = api.create_commit(
            ref.repo,
            [
                *(CommitOperationAdd(name, folder / name) for name in names),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message="Delta artifact",
            revision=ref.revision,
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        _refuse_push(ref, error)
    return str(commit.commit_url)


def _refuse_push(ref: HubRef, error: Exception) -> NoReturn:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if constants.is_offline_mode():
        remedy = "HF_HUB_OFFLINE is set"
    elif status in (401, 403):
        remedy = "the Hub wants a token that may write there: set HF_TOKEN"
    else:
        remedy = f"the Hub did not take it ({type(error).__name__}); check the network and the name"
    raise OutputError(f"cannot push to {ref}: {remedy}") from error


def _snapshot(
    ref: HubRef,
    patterns: Sequence[str],
    *,
    asked: HubRef | None = None,
    local_dir: Path | None = None,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # `*` of a pattern matches slashes too: folders hold other formats of the same model.
    try:
        return Path(
            snapshot_download(
                ref.repo,
                revision=ref.revision,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*"],
                local_dir=local_dir,
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        _refuse(asked or ref, error)


def _refuse(ref: HubRef, error: Exception) -> NoReturn:
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            remedy = "it is gated: accept its terms on the Hub and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            remedy = "the Hub has no such repository (a private one needs HF_TOKEN)"
        case errors.RevisionNotFoundError():
            remedy = f"the repository has no revision {ref.revision!r}"
        case errors.LocalEntryNotFoundError() if constants.is_offline_mode():
            remedy = "HF_HUB_OFFLINE is set and the Hub's cache does not hold all of it"
        case errors.LocalEntryNotFoundError():
            remedy = "the Hub cannot be reached and its cache does not hold all of it"
        case _:
            remedy = f"the Hub did not give it ({type(error).__name__}); check the network"
    raise CheckpointError(f"{ref}: no such directory here, and {remedy}") from error
