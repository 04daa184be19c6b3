"""Runs tests/multi_device in a process of its own, with eight devices forced on one CPU."""

import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

FOLDER = pathlib.Path(__file__).parent / "multi_device"


def test_multi_device_tests_pass_on_eight_devices(tmp_path, request):
    report = tmp_path / "report.xml"
    slow = ["--slow"] if request.config.getoption("--slow") else []
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", f"--junit-xml={report}"]
    # Not this process's settings: it may have asked for another number of devices, or for other tests.
    own = ("XLA_FLAGS", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    ended = subprocess.run(
        [*command, *slow], cwd=FOLDER.parent.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) > int(suite.get("skipped")), ended.stdout
