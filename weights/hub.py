"""Download a checkpoint from the Hugging Face Hub, or find it in the Hub client's cache.

The client (huggingface-hub) keeps what it fetched under HF_HOME, resumes a download that was interrupted, asks the
endpoint in HF_ENDPOINT and goes without the network when HF_HUB_OFFLINE is set. This file chooses what is fetched and
turns what can go wrong into one line each.
"""

import importlib
import re
import sys
from pathlib import Path

from weights import files
from weights.errors import InputError

# The same weights a second time in another layout (the client's * also matches a /), which would double the download.
UNNEEDED_FILES = ("*/*", "consolidated*")


def is_hub_id(text: str) -> bool:
    """Whether a string has the form of a repository's id, `organisation/name` or `name`."""
    part = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
    return re.fullmatch(f"({part}/)?{part}", text) is not None and not text.endswith((".gguf", ".safetensors", ".json"))


def download(repository: str) -> Path:
    """The directory of a repository's files, downloaded when they are not in the cache, with a bar on a terminal.

    InputError when there is no such repository, it is private or gated, or the network or the disk fails.
    """
    # Imported late: the client takes a while to import, and most checkpoints are on disk.
    names = ("huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils")
    hub, errors, utils = (importlib.import_module(name) for name in names)
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    neither = f"{repository!r}: no such path, and"
    try:
        # Weights in pickle are never used, so never fetched.
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
        # Which exceptions a transfer can end in depends on the client's version and on the HTTP library under it;
        # whatever it is, the files fetched whole stay in the cache and the next run fetches the others.
        message = f"the download of {repository} from the Hub was interrupted; run again to finish it"
        raise InputError(f"{message} ({first_line(error)})") from error
    return Path(path)


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
