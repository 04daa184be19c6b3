"""Lists in settings are lists, whatever else a command line makes of them."""

import pytest

from endistill_jax.core.errors import UserError, whole_numbers
from endistill_jax.jobs import Data, Finetuning, Run
from endistill_jax.train.optimizer import OptimizerConfig


@pytest.mark.parametrize("given", [(), (0,), [0, 5]])
def test_lists_and_tuples_of_whole_numbers_are_taken(given):
    assert whole_numbers(given, "x") == tuple(given)


@pytest.mark.parametrize("given", [3, "0,1", None, (0, "1"), (0.0,), (-1,), (True,), {0, 1}])
def test_anything_else_is_refused_in_one_line_that_shows_the_right_writing(given):
    with pytest.raises(
        UserError, match=r"^job\.seeds is .*; give a tuple of whole numbers, such as '\(0, 1\)'"
    ) as error:
        whole_numbers(given, "job.seeds")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seeds", [3, "0,1"])
def test_a_fine_tuning_does_not_take_a_text_for_seeds(seeds):
    with pytest.raises(UserError, match=r"^Finetuning\.seeds is"):
        Finetuning(data=Data(task="any"), optimizer=OptimizerConfig(), run=Run(steps=1), seeds=seeds)
