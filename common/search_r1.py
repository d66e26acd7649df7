"""Search-R1's /retrieve protocol (search_r1/search/retrieval_server.py), for the server and for the client.

POST /retrieve {"queries": [...], "topk": 3, "return_scores": true} is answered with {"result": [[{"document": {"id",
"contents"}, "score"}, ...], ...]}, without scores with {"result": [[{"id", "contents"}, ...], ...]}.
Imported by retriever.py.
"""

from collections import namedtuple

import requests

from common import InputError, http_session

Hit = namedtuple("Hit", "id score contents")


def answer_request(index, method, path, body):
    """Answer POST /retrieve and GET /health from an open index. Returns (HTTP status, JSON value)."""
    if (method, path) == ("GET", "/health"):
        return 200, {"passages": len(index), "kind": index.manifest["kind"]}
    if (method, path.rstrip("/")) != ("POST", "/retrieve"):
        return 404, {"error": "POST /retrieve, or GET /health"}
    found = index.search(body.get("queries"), 3 if body.get("topk") is None else body["topk"])
    hits = [[{"document": {"id": id, "contents": text}, "score": score} for id, score, text in one] for one in found]
    return 200, {"result": hits if body.get("return_scores") else [[hit["document"] for hit in one] for one in hits]}


class RemoteIndex:
    """An index behind `retriever.py serve`, or any other server with Search-R1's /retrieve. Threads may share it."""

    def __init__(self, url, retries=3):  # about 3 seconds: within the time-out of one code action
        self.url = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        self.session = http_session(retries)

    def search(self, queries, k=3):
        body = {"queries": queries, "topk": k, "return_scores": True}
        try:
            response = self.session.post(self.url, json=body, timeout=(10, 300))
            answer = response.json()
            if response.status_code != 200:
                raise ValueError(f"status {response.status_code}: {answer.get('error')}")
            return [
                [Hit(str(hit["document"]["id"]), hit["score"], hit["document"]["contents"]) for hit in hits]
                for hits in answer["result"]
            ]
        except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.url}: no answer in the format of Search-R1's /retrieve: {error}") from None
