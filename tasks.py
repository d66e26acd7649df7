"""What an episode is given: its task, the words of its prompts, and the search tool.

from tasks import Prompts, load_tasks, open_search
"""

import re
from pathlib import Path

import retriever
from common import InputError, parse_object, read_jsonl


class Prompts:
    """Every word that a model is shown, one text file each. `prompts.question` is prompts/question.txt."""

    default = Path(__file__).parent / "prompts"

    def __init__(self, folder=default):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder of prompts")

    def __getattr__(self, name):
        path = self.folder / f"{name}.txt"
        try:
            text = path.read_text(encoding="utf-8").removesuffix("\n")
        except FileNotFoundError:
            raise InputError(f"{path}: this prompt is missing") from None
        setattr(self, name, text)
        return text

    def fill(self, name, **values):
        """The prompt with {placeholders} replaced. One pass, so that braces in a value stay as they are."""
        return re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), getattr(self, name))


def load_tasks(paths, kind=None, limit=None):
    """Rows {"id", "task", "kind", "question", "answer", ...} from JSONL or {"examples": [...]} files.

    kind: "fact" or "math" for files that do not state it. limit: the first n of each file.
    Raises InputError, with file and row, for what is missing or there twice.
    """
    rows, seen = [], set()
    for path in paths:
        for where, row in list(_task_rows(path))[:limit]:
            row = {"task": Path(path).stem, **({"kind": kind} if kind else {}), **row}
            for field in ("id", "question", "answer"):
                if row.get(field) in (None, ""):
                    raise InputError(f"{where}: a task needs an {field!r}")
            if row.get("kind") not in ("fact", "math"):
                raise InputError(f'{where}: the kind must be stated: "kind": "fact" or "math", or --kind')
            row["id"] = str(row["id"])
            if (row["task"], row["id"]) in seen:
                raise InputError(f"{where}: task {row['task']} has id {row['id']!r} twice")
            seen.add((row["task"], row["id"]))
            rows.append(row)
    return rows


def _task_rows(path):
    if Path(path).suffix != ".json":
        return [(f"{path}:{number}", row) for number, row in read_jsonl(path)]
    try:
        examples = parse_object(Path(path).read_text(encoding="utf-8"), path).get("examples")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    if not isinstance(examples, list):
        raise InputError(f'{path}: {{"examples": [...]}} was expected')
    return [(f"{path}: example {number}", row) for number, row in enumerate(examples)]


def open_search(where, prompts, k=3):
    """The web_search tool: a function from query to text, over an index folder or a /retrieve URL.

    Threads may share it. Queries to a dense index that wait at the same moment are one batch: it is read once for all.
    """
    index = retriever.load(where)
    if isinstance(index, retriever.Index) and index.manifest["kind"] == "dense":
        index.top(["warm-up"], 1)  # its vectors take their room on a GPU before a student takes the rest
        index = retriever.Batcher(index)

    def web_search(query):
        texts = []
        for rank, hit in enumerate(index.search([str(query)], k=k)[0], 1):
            title, _, text = hit.contents.partition("\n")
            about = {"rank": rank, "place": rank - 1, "score": f"{hit.score:.2f}"}
            texts.append(prompts.fill("search_result", title=title.strip('"'), text=text, **about))
        return "\n\n".join(texts) or "No passages found."

    return web_search
