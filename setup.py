"""The wheel: `models` and `weights` are names that other projects use too, so it holds them inside `popengine`.

Their files are copied to popengine/models and popengine/weights, and imports are rewritten on the way (`from
models.llama` becomes `from popengine.models.llama`). The source has both at the top, and so has an editable
installation.
"""

import re
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

INSIDE = ("models", "weights")
# An import, or a module's name in a table of names.
IMPORT = re.compile(rf'^(\s*from |\s*"\w+": ")({"|".join(INSIDE)})(?=[. ])', re.MULTILINE)


class BuildInside(build_py):
    def build_module(self, *arguments: Any) -> Any:
        made = super().build_module(*arguments)
        path = Path(made[0])
        path.write_text(IMPORT.sub(r"\1popengine.\2", path.read_text(encoding="utf-8")), encoding="utf-8")
        return made


top = find_packages(include=["popengine*"])
inside = find_packages(include=[f"{name}*" for name in INSIDE])
if "editable_wheel" in sys.argv:
    setup(packages=top + inside)
else:
    setup(
        packages=top + [f"popengine.{name}" for name in inside],
        package_dir={f"popengine.{name}": name for name in INSIDE},
        package_data={"popengine": ["page/*", "py.typed", "demo_note.txt"], "popengine.weights": ["*-tiny/*"]},
        cmdclass={"build_py": BuildInside},
    )
