"""The flags of the pruning settings, which derive from the fields of PruningSettings, and --paper."""

import argparse
from collections.abc import Iterable
from dataclasses import Field, fields, replace
from typing import Any

from models.pruning.settings import PAPER, POPSettings
from popengine.studies.settings import GROUPS, PruningSettings

# Shorter names of flags.
ALSO = {"prune_ratio": ("--ratio",), "temperature": ("--temp",)}


def add_setting_flags(flags: argparse.ArgumentParser, chosen: Iterable[Field[Any]] | None = None) -> None:
    """Add a flag for every pruning setting, grouped by study, and --paper.

    chosen  only these settings, each with several values to compare
    """
    compared = None if chosen is None else {one.name for one in chosen}
    for title, settings in GROUPS.items():
        group = flags.add_argument_group(title)
        for one in fields(settings):
            if compared is None:
                add_setting_flag(group, one, default=argparse.SUPPRESS)
            elif one.name in compared:
                default = None if one.default is None else Unsaid([one.default])
                add_setting_flag(group, one, nargs="+", default=default)
        if settings is POPSettings:
            add_paper_flag(group)


def add_setting_flag(group: argparse._ActionsContainer, one: Field[Any], **values: Any) -> None:
    """Add the flag of one setting. values: its default, and how many values it takes"""
    about = one.metadata
    group.add_argument(
        "--" + one.name.replace("_", "-"), *ALSO.get(one.name, ()), type=about["type"], metavar=about["metavar"],
        help=about["help"], **values,
    )


def add_paper_flag(flags: argparse._ActionsContainer) -> None:
    """Add --paper."""
    flags.add_argument(
        "--paper", action="store_true",
        help="the paper's values for settings that are not given: width 0.1, no minimum of evidence",
    )


def pruning_settings(flags: argparse.Namespace, otherwise: PruningSettings | None = None) -> PruningSettings:
    """Return the settings of the flags of `add_setting_flags`, on top of `otherwise` or of the paper's (--paper).

    otherwise  None: the recommended settings
    """
    given = {one.name: getattr(flags, one.name) for one in fields(PruningSettings) if hasattr(flags, one.name)}
    return PruningSettings.paper(**given) if flags.paper else replace(otherwise or PruningSettings(), **given)


class Unsaid(list[Any]):
    """The default values of a flag that was not given."""


def take_paper_values(flags: argparse.Namespace) -> None:
    """With --paper, replace the values of flags that were not given by the paper's."""
    for name, value in PAPER.items():
        if flags.paper and isinstance(getattr(flags, name), Unsaid):
            setattr(flags, name, Unsaid([value]))
