"""Upload a folder to the model hub: what would fail is found before an export's work begins, the rest after it.

push = checked(Push("name/model", private=True))    # asks the hub who the token belongs to
...                                                 # export into a folder, compare it
url = upload(folder, push)                          # one commit, everything or nothing
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import HubError

__all__ = ["Push", "checked", "upload"]


@dataclass(frozen=True, slots=True)
class Push:
    """Where a folder goes and how, as huggingface_hub's ``create_repo`` and ``upload_folder`` take it.

    Attributes:
        repo_id: "owner/name", or a name in the account of the token.
        token: None: HF_TOKEN or the one that ``hf auth login`` keeps.
        private: None: as the account has it for new repositories; one that is there stays as it is.
        commit_message, commit_description: of the commit.
        create_pr: open a pull request in place of writing to ``revision``.
        revision: branch, made where it is not there; None: main.
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    commit_message: str | None = None
    commit_description: str | None = None
    create_pr: bool = False
    revision: str | None = None


def checked(push: Push) -> Push:
    """Return ``push`` with the whole name of its repository and its token.

    Raises:
        HubError: the name is none, this machine is offline, there is no token, the hub does not take it, the
            repository would be another account's, or both ``create_pr`` and ``revision`` are given.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise HubError(
            f"{push.repo_id} cannot be uploaded: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set. Unset it, or leave "
            "the upload out."
        )
    token = push.token or get_token()
    if not token:
        raise HubError(
            f"{push.repo_id} cannot be uploaded without a token. Set HF_TOKEN, log in with `hf auth login`, or give "
            "token=..."
        )
    if push.create_pr and push.revision is not None:
        raise HubError(f"create_pr=True opens a pull request to main: leave revision={push.revision!r} out.")
    with _readable(push.repo_id):
        _check_name(push.repo_id)
        account = HfApi().whoami(token=token)
    owner, _, name = push.repo_id.rpartition("/")
    owners = [account["name"], *(group["name"] for group in account.get("orgs", ()))]
    if owner and owner not in owners and not push.create_pr:
        raise HubError(
            f"{push.repo_id} would belong to {owner}, and the token to {', '.join(owners)}. Give repo_id, or "
            "create_pr=True for a pull request."
        )
    return replace(push, repo_id=f"{owner or account['name']}/{name}", token=token)


def upload(folder: Path, push: Push) -> str:
    """Upload the files of ``folder``, to a repository that is made where it is not there, and return its address.

    Raises:
        HubError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=push.token)
    with _readable(push.repo_id):
        api.create_repo(push.repo_id, private=push.private, exist_ok=True)
        if push.revision is not None:
            api.create_branch(push.repo_id, branch=push.revision, exist_ok=True)
        done = api.upload_folder(
            folder_path=folder,
            repo_id=push.repo_id,
            commit_message=push.commit_message or "Upload a model trained with tunesmith",
            commit_description=push.commit_description,
            create_pr=push.create_pr,
            revision=push.revision,
        )
    return done.pr_url or f"{api.endpoint}/{push.repo_id}"


def _check_name(name: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(name)


@contextmanager
def _readable(name: str) -> Generator[None]:
    """Turn what huggingface_hub raises into one sentence; its messages hold addresses and no token."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    transport: Any = HfHubHTTPError.__mro__[1]  # the error of the HTTP library that huggingface_hub stands on
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{name!r} is no name of a repository: {error}") from error
    except (transport, ConnectionError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise HubError(f"the hub does not take {name}: {said[:300]}") from error
