"""What needs no text pipeline works without TensorFlow, SeqIO and TFDS; what needs one that is missing says which."""

import sys

import pytest

from endistill_jax.core.errors import UserError

TEXT_PIPELINE = ("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "clu")

USE_A_MODEL = """
import json
import jax, jax.numpy as jnp, numpy as np
from endistill_jax.checkpoints.models import open_model
from endistill_jax.checkpoints.tokenizer import load_tokenizer
from endistill_jax.jobs import export, import_checkpoint, infer
from endistill_jax.models.generation.generation import Decoding, make_decoder

folder = sys.argv[1]

def generate(model, decoding):
    tokenizer = load_tokenizer(model.vocabulary_file.path, extra_ids=model.vocabulary_file.extra_ids)
    ids = [*tokenizer.encode("Return the <extra_id_0> of items in a list."), tokenizer.eos_id]
    decoded = make_decoder(model.config, decoding)(model.load(), jnp.asarray([ids]))
    return tokenizer.decode(np.asarray(decoded.tokens)[0]), float(decoded.scores[0])

teacher = open_model("bundled")
assert teacher.vocabulary == open_model("bundled").vocabulary is not None
export(model="bundled", folder=f"{folder}/hf")
export(model="bundled", folder=f"{folder}/t5x", format="t5x")
import_checkpoint(source=f"{folder}/hf", model_dir=f"{folder}/imported")
export(model=f"{folder}/imported", folder=f"{folder}/again")
for source in ("hf", "imported", "again", "t5x"):
    model = open_model(f"{folder}/{source}")
    assert model.fingerprint == teacher.fingerprint, source
    assert source == "t5x" or model.vocabulary == teacher.vocabulary, source  # T5X keeps no vocabulary
greedy, beam = Decoding(max_length=4), Decoding(max_length=4, strategy="beam", beams=2)
text, score = generate(open_model(f"{folder}/again"), greedy)
assert text and score < 0
assert generate(teacher, greedy) == (text, score)
assert generate(teacher, beam)[0]
open(f"{folder}/texts.txt", "w").write("Return the <extra_id_0> of items in a list.")
output = f"{folder}/out.jsonl"
assert infer(model="bundled", input_file=f"{folder}/texts.txt", output_file=output, decoding=greedy, batch_size=8) == 1
assert json.loads(open(output).read())["prediction"] == text
assert not HIDDEN & {name.split(".")[0] for name in sys.modules}
"""


def test_models_are_read_used_exported_and_imported_without_the_text_pipeline(tmp_path, without_modules):
    ended = without_modules(USE_A_MODEL, str(tmp_path), absent=TEXT_PIPELINE)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "again/spiece.model").is_file()


COMMAND = "from endistill_jax.main import main; sys.exit(main(sys.argv[1:]))"


def test_the_command_line_exports_without_the_text_pipeline(tmp_path, without_modules):
    words = ["--gin_file=gin/runs/export.gin", "--gin.MODEL=bundled", f"--gin.FOLDER={tmp_path}/hf"]
    ended = without_modules(COMMAND, *words, absent=TEXT_PIPELINE)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "hf/config.json").is_file()


def test_a_job_that_reads_text_names_the_missing_package_in_one_line(tmp_path, without_modules):
    words = ["--gin_file=gin/miniend_demo.gin", f"--gin.MODEL_DIR={tmp_path}/run"]
    ended = without_modules(COMMAND, *words, absent=TEXT_PIPELINE)
    assert ended.returncode == 2
    assert ended.stderr == (
        "endistill: error: reading a task's text needs tensorflow, which is not installed: pip install endistill-jax\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("program", "absent", "message"),
    [
        (
            "from endistill_jax.studies import report; report.check_packages()",
            "matplotlib",
            "drawing the plots of a study needs matplotlib, which is not installed: "
            "pip install 'endistill-jax[studies]'",
        ),
        (
            "from endistill_jax.evaluation import metrics; metrics.check_packages([metrics.accuracy, metrics.rouge])",
            "rouge_score",
            "the metric ROUGE needs rouge_score, which is not installed: pip install 'endistill-jax[metrics]'",
        ),
    ],
)
def test_what_an_extra_installs_is_asked_for_by_the_name_of_the_extra(without_modules, program, absent, message):
    ended = without_modules(program, absent=(absent,))
    assert ended.stderr.splitlines()[-1] == f"endistill_jax.core.errors.UserError: {message}"


def test_a_study_asks_for_its_plots_before_it_trains(monkeypatch):
    import endistill_jax.jobs  # noqa: F401  before studies, which import it and which it imports
    from endistill_jax.studies.arms import plan_study

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = dict.fromkeys(("seeds", "tasks"))
    with pytest.raises(UserError, match=r"endistill-jax\[studies\]"):
        plan_study("study", None, None, {}, **settings)


def test_a_task_asks_for_its_metrics_before_a_model_is_trained(monkeypatch):
    pytest.importorskip("seqio")
    from endistill_jax.evaluation.task_metrics import check_task_metrics
    from endistill_jax.train.experiment import Data

    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UserError, match=r"endistill-jax\[metrics\]"):
        check_task_metrics(Data(task="python_docs_stdlib_summary_v1", inputs_length=128, targets_length=32))
