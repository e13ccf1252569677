#!/usr/bin/env bash
# openai client: a gateway's HTML page with status 200 is three different things on three routes of the Batch API.
#
# Versions: openai 3.52.0, Python 3.11.
# Behaviour: no route raises one of the client's own errors. `files.create` and `batches.retrieve` return the page as a plain str in
#   place of their object, so the failure shows where an attribute is read later; `batches.list` raises AttributeError from inside
#   the client's page parser; `files.content` returns the page as the file. The same page labelled application/json raises
#   json.JSONDecodeError. Whoever polls a batch through a proxy has to check the type of every answer.
# Output seen:
#   files.create: returned str
#   batches.retrieve: returned str
#   batches.list: AttributeError
#   files.content: returned HttpxBinaryResponseContent, text is the page: True
#   batches.retrieve, labelled application/json: JSONDecodeError
# Fails (exit 1) when any of these changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q openai==3.52.0
cat > "$work/check.py" <<'PY'
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from openai import OpenAI

PAGE = b"<html><body>Down for maintenance</body></html>"


class Gateway(BaseHTTPRequestHandler):
    kind = "text/html"

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    do_POST = do_GET

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = OpenAI(api_key="none", base_url=f"http://127.0.0.1:{server.server_port}/v1", max_retries=0)


def outcome(call):
    try:
        answer = call()
    except Exception as error:
        return type(error).__name__
    shown = f"returned {type(answer).__name__}"
    return shown + (f", text is the page: {answer.text == PAGE.decode()}" if hasattr(answer, "text") else "")


found = {
    "files.create": outcome(lambda: client.files.create(file=("a.jsonl", b"{}"), purpose="batch")),
    "batches.retrieve": outcome(lambda: client.batches.retrieve("batch_1")),
    "batches.list": outcome(lambda: client.batches.list(limit=100)),
    "files.content": outcome(lambda: client.files.content("file_1")),
}
Gateway.kind = "application/json"
found["batches.retrieve, labelled application/json"] = outcome(lambda: client.batches.retrieve("batch_1"))
for name, what in found.items():
    print(f"{name}: {what}")
assert list(found.values()) == [
    "returned str",
    "returned str",
    "AttributeError",
    "returned HttpxBinaryResponseContent, text is the page: True",
    "JSONDecodeError",
], "the client behaves differently now"
PY
"$work/venv/bin/python" "$work/check.py"
