"""Where alerts go besides the metrics file."""

import json
import os
import threading
import urllib.error
import urllib.request

from b2t.log import log_once, logger
from b2t.monitor.alerts import Alert

WEBHOOK_VARIABLE = "B2T_ALERT_WEBHOOK"
"""Environment variable with the address of a Slack-compatible webhook."""


class ConsoleSink:
    """The log, at the level of the alert's severity."""

    def send(self, alert: Alert, run: str) -> None:
        """Log one line."""
        log = logger(__name__)
        say = {"critical": log.error, "warning": log.warning}.get(alert.severity, log.info)
        say("%s at step %s: %s", alert.severity, f"{alert.step:,}", alert.text())


class WebhookSink:
    """Posts warnings and criticals as Slack-compatible JSON, without holding up training.

    The address is a secret: it is read from the environment and never logged. Failures are logged
    once, by kind.

    Args:
        address: where to post; None reads `B2T_ALERT_WEBHOOK`, and without it nothing is sent.
        timeout_s: seconds until a post is given up.
    """

    def __init__(self, address: str | None = None, timeout_s: float = 5.0) -> None:
        self._address = address or os.environ.get(WEBHOOK_VARIABLE)
        self._timeout_s = timeout_s
        self._threads: list[threading.Thread] = []

    def __repr__(self) -> str:
        return f"WebhookSink({'set' if self._address else 'unset'})"

    def send(self, alert: Alert, run: str) -> None:
        """Post in the background."""
        if self._address is None or alert.severity == "info":
            return
        mark = ":rotating_light:" if alert.severity == "critical" else ":warning:"
        text = f"{mark} *{run}* step {alert.step:,}: {alert.text()}"
        body = json.dumps({"text": text}).encode()
        thread = threading.Thread(target=self._post, args=(body,), daemon=True)
        thread.start()
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]

    def close(self) -> None:
        """Wait for posts under way, at most as long as one may take."""
        for thread in self._threads:
            thread.join(self._timeout_s)

    def _post(self, body: bytes) -> None:
        try:
            request = urllib.request.Request(
                self._address or "", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=self._timeout_s):
                pass
        except urllib.error.HTTPError as error:
            self._failed(f"status {error.code}")
        except Exception as error:  # whatever goes wrong here must not reach training
            self._failed(type(error).__name__)

    @staticmethod
    def _failed(kind: str) -> None:
        log_once(
            f"webhook-{kind}",
            f"an alert could not be posted to ${WEBHOOK_VARIABLE} ({kind}); training goes on",
        )
