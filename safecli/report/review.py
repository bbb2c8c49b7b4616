"""A page on this machine alone, where a person labels answers by keyboard; every label is kept as it is made."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from markupsafe import Markup

from safecli.config import Kind
from safecli.judges import outcomes_of
from safecli.records import Row, append_values, read_jsonl
from safecli.report.page import csp_hash
from safecli.report.untrusted import visible

_HERE = Path(__file__).parent
MOST_BYTES = 4096


class ReviewServer(ThreadingHTTPServer):
    """Serves rows to be labelled on 127.0.0.1, at an address that holds a random token, and appends to `labels`.

    A request must carry the token, this very host, and, where it writes, this very origin, so that no other page
    in the same browser can read an answer or make a label.
    """

    daemon_threads = True

    def __init__(self, rows: Sequence[tuple[Row, Kind]], labels: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.rows, self.labels = rows, labels
        self.token = secrets.token_urlsafe(24)
        self.made: dict[int, str] = {}
        if labels.exists():
            self.made = {row["row"]: row["label"] for _, row in read_jsonl(labels)}
        self.page, self.policy = _page()

    @property
    def host(self) -> str:
        """The only value of the Host header that is answered."""
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.host}/{self.token}/"

    def shown(self) -> list[dict[str, Any]]:
        """The rows as the page gets them: no judge's opinion among them."""
        return [
            {
                "row": number,
                "kind": kind,
                "prompt": visible(row.prompt),
                "answer": visible(row.answer),
                "labels": outcomes_of(kind),
                "label": self.made.get(number),
            }
            for number, (row, kind) in enumerate(self.rows)
        ]

    def label(self, number: int, label: str) -> None:
        """Keep a label, fsynced; `ValueError` for one that the row can't have."""
        if not 0 <= number < len(self.rows) or label not in outcomes_of(self.rows[number][1]):
            raise ValueError(f"row {number} can't be '{label}'")
        row, kind = self.rows[number]
        kept = {"row": number, "kind": kind, "prompt": row.prompt, "answer": row.answer, "label": label}
        append_values(self.labels, [kept])
        self.made[number] = label


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer

    def do_GET(self) -> None:
        path = self._path()
        if path == "":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page.encode())
        elif path == "rows":
            self._send(HTTPStatus.OK, "application/json", json.dumps(self.server.shown()).encode())
        else:
            self._send(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        same_origin = self.headers.get("Origin") == f"http://{self.server.host}"
        is_json = self.headers.get("Content-Type") == "application/json"
        if self._path() != "label" or not same_origin or not is_json or not 0 < length <= MOST_BYTES:
            self._send(HTTPStatus.FORBIDDEN)
            return
        try:
            found = json.loads(self.rfile.read(length))
            self.server.label(int(found["row"]), str(found["label"]))
        except (ValueError, KeyError, TypeError):
            self._send(HTTPStatus.BAD_REQUEST)
            return
        self._send(HTTPStatus.NO_CONTENT)

    def _path(self) -> str | None:
        """What follows the token in the address; None for a request that is not the page's own."""
        prefix = f"/{self.server.token}/"
        asked = secrets.compare_digest(self.path[: len(prefix)].encode(), prefix.encode())
        return self.path[len(prefix) :] if asked and self.headers.get("Host") == self.server.host else None

    def _send(self, status: HTTPStatus, kind: str = "text/plain", body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: the address holds the token."""


def _page() -> tuple[str, str]:
    from jinja2 import Environment, FileSystemLoader

    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "review.js"))
    template = Environment(loader=FileSystemLoader(_HERE), autoescape=True).get_template("review.html")
    page = template.render(style=Markup(style), script=Markup(script))
    inner = page.partition("<style>")[2].partition("</style>")[0]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "connect-src 'self'; img-src data:; "
        f"style-src '{csp_hash(inner)}'; script-src '{csp_hash(script)}'"
    )
    return page, policy
