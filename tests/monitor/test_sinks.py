import http.server
import json
import logging
import threading

import pytest

from b2t.monitor.alerts import Alert
from b2t.monitor.sinks import WEBHOOK_VARIABLE, ConsoleSink, WebhookSink


@pytest.fixture
def server():
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # the name that http.server calls
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if "fail" in self.path else 200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", received
        running.shutdown()


ALERT = Alert("warning", "codes die", remedy="decay 0.9", cause="churn", step=1200)


def test_the_webhook_gets_slack_json_from_the_environment(server, monkeypatch):
    address, received = server
    monkeypatch.setenv(WEBHOOK_VARIABLE, address + "/secret-token")
    sink = WebhookSink()
    sink.send(ALERT, "runs/demo")
    sink.send(Alert("info", "warm"), "runs/demo")
    sink.close()
    (body,) = received
    assert set(body) == {"text"}
    for part in ("runs/demo", "1,200", "codes die", "decay 0.9", "churn"):
        assert part in body["text"]
    assert "secret" not in repr(sink)


@pytest.mark.parametrize("path", ["/fail-secret-token", None])
def test_a_failing_webhook_neither_raises_nor_shows_its_address(server, caplog, path):
    address = server[0] + path if path else "http://127.0.0.1:9/secret-token"
    sink = WebhookSink(address, timeout_s=2)
    with caplog.at_level(logging.WARNING, "b2t"):
        sink.send(ALERT, "run")
        sink.close()
    assert "could not be posted" in caplog.text
    assert "secret" not in caplog.text and "127.0.0.1" not in caplog.text


def test_without_an_address_nothing_is_sent(monkeypatch):
    monkeypatch.delenv(WEBHOOK_VARIABLE, raising=False)
    sink = WebhookSink()
    sink.send(ALERT, "run")
    assert not sink._threads


def test_the_console_logs_at_the_severity(caplog):
    with caplog.at_level(logging.INFO, "b2t"):
        for severity in ("info", "warning", "critical"):
            ConsoleSink().send(Alert(severity, severity, step=3), "run")
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING", "ERROR"]
