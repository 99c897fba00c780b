"""The project's own SAE folder, read back whatever its bytes happen to be."""

import pytest
import torch
from safetensors.torch import save

import saehooks as sh
from saehooks.errors import FormatError
from saehooks.storage import read_safetensors


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    """A safetensors file opens with its header's length; a length of 0x80 or 'PK' is no pickle."""
    for wanted in (0x80, 0x100 + 0x80):
        for padding in range(wanted + 8):
            data = save({"a": torch.ones(2)}, metadata={"cfg": "{}", "p": "x" * padding})
            if data[0] == 0x80 and int.from_bytes(data[:8], "little") == wanted:
                break
        else:
            raise AssertionError(f"no header of {wanted} bytes was made")
        path = tmp_path / "sae_weights.safetensors"
        path.write_bytes(data)
        assert torch.equal(read_safetensors(path)[0]["a"], torch.ones(2))


def test_a_file_of_the_folder_is_told_from_a_missing_folder(tmp_path):
    """Who names cfg.json instead of its folder is told so."""
    sh.SAE(d_in=4, d_sae=8).save(tmp_path)
    with pytest.raises(FormatError, match="is a file; give the folder that holds it"):
        sh.load(tmp_path / "cfg.json")
