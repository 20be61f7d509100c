"""Download a checkpoint from the Hugging Face Hub, or find it in the Hub client's cache.

The client (huggingface-hub) caches files under HF_HOME, resumes an interrupted download, uses the endpoint in
HF_ENDPOINT and no network if HF_HUB_OFFLINE is set. This module selects the files and turns each failure into a
one-line message.
"""

import importlib
import re
import sys
from pathlib import Path

from weights import files
from weights.errors import InputError

# A second copy of the weights in another layout (the client's * also matches a /), which would double the download.
UNNEEDED_FILES = ("*/*", "consolidated*")


def is_hub_id(text: str) -> bool:
    """Return True if a string has the form of a repository id, `organisation/name` or `name`."""
    part = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
    return re.fullmatch(f"({part}/)?{part}", text) is not None and not text.endswith((".gguf", ".safetensors", ".json"))


def download(repository: str) -> Path:
    """Return the directory of a repository's files, and download those not in the cache, with a bar on a terminal.

    Raises InputError if the repository does not exist, is private or gated, or if the network or the disk fails.
    """
    # Imported late: the client takes a while to import, and most checkpoints are on disk.
    names = ("huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils")
    hub, errors, utils = (importlib.import_module(name) for name in names)
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    neither = f"{repository!r}: no such path, and"
    try:
        # Pickled weights are never used and never fetched.
        path = hub.snapshot_download(
            repository, allow_patterns=list(files.READ), ignore_patterns=list(UNNEEDED_FILES)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{neither} the Hub repository of that name is gated: ask for access on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{neither} the Hub has no repository of that name that is open to you: check the spelling; if it is "
            "private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{neither} not the id of a Hub repository (organisation/name) either") from error
    except errors.LocalEntryNotFoundError as error:
        if hub.constants.HF_HUB_OFFLINE:
            why = "the Hub repository of that name is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
        else:
            why = f"the Hub cannot be asked for a repository of that name ({first_line(error.__cause__ or error)})"
        raise InputError(f"{neither} {why}") from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(
                f"{neither} the Hub refuses access to the repository of that name ({error.response.status_code}): log "
                "in with `hf auth login` or correct HF_TOKEN"
            ) from error
        raise InputError(f"the Hub could not serve {repository}; try again later ({first_line(error)})") from error
    except Exception as error:
        # The exceptions of a transfer depend on the versions of the client and its HTTP library. Complete files stay
        # in the cache, and the next run fetches the others.
        message = f"the download of {repository} from the Hub was interrupted; run again to finish it"
        raise InputError(f"{message} ({first_line(error)})") from error
    return Path(path)


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
