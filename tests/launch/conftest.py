"""Fake commands of clouds and schedulers: they record how they are called and answer, or fail, as told."""

import os
import pathlib
import shlex
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"

# Records its words, then gives the first answer that is left for this kind of call; the last one stays. An answer is a
# line "exit code, tab, text"; the text of a failure goes to standard error.
FAKE_COMMAND = r"""#!/usr/bin/env bash
{ printf '%s' "$(basename "$0")"; printf ' %s' "${@@Q}"; echo; } >>"$FAKES/calls"
kind="$(basename "$0")"
for word in "$@"; do
    case "$kind:$word" in
        gcloud:create | gcloud:describe | gcloud:delete | gcloud:list | gcloud:ssh | gcloud:scp) kind="$word" ;;
        describe:*failedData*) kind=reason ;;
        describe:*nodeSpec*) kind=names ;;
        ssh:--command=mkdir*) kind=connect ;;
        ssh:--command=*) words=($word); kind="${words[2]}" ;;
    esac
done
if [[ $kind == kubectl ]]; then cat >"$FAKES/manifest"; fi
answers="$FAKES/$kind"
if [[ ! -e $answers ]]; then printf '0\t\n' >"$answers"; fi
IFS=$'\t' read -r code text <"$answers"
if (($(wc -l <"$answers") > 1)); then sed -i 1d "$answers"; fi
if ((code)); then printf '%b\n' "$text" >&2; elif [[ $text ]]; then printf '%b\n' "$text"; fi
# Each of two workers, or of as many as are reached, says what it was told to say when it is done.
if ((code == 0)) && [[ $word == *'&& echo '* ]]; then
    for ((reached = $(cat "$FAKES/reached_$kind" 2>/dev/null || echo 2); reached > 0; reached--)); do
        echo "${word##*&& echo }"
    done
fi
exit "$code"
"""


class Fakes:
    """A folder of fake commands on PATH."""

    launch = LAUNCH

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.commands = folder / "bin"
        self.commands.mkdir()
        for name in ("gcloud", "xpk", "kubectl", "sbatch", "srun", "scancel", "scontrol", "nvidia-smi"):
            self.write(name, FAKE_COMMAND)
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}  # the scripts' own setting
        self.environment = {
            **inherited,
            "PATH": f"{self.commands}{os.pathsep}{os.environ['PATH']}",
            "FAKES": str(folder),
            "TMPDIR": str(folder),
            "HOME": str(folder),
            "CLOUDSDK_CORE_PROJECT": "project",
            "CLOUDSDK_COMPUTE_ZONE": "zone",
        }

    def write(self, name: str, text: str) -> pathlib.Path:
        """An executable on PATH."""
        file = self.commands / name
        file.write_text(text)
        file.chmod(0o755)
        return file

    def answer(self, kind: str, *answers: str | tuple[int, str]) -> None:
        """What calls of a kind are answered, in order; a string is a success, (exit code, message) a failure."""
        pairs = [(0, answer) if isinstance(answer, str) else answer for answer in answers]
        (self.folder / kind).write_text("".join(f"{code}\t{text}\n" for code, text in pairs))

    def reach(self, kind: str, workers: int) -> None:
        """How many workers calls of a kind get to, where they succeed."""
        (self.folder / f"reached_{kind}").write_text(str(workers))

    def clock(self, step: int) -> None:
        """A clock that goes on by so many seconds each time it is looked at."""
        self.write(
            "date", f'#!/usr/bin/env bash\necho {step} >>"$FAKES/clock"\necho $(({step} * $(wc -l <"$FAKES/clock")))\n'
        )

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [LAUNCH / script, *words],
            env={**self.environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def calls(self) -> list[list[str]]:
        record = self.folder / "calls"
        return [shlex.split(line) for line in record.read_text().splitlines()] if record.exists() else []


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)
