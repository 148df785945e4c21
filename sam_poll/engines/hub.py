"""Models of the Hugging Face hub: their names, their download, and their place in the hub's cache.

The package `huggingface_hub` (extra `hf`) does the work; it reads HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE of the environment. Loading a model never downloads: `local_folder`
takes what `download` has put into the cache. A model is used at the commit that was downloaded
first, whatever the publisher adds later, until another revision is named: `owner/name@revision`.

Only configurations and weights in the safetensors format are downloaded, which cannot run code.

Limitations: the hub's SHA-256 of a file is known only where the hub keeps it as a large file, which
it does for weights.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_poll.core import missing_library
from sam_poll.core.errors import ModelError
from sam_poll.engines.download import Progress, sha256_of

# What is downloaded of a repository.
PATTERNS = ("*.json", "*.safetensors")
# `owner/name` or `owner/name@revision`, as the hub allows them.
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,255}))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAIN = "main"


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository of the hub.

    `revision` is a commit, a branch or a tag; None: the commit that was downloaded first.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True, slots=True)
class HubEntry:
    """What is known of a model of the hub without asking it; `size` is approximate, in bytes.

    `terms` are the limits of a licence that is not a free one. `gated`: the hub gives the model to
    those only who have accepted its licence, and who send their token.
    """

    family: str
    size: int
    license: str
    terms: str = ""
    gated: bool = False


# The models that `sam-poll models list` shows. Others of their families can be named, too.
MODELS = {
    "yonigozlan/EdgeTAM-hf": HubEntry("edgetam", 56_000_000, "Apache-2.0"),
    "facebook/sam3": HubEntry(
        "sam3",
        3_440_000_000,
        "SAM License",
        "not a free licence: it must be passed on with the model, and forbids military use, use "
        "for weapons, and nuclear use; read it at https://huggingface.co/facebook/sam3",
        gated=True,
    ),
}


def parse(model: str) -> HubModel | None:
    """Return the repository that `model` names; None where it has not the form of such a name."""
    match = _NAME.fullmatch(model)
    return HubModel(match["repo"], match["revision"]) if match else None


def local_folder(model: HubModel) -> Path | None:
    """Return the folder of a downloaded model in the hub's cache; None where it is not there.

    Nothing is downloaded. None, too, where the extra `hf` is not installed.
    """
    try:
        library = _library()
    except ModelError:
        return None
    try:
        found = library.snapshot_download(
            model.repo,
            revision=model.revision or _MAIN,
            local_files_only=True,
            allow_patterns=list(PATTERNS),
        )
    except library.errors.LocalEntryNotFoundError:
        return None
    return Path(found)


def revision_of(folder: Path) -> str | None:
    """Return the commit of a folder of the hub's cache; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def download(model: HubModel, progress: Progress | None = None) -> Path:
    """Return the folder of the model, downloading what is missing of it.

    A model without a named revision that has been downloaded stays at its commit. `progress` is
    called with the bytes done and the bytes in total. Raises ModelError.
    """
    if model.revision is None and (found := local_folder(model)):
        return found
    library = _library()
    known = MODELS.get(model.repo)
    if known and known.gated and not library.get_token():
        raise _gated(model, "there is no token")
    try:
        folder = library.snapshot_download(
            model.repo,
            revision=model.revision or _MAIN,
            allow_patterns=list(PATTERNS),
            tqdm_class=_bar_of(progress),
        )
    except Exception as error:  # of httpx, the hub and the system, without a common base
        raise _explained(error, model, library) from error
    return Path(folder)


def verify(folder: Path) -> bool | None:
    """Return whether the large files of a folder of the hub's cache have the hub's SHA-256.

    None where the hub has no hash of any of them.
    """
    hashes = []
    for path in sorted(folder.glob("*.safetensors")):
        # The cache names each blob by the hub's hash of it, which for large files is the SHA-256.
        expected = path.resolve().name
        if _SHA256.fullmatch(expected):
            hashes.append(sha256_of(path) == expected)
    return all(hashes) if hashes else None


def fingerprint(folder: Path) -> str:
    """Return a hash, in hex, that changes with the model in `folder`: the commit, if it has one.

    For another folder it is computed from all that `PATTERNS` names, a gigabyte in about a second.
    """
    if commit := revision_of(folder):
        return commit
    digest = hashlib.sha256()
    for path in sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
        digest.update(f"{path.name} {sha256_of(path)} ".encode())
    return digest.hexdigest()


def _library() -> Any:
    """Import and return `huggingface_hub`. Raises ModelError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise missing_library.missing_extra(error, "hf", "a model of the hub") from error
    return huggingface_hub


def _bar_of(progress: Progress | None) -> type[Any]:
    """Return a class for the library's progress bars that shows nothing and calls `progress`."""
    from tqdm import tqdm

    class Bar(tqdm):
        """A progress bar of the library. One counts files, others bytes, received or written."""

        most = 0  # bytes that any bar has counted: they are ahead of each other in turn

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # which the library gives to bars of its own class
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            """Count `n` more."""
            self.n += n or 0
            if progress and self._counts_bytes and self.total and self.n > Bar.most:
                Bar.most = int(self.n)
                progress(Bar.most, int(self.total))
            return None

    return Bar


def _gated(model: HubModel, reason: str) -> ModelError:
    """Return the error for a model that only those may download who have accepted its licence."""
    return ModelError(
        f"the model may be downloaded only by those who have accepted its licence, and {reason}",
        place=str(model),
        remedy=f"accept it at https://huggingface.co/{model.repo}, then set HF_TOKEN to a token of "
        "yours (https://huggingface.co/settings/tokens)",
    )


def _explained(error: Exception, model: HubModel, library: Any) -> ModelError:
    """Return the error to raise for an error of a download."""
    errors = library.errors
    place = str(model)
    if isinstance(error, errors.GatedRepoError):
        return _gated(model, "the hub has refused the token")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            "the hub has no such model, or it is private",
            place=place,
            remedy="check the name; for a private model set HF_TOKEN",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError("the model has no such revision", place=place)
    if isinstance(error, errors.OfflineModeIsEnabled) or library.constants.HF_HUB_OFFLINE:
        return ModelError(
            "downloads are switched off by HF_HUB_OFFLINE",
            place=place,
            remedy="unset it, or copy the hub's cache (HF_HOME) from another machine",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(
        f"the model cannot be downloaded: {reason}",
        place=place,
        remedy="check the network, the proxy (HTTPS_PROXY) and the disk; the next try continues",
    )
