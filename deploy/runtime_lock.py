"""Print a lock without the development tools that pyproject.toml names: `runtime_lock.py pyproject.toml cpu.lock`.

The locks pin the development environment. A tool's own dependencies stay, since something else may need them; the
tools themselves are what an image should not carry. Build tools that install joinwise itself stay too.
"""

import re
import sys
import tomllib
from pathlib import Path

#: Installing joinwise without build isolation needs these.
BUILDS_JOINWISE = {"setuptools", "wheel", "packaging"}


def name_of(requirement: str) -> str:
    """The normal form of a requirement's name; empty for a comment or a blank line."""
    found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def runtime(project: str, lock: str) -> str:
    """The lock without development tools that nothing else asks for.

    Raises:
        KeyError: the project has no extra called `dev`.
    """
    extras = tomllib.loads(project)["project"]["optional-dependencies"]
    needed = tomllib.loads(project)["project"]["dependencies"] + extras["engine"]
    tools = {name_of(each) for each in extras["dev"]} - {name_of(each) for each in needed} - BUILDS_JOINWISE
    # vLLM itself uses its clients' types.
    tools -= {"openai", "anthropic", "jsonschema"}
    entries = re.findall(r"(?:.*\\\n)*.*\n", lock)  # a package with its hashes is one entry of several lines
    return "".join(entry for entry in entries if name_of(entry) not in tools)


if __name__ == "__main__":
    sys.stdout.write(runtime(Path(sys.argv[1]).read_text("utf-8"), Path(sys.argv[2]).read_text("utf-8")))
