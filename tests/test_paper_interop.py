"""The authors' trajectories in parquet files, with pyarrow.

python -m pytest tests/test_paper_interop.py
"""

import json

import pytest

from agent_distill import Prompts
from common import InputError
from paper import data, rehearse

CHAT = [
    ("system", "The teacher's prompt"),
    ("user", "New task:\nWhat is 2 + 3?"),
    ("assistant", "Thought: Add.\nCode:\n```py\nfinal_answer(2 + 3)\n```<end_code>"),
]
MESSAGES = [{"role": role, "content": text} for role, text in CHAT]


@pytest.mark.parametrize("log_as_text", [False, True])
@pytest.mark.parametrize("method", ["cot", "agent"])
def test_parquet_files_give_the_same_as_json_lines(method, log_as_text, tmp_path):
    row = {"method": method, "question": "What is 2 + 3?", "messages": MESSAGES}
    published = rehearse.published_row(row, log_as_text) | {"score": None}
    rehearse.write_rows([published] * 2, tmp_path / "data/train", parquet=True)
    assert (tmp_path / "data/train.parquet").exists()
    rehearse.write_rows([published] * 2, tmp_path / "rows")
    made = []
    for source in ("data", "rows.jsonl"):
        data.make_training_file(data.TrajectoriesConfig(source=str(tmp_path / source), out=str(tmp_path / "out")))
        made.append((tmp_path / "out").read_text())
    assert made[0] == made[1]
    (first, _) = map(json.loads, made[0].splitlines())
    system = Prompts().cot_system if method == "cot" else Prompts().system("agent_student_system", ["web_search"])
    assert first["messages"] == [{"role": "system", "content": system}, *MESSAGES[1:]]


def test_another_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="a.parquet: .*[Pp]arquet") as caught:
        data.make_training_file(data.TrajectoriesConfig(source=str(tmp_path / "a.parquet"), out=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)
