"""Folders become model repositories of the Hugging Face Hub, and come back. Knows nothing of what is in them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import huggingface_hub
from huggingface_hub import ModelHubMixin

from t2l import hub
from t2l.errors import UploadError, first_line


class HubFolder(ModelHubMixin):
    """What is saved as a folder, and so becomes a repository of the Hub."""

    # The mixin would otherwise collect the arguments of every new object, and copy all tensors to do so.
    _hub_mixin_config: ClassVar[dict[str, Any]] = {}

    def push_to_hub(self, repo_id: str, *, dtype: Any = None, **options: Any) -> str:
        """Uploads this as a repository of the Hub.

        Args:
            repo_id: `name` or `organisation/name`; the repository is made if it is not there.
            dtype: Type of the saved tensors; as `save_pretrained` has it, if absent.
            options: `token`, `private`, `revision`, `commit_message` and `create_pr`.

        Returns:
            Address of the commit.

        Raises:
            UploadError: if the Hub does not take it.
        """
        with TemporaryDirectory() as parent:
            folder = Path(parent) / "folder"
            self._write_for_hub(folder, **({} if dtype is None else {"dtype": dtype}))
            return push_folder(folder, repo_id, **options)

    def _write_for_hub(self, folder: Path, **options: Any) -> None:
        """Writes what is uploaded."""
        self.save_pretrained(folder, **options)


class SharedLibrary:
    """A folder of many adapters, which becomes a repository of the Hub and comes back from there.

    Classes with this have a `folder` and open one by `open`; the card stands in the folder already.
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Reads what the folder says of itself."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, reference: str | Path, **fetch: Any) -> Self:
        """Opens a library that is on this machine or on the Hub.

        Args:
            reference: The folder, or a Hub id.
            fetch: `revision`, `token`, `cache_dir` and `local_files_only`, as the Hub's client takes them.

        Raises:
            CheckpointError: if it is damaged or no library of this kind.
            ModelNotFoundError, DownloadError: if it cannot be had.
        """
        return cls.open(hub.resolve_library(str(reference), **fetch))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the folder; arguments and result as of `push_folder`."""
        return push_folder(self.folder, repo_id, **options)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload by text-to-lora",
    create_pr: bool = False,
) -> str:
    """Upload a folder as a model repository of the Hub, which is made if it is not there.

    Args:
        folder: What is uploaded.
        repo_id: `name` or `organisation/name`.
        token: As `huggingface_hub` takes it; None means the token that is saved, if there is one.
        private: Whether a new repository is private; None means the organisation's default.
        revision: Branch; None means the main one.
        commit_message: Message of the commit.
        create_pr: Whether a pull request is opened in place of a commit.

    Returns:
        The address of the commit.

    Raises:
        UploadError: The Hub does not take it.
    """
    api = huggingface_hub.HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        )
    # As for downloads: which errors the client lets through differs by the version of its HTTP library.
    except Exception as error:
        raise UploadError(
            f"cannot upload to {repo_id} on the Hugging Face Hub: {first_line(error)}. Run `hf auth login` with a "
            "token that may write there, and check the network"
        ) from error
