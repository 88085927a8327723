"""A person who labels: answers the questions of the page, and keeps which answers it took."""

import json
from http.client import HTTPException
from urllib.request import Request, urlopen

ANSWERS = 30


def answer_questions(url, taken):
    """Choose the older of the two pictures until all is answered or the page is gone; the numbers of the answers that
    the page took are the lines of the file `taken`."""
    try:
        with taken.open("a") as file:
            state = _read_json(f"{url}/question?person=anna")
            while state["answered"] < ANSWERS:
                asked = state["question"]
                answer = "first" if asked["first"] < asked["second"] else "second"
                state = _read_json(f"{url}/answer", {"person": "anna", "number": asked["number"], "answer": answer})
                file.write(f"{asked['number']}\n")
                file.flush()
    except (OSError, HTTPException):
        pass  # the page is gone


def _read_json(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=60) as response:
        return json.load(response)


def lines_of(path):
    return path.read_text().splitlines(keepends=True) if path.exists() else []
