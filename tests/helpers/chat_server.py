"""A chat-completions server on a real socket, which answers as a test tells it to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Answers `reply(number of the request, its JSON)` -> (status, headers, body); None closes the connection."""

    def __init__(self, port=0):
        self.reply = lambda number, body: self.completion("a cat")
        self.models = ["first", "second"]
        self.requests, self.listings = [], 0
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def completion(text):
        """The reply with a chat completion."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _handler(outer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.listings += 1
                listed = json.dumps({"object": "list", "data": [{"id": name} for name in outer.models]})
                self._send(200 if self.path == "/v1/models" else 404, {}, listed.encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                try:
                    answer = outer.reply(number, body)
                finally:
                    with outer._lock:
                        outer.in_flight -= 1
                if answer is None:
                    self.connection.close()
                else:
                    self._send(*answer)

            def _send(self, status, headers, body):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def handle(self):
                try:
                    super().handle()
                except (OSError, ValueError):
                    pass  # the client has gone, or the test has closed the connection

            def log_message(self, *args):
                pass

        return Handler
