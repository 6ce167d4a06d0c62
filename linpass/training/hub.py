"""The finished model on the Hugging Face Hub: the questions before the training, the push after it."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from linpass.errors import InputError

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def check_hub(
    repo_id: str | None,
    output_dir: str | Path,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """The full name OWNER/NAME of a repository that exists on the Hub and that the token may write to.

    Meant for the moment before a training, so that no wrong name or token shows up after days. The repository, and
    the branch ``revision``, are made where they are missing. Several processes: one of them asks.

    Args:
        repo_id: NAME or OWNER/NAME; without OWNER it is the token's, None is the name of ``output_dir``.
        token: None is the one of HF_TOKEN or of ``hf auth login``.
        private: of a new repository; None is the owner's default.
        revision: the branch to push to; None is main.

    Raises:
        InputError: the name breaks the Hub's rules, there is no token, it may not write there, or no network.
    """
    name = Path(output_dir).expanduser().resolve().name if repo_id is None else repo_id
    try:
        validate_repo_id(name)
    except HFValidationError:
        origin = " (the name of output_dir)" if repo_id is None else ""
        raise InputError(
            f"hub_model_id={name!r}{origin} must be NAME or OWNER/NAME, at most 96 letters, digits, '-', '_' and '.', "
            "no '--' or '..', and no '-' or '.' at either end"
        ) from None
    token = token or get_token()
    if token is None:
        raise InputError("hub_token=None must be a token that may write when push_to_hub=True; or: hf auth login")
    api = HfApi(token=token)
    try:
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        # An existing repository passes create_repo whoever asks.
        api.auth_check(name, write=True)
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(name, branch=revision, exist_ok=True)
    except Exception as error:  # the network's errors are of another library in each version of huggingface_hub
        raise InputError(_refusal(error, name, api.endpoint)) from error
    return name


def push_folder(folder: str | Path, repo_id: str, token: str | None = None, revision: str | None = None) -> str:
    """Upload a finished model, every file of its folder, as one commit.

    Weights of an older model that the new one does not replace are deleted by the same commit: a single file left
    beside new shards would be loaded instead of them.

    Args:
        folder: is only read.
        repo_id: OWNER/NAME as :func:`check_hub` gave it.

    Returns:
        The address of the repository.

    Raises:
        InputError: the upload failed; it names the folder, where nothing is lost, and the command that uploads it.
    """
    folder = Path(folder).expanduser().resolve()
    api = HfApi(token=token)
    try:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Model trained with linpass",
            delete_patterns=WEIGHTS,
        )
    except Exception as error:  # whatever it was, the model is trained, and the message says where it is
        command = ["hf", "upload", repo_id, str(folder), "."]
        command += ["--revision", revision] if revision is not None else []
        raise InputError(
            f"push_to_hub=True: {_refusal(error, repo_id, api.endpoint)}. Nothing is lost: the model is complete in "
            f"{str(folder)!r}; to push it later: {shlex.join(command)}"
        ) from error
    return str(commit.repo_url)


def _refusal(error: Exception, repo_id: str, endpoint: str) -> str:
    """What is wrong in the words of the flags; the token itself is never named."""
    said = " ".join(str(error).split())
    if isinstance(error, OfflineModeIsEnabled):
        return "push_to_hub=True must be able to reach the Hub; HF_HUB_OFFLINE=1 forbids it"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return f"push_to_hub=True must be able to reach the Hub; {endpoint} does not answer: {said}"
    if status == 401:
        return f"hub_token=*** must be a valid token of {endpoint}; it was refused: {said}"
    if status == 403:
        return f"hub_model_id={repo_id!r} must be a repository that the token may write to: {said}"
    return f"hub_model_id={repo_id!r}: {endpoint} refused it: {said}"
