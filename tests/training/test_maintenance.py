"""What a metadata server says, asked of one on this machine."""

import http.server
import signal
import threading

import pytest

from vishwam_t5x.training import maintenance


@pytest.fixture
def server():
    """(URL, {path: answer}) of a fake metadata server."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            body = answers[self.path.rpartition("/")[2]].encode()
            if body == b"garbage":
                self.wfile.write(b"no HTTP\r\n\r\n")
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://localhost:{serving.server_port}", answers
        serving.shutdown()
        thread.join()


def test_notices(server):
    url, answers = server
    assert maintenance.notice(url) is None
    answers["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert maintenance.notice(url) is None, "a machine that is moved goes on"
    answers["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    assert "TERMINATE" in maintenance.notice(url)
    answers["preempted"] = "TRUE"
    assert maintenance.notice(url) == "preempted: TRUE"
    assert maintenance.notice("http://localhost:1") is None
    answers["preempted"] = "garbage"
    assert "TERMINATE" in maintenance.notice(url), "an answer that is none ends no thread"


def test_a_notice_is_a_sigterm(server):
    url, answers = server
    got, ended = threading.Event(), threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: got.set())
    try:
        asking = threading.Thread(target=maintenance.watch, args=(url, ended, 0.01))
        asking.start()
        answers["preempted"] = "TRUE"
        assert got.wait(20)
        asking.join(20)
        assert not asking.is_alive(), "it is said once"
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, previous)
