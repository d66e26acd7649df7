"""The authors' trajectories in parquet files, with pyarrow.

python -m pytest tests/test_paper_interop.py
"""

import pytest

from common import InputError
from paper import rehearse
from test_paper import collected_row, convert


@pytest.mark.parametrize("log_as_text", [False, True])
@pytest.mark.parametrize("method", ["cot", "agent"])
def test_parquet_files_give_the_same_as_json_lines(method, log_as_text, tmp_path):
    rows = [rehearse.published_row(collected_row(method), log_as_text) | {"score": None}] * 2
    rehearse.write_rows(rows, tmp_path / "data/train", parquet=True)
    assert (tmp_path / "data/train.parquet").exists()
    rehearse.write_rows(rows, tmp_path / "rows")
    assert convert(tmp_path / "data", tmp_path / "out") == convert(tmp_path / "rows.jsonl", tmp_path / "out")


def test_another_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="a.parquet: [^\n]*[Pp]arquet[^\n]*$"):
        convert(tmp_path / "a.parquet", tmp_path / "out")
