"""Files are what the library that defines the format reads and writes, without its need for memory."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from endistill_jax.checkpoints.huggingface.weights import open_safetensors
from endistill_jax.checkpoints.huggingface.writing import Written, write_files

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def whole(array, pieces=3):
    return Written(array.shape, lambda: np.array_split(array, pieces))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("max_file_bytes", [1 << 20, 300])
def test_library_reads_what_is_written(tmp_path, dtype, max_file_bytes):
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape) for name, shape in (("a", (5, 7)), ("é", (40, 3)), ("c", (9,)))}
    write_files(tmp_path, {name: whole(value) for name, value in tensors.items()}, np.dtype(dtype), max_file_bytes)
    read = {}
    for path in tmp_path.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
        read |= load_file(path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_file_bytes == 300)
    for name, value in tensors.items():
        assert read[name].dtype == dtype
        np.testing.assert_array_equal(read[name], value.astype(dtype))


@pytest.mark.parametrize("name", DTYPES)
def test_rows_are_what_the_library_wrote(tmp_path, name):
    dtype = DTYPES[name]
    tensors = {"matrix": np.arange(35).reshape(5, 7).astype(dtype), "vector": np.arange(4).astype(dtype)}
    save_file(tensors, tmp_path / "file")
    found = {tensor.name: tensor for tensor in open_safetensors(tmp_path / "file")}
    assert set(found) == set(tensors)
    for key, tensor in found.items():
        assert (tensor.stored_as, tensor.dtype, tensor.shape) == (name, np.dtype(dtype), tensors[key].shape)
        for start, stop in ((0, len(tensors[key])), (1, 3), (2, 2)):
            np.testing.assert_array_equal(tensor.rows(start, stop), tensors[key][start:stop])


def test_writing_holds_one_block_at_a_time_and_reading_what_is_asked_for(tmp_path):
    block = np.ones((1 << 10, 1 << 8), np.float32)  # 1 MiB

    def blocks():
        for _ in range(16):
            yield block

    tracemalloc.start()
    try:
        write_files(tmp_path, {"a": Written((1 << 14, 1 << 8), blocks)}, np.dtype(np.float32), 1 << 40)
        (tensor,) = open_safetensors(tmp_path / "model.safetensors")
        tensor.rows(0, 1 << 10)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
        tensor.rows(0, 1 << 14)
        assert tracemalloc.get_traced_memory()[1] < 18 << 20
    finally:
        tracemalloc.stop()
